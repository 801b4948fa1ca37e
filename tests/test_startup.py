"""What plain imports and light commands load: no torch, which takes a second, and no diffusers."""

import json
import subprocess
import sys

import pytest

import diffattn

HEAVY = ("torch", "torch._dynamo", "diffusers", "transformers", "triton", "numpy", "cv2")


def loaded_by(code: str) -> list[str]:
    """The heavy modules that a process has loaded once it has run `code`."""
    end = f"; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import json, sys; {code}{end}"],
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_importing_diffattn_loads_nothing_heavy() -> None:
    assert loaded_by("import diffattn; dir(diffattn)") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        ["--version"],
        ["methods"],
        ["methods", "--json"],
        ["models"],
        ["models", "--json"],
        ["generate", "--help"],
        ["lora", "train", "-h"],
        ["bench", "-h"],
        ["bench", "--compare", "no.json", "--grid", "2x2x2"],
        ["doctor", "-h"],
        ["generate", "--no-such-option"],
    ],
    ids=" ".join,
)
def test_light_commands_load_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(f"from diffattn.pipelines import cli; cli.run({arguments!r})") == []


def test_methods_load_no_compiler_beyond_what_they_need() -> None:
    assert "diffusers" not in loaded_by("from diffattn import GNAAttn; GNAAttn()")


@pytest.mark.parametrize(
    "code",
    [
        "from diffattn import RadialAttn; RadialAttn()",
        "from diffattn import CLEARAttn, LinFusionAttn, AgentAttn; AgentAttn()",
        "from diffattn import attention; import torch; attention(*torch.ones(3, 1, 4, 1, 8))",
        "import diffattn; diffattn.plan(diffattn.TokenGrid(2, 4, 4), diffattn.GNAAttn(window=3))",
        "import diffattn.masks, diffattn.draw, diffattn.schedule, diffattn.block_forms",
    ],
)
def test_no_public_name_but_those_of_models_loads_dynamo(code: str) -> None:
    """Dynamo takes as long to import as torch; diffusers imports Dynamo itself."""
    assert not {"torch._dynamo", "diffusers"} & {*loaded_by(code)}


def test_every_public_name_is_listed_and_nothing_else() -> None:
    names = [name for name in dir(diffattn) if not name.startswith("_")]
    assert {name for name in diffattn.__all__ if not name.startswith("_")} <= {*names}
    assert {"set_attn_processor", "calibrate_agent", "load_clear_checkpoint", "draw"} <= {*names}
    assert not {"Any", "importlib", "TYPE_CHECKING", "annotations"} & {*names}
    assert all(getattr(diffattn, name) is not None for name in names)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'diffattn' has no attribute 'RadailAttn'"):
        _ = diffattn.RadailAttn
