"""The loop: what a step is, going on where one left off, and what it refuses."""

import json
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import tiny_wan
import torch
from safetensors.torch import load_file

from diffattn.lora import checkpoint, trainer
from diffattn.lora.adapter import LORA_FILE
from diffattn.lora.draws import clip_of, sample_numbers
from diffattn.lora.errors import LoraError
from diffattn.lora.settings import ADVICE, TrainSettings
from diffattn.lora.trainer import StepReport, Trainer, make_accelerator

PROCESSES_AND_PARTS = [(1, 1), (2, 1), (1, 3), (3, 2)]


def same(one: Trainer, other: Trainer) -> bool:
    first, second = tiny_training.trained(one), tiny_training.trained(other)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


class TestSteps:
    def test_it_learns(self, tmp_path: Path) -> None:
        made = tiny_training.trainer(
            tmp_path, steps=30, objective=0.0, prediction=1.0, attention_output=0.0, dropout=0.0
        )
        # A model whose mask is felt: with the tiny one's small projections it is hardly.
        with torch.no_grad():
            for name, parameter in made.model.named_parameters():
                if "attn1.to" in name and "lora" not in name:
                    parameter.mul_(6)
        before = made.loss(range(8))["prediction"]
        made.train()
        assert made.loss(range(8))["prediction"] < 0.7 * before

    def test_reports_and_log_say_the_same(self, tmp_path: Path) -> None:
        reports: list[StepReport] = []
        between: list[int] = []
        made = tiny_training.trainer(tmp_path, steps=3)
        made.train(report=reports.append, between=between.append)
        assert [report.step for report in reports] == between == [1, 2, 3]
        for report, line in zip(reports, log(tmp_path), strict=True):
            expected = {"step": report.step, **report.losses, "learning_rate": 1e-2}
            assert line == expected
            assert report.steps == 3
            assert report.seconds > 0
            assert report.memory > 1e6

    def test_accumulation_is_a_larger_batch(self, tmp_path: Path) -> None:
        whole = tiny_training.trainer(tmp_path / "whole", batch_size=4, dropout=0.0, steps=2)
        parts = tiny_training.trainer(
            tmp_path / "parts", batch_size=2, accumulation=2, dropout=0.0, steps=2
        )
        whole.train()
        parts.train()
        for one, other in zip(log(tmp_path / "whole"), log(tmp_path / "parts"), strict=True):
            assert one == pytest.approx(other, rel=1e-5)

    def test_accelerate_clips_what_it_knows_a_model_by(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """FSDP puts other parameters in their place, and looks for a model with just these."""
        made = tiny_training.trainer(tmp_path)
        layer = made.model.get_submodule("blocks.0.attn1.to_q.lora_A.default")
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        clipped: list[torch.Tensor] = []
        monkeypatch.setattr(
            made.accelerator, "clip_grad_norm_", lambda given, _: clipped.extend(given)
        )
        made.train(until=1)
        wanted = list(made.model.parameters())
        assert [id(p) for p in clipped] == [id(p) for p in wanted]

    def test_longer_videos_than_the_base_s(self, tmp_path: Path) -> None:
        pipe = tiny_wan.PIPELINES["t2v"]()
        clips = tiny_training.clips(2, (16, 7, 12, 8))
        settings = tiny_training.settings(steps=1)
        Trainer(pipe, clips, tiny_training.EMPTY, settings, tmp_path).train()
        assert tiny_wan.run(pipe, num_frames=25).shape[2] == 7


class TestNumbers:
    """Samples have numbers, whoever computes them."""

    @pytest.mark.parametrize(("processes", "parts"), PROCESSES_AND_PARTS)
    def test_every_one_is_drawn_once(self, processes: int, parts: int) -> None:
        settings = tiny_training.settings(accumulation=parts, batch_size=2)
        numbers = [
            number
            for step in range(3)
            for part in range(parts)
            for process in range(processes)
            for number in sample_numbers(settings, step, part, process, processes)
        ]
        assert numbers == list(range(3 * parts * processes * 2))

    def test_every_clip_is_shown_once_an_epoch(self) -> None:
        epochs = [[clip_of(epoch * 7 + place, 7, seed=3) for place in range(7)] for epoch in (0, 1)]
        assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
        assert epochs[0] != epochs[1]


class TestResume:
    def test_it_ends_with_the_same_weights(self, tmp_path: Path) -> None:
        whole = tiny_training.trainer(tmp_path / "whole", schedule="cosine", warmup_steps=2)
        whole.train()
        for until in (1, 3):
            tiny_training.trainer(
                tmp_path / "parts", schedule="cosine", warmup_steps=2, resume=until > 1
            ).train(until=until)
            torch.rand(3)  # nothing of what comes may depend on it
        last = tiny_training.trainer(
            tmp_path / "parts", schedule="cosine", warmup_steps=2, resume=True
        )
        assert last.step == 3
        last.train()
        assert same(whole, last)
        assert log(tmp_path / "whole") == log(tmp_path / "parts")
        one, other = (load_file(tmp_path / run / LORA_FILE) for run in ("whole", "parts"))
        assert all(torch.equal(one[name], other[name]) for name in one | other)

    def test_half_a_checkpoint_is_none(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path).train(until=2)
        half = tmp_path / "checkpoints" / ".step-000004.tmp"
        shutil.copytree(tmp_path / "checkpoints" / "step-000002", half)
        (half / "optimizer.bin").write_bytes(b"half")
        made = tiny_training.trainer(tmp_path, resume=True)
        assert made.step == 2
        made.train()
        assert not half.exists()

    def test_the_last_checkpoints_stay(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path, checkpoint_every=1, keep_checkpoints=2, steps=4).train()
        found = [path.name for path in checkpoint.checkpoints(tmp_path)]
        assert found == ["step-000003", "step-000004"]

    def test_more_steps_may_be_asked_for(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path / "more", steps=2).train()
        more = tiny_training.trainer(tmp_path / "more", steps=4, resume=True)
        more.train()
        once = tiny_training.trainer(tmp_path / "once", steps=4)
        once.train()
        assert same(more, once)

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"rank": 3}, "rank is 2, now it is 3"),
            ({"schedule": "linear"}, "schedule is 'constant', now it is 'linear'"),
            ({"seed": 9}, "seed is 0, now it is 9"),
        ],
    )
    def test_another_run_is_refused(
        self, changes: dict[str, Any], what: str, tmp_path: Path
    ) -> None:
        tiny_training.trainer(tmp_path, steps=1).train()
        with pytest.raises(LoraError) as error:
            tiny_training.trainer(tmp_path, resume=True, **changes)
        last = tmp_path / "checkpoints" / "step-000001"
        message = str(error.value)
        assert message.startswith(f"cannot go on from {last}: its ")
        assert what in message
        assert message.endswith("; give the same, or another output folder")

    def test_other_clips_are_refused(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path, steps=1).train()
        pipe = tiny_wan.PIPELINES["t2v"]()
        clips, settings = tiny_training.clips(4), tiny_training.settings()
        with pytest.raises(LoraError, match=r"its clips is '\w{16}', now it is '\w{16}'"):
            Trainer(pipe, clips, tiny_training.EMPTY, settings, tmp_path, resume=True)

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path, steps=1).train()
        pipe = tiny_wan.PIPELINES["t2v"]()
        with torch.no_grad():
            pipe.transformer.proj_out.bias.add_(1)
        with pytest.raises(LoraError, match=r"its model is '\w{32}', now it is '\w{32}'; give the"):
            tiny_training.trainer(tmp_path, resume=True, pipe=pipe)

    def test_a_folder_that_holds_a_run(self, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path, steps=1).train()
        with pytest.raises(LoraError) as error:
            tiny_training.trainer(tmp_path)
        assert str(error.value) == (
            f"{tmp_path} holds a run with a checkpoint, step-000001: resume it, or give another"
            f" output folder"
        )

    @pytest.mark.parametrize("file", ["progress.json", "optimizer.bin", "trained.safetensors"])
    def test_a_damaged_checkpoint(self, file: str, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path, steps=1).train()
        last = tmp_path / "checkpoints" / "step-000001"
        (last / file).write_bytes(b"damaged")
        with pytest.raises(LoraError) as error:
            tiny_training.trainer(tmp_path, resume=True)
        assert str(error.value).startswith(f"cannot read checkpoint {last}: ")
        assert str(error.value).endswith("; remove it to go on from the one before")

    @pytest.mark.parametrize("free", [0, 1 << 40])
    def test_a_full_disk(self, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = tiny_training.trainer(tmp_path, steps=1)
        words = "[enforce fail at inline_container.cc:672] . unexpected pos 37632 vs 37520"

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError(words)

        monkeypatch.setattr(made.accelerator, "save_state", fail)
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(LoraError) as error:
            made.save_checkpoint()
        reason = words if free else f"no space is left on the disk of {tmp_path}"
        assert str(error.value) == (
            f"cannot write {tmp_path / 'checkpoints' / 'step-000000'}: {reason}; there is no"
            f" earlier checkpoint"
        )

    @pytest.mark.parametrize("file", ["random_states_0.pkl", "optimizer.bin"])
    def test_a_pickle_of_code_in_a_checkpoint(self, file: str, tmp_path: Path) -> None:
        tiny_training.trainer(tmp_path, steps=1).train()
        last = tmp_path / "checkpoints" / "step-000001"
        for write in (pickle.dump, torch.save):
            with (last / file).open("wb") as opened:
                write(_Evil(tmp_path / "mark"), opened)
            with pytest.raises(LoraError) as error:
                tiny_training.trainer(tmp_path, resume=True)
            assert str(error.value).startswith(
                f"cannot read checkpoint {last}: {file} is damaged, or is a pickled file with more"
                f" than tensors and numbers, which could run code ("
            )
            assert str(error.value).endswith("); remove it to go on from the one before")
        assert not (tmp_path / "mark").exists()


class _Evil:
    """A pickle of it makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class TestRefusals:
    def test_no_scheduler(self, tmp_path: Path) -> None:
        pipe = tiny_wan.PIPELINES["t2v"]()
        pipe.scheduler = None
        with pytest.raises(LoraError) as error:
            tiny_training.trainer(tmp_path, pipe=pipe)
        assert str(error.value) == (
            "WanPipeline has no scheduler, which says how noise is added: load it with its"
            " scheduler/scheduler_config.json"
        )

    def test_no_clips(self, tmp_path: Path) -> None:
        pipe, settings = tiny_wan.PIPELINES["t2v"](), tiny_training.settings()
        with pytest.raises(LoraError, match=r"^there are no clips to learn from$"):
            Trainer(pipe, tiny_training.Clips(), tiny_training.EMPTY, settings, tmp_path)

    def test_a_pipeline_that_needs_a_picture(self, tmp_path: Path) -> None:
        with pytest.raises(LoraError, match="conditioned on more than text"):
            tiny_training.trainer(tmp_path, pipe=tiny_wan.PIPELINES["i2v"]())

    def test_a_method_that_cannot_be_attached(self, tmp_path: Path) -> None:
        attention = {"type": "clear", "ntk_factor": 2.0}
        with pytest.raises(LoraError, match="does not have the rotary position embedding of Flux"):
            tiny_training.trainer(tmp_path, attention=attention)

    def test_an_unknown_denoiser(self, tmp_path: Path) -> None:
        with pytest.raises(LoraError) as error:
            tiny_training.trainer(tmp_path, denoiser="transformer_2")
        assert str(error.value) == "denoiser is 'transformer_2', but WanPipeline has transformer"

    def test_a_loss_that_is_no_number(self, tmp_path: Path) -> None:
        made = tiny_training.trainer(tmp_path)
        with torch.no_grad():
            made.model.proj_out.weight.fill_(float("inf"))
        with pytest.raises(LoraError, match=r"^the loss is (nan|inf) at step 1: try a smaller"):
            made.train()

    def test_a_tracker_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(LoraError, match=r"^tracker 'tensorbored' is not installed \(pip "):
            tiny_training.trainer(tmp_path, trackers=("tensorbored",))

    def test_what_accelerate_cannot_do(self, tmp_path: Path) -> None:
        """Its state is the process's: another precision than the first training's is refused."""
        tiny_training.trainer(tmp_path / "one")
        with pytest.raises(LoraError, match=r"^accelerate refuses: .*mixed_precision='bf16'"):
            tiny_training.trainer(tmp_path / "two", mixed_precision="bf16")

    def test_a_kind_of_training_that_the_machine_lacks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(**_: object) -> None:
            raise RuntimeError("There are currently no available devices found")

        monkeypatch.setattr(trainer, "Accelerator", refuse)
        with pytest.raises(LoraError, match=r"^accelerate refuses: There are currently no "):
            make_accelerator(tiny_training.settings(), tmp_path)

    def test_an_output_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(LoraError, match=r"^cannot write to .*file: File exists$"):
            tiny_training.trainer(tmp_path / "file")

    def test_a_disk_that_is_full(self, tmp_path: Path) -> None:
        """A limit on the size of files stands in for the disk: writing fails half-way."""
        made = tiny_training.trainer(tmp_path, checkpoint_every=1)
        made.train(until=1)
        first = tmp_path / "checkpoints" / "step-000001"
        before = {path.name: path.read_bytes() for path in first.iterdir()}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        try:
            with pytest.raises(LoraError) as error:
                made.save_checkpoint()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(error.value).startswith(f"cannot write {first}: ")
        assert str(error.value).endswith(f"; kept: {first}")
        assert {path.name: path.read_bytes() for path in first.iterdir()} == before
        assert [path.name for path in first.parent.iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    ("attention", "unused"),
    [
        ({"type": "clear", "down_factor": 2, "dense_layers": 1}, True),
        ({"type": "clear", "down_factor": 2, "dense_layers": 0}, False),
        ({"type": "gna", "dense_layers": 1}, False),
    ],
)
def test_processes_wait_for_gradients_that_come(
    attention: dict[str, Any], unused: bool, tmp_path: Path
) -> None:
    """Cells in layers that stay dense have none; nothing else is without."""
    accelerator = make_accelerator(tiny_training.settings(attention=attention), tmp_path)
    assert accelerator.ddp_handler.find_unused_parameters is unused


class TestSettings:
    def test_they_can_be_written_down(self) -> None:
        settings = tiny_training.settings(trackers=("tensorboard",), warmup_steps=3)
        assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings

    def test_the_method_s_paper_decides_what_is_left_open(self) -> None:
        radial = TrainSettings().completed()
        assert (radial.rank, radial.alpha, radial.objective, radial.prediction) == (128, 256, 1, 0)
        clear = TrainSettings(attention={"type": "clear"}).completed()
        assert (clear.objective, clear.prediction, clear.attention_output) == (1, 0.5, 0.5)
        assert clear.attention_every == 4
        # The factor, alpha / rank, is the paper's for any rank.
        assert TrainSettings(rank=16).completed().alpha == 32
        assert TrainSettings(rank=16, alpha=4, prediction=2).completed().prediction == 2
        assert ADVICE.keys() <= {"radial", "clear", "linfusion", "attention-tile", "sla"}

    def test_rates(self) -> None:
        def rates(schedule: str) -> list[float]:
            settings = TrainSettings(steps=6, warmup_steps=2, learning_rate=4.0, schedule=schedule)
            return [round(settings.rate_at(step), 6) for step in range(6)]

        assert rates("constant") == [2, 4, 4, 4, 4, 4]
        assert rates("linear") == [2, 4, 4, 3, 2, 1]
        assert rates("cosine") == [2, 4, 4, 3.414214, 2, 0.585786]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rank": 0}, "rank is 0, but must be a whole number from 1 to 65536"),
            ({"rank": True}, "rank is True, but must be a whole number from 1 to 65536"),
            ({"alpha": 8}, "alpha is 8, but means nothing without a rank: give both or neither"),
            ({"dropout": 1.0}, "dropout is 1.0, but must be a number of at least 0 and below 1"),
            (
                {"learning_rate": 0},
                "learning_rate is 0, but must be a number above 0 and at most 1e+06",
            ),
            (
                {"schedule": "step"},
                "schedule is 'step', but must be one of constant, linear, cosine",
            ),
            ({"dora": 1}, "dora is 1, but must be true or false"),
            ({"targets": "to_q"}, "targets is 'to_q', but must be a list of names"),
            (
                {"targets": []},
                "targets is empty: name at least one layer, such as to_q, to_k, to_v, to_out.0",
            ),
            ({"attention": "radial"}, "attention is 'radial', but must be a method's settings with"
             " its type"),
            (
                {"attention": {"type": "dense"}},
                "the method is dense, which needs no adapting: choose a sparse one, such as radial",
            ),
            (
                {"objective": 0.0},
                "objective, prediction and attention_output are all 0: there is nothing to learn;"
                " give one of them a weight",
            ),
            ({"step": 3}, "unknown setting 'step'; did you mean 'steps'?"),
        ],
    )  # fmt: skip
    def test_refusals(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(LoraError) as error:
            TrainSettings.from_dict(change)
        assert str(error.value) == message

    def test_the_method_s_own_words(self) -> None:
        with pytest.raises(LoraError, match=r"^unknown method 'radiall'; did you mean 'radial'"):
            TrainSettings(attention={"type": "radiall"})
