"""`pipe.set_attn_processor` is there after `import diffattn`, in whatever order things come."""

import subprocess
import sys

import pytest

HAS_IT = "assert diffusers.DiffusionPipeline.set_attn_processor.__module__.startswith('diffattn')"


MODULAR_HAS_IT = HAS_IT.replace("DiffusionPipeline", "ModularPipeline")


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        f"import diffattn, diffusers; {HAS_IT}",
        f"import diffusers; diffusers.DiffusionPipeline; import diffattn; {HAS_IT}",
        f"import diffattn; from diffusers import WanPipeline; import diffusers; {HAS_IT}",
        f"import diffattn; diffattn.set_attn_processor; import diffusers; {HAS_IT}",
    ],
    ids=["before", "after", "a pipeline first", "attach first"],
)
def test_pipelines_have_the_method(code: str) -> None:
    run(code)


@pytest.mark.parametrize(
    "code",
    [
        f"import diffattn, diffusers; {MODULAR_HAS_IT}; {HAS_IT}",
        f"import diffusers; diffusers.ModularPipeline; import diffattn; {MODULAR_HAS_IT}",
        f"import diffusers; diffusers.DiffusionPipeline; import diffattn; {MODULAR_HAS_IT}",
        f"import diffattn; from diffusers import WanModularPipeline as P; import diffusers;"
        f"{MODULAR_HAS_IT}; assert P.set_attn_processor",
    ],
    ids=["before", "after", "between", "a pipeline first"],
)
def test_modular_pipelines_have_the_method(code: str) -> None:
    run(code)


def test_the_import_hook_goes_when_both_classes_have_the_method() -> None:
    run(
        "import sys, diffattn\n"
        "hooks = lambda: [f for f in sys.meta_path if type(f).__module__.startswith('diffattn')]\n"
        "assert len(hooks()) == 1\n"
        "import diffusers; diffusers.ModularPipeline; diffusers.DiffusionPipeline\n"
        "assert not hooks()\n"
    )


def test_importing_diffattn_does_not_import_diffusers() -> None:
    run("import diffattn, sys; assert 'diffusers' not in sys.modules")


def test_a_method_of_diffusers_own_is_left_alone() -> None:
    run(
        "import diffusers\n"
        "diffusers.DiffusionPipeline.set_attn_processor = theirs = lambda self, processor: None\n"
        "import diffattn, diffattn.attach\n"
        "assert diffusers.DiffusionPipeline.set_attn_processor is theirs\n"
    )
