"""Breaks one line of the code after another, and looks whether a test fails.

Run it by hand: `python tests/mutations.py`. Each mutation is one edit of one place. The checkout is
copied to a temporary folder; the code that is worked on stays as it is. The named tests must pass
there before the edit and fail after it. The table in mutations.md is what the last run found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORT = Path(__file__).with_suffix(".md")
PASSED, FAILED = 0, 1  # exit codes of pytest


@dataclass(frozen=True)
class Mutation:
    """An edit that a test must notice.

    Attributes:
        what: what no longer works.
        folder: top-level folder of the code.
        old: text that stands once in all Python files of the folder, wherever they are moved.
        new: what it is replaced by.
        test: file name (with as much of its path as makes it the only one) and pytest's node id.
    """

    what: str
    folder: str
    old: str
    new: str
    test: str

    def place(self, root: Path) -> Path:
        """The file that `old` stands in.

        Raises:
            ValueError: if it stands nowhere, or more than once.
        """
        counts = {path: path.read_text("utf-8").count(self.old) for path in code(root, self.folder)}
        found = {path: count for path, count in counts.items() if count}
        if sum(found.values()) != 1:
            places = ", ".join(str(path.relative_to(root)) for path in found) or "none"
            raise ValueError(
                f"{self.what}: {self.old!r} must stand once in {self.folder}/, but stands"
                f" {sum(found.values())} times (files: {places}); give the line that it is now"
            )
        return next(iter(found))

    def node(self, root: Path) -> str:
        """The node id of the test.

        Raises:
            ValueError: if the file's name is that of no test file, or of several.
        """
        name, _, rest = self.test.partition("::")
        paths = [path for path in (root / "tests").rglob("test_*.py") if ends_with(path, name)]
        if len(paths) != 1:
            raise ValueError(f"{self.what}: {len(paths)} test files are called {name}")
        return f"{paths[0].relative_to(root)}::{rest}"


MUTATIONS = (
    # --- kernels
    Mutation("negative scale, Triton", "kernels",
             "NEGATIVE_SCALE=problem.scale < 0", "NEGATIVE_SCALE=False",
             "test_contract.py::test_large_scores_do_not_overflow[-0.125-triton-float32]"),
    Mutation("negative scale, Triton gather", "kernels",
             "NEGATIVE_SCALE=scale < 0", "NEGATIVE_SCALE=False",
             "test_contract.py::test_large_scores_do_not_overflow[-0.125-gather-float32]"),
    Mutation("queries that have seen nothing yet, Triton", "kernels",
             'b_base = tl.where(b_new == float("-inf"), 0.0, b_new)', "b_base = b_new",
             "test_contract.py::test_rows_that_see_nothing[triton-float32]"),
    Mutation("bits past the end of the sequence, Triton", "kernels",
             "& first_bits(left - i * 32)", "",
             "test_forms.py::test_bits_past_the_end_of_the_sequence_hide_nothing_that_is_there"
             "[plain-ahead]"),
    Mutation("queries that see nothing, CPU", "kernels",
             "lse = lse.masked_fill(bias.blind, -torch.inf)", "lse = lse",
             "test_contract.py::test_rows_that_see_nothing[cpu-flash-float32]"),
    Mutation("NaN in hidden keys, CPU", "kernels",
             "(key_mask is None or key_mask[slice(*tile.run)].all())", "True",
             "test_contract.py::test_nan_in_hidden_keys_stays_there[cpu-flash-float32]"),
    Mutation("merge of two tiles without keys, CPU", "kernels",
             "torch.sigmoid(new_lse - old_lse).nan_to_num_(0)", "torch.sigmoid(new_lse - old_lse)",
             "test_contract.py::test_rows_that_see_nothing[cpu-flash-float32]"),
    Mutation("layouts written to after their plan was made", "kernels",
             "and entry.versions == versions", "",
             "test_cpu.py::test_plan_follows_changes_and_dies_with_the_layout"),
    Mutation("queries that select several blocks, CPU gather", "kernels",
             "total.index_add_(0, rows, part_dq[0, 0])", "total[rows] = part_dq[0, 0]",
             "test_contract.py::test_gradient_of_one_of_the_results[out-gather_cpu-flash]"),
    # --- masks and blocks
    Mutation("a block map's blocks under a tile order", "diffattn",
             "        if blocking.order is not None:\n"
             "            return super().block_states(blocking)\n", "",
             "test_orders.py::TestLayouts::test_a_layout_in_an_order_is_the_mask_permuted"),
    Mutation("blocks that overlap a block map's", "diffattn",
             "running.index_select(dim, last + 1) >", "running.index_select(dim, last) >",
             "test_mask.py::test_blocks_hold_exactly_the_tokens_of_the_rule"),
    Mutation("signatures of blocks with text", "diffattn",
             "kinds.append(begins * (block + 1) + ends)", "kinds.append(begins * (block + 1))",
             "test_mask.py::test_blocks_hold_exactly_the_tokens_of_the_rule"),
    Mutation("short blocks of a signature", "diffattn",
             "(row == states.shape[0] - 1) * 1 + (column == states.shape[1] - 1) * 2", "row * 0",
             "test_mask.py::test_short_blocks_are_like_no_whole_block_of_their_signature"),
    Mutation("the way back from tiles, in gradients", "diffattn",
             "ctx.permutation = back, there, dim", "ctx.permutation = there, back, dim",
             "test_orders.py::TestPermutation::test_gradients_take_the_way_back"),
    Mutation("key mask in tile order", "diffattn",
             "key_mask = None if key_mask is None else order.to_tiles(key_mask)\n    out, lse",
             "out, lse",
             "test_orders.py::TestAttention::test_output_and_gradients_are_those_of_the_mask"),
    Mutation("LSE in tile order, compiled", "diffattn",
             "lse = order.to_tiles(lse, 2)", "pass",
             "test_orders.py::TestAttention::test_compiled_code_permutes_as_eager_does"),
    # --- methods
    Mutation("Radial's 60 % rule", "diffattn",
             "5 * seen > 3 * touched", "5 * seen >= 3 * touched",
             "test_radial.py::test_covering_rule"),
    Mutation("the middle of GNA's groups", "diffattn",
             "group + self.stride // 2,", "group + (self.stride - 1) // 2,",
             "test_gna.py::TestMask::test_it_is_nattens_token_for_token"),
    Mutation("text in CLEAR's proportional attention", "diffattn",
             "tokens = grid.tokens * (", "tokens = grid.video_tokens * (",
             "test_clear.py::test_proportional_attention_counts_every_token_of_the_sequence"),
    Mutation("FreeSwim's temperature", "diffattn",
             "math.log(2 * tokens)", "math.log(4 * tokens)",
             "methods/test_freeswim.py::TestAttention::test_the_temperature_is_the_public_codes"),
    Mutation("VMoBA's ties", "diffattn",
             "tied.cumsum(1, dtype=torch.int32) <= wanted", "tied.cumsum(1) < wanted",
             "test_vmoba_selection.py::test_counting_chooses_what_sorting_does"),
    Mutation("VMoBA's ties, Triton", "kernels",
             "b_count <= b_wanted", "b_count < b_wanted",
             "test_best_blocks.py::test_equal_scores_are_taken_in_order"),
    Mutation("means of merged tokens, AgentSD", "diffattn",
             "total / self.sizes[..., None]", "total",
             "test_agent.py::test_merging_is_that_of_the_public_code"),
    Mutation("means of agents over tokens that count", "diffattn",
             "mean / share.clamp(min=torch.finfo(share.dtype).tiny)", "mean",
             "test_agent.py::test_boxes_are_the_definition_on_any_grid"),
    # --- attaching and planning
    Mutation("the first dense layers", "diffattn",
             "self.layer >= (self.method.dense_layers or 0)",
             "self.layer > (self.method.dense_layers or 0)",
             "test_attach.py::test_sparse_method_is_the_stock_model_with_that_mask"),
    Mutation("the last dense step", "diffattn",
             "self.step >= self.num_steps - last", "self.step > self.num_steps - last",
             "test_schedule.py::test_a_run_is_dense_at_both_ends"),
    Mutation("the first pattern that matches", "diffattn",
             "chosen[name] = method\n                break", "chosen[name] = method",
             "test_attach.py::test_patterns_choose_methods"),
    Mutation("padding masks over pairs", "diffattn",
             "return attn_mask[:, 0, 0]\n", "return attn_mask[:, 0, -1]\n",
             "models/test_families.py::test_sparse_method_is_the_stock_model_with_that_mask"
             "[hunyuanvideo-1.5]"),
    Mutation("ragged ends in plans", "diffattn",
             "whole[-1] = False", "pass",
             "test_plan.py::TestByBruteForce::test_counts"),
    Mutation("rates of a plan", "diffattn",
             "self.linear_flops / LINEAR_RATE", "self.linear_flops / ATTENTION_RATE",
             "test_plan.py::TestOfPublishedModels::test_flops_and_bounds_of_the_table"),
    # --- lora
    Mutation("dropped captions", "lora",
             "< settings.caption_dropout", "< 0",
             "test_draws.py::test_as_many_captions_are_dropped_as_the_settings_say"),
    Mutation("the dense teacher's adapters", "lora",
             "model.disable_adapters()", "pass",
             "test_losses.py::test_the_teacher_is_the_stock_model"),
    Mutation("the weight of a loss", "lora",
             "self.weights[name] * loss", "loss",
             "test_losses.py::test_they_are_what_their_definitions_say"),
    Mutation("every clip once an epoch", "lora",
             "divmod(number, clips)", "divmod(number, clips + 1)",
             "test_trainer.py::TestNumbers::test_every_clip_is_shown_once_an_epoch"),
    # --- pipelines
    Mutation("the structure in SSIM", "pipelines",
             "2 * covariance + c2", "covariance + c2",
             "test_compare.py::test_ssim_follows_its_definition"),
    Mutation("a LoRA of another width", "pipelines",
             "if wanted is not None and wanted != size:", "if False:",
             "pipelines/test_bad_input.py::TestLora::test_one_of_another_width"),
    Mutation("frames that Wan adds", "diffattn",
             "num_frames - 1 if pipe.vae_scale_factor_temporal == 1 else num_frames", "num_frames",
             "test_generate.py::TestOneVideo::test_a_vae_that_keeps_every_frame_gives_the_frames_asked_for"),
)  # fmt: skip


def code(root: Path, folder: str) -> list[Path]:
    return sorted((root / folder).rglob("*.py"))


def ends_with(path: Path, name: str) -> bool:
    """Does a path end with these parts?"""
    parts = Path(name).parts
    return path.parts[-len(parts) :] == parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutations and write down which were caught; 1 if any was not, 2 if none was tried."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="those whose name contains this; writes no file")
    only = parser.parse_args(arguments).only
    chosen = [mutation for mutation in MUTATIONS if only in mutation.what]
    problems = list(unusable(chosen))
    if problems or not chosen:
        print(*problems or [f"no mutation is called {only!r}"], sep="\n", file=sys.stderr)
        return 2
    with copied_checkout() as root:
        nodes = sorted({mutation.node(root) for mutation in chosen})
        print(f"{len(nodes)} tests without a mutation ...", flush=True)
        exit_code, output = run_tests(root, nodes)
        if exit_code != PASSED:
            print(
                output, "the tests must pass before anything is broken", sep="\n", file=sys.stderr
            )
            return 2
        rows = []
        for mutation in chosen:
            rows.append(tried(mutation, root))
            print(rows[-1], flush=True)
    survived = sum("survived" in row for row in rows)
    head = [
        "# What a wrong line makes fail",
        "",
        f"The last run of `python tests/mutations.py`: {len(rows) - survived} of {len(rows)} edits"
        f" are caught by the test that is named, {survived} survive.",
        "",
        "| what is broken | in | before | after | test | result |",
        "|---|---|---|---|---|---|",
    ]
    if not only:
        REPORT.write_text("\n".join([*head, *rows, ""]), "utf-8")
    return int(survived > 0)


def unusable(mutations: Sequence[Mutation]) -> Iterator[str]:
    """What keeps mutations from being tried: lines and tests that are no longer there."""
    for mutation in mutations:
        try:
            mutation.place(ROOT)
            mutation.node(ROOT)
        except ValueError as error:
            yield str(error)


def tried(mutation: Mutation, root: Path) -> str:
    """A row of the report: what the test says of the mutation in a copy of the checkout."""
    path = mutation.place(root)
    sound = path.read_text("utf-8")
    path.write_text(sound.replace(mutation.old, mutation.new), "utf-8")
    start = time.monotonic()
    try:
        exit_code, output = run_tests(root, [mutation.node(root)], "-x")
    finally:
        path.write_text(sound, "utf-8")
    result = {PASSED: "**survived**", FAILED: "caught"}.get(exit_code)
    if result is None:
        # Code that cannot be imported, or a test that is not there, says nothing of the tests.
        print(output, file=sys.stderr)
        result = f"**survived** (pytest ended with {exit_code})"
    print(f"{time.monotonic() - start:.0f} s", end=" ")
    cells = (
        mutation.what, path.relative_to(root), *(_code(x) for x in (mutation.old, mutation.new)),
        mutation.test, result,
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _code(text: str) -> str:
    """A text as code in a cell of a table."""
    text = " ⏎ ".join(line.strip() for line in text.splitlines()).replace("|", r"\|")
    return f"`{text}`" if text else "nothing"


@contextmanager
def copied_checkout() -> Iterator[Path]:
    """A copy of the files of this checkout, committed or not, that can be imported from."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="diffattn-mutations-") as folder:
        root = Path(folder)
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, root / name)
        link_package(root)
        yield root


def link_package(root: Path) -> None:
    """Put the package together from its folders, as an editable install does."""
    setuptools = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    site = root / ".site"
    for name, folder in sorted(setuptools["package-dir"].items()):
        if "." not in name:
            (site / name).mkdir(parents=True)
            for path in (root / folder).iterdir():
                (site / name / path.name).symlink_to(path)
        else:
            (site / name.replace(".", "/")).symlink_to(root / folder)


def run_tests(root: Path, nodes: Sequence[str], *options: str) -> tuple[int, str]:
    """The exit code of pytest and what it printed."""
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *nodes],
        cwd=root, capture_output=True, text=True, check=False,
        # Files change within the second that bytecode would be compared by.
        env={**os.environ, "PYTHONPATH": str(root / ".site"), "PYTHONDONTWRITEBYTECODE": "1",
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr


if __name__ == "__main__":
    sys.exit(main())
