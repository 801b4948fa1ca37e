"""The run of a comparison: render each sample of each case, measure it, and add its row."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from diffattn.counting import PairCount, counted_pairs
from diffattn.operator import BACKEND_VARIABLE

from ..errors import RunInterruptedError, UserError, one_line
from ..run.generate import Rendering, attached, render, sparse_throughout
from ..run.loading import LoadedModel, choose_device, load_model
from ..run.machine import describe_device, quiet_libraries
from ..run.memory import check_memory
from ..run.refusals import refusals
from ..run.request import BUNDLED_MODEL
from ..run.sizing import Run, complete
from ..run.sources import Sources, read_sources
from ..run.trained_lora import loras_of, read_lora_record
from ..run.video import write_picture, write_video
from ..run.vocabulary import warn_of_words
from . import vbench
from .caches import cached, check_cache
from .case import DENSE, Case
from .clip import Clip
from .comparison import Comparison, Folder, Sample
from .mask_images import write_mask
from .measures import take
from .peak import peak_memory
from .sample_table import Row, SampleTable

_GO_ON = "the same command goes on from there"


def compare(
    comparison: Comparison,
    folder: Folder,
    only: Sequence[Case],
    say: Callable[[str], None],
    warn: Callable[[str], None],
    *,
    memory_check: bool = True,
) -> SampleTable:
    """Make the samples that the folder lacks.

    Args:
        comparison: the settings.
        folder: the folder, new or of an earlier run of the same settings.
        only: the cases to make now; what they are compared with is made in any case.
        say: takes lines for the user.
        warn: takes one-line warnings.
        memory_check: whether to refuse what the device has too little memory for.

    Returns:
        The table, with the rows of all runs so far.

    Raises:
        UserError: if the folder, the model, a case or a size is refused. All rows that were made
            are kept.
        RunInterruptedError: on Ctrl-C. All rows that were made are kept.
    """
    quiet_libraries()
    for lora in dict.fromkeys([comparison.base.lora, *(case.lora for case in only)]):
        if lora is not None:
            read_lora_record(lora)
    for case in only:
        check_cache(case.name, case.cache)
    device = describe_device(str(choose_device(comparison.base.device)))
    wanted = {case.name for case in only}
    wanted |= {comparison.reference(case).name for case in only}
    now = [case for case in comparison.cases if case.name in wanted or case.name == DENSE]
    with folder.opened(comparison, device, warn) as table:
        try:
            for cases in _by_model(now):
                phase = _Phase(comparison, folder, table, cases, say, warn)
                if phase.left:
                    phase.run(device, memory_check)
            vbench.score(folder, table, say)
        except KeyboardInterrupt:
            kept = [folder.samples] if table.rows else []
            raise RunInterruptedError(kept, _GO_ON if table.rows else "") from None
        return table


def _by_model(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The cases in groups that one loaded model serves, that of the dense model first."""
    groups: dict[Any, list[Case]] = {}
    for case in cases:
        group = groups.setdefault(case.loads, [])
        if case not in group:
            group.append(case)
    yield from groups.values()


