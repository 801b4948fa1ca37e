"""FSDP 2 and context parallelism in two processes, joined by gloo, against one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scale_worker
import tiny_families
import tiny_training
import tiny_wan
import torch
from safetensors.torch import load_file
from scale_worker import RUNS

from diffattn.lora.adapter import LORA_FILE, METHOD_FILE
from diffattn.lora.errors import LoraError
from diffattn.lora.sharded import check_launch, check_sharding, check_weights
from diffattn.lora.together import check_together, shared_loss
from diffattn.lora.trainer import LOG_FILE
from diffattn.methods import from_dict
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.train.run import _check_whole

SECONDS_TO_WAIT = 240


def launch(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        **tiny_training.own_path(),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
    }
    logs = [folder / f"{rank}.log" for rank in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, Path(scale_worker.__file__), folder],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(SECONDS_TO_WAIT) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def found(place: Path) -> list[dict[str, Any]]:
    return launch(place)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float]]]:
    """By run, the folder of one process with the samples of both, and its gradients' norms."""
    made = {}
    for run in RUNS.values():
        kind = run.attention["type"], run.dtype
        if kind not in made:
            folder = tmp_path_factory.mktemp("one")
            changes = scale_worker.ALIKE | {"attention": run.attention}
            trainer = tiny_training.trainer(folder, pipe=run.pipe(), **changes)
            norms = scale_worker.watch_norms(trainer)
            trainer.train()
            made[kind] = folder, norms
    return {name: made[run.attention["type"], run.dtype] for name, run in RUNS.items()}


class TestTwoProcesses:
    @pytest.mark.parametrize("name", RUNS)
    def test_do_what_one_does(self, place: Path, found: Any, alone: Any, name: str) -> None:
        folder, norms = alone[name]
        rounding = 1e-4 if RUNS[name].dtype == torch.float32 else 1e-2
        for facts in found:
            # AdamW is blind to the gradients' scale; their norm before clipping is not.
            assert facts[name]["norms"] == pytest.approx(norms, rel=rounding)
        logs = [
            [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
            for run in (place / name, folder)
        ]
        assert len(logs[0]) == scale_worker.STEPS
        for shared, single in zip(*logs, strict=True):
            assert shared == pytest.approx(single, rel=rounding / 10, abs=1e-6)
        for file in folder.glob("*.safetensors"):
            assert file.name in (LORA_FILE, METHOD_FILE)
            expected, weights = load_file(file), load_file(place / name / file.name)
            assert weights.keys() == expected.keys()
            for key, weight in expected.items():
                assert weights[key].dtype == torch.float32
                assert (weights[key] - weight).norm() <= 10 * rounding * weight.norm(), key

    @pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.fsdp])
    def test_each_hold_half_of_the_weights(self, found: Any, name: str) -> None:
        held = [facts[name]["held"] for facts in found]
        assert sum(held) == pytest.approx(1)
        assert max(held) < 0.52

    def test_go_on_from_a_checkpoint_bit_for_bit(self, place: Path, found: Any) -> None:
        whole, resumed = (load_file(place / run / LORA_FILE) for run in ("fsdp", "resumed"))
        assert whole.keys() == resumed.keys()
        for name, weight in whole.items():
            assert torch.equal(resumed[name], weight), name

    def test_write_no_frozen_weights(self, place: Path, found: Any) -> None:
        last = place / "fsdp" / "checkpoints" / f"step-{scale_worker.STEPS:06d}"
        assert {path.name for path in last.iterdir()} == {
            LORA_FILE, "trained.safetensors", "optimizer.bin", "progress.json",
            "random_states_0.pkl", "random_states_1.pkl",
        }  # fmt: skip
        assert all(".lora_" in name for name in load_file(last / "trained.safetensors"))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "vmoba on a ring",
                "context_parallel is ring, but vmoba attention cannot be computed for a part of the"
                " queries: give ulysses",
            ),
            (
                "all heads under ulysses",
                "context_parallel is ulysses, but vmoba attention with these parameters looks at",
            ),
            (
                "weights of the method under ulysses",
                "context_parallel is ulysses, but vsa attention has weights of its own",
            ),
            ("ema under fsdp", "ema needs the trained weights whole in each process, but FSDP"),
        ],
    )
    def test_refuse(self, found: Any, name: str, message: str) -> None:
        for facts in found:
            assert facts[name].startswith(message)


class Kind(SimpleNamespace):
    """As much of an accelerator as is looked at before a training."""


def accelerator(kind: str, mixed_precision: str = "no", **plugin: Any) -> Any:
    usual = {
        "fsdp_version": 2,
        "cpu_ram_efficient_loading": False,
        "activation_checkpointing": False,
    }
    return Kind(
        distributed_type=Kind(value=kind),
        device=torch.device("cpu"),
        mixed_precision=mixed_precision,
        state=Kind(fsdp_plugin=Kind(**usual | plugin)),
    )


