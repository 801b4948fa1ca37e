"""A calibrated policy against every uniform setting at equal work, on held-out prompts.

    python benchmarks/calibrate.py --folder outputs/calibrate --output benchmarks

writes benchmarks/calibrate.json, benchmarks/calibrate.md and benchmarks/policy.json.

How the figures are made:

- `diffattn calibrate` searches on the bundled model (16 x 12 x 12 tokens, 4 layers, 20 steps), with
  captions that the model was trained on. Held-out captions are not searched with.
- Then each held-out caption is rendered densely, under the policy and under every uniform setting:
  each method of the search with each dense warm-up of the search, one share of the pairs in all
  layers, heads and sparse steps. The share of a uniform setting is set so that it does at least the
  policy's work, as near to that as its parameters allow.
- "work" is the share of a dense run's attention FLOPs as `diffattn plan` counts them, warm-up and
  selection included. "visited" is measured: the share of the blocks of all attention calls of the
  run that were computed, by head.
- "PSNR" is the mean over held-out captions, against the dense clip of the same caption and noise.
  All settings are rendered with 16 captions, and the five best of them, which are hard to tell
  apart, with all. "better" is on how many captions the policy is nearer to dense than the setting,
  "by" the mean difference on these captions, and "p" the two-sided probability of the paired
  permutation test (all flips of signs, or 100,000 drawn ones), after Holm's correction for the
  number of settings.

A killed run goes on: renders that are done are kept in the folder. It makes about 850 renders: up
to 300 of the search, up to 22 settings with 16 captions, and 7 with 32 more. A render took 8 s of
one core, so that is two hours; `--renders 150 --held-out 16` takes one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import numpy as np
import torch

import diffattn
from diffattn import Policy, load_policy, save_policy
from diffattn.blocks import unpack_bits
from diffattn.methods import from_dict
from diffattn.methods.base import StaticMaskMethod
from diffattn.methods.selected_blocks import SelectedBlocksMethod
from diffattn.methods.vmoba import method as vmoba_method
from diffattn.pipelines.calibrate.candidates import Candidate, Maker, settings_of
from diffattn.pipelines.calibrate.run import PROMPTS, Budget, bundled_prompts, calibrate
from diffattn.pipelines.calibrate.search import WARM_UPS
from diffattn.pipelines.run.compare import psnr
from diffattn.pipelines.run.generate import render
from diffattn.pipelines.run.loading import LoadedModel, load_model
from diffattn.pipelines.run.request import Request
from diffattn.pipelines.run.sizing import complete
from diffattn.planning.plans import model_shape
from diffattn.samples.moving_shapes.captions import split_scenes

# Blocks of 32 tokens: the model has 2,304 tokens, which are 36 blocks of 64 only.
METHODS: tuple[dict[str, Any], ...] = (
    {"type": "block-topk", "block": 32},
    {"type": "block-topk", "block": 32, "order": "raster"},
    {"type": "block-topk", "block": 32, "remainder": "summary"},
    {"type": "vmoba"},
    {"type": "gna"},
)
POLICY, DENSE = "policy", "dense"
# Noise that no render of the search has.
FIRST_SEED = 10_000
# Captions of all settings, and the settings that have more.
CAPTIONS_OF_ALL = 16
CLOSE = 5
DRAWS = 100_000
MOST_FLIPS = 16


@dataclass(frozen=True)
class Case:
    """A setting to render with.

    Attributes:
        name: its name in the table.
        policy: None for the dense model.
        work: share of the dense FLOPs, by the plan.
    """

    name: str
    policy: Policy | None
    work: float


class Rows:
    """What has been rendered: PSNR and visited blocks by case and caption, on disk."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.path = folder / "rows.json"
        self._about = about
        self.found: dict[str, dict[str, list[float]]] = {}
        if self.path.exists():
            read = json.loads(self.path.read_text())
            if read["about"] != about:
                raise SystemExit(f"{self.path} is of another run ({read['about']}): remove it")
            self.found = read["rows"]

    def add(self, case: str, number: int, ratio: float, visited: float) -> None:
        self.found.setdefault(case, {})[str(number)] = [ratio, visited]
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"about": self._about, "rows": self.found}, indent=1))
        os.replace(part, self.path)

    def has(self, case: str, number: int) -> bool:
        return str(number) in self.found.get(case, {})

    def column(self, case: str, index: int) -> list[float]:
        of = self.found[case]
        return [of[str(n)][index] for n in range(len(of))]