class _Phase:
    """The part of a run that one loaded model makes.

    Attributes:
        left: samples and cases that have no row yet, sample by sample: all cases of a sample are
            timed one after another, so that other load on the machine falls on all of them.
    """

    def __init__(
        self,
        comparison: Comparison,
        folder: Folder,
        table: SampleTable,
        cases: Sequence[Case],
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._comparison, self._folder, self._table = comparison, folder, table
        self._say, self._warn = say, warn
        self.left = [
            (sample, case)
            for sample in comparison.samples
            for case in cases
            if not table.has(case.name, sample.key) or self._lacks_frames(case, sample, cases)
        ]
        self._warm: set[str] = set()
        self._left_out: set[str] = set()

    def _lacks_frames(self, case: Case, sample: Sample, cases: Sequence[Case]) -> bool:
        """Whether cases that have no row yet are to be compared with frames that are not there."""
        needed = case.name == DENSE or any(
            one.flex_of == case.name and not self._table.has(one.name, sample.key) for one in cases
        )
        return needed and not self._frames(case, sample).exists()

    def _frames(self, case: Case, sample: Sample) -> Path:
        """The file of the exact frames of a case that others are compared with."""
        if case.name == DENSE:
            return self._folder.dense_frames(sample)
        return self._folder.frames(self._comparison.stem(case), sample)

    def run(self, device: Mapping[str, Any], memory_check: bool) -> None:
        """Load the model, and make the samples.

        Args:
            device: of the run, as `describe_device` has it.
            memory_check: whether to refuse what the device has too little memory for.

        Raises:
            UserError: if the model or a case is refused.
        """
        base = self._comparison.base
        first = self.left[0][1].request(base, self._comparison.prompts[0], 0)
        if memory_check:
            check_memory(first)
        record = None if first.lora is None else read_lora_record(first.lora)
        sources = read_sources(first, self._say)
        loaded = load_model(first, record)
        names = " and ".join(str(lora.path) for lora in loras_of(first.lora))
        shown = f" with the LoRA {names}" if names else ""
        self._say(f"{base.model}{shown}: {loaded.dtype} on {loaded.device}")
        for name in dict.fromkeys(case.name for _, case in self.left):
            self._check(self._comparison.case(name), loaded, sources)
        for prompt in self._comparison.prompts:
            warn_of_words(loaded.pipe, prompt, self._warn)
        self._folder.begin(self._comparison, device)
        start = time.monotonic()
        for number, (sample, case) in enumerate(self.left, start=1):
            if case.name in self._left_out:
                continue
            try:
                line = self._make(sample, case, loaded, sources)
            except UserError as error:
                if not case.is_floor:
                    raise
                # A model may overflow in half precision; the methods can be compared all the same.
                self._warn(f"left out: {error}")
                self._left_out.add(case.name)
                continue
            each = (time.monotonic() - start) / number
            rest = _words(each * (len(self.left) - number))
            self._say(
                f"[{number}/{len(self.left)}] {case.name}, sample {sample.number}: {line}{rest}"
            )

    def _settled(self, sample: Sample, case: Case, loaded: LoadedModel, sources: Sources) -> Run:
        request = case.request(self._comparison.base, sample.prompt, sample.seed)
        return complete(request, loaded, sources, pictures=True)

    def _check(self, case: Case, loaded: LoadedModel, sources: Sources) -> None:
        """Refuse a case that the model cannot have, before anything is rendered."""
        try:
            run = self._settled(self._comparison.samples[0], case, loaded, sources)
            assert run.request.steps is not None
            with refusals(), attached(loaded.pipe, run) as attachment:
                if attachment is not None:
                    attachment.describe(run.grid, run.request.steps)
            with cached(loaded.pipe, case.cache, run.request.steps):
                pass
        except UserError as error:
            raise UserError(f"case {case.name!r}: {error}") from None

    def _make(self, sample: Sample, case: Case, loaded: LoadedModel, sources: Sources) -> str:
        """Render a sample, write its files and its row; return words about it."""
        run = self._settled(sample, case, loaded, sources)
        assert run.request.steps is not None
        kernel: AbstractContextManager[None] = nullcontext()
        if case.other_kernel:
            kernel = _other_kernel(loaded.device)
        elif case.flex_of is not None:
            kernel = _by_flex()
        try:
            with kernel, cached(loaded.pipe, case.cache, run.request.steps):
                self._warm_up(run, case, loaded)
                with (
                    attached(loaded.pipe, run) as attachment,
                    counted_pairs() as pairs,
                    peak_memory(loaded.device) as peak,
                ):
                    made = render(run.request, loaded, case.name, run.sources, shown=False)
        except UserError as error:
            kept = f" (kept: {self._folder.samples})" if self._table.rows else ""
            raise UserError(f"case {case.name!r}, sample {sample.number}: {error}{kept}") from None
        video = self._write(sample, case, run, made)
        if self._table.has(case.name, sample.key):
            return "its frames were made again"
        if attachment is not None and not case.is_floor:
            method = attachment.describe(run.grid, run.request.steps).method
            write_mask(self._folder.mask(self._comparison.stem(case)), pairs, method, run.grid)
        clip = self._clip(run, made)
        reference = clip if case.name == DENSE else self._reference(sample, case, clip)
        row = Row(
            case=case.name,
            prompt=sample.prompt,
            seed=sample.seed,
            seconds=made.total_seconds,
            loop_seconds=made.loop_seconds,
            memory_gib=peak.gib,
            density=_density(pairs, run, case, attachment),
            file=str(video.relative_to(self._folder.path)),
            measures=take(self._comparison.measures, reference, clip, case.name == DENSE),
        )
        self._table.add(row)
        ratio = row.number("psnr")
        closeness = "" if ratio is None else f"PSNR {ratio:.1f} dB, "
        if ratio == math.inf:
            closeness = "equal to dense, "
        return f"{closeness}{row.seconds:.1f} s"

    def _warm_up(self, run: Run, case: Case, loaded: LoadedModel) -> None:
        """Run one untimed step of a case that this process has not run yet, all of it sparse."""
        if case.name in self._warm:
            return
        step = dataclasses.replace(run.request, steps=1)
        method = run.method if run.method.type == "dense" else sparse_throughout(run)
        with attached(loaded.pipe, dataclasses.replace(run, method=method)):
            render(step, loaded, case.name, run.sources, shown=False)
        self._warm.add(case.name)

    def _write(self, sample: Sample, case: Case, run: Run, made: Rendering) -> Path:
        """Write the video, and the exact frames where others are compared with them."""
        fps = run.request.fps
        path = self._folder.video(self._comparison.stem(case), sample, picture=fps is None)
        part = path.with_name(f".part-{path.name}")
        if fps is None:
            from PIL import Image

            write_picture(part, Image.fromarray(made.frames[0]))
        else:
            write_video(part, made.frames, fps)
        part.replace(path)
        if self._comparison.is_reference(case):
            exact = self._frames(case, sample)
            part = exact.with_name(f".part-{exact.name}")
            more = {"audio": made.audio, "fps": fps}
            given: dict[str, Any] = {name: x for name, x in more.items() if x is not None}
            np.savez_compressed(part, frames=made.frames, **given)
            part.replace(exact)
        return path

    def _clip(self, run: Run, made: Rendering) -> Clip:
        bundled = self._comparison.base.model == BUNDLED_MODEL
        return Clip(made.frames, run.request.fps, run.request.prompt, bundled, made.audio)

    def _reference(self, sample: Sample, case: Case, like: Clip) -> Clip:
        """The clip that a case is compared with."""
        path = self._frames(self._comparison.reference(case), sample)
        try:
            with np.load(path) as found:
                frames, audio = found["frames"], found.get("audio")
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(
                f"cannot read {path}: {error}; remove it to have it made anew"
            ) from None
        if frames.shape != like.frames.shape:
            raise UserError(
                f"{path} holds frames {frames.shape}, not {like.frames.shape}: choose another"
                f" folder"
            )
        return dataclasses.replace(like, frames=frames, audio=audio)


def _density(pairs: PairCount, run: Run, case: Case, attachment: Any) -> float | str:
    """The share of the pairs that were computed in all calls of attention."""
    if case.cache is not None:
        return "calls left out"  # the share is that of the other calls
    if attachment is None:
        return 1.0
    work = run.method.work(run.grid, 0, 1, 64)
    if work is not None and work.density is None and pairs.sparse_calls:
        return "no pairs"
    found = pairs.density
    return "not counted" if found is None else found


@contextmanager
def _other_kernel(device: str) -> Iterator[None]:
    """Have torch compute dense attention by another kernel than it would choose.

    On a CPU torch fuses attention, and here computes it by plain matrix products. On a GPU those
    would hold a matrix of tokens x tokens: there it is the memory-efficient kernel instead of flash
    attention.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_cpu = torch.device(device).type == "cpu"
    with sdpa_kernel(SDPBackend.MATH if on_cpu else SDPBackend.EFFICIENT_ATTENTION):
        yield


@contextmanager
def _by_flex() -> Iterator[None]:
    """Have torch's compiled FlexAttention compute the masks of methods.

    Raises:
        UserError: if FlexAttention cannot be compiled, or refuses a mask or a size.
    """
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = "flex"
    try:
        yield
    except UserError:
        raise
    except RuntimeError as error:  # torch's compilers raise errors of many types, all of this one
        raise UserError(f"torch's FlexAttention does not work here ({one_line(error)})") from None
    finally:
        if before is None:
            del os.environ[BACKEND_VARIABLE]
        else:
            os.environ[BACKEND_VARIABLE] = before


def _words(seconds: float) -> str:
    if seconds < 90:
        return "" if seconds == 0 else f"; {seconds:.0f} s left"
    return f"; {seconds / 60:.0f} min left"