class TestLaunchers:
    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is asked for, but lora train has ne"),
            ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM is asked for, but lora train"),
            ({"ACCELERATE_USE_FSDP": "true"}, "FSDP is asked for in version 1, but must be vers"),
            (
                {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
                "FSDP is asked for in version 1, but must be version 2",
            ),
        ],
    )
    def test_are_refused(
        self,
        environment: dict[str, str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with pytest.raises(LoraError, match=message):
            check_launch(environment)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LoraError, match=message):
            tiny_training.trainer(tmp_path)

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (accelerator("DEEPSPEED"), "DeepSpeed is asked for"),
            (accelerator("MEGATRON_LM"), "Megatron-LM is asked for"),
            (accelerator("FSDP", fsdp_version=1), "FSDP is asked for in version 1"),
            (
                accelerator("FSDP", cpu_ram_efficient_loading=True),
                "the text encoders of the others empty: give --fsdp_cpu_ram_efficient_loading fals",
            ),
            (
                accelerator("FSDP", activation_checkpointing=True),
                "give --gradient-checkpointing to lora train instead",
            ),
            (
                accelerator("FSDP", "bf16"),
                "mixed_precision is bf16, by which FSDP casts all weights",
            ),
            (
                accelerator("MULTI_CPU"),
                "FSDP is asked for, but on cpu accelerate gives each process a copy of the model",
            ),
        ],
    )
    def test_accelerators_are_refused(self, made: Any, message: str) -> None:
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        with pytest.raises(LoraError, match=message):
            check_sharding(made, environment)

    def test_others_pass(self) -> None:
        check_launch({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"})
        check_launch({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
        check_sharding(accelerator("FSDP"), {"ACCELERATE_USE_FSDP": "true"})
        check_sharding(accelerator("MULTI_CPU"), {})


def test_a_weight_of_a_single_number_cannot_be_spread() -> None:
    model = torch.nn.Linear(2, 2)
    check_weights(model, "torch.AdamW")
    model.strength = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(LoraError, match="a single number, and Linear has 1, such as strength"):
        check_weights(model, "torch.AdamW")


def test_what_was_never_run_under_fsdp_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(
        LoraError, match=r"^optimizer is torch\.SGD, but under FSDP no other than tor"
    ):
        check_weights(model, "torch.SGD")
    small = model.weight.detach().to(torch.float8_e4m3fn)
    model.weight = torch.nn.Parameter(small, requires_grad=False)
    with pytest.raises(
        LoraError, match="stored in fewer than 16 bits, such as weight: leave base_d"
    ):
        check_weights(model, "torch.AdamW")


class TestSharing:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"processes": 1}, "is ulysses, but there is only one process: start several with"),
            ({"processes": 3}, "the 2 attention heads of WanTransformer3DModel cannot be divided"),
            ({"tokens": 7}, "is ulysses, but 7 tokens cannot be divided among 2 processes"),
            ({"way": "ring", "tokens": 9}, "is ring, but 9 tokens cannot be divided"),
            ({"build": tiny_wan.vace_transformer}, "has no plan for WanVACETransformer3DModel"),
            ({"build": tiny_families.ltx}, "cannot spread LTXVideoTransformer3DModel's attention"),
        ],
    )
    def test_is_refused(
        self, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        build = {"build": tiny_wan.transformer} | changes
        model = build.pop("build")()
        usual = {"way": "ulysses", "method": from_dict(tiny_training.ATTENTION), "processes": 2}
        check_together(tiny_wan.transformer(), **usual, tokens=8)
        with pytest.raises(LoraError, match=message):
            check_together(model, **usual | build)

    def test_needs_accelerators(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
        method = from_dict(tiny_training.ATTENTION)
        with pytest.raises(LoraError, match="is ring, but needs accelerators"):
            check_together(tiny_wan.transformer(), "ring", method, 2)

    def test_a_single_process_cannot(self, tmp_path: Path) -> None:
        with pytest.raises(
            LoraError, match="context_parallel is ring, but there is only one proce"
        ):
            tiny_training.trainer(tmp_path, context_parallel="ring")

    def test_an_unknown_way_is_refused(self) -> None:
        with pytest.raises(LoraError, match=r"context_parallel .*'sideways'"):
            tiny_training.settings(context_parallel="sideways")

    @pytest.mark.parametrize("processes", [2, 3])
    def test_a_loss_of_own_tokens_counts_once(self, processes: int) -> None:
        generator = torch.Generator().manual_seed(5)
        whole = torch.randn((), generator=generator)
        own = torch.randn(processes, generator=generator)
        driving = [
            shared_loss({"loss": whole + 0.3 * part, "attention": part}, 0.3, processes)
            for part in own
        ]
        # Each process has its share of the gradient of `whole`, and the whole one of its part.
        for part, loss in zip(own, driving, strict=True):
            assert loss / processes == pytest.approx(float(whole + 0.3 * part / processes))
        assert shared_loss({"loss": whole}, 0.0, processes) == pytest.approx(processes * whole)

    def test_leaves_no_process_for_validation_videos(self) -> None:
        shared = tiny_training.settings(context_parallel="ulysses")
        with pytest.raises(UserError, match="--context-parallel spreads its calls over all"):
            _check_whole(accelerator("MULTI_GPU"), shared)
        with pytest.raises(UserError, match="FSDP spreads it over all: leave it out"):
            _check_whole(accelerator("FSDP"), tiny_training.settings())
        _check_whole(accelerator("MULTI_GPU"), tiny_training.settings())
