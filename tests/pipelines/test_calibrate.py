"""``diffattn calibrate``: policies found by rendering."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffattn import BlockTopKAttn, GNAAttn, TokenGrid, load_policy, plan
from diffattn._locks import lock_file
from diffattn.methods.selected_blocks import SelectedBlocksMethod
from diffattn.pipelines.calibrate import run as run_module
from diffattn.pipelines.calibrate.candidates import Candidate, Maker, settings_of
from diffattn.pipelines.calibrate.journal import Journal, key
from diffattn.pipelines.calibrate.run import PROMPTS, bundled_prompts
from diffattn.pipelines.calibrate.search import halve, leader, search
from diffattn.planning.published import ModelShape
from diffattn.samples.moving_shapes.captions import split_scenes

from .conftest import Result

GRID = TokenGrid(8, 8, 8)
SHAPE = ModelShape(
    name="tiny", variant="wan2.1", heads=2, head_dim=12, block_of_site=(0, 1, 2), sizes=None
)
NOW: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0}
TOP = settings_of(BlockTopKAttn(block=16, **NOW))
WINDOW = settings_of(GNAAttn(**NOW))
SIZE = ["--height", 96, "--width", 96, "--num-frames", 17, "--steps", 3]


def maker(wanted: float = 0.5, steps: int = 8) -> Maker:
    return Maker(SHAPE, GRID, steps, wanted)


class TestCandidates:
    @pytest.mark.parametrize(
        "candidate",
        [
            Candidate(TOP, 0.0),
            Candidate(WINDOW, 0.125),
            Candidate(TOP, 0.25, 0.5),
            Candidate(TOP, 0.125, 0.3, (1.3, 0.9, 0.8)),
            Candidate(TOP, 0.0, 0.3, (1.3, 0.9, 0.8), ((1.2, 0.8), (0.7, 1.3), (1.0, 1.0))),
        ],
        ids=["constant", "window", "ramp", "layers", "heads"],
    )
    @pytest.mark.parametrize("wanted", [0.4, 0.6])
    def test_all_do_the_wanted_work_as_a_plan_counts_it(
        self, candidate: Candidate, wanted: float
    ) -> None:
        made = maker(wanted).policy(candidate)
        assert made is not None
        policy, work = made
        assert 0.9 * wanted <= work <= 1.005 * wanted
        assert plan(SHAPE, policy, grid=GRID, steps=8).run_density == pytest.approx(work)

    def test_work_from_above(self) -> None:
        made = maker(0.5).policy(Candidate(WINDOW, 0.0), from_above=True)
        assert made is not None
        assert 0.4975 <= made[1] <= 0.55

    def test_work_that_cannot_be_reached(self) -> None:
        assert maker(0.2).policy(Candidate(TOP, 0.4)) is None
        assert maker(0.001).policy(Candidate(TOP, 0.0)) is None

    def test_the_work_of_a_choice_of_blocks_is_what_is_chosen(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shares = []
        choose = SelectedBlocksMethod._chosen

        def chosen(self: Any, *arguments: Any) -> Any:
            out = choose(self, *arguments)
            shares.append(float(out.float().mean()))
            return out

        monkeypatch.setattr(SelectedBlocksMethod, "_chosen", chosen)
        from diffattn.methods.base import Site

        site = Site("wan", 0, 1, GRID)
        qkv = torch.randn(3, 1, GRID.tokens, 2, 8)
        for keep in (0.1, 0.31, 0.77):
            method = BlockTopKAttn(keep=keep, block=16, **NOW)
            method.attend(*qkv, site)
            assert method.work(GRID, 0, 2, 8).density == pytest.approx(shares[-1], abs=1e-6)


class TestSearch:
    def test_halving_ranks_by_more_and_more_prompts(self) -> None:
        candidates = [Candidate(TOP, n / 10) for n in range(5)]
        asked: list[tuple[int, int]] = []

        def score(candidate: Candidate, prompt: int) -> float:
            asked.append((candidates.index(candidate), prompt))
            # The last is best with the first prompts alone.
            return candidates.index(candidate) * (1 if prompt < 2 else -1)

        found = halve(candidates, score, 8, 2)
        assert found == [candidates[3], candidates[4]]
        assert {n for n, prompt in asked if prompt == 1} == {0, 1, 2, 3, 4}
        assert {n for n, prompt in asked if prompt == 2} == {2, 3, 4}
        assert {n for n, prompt in asked if prompt == 7} == {3, 4}

    def test_it_finds_the_best_of_ramps_layers_and_heads(self) -> None:
        errors = {TOP: [[4.0, 1.0], [1.0, 1.0], [1.0, 4.0]]}

        def score(candidate: Candidate, prompt: int) -> float:
            layers = candidate.layers or (1.0,) * 3
            heads = candidate.heads or ((1.0, 1.0),)
            good = -abs(candidate.warm_up - 0.25) - abs(candidate.ramp - 0.6)
            return good - abs(layers[1] - 0.6) - abs(heads[0][0] - 1.3) + 0.01 * prompt

        first = [Candidate(TOP, warm_up) for warm_up in (0.0, 0.25, 0.4)]
        best = search(first, errors, lambda candidate: True, score, 4)
        assert (best.warm_up, best.ramp) == (0.25, 0.6)
        assert abs(best.layers[1] - 0.6) < 0.2
        assert best.heads[0][0] > best.heads[0][1]

    def test_the_leader_is_best_over_prompts_that_others_have_too(self) -> None:
        one, two, three = (Candidate(TOP, n / 10) for n in range(3))
        assert leader({}) is None
        assert leader({one: {0: 3.0}}) == (one, 3.0, 1)
        scores = {one: {0: 3.0, 1: 9.0, 2: 9.0}, two: {0: 4.0, 1: 8.0}, three: {0: 20.0}}
        assert leader(scores) == (one, 6.0, 2) or leader(scores) == (two, 6.0, 2)
        assert leader({one: {0: 3.0, 1: 5.0}, two: {0: 4.0, 1: 5.0}}) == (two, 4.5, 2)


@pytest.fixture
def calibrate(
    diffattn: Callable[..., Result], tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run ``diffattn calibrate`` on the tiny model, with two prompts and two methods."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na red circle\n")
    Path("methods.json").write_text(
        json.dumps([{"type": "block-topk", "block": 16}, {"type": "vmoba"}])
    )
    usual = ["--work", 0.5, "--prompts", "prompts.txt", "--attn-config", "methods.json"]

    def call(*arguments: object) -> Result:
        return diffattn("calibrate", "--model", tiny_wan, *SIZE, *usual, *arguments)

    return call


def policy_and_scores(folder: Path) -> tuple[Any, Any]:
    return json.loads((folder / "policy.json").read_text()), json.loads(
        (folder / "journal.json").read_text()
    )


class TestRun:
    def test_interrupted_it_ends_as_one_that_never_was(
        self, calibrate: Any, generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = calibrate("-o", "whole", "--renders", 14)
        assert whole.code == 0, whole.err
        assert "[14/14] " in whole.out
        assert "the budget is spent" in whole.out
        assert "best so far" in whole.out

        render, calls = run_module.render, []

        def interrupted(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 8:
                raise KeyboardInterrupt
            return render(*arguments, **options)

        monkeypatch.setattr(run_module, "render", interrupted)
        broken = calibrate("-o", "parts", "--renders", 14)
        assert broken.code == 130
        assert "kept parts; the same command goes on from there" in broken.err
        # What a killed process may leave.
        (tmp_path / "parts" / ".part-journal.json").write_text('{"sett')
        (tmp_path / "parts" / "dense-00.npz").write_bytes(b"PK half a file")
        monkeypatch.setattr(run_module, "render", render)
        again = calibrate("-o", "parts", "--renders", 14)
        assert again.code == 0, again.err
        assert policy_and_scores(tmp_path / "parts") == policy_and_scores(tmp_path / "whole")

        policy = load_policy(tmp_path / "whole" / "policy.json")
        found = policy.recorded.found
        assert policy.recorded.steps == 3
        assert policy.recorded.grid == (5, 6, 6)
        assert found["renders"] == 14
        assert 0.45 <= found["work"] <= 0.5025
        best = max(
            (row for row in found["candidates"] if row["prompts"] >= found["prompts"]),
            key=lambda row: row["psnr_db"],
        )
        assert found["psnr_db"] == pytest.approx(best["psnr_db"], abs=1e-3)

        # The journal's score is that of a comparison of the same prompt and seed.
        same = [*SIZE, "--attn-config", tmp_path / "whole" / "policy.json", "--compare"]
        result = generate("a cat", "-o", "out.mp4", *same)
        assert result.code == 0, result.err
        assert "found for another run" not in result.err
        (sidecar,) = (json.loads(p.read_text()) for p in tmp_path.glob("out*.json"))
        journal = Journal.open(
            tmp_path / "whole",
            json.loads((tmp_path / "whole" / "journal.json").read_text())["settings"],
        )
        (name,) = (
            name
            for name in journal.scores
            if json.loads(name) == json.loads(json.dumps(found["candidate"]))
        )
        score = journal.scores[name][0]
        assert sidecar["comparison"]["psnr_db"] == pytest.approx(score, abs=0.01)

    def test_minutes(self, calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(0, 10_000, 30))
        monkeypatch.setattr(run_module, "monotonic", lambda: next(clock))
        result = calibrate("-o", "found", "--minutes", 4)
        assert result.code == 0, result.err
        assert "/4 min] " in result.out
        assert "the budget is spent" in result.out

    def test_two_at_once_are_refused(self, calibrate: Any, tmp_path: Path) -> None:
        (tmp_path / "found").mkdir()
        lock = lock_file(tmp_path / "found" / ".lock")
        assert lock is not None
        assert calibrate("-o", "found", "--renders", 4).error == (
            "another process calibrates in found: wait for it, or stop it"
        )
        lock.release()

    def test_other_settings_do_not_go_on(self, calibrate: Any, tmp_path: Path) -> None:
        assert calibrate("-o", "found", "--renders", 4).code == 0
        assert calibrate("-o", "found", "--renders", 4, "--work", 0.4).error == (
            "found holds a calibration with work 0.5, not 0.4: choose another folder, or the same"
            " settings"
        )
        (tmp_path / "found" / "journal.json").write_text("{}")
        error = calibrate("-o", "found", "--renders", 4).error
        assert error.startswith("found/journal.json is no journal of a calibration: ")


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give --output FOLDER, where the policy is written"),
            (["-o", "f", "--renders", 3, "--minutes", 1], "give --renders or --minutes, not both"),
            (["-o", "f", "--renders", 0], "--renders must be at least 1, not 0"),
            (["-o", "f", "--minutes", 0], "--minutes must be above 0, not 0"),
            (["-o", "f", "--work", 1], "--work must be a share above 0 and below 1, not 1"),
            (["-o", "prompts.txt"], "--output prompts.txt is a file, but must be a folder"),
            (["-o", "."], ". holds methods.json, prompts.txt and no calibration: choose an empty"),
            (["-o", "f", "--attn", "gna"], "give --attn with --attn-arg, or --attn-config, not b"),
            (
                ["-o", "f", "--work", 0.01, "--renders", 3],
                "--work 0.01: no method can do so",
            ),
            (["-o", "f", "--renders", 1], "the budget was spent before a candidate was rendered"),
        ],
    )
    def test_options(self, calibrate: Any, arguments: list[Any], message: str) -> None:
        assert calibrate(*arguments).error.startswith(message)

    @pytest.mark.parametrize(
        ("methods", "message"),
        [
            ([], "--attn-config methods.json gives no method"),
            ([3], '--attn-config methods.json must give methods as objects with a "type", not 3'),
            (
                [{"type": "agent"}],
                "--attn agent: no parameter of agent sets its share of the token pairs; calibrate"
                " can take radial, gna, clear, ",
            ),
            (
                [{"type": "block-topk", "keep": [1, 0.5]}],
                "--attn block-topk: keep of block-topk differs from step to step, but sets the sh",
            ),
            ([{"type": "gna"}, {"type": "gna"}], "the method {'type': 'gna'} is given twice"),
        ],
    )
    def test_methods(self, calibrate: Any, methods: Any, message: str) -> None:
        Path("methods.json").write_text(json.dumps(methods))
        assert calibrate("-o", "f").error.startswith(message)

    def test_prompts(self, calibrate: Any, diffattn: Any, tiny_wan: Path) -> None:
        Path("prompts.txt").write_text("a cat\na dog\na cat\n")
        assert calibrate("-o", "f").error == (
            "the prompt 'a cat' comes twice: give every prompt once"
        )
        error = diffattn("calibrate", "--model", tiny_wan, "-o", "f").error
        assert error.startswith("give --prompts FILE, prompts like those that ")
        error = diffattn("calibrate", "-o", "f", "--attn-arg", "block=16").error
        assert error == "--attn-arg is of a method: give --attn, too"


def test_held_out_captions_are_not_searched_with() -> None:
    _, held_out = split_scenes()
    for seed in range(5):
        prompts = bundled_prompts(seed, PROMPTS)
        assert len(set(prompts)) == PROMPTS
        assert not set(prompts) & {scene.caption for scene in held_out}
    assert bundled_prompts(1, PROMPTS) == bundled_prompts(1, PROMPTS) != bundled_prompts(2, PROMPTS)


def test_a_journal_survives_numbers_and_names(tmp_path: Path) -> None:
    candidate = Candidate(TOP, 0.25, 0.3, (1.0, 0.5))
    journal = Journal.open(tmp_path, {"work": 0.3})
    journal.add_score(candidate, 3, 21.25)
    journal.add_errors(0, [[[[0.5]]]])
    read = Journal.open(tmp_path, {"work": 0.3})
    assert read.score(candidate, 3) == 21.25
    assert read.score(replace(candidate, ramp=0.6), 3) is None
    assert read.renders == 2
    assert math.isfinite(read.scores[key(candidate)][3])
