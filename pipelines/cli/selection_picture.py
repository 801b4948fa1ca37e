"""`diffattn mask` for a method that selects by content: a picture of one call.

The call is one of a run, or a call without a model, of random queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffattn.methods.base import Method, Site

from ..errors import UserError
from ..run.loading import load_model
from ..run.machine import quiet_libraries
from ..run.request import Request
from ..run.sizing import call_arguments, complete

if TYPE_CHECKING:
    from diffattn import TokenGrid
    from diffattn.draw import Image, Place
    from diffattn.methods.call_selection import AttentionCall, CallSelection

# Channels of random queries and keys: as many as in most models' heads.
_HEAD_DIM = 64


@dataclass(frozen=True)
class Call:
    """The attention call to draw.

    Attributes:
        step: denoising step, counted from 1; the middle step when None.
        layer, head: counted from 0.
    """

    step: int | None = None
    layer: int = 0
    head: int = 0

    def __post_init__(self) -> None:
        """Raise UserError for a number before the first step, layer or head."""
        if self.step is not None and self.step < 1:
            raise UserError(f"--step counts denoising steps from 1, and is {self.step}")
        for name in ("layer", "head"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} counts from 0, and is {getattr(self, name)}")


class _SeenError(Exception):
    """Ends the run once the selection of the call is known."""


def draw_random(
    method: Method,
    grid: TokenGrid,
    place: Place,
    layer: int,
    seed: int,
    write: Callable[[Image], Path],
) -> Iterator[str]:
    """Yield lines about the selection of random queries and keys, and write the picture.

    Args:
        method: the method, as `for_model` gives it.
        grid: the tokens.
        place: frame, row and column of the token whose neighbourhood is shown.
        layer: index of the block of the model, from 0.
        seed: of the queries and keys.
        write: takes the picture and returns the path of its file.

    Raises:
        UserError: if the layer or the seed is negative.
    """
    from diffattn import draw
    from diffattn.methods.call_selection import AttentionCall, selection_of_call, smooth_tokens
    from diffattn.methods.words import reference_words

    Call(layer=layer)  # checks the number
    if seed < 0:
        raise UserError(f"--seed must be 0 or more, and is {seed}")
    tokens = smooth_tokens(grid, _HEAD_DIM, seed)
    call = AttentionCall(*tokens, Site("", layer, layer + 1, grid))
    selection = selection_of_call(method, call)
    assert selection is not None
    what = f"Smooth random queries and keys of seed {seed}, not those of a model"
    yield f"{what}: layer {layer} ({selection.blocks})"
    if grid.references:
        yield f"references: {reference_words(method, grid)}"
    yield from _figures(selection)
    words = [draw.method_words(method), f"{what}. Layer {layer} ({selection.blocks})."]
    if grid.references:
        words.append(f"References: {reference_words(method, grid)}.")
    yield str(write(draw.selection_picture(selection, words, place)))


def _figures(selection: CallSelection) -> Iterator[str]:
    mask, grid = selection.pairs, selection.pairs.grid
    yield f"{grid}: {grid.tokens} tokens in {mask.chosen.shape[1]} blocks"
    density = float(selection.key_counts().mean()) / grid.tokens
    yield f"density: {density:.4%} of the token pairs attend"
    counts = mask.chosen[grid.video].sum(1)
    yield (
        f"selected: {int(counts.min())} to {int(counts.max())} blocks by a query, "
        f"{float(counts.float().mean()):.2f} on average"
    )
    if selection.rest is not None:
        yield f"rest: every other key is seen {selection.rest_words}"


def draw_selection(
    method: Method,
    request: Request,
    call: Call,
    place: Place | None,
    write: Callable[[Image], Path],
) -> Iterator[str]:
    """Run the pipeline up to one call, yield lines about its selection, and write the picture.

    Args:
        method: the method as the user gave it.
        request: the run; the method of the request is not used.
        call: the call to draw.
        place: frame, row and column of the token whose neighbourhood is shown; the middle of the
            grid when None.
        write: takes the picture and returns the path of its file.

    Raises:
        UserError: if the run has no such step, layer, head or token, or the call stays dense.
    """
    from diffattn import draw
    from diffattn.methods.call_selection import selection_of_call

    quiet_libraries()
    loaded = load_model(request)
    request = complete(request, loaded).request
    assert request.steps is not None
    step = call.step or request.steps // 2 + 1
    if step > request.steps:
        raise UserError(f"--step {step}: the run has {request.steps} steps")
    for attention in _sites(loaded.pipe, call.layer):
        if call.head >= attention.heads:
            raise UserError(f"--head {call.head}: the model has heads 0 to {attention.heads - 1}")
    fitted, seen = _seen(method, request, loaded, step, call)
    grid = seen.site.grid
    place = draw.middle(grid) if place is None else place
    try:
        draw.check_query(grid, place)
    except ValueError as error:
        raise UserError(error) from None
    # With guidance in one batch the prompt's sample is the last.
    selection = selection_of_call(fitted, seen, head=call.head)
    assert selection is not None
    where = f"step {step} of {request.steps}, layer {call.layer} ({selection.blocks})"
    where += f", head {call.head}"
    yield f'{request.model}, "{request.prompt}", seed {request.seed}: {where}'
    yield from _figures(selection)
    words = [draw.method_words(fitted), f'{request.model}: "{request.prompt}". {where}.']
    yield str(write(draw.selection_picture(selection, words, place)))


def _seen(
    method: Method, request: Request, loaded: Any, step: int, call: Call
) -> tuple[Method, AttentionCall]:
    """Run up to the call: the method as fitted to the model, and the call."""
    import diffattn

    found: list[tuple[Method, AttentionCall]] = []
    here: list[bool] = []

    def watch(fitted: Method, seen: AttentionCall) -> None:
        if here and attachment.clock.step == step - 1:
            found.append((type(method)(**_parameters(fitted)), seen))
            raise _SeenError

    watched = _watched(type(method), watch)(**_parameters(method))
    attachment: Any = diffattn.set_attn_processor(loaded.pipe, watched)
    hooks = []
    try:
        for site in _sites(loaded.pipe, call.layer):
            hooks.append(site.register_forward_pre_hook(lambda *_: here.append(True)))
            hooks.append(site.register_forward_hook(lambda *_: here.clear(), always_call=True))
        loaded.pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        # Weights that a method adds, such as those of SLA, are not trained: the selection is that
        # of a model before training.
        loaded.pipe(**call_arguments(request, loaded), generator=generator, output_type="latent")
    except _SeenError:
        return found[0]
    finally:
        for hook in hooks:
            hook.remove()
        diffattn.set_attn_processor(loaded.pipe, None)
    fitted = method.for_model("")
    raise UserError(
        f"step {step} of layer {call.layer} stays dense by the method's schedule"
        f" (dense_steps={fitted.dense_steps}, last_dense_steps={fitted.last_dense_steps},"
        f" dense_layers={fitted.dense_layers}): choose another, or --attn-arg dense_steps=0"
    )


def _watched(kind: type[Method], watch: Callable[[Method, AttentionCall], None]) -> type[Method]:
    """The class of a method, with a function that sees the arguments of each call."""
    from diffattn.methods.call_selection import AttentionCall

    @dataclass(frozen=True, kw_only=True)
    class Watched(kind):  # type: ignore[valid-type, misc]
        def attend(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            site: Site,
            *,
            scale: float | None = None,
            key_mask: torch.Tensor | None = None,
        ) -> torch.Tensor:
            watch(self, AttentionCall(query, key, value, site, scale, key_mask))
            out: torch.Tensor = super().attend(
                query, key, value, site, scale=scale, key_mask=key_mask
            )
            return out

    return Watched


def _parameters(method: Method) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in fields(method) if f.init}


def _sites(pipe: Any, layer: int) -> list[Any]:
    """The first attention module of a layer in each denoiser."""
    from diffattn.models import denoisers, family_of

    out = []
    for model in denoisers(pipe).values():
        layers = family_of(model).layers(model)
        names = [name for name, number in layers.items() if number == layer]
        if not names:
            raise UserError(
                f"--layer {layer}: {type(model).__name__} has layers 0 to {max(layers.values())}"
            )
        out.append(model.get_submodule(names[0]))
    return out