@contextmanager
def visited_blocks() -> Iterator[list[tuple[float, int]]]:
    """The share of blocks of each sparse call that is computed, and the call's heads."""
    seen: list[tuple[float, int]] = []
    choose, attend, select = (
        SelectedBlocksMethod._chosen,
        StaticMaskMethod.attend,
        vmoba_method.select_blocks,
    )

    def chosen(self: Any, *arguments: Any) -> Any:
        out = choose(self, *arguments)
        seen.append((float(out.float().mean()), out.shape[-3] if out.dim() > 2 else 1))
        return out

    def attended(self: Any, query: Any, key: Any, value: Any, site: Any, **options: Any) -> Any:
        order = site.order or self.order(site.grid)
        seen.append((self.layout(site.grid, query.device, order).density, query.shape[2]))
        return attend(self, query, key, value, site, **options)

    def selected(query: Any, key: Any, blocks: Any, *arguments: Any, **options: Any) -> Any:
        bits = select(query, key, blocks, *arguments, **options)
        lengths = blocks.starts.diff().float()
        part = unpack_bits(bits, blocks.blocks).float() @ (lengths / lengths.sum())
        seen.append((float(part.mean()), query.shape[2]))
        return bits

    with ExitStack() as patches:
        for target, name, value in (
            (SelectedBlocksMethod, "_chosen", chosen),
            (StaticMaskMethod, "attend", attended),
            (vmoba_method, "select_blocks", selected),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        yield seen


def find(folder: Path, request: Request, options: argparse.Namespace) -> Path:
    """Search, or go on with a search; the policy's file."""
    return calibrate(
        request, bundled_prompts(0, PROMPTS), METHODS, options.work, folder / "search",
        Budget(options.renders, None), lambda line: print(line, flush=True), print,
    )  # fmt: skip


def cases(policy: Policy, loaded: LoadedModel, request: Request) -> Iterator[Case]:
    """The policy, and every uniform setting that can do at least its work."""
    run = complete(request, loaded)
    assert run.request.steps is not None
    own = Maker(model_shape(loaded.pipe), run.grid, run.request.steps, 1.0).work(policy)
    yield Case(POLICY, policy, own)
    maker = Maker(model_shape(loaded.pipe), run.grid, run.request.steps, own)
    alike = set()
    for settings, warm_up in product(METHODS, WARM_UPS):
        if warm_up >= own:
            continue
        candidate = Candidate(settings_of(from_dict(settings)), warm_up)
        made = maker.policy(candidate, from_above=True)
        words = ", ".join(f"{k}={v}" for k, v in settings.items() if k not in ("type", "block"))
        name = f"{settings['type']}{f' ({words})' if words else ''}, {warm_up:.0%} dense first"
        if made is None:
            print(f"left out, no parameter does about the policy's work: {name}", flush=True)
        elif maker.in_run(made[0]) not in alike:
            # In runs of few steps several warm-ups are the same.
            alike.add(maker.in_run(made[0]))
            yield Case(name, *made)


def measure(
    found: list[Case], rows: Rows, loaded: LoadedModel, request: Request, folder: Path, many: int
) -> None:
    """Render every case with the first `many` held-out captions."""
    held_out = split_scenes()[1]
    scenes = random.Random(0).sample(held_out, len(held_out))[:many]
    heads = loaded.pipe.transformer.config.num_attention_heads
    for number, scene in enumerate(scenes):
        own = replace(request, prompt=scene.caption, seed=FIRST_SEED + number)
        run = complete(own, loaded)
        path = folder / f"dense-{number:02d}.npy"
        left = [case for case in found if not rows.has(case.name, number)]
        if not left:
            continue
        if path.exists():
            dense = np.load(path)
        else:
            dense = render(run.request, loaded, DENSE, shown=False).frames
            part = path.with_name(f".part-{path.name}")
            np.save(part, dense)
            os.replace(part, path)
        for case in left:
            attachment = diffattn.set_attn_processor(loaded.pipe, case.policy)
            assert attachment is not None
            with visited_blocks() as seen:
                made = render(run.request, loaded, case.name, shown=False)
            calls = attachment.sparse_calls + attachment.dense_calls
            sparse = sum(share * many_heads for share, many_heads in seen)
            others = calls * heads - sum(many_heads for _, many_heads in seen)
            diffattn.set_attn_processor(loaded.pipe, None)
            visited = (sparse + others) / (calls * heads)
            rows.add(case.name, number, psnr(dense, made.frames), visited)
            print(f"[{number + 1}/{many}] {case.name}: {rows.column(case.name, 0)[-1]:.2f} dB",
                  flush=True)  # fmt: skip


def permutation_test(differences: list[float]) -> float:
    """The two-sided probability of so large a mean, if every sign were a fair coin's."""
    values = np.array(differences)
    if len(values) <= MOST_FLIPS:
        signs = np.array(list(product((1, -1), repeat=len(values))))
        return float((np.abs(signs @ values) >= abs(values.sum()) - 1e-12).mean())
    signs = np.random.default_rng(0).choice((1, -1), size=(DRAWS, len(values)))
    hits = int((np.abs(signs @ values) >= abs(values.sum()) - 1e-12).sum())
    return (hits + 1) / (DRAWS + 1)


def holm(probabilities: list[float]) -> list[float]:
    """Probabilities corrected for their number (Holm 1979), in the same order."""
    corrected, largest = [0.0] * len(probabilities), 0.0
    order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * probabilities[index]))
        corrected[index] = largest
    return corrected


def results(found: list[Case], rows: Rows) -> list[dict[str, Any]]:
    """The lines of the table, the policy first and then the settings from the best."""
    own_ratios = rows.column(POLICY, 0)
    lines = []
    for case in found:
        ratios = rows.column(case.name, 0)
        # Some settings have fewer captions, the first ones.
        pairs = zip(own_ratios, ratios, strict=False)
        differences = [ours - theirs for ours, theirs in pairs]
        lines.append(
            {
                "setting": case.name,
                "work": case.work,
                "visited": fmean(rows.column(case.name, 1)),
                "psnr_db": fmean(ratios),
                "better": sum(difference > 0 for difference in differences),
                "captions": len(differences),
                "by_db": fmean(differences),
                "p": permutation_test(differences),
                "ratios": ratios,
            }
        )
    own, *others = lines
    for line, p in zip(others, holm([line["p"] for line in others]), strict=True):
        line["p"] = p
    return [own, *sorted(others, key=lambda line: -line["psnr_db"])]


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| setting | work | visited | PSNR, dB | better | by, dB | p |", "|---" * 7 + "|"]
    for line in lines:
        head = f"| {line['setting']} | {line['work']:.1%} | {line['visited']:.1%}"
        tail = " | | | |"
        if line["setting"] != POLICY:
            tail = (
                f" | {line['better']} of {line['captions']} | {line['by_db']:+.2f}"
                f" | {line['p']:.2g} |"
            )
        rows.append(f"{head} | {line['psnr_db']:.2f}{tail}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="keeps the renders")
    parser.add_argument("--output", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--work", type=float, default=0.3, help="share of the dense FLOPs")
    parser.add_argument("--renders", type=int, default=300, help="of the search")
    parser.add_argument("--held-out", type=int, default=48, help="captions, from 2 to 50")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    request = Request(prompt="a", attention={"type": "dense"}, steps=options.steps)
    policy = load_policy(find(options.folder, request, options))
    loaded = load_model(request)
    found = list(cases(policy, loaded, request))
    about = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "diffattn": diffattn.__version__,
        "work": options.work,
        "renders": options.renders,
        "held_out": options.held_out,
        "steps": options.steps,
    }
    # Rows of another policy are of another run.
    rules = policy.to_dict()["rules"]
    rows = Rows(options.folder, json.loads(json.dumps(about | {"rules": rules})))
    of_all = min(options.held_out, CAPTIONS_OF_ALL)
    measure(found, rows, loaded, request, options.folder, of_all)
    uniform = sorted(found[1:], key=lambda case: -fmean(rows.column(case.name, 0)[:of_all]))
    close = [found[0], *uniform[:CLOSE]]
    measure(close, rows, loaded, request, options.folder, options.held_out)
    lines = results(found, rows)
    record = {"about": about, "found": policy.recorded.found["candidate"], "rows": lines}
    (options.output / "calibrate.json").write_text(json.dumps(record, indent=1) + "\n")
    save_policy(policy, options.output / "policy.json")
    words = (
        (__doc__ or "")
        .replace("    python", "```\npython")
        .replace("\n\nwrites", "\n```\n\nwrites")
    )
    text = f"# A calibrated policy\n\n{words}\nThe policy: {policy.words()}.\n\n{table(lines)}\n"
    (options.output / "calibrate.md").write_text(text)
    print(table(lines))


if __name__ == "__main__":
    main()
