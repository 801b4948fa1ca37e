"""`diffattn mask` for a method that selects by content: a run up to one call, and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffattn.methods.base import Site
from diffattn.methods.vmoba.method import VMoBAAttn

from ..errors import UserError
from ..run.loading import load_model
from ..run.machine import quiet_libraries
from ..run.request import Request
from ..run.sizing import call_arguments, complete

if TYPE_CHECKING:
    from diffattn.draw import Image, Place


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


@dataclass(frozen=True, kw_only=True)
class _Watched(VMoBAAttn):
    """The method, with a function that sees the arguments of each call.

    Attributes:
        watch: takes the method and the call's query, key, site and key mask.
    """

    watch: Callable[[VMoBAAttn, torch.Tensor, torch.Tensor, Site, torch.Tensor | None], None] = (
        field(default=lambda *_: None, compare=False, repr=False)
    )

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
        self.watch(self, query, key, site, key_mask)
        return super().attend(query, key, value, site, scale=scale, key_mask=key_mask)


def draw_selection(
    method: VMoBAAttn,
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
    fitted, site, bits = _seen(method, request, loaded, step, call)
    place = draw.middle(site.grid) if place is None else place
    try:
        draw.check_query(site.grid, place)
    except ValueError as error:
        raise UserError(error) from None
    mask = fitted.selection_mask(bits[call.head], site.grid, call.layer)
    kind = fitted.partitions[fitted.layer_kind(call.layer)]
    share = float((mask.chosen.float() @ mask.block_of.bincount().float()).mean())
    where = f"step {step} of {request.steps}, layer {call.layer} ({kind} blocks), head {call.head}"
    yield f'{request.model}, "{request.prompt}", seed {request.seed}: {where}'
    yield f"{site.grid}: {site.grid.tokens} tokens in {mask.chosen.shape[1]} blocks"
    yield f"density: {share / site.grid.tokens:.4%} of the token pairs attend"
    counts = mask.chosen[site.grid.video].sum(1)
    yield (
        f"selected: {int(counts.min())} to {int(counts.max())} blocks by a query, "
        f"{float(counts.float().mean()):.2f} on average"
    )
    words = [draw.method_words(fitted), f'{request.model}: "{request.prompt}". {where}.']
    yield str(write(draw.selection_picture(mask, words, place)))


def _seen(
    method: VMoBAAttn, request: Request, loaded: Any, step: int, call: Call
) -> tuple[VMoBAAttn, Site, torch.Tensor]:
    """Run up to the call: the fitted method, the site, and the bits (heads, tokens, words)."""
    import diffattn

    found: list[tuple[VMoBAAttn, Site, torch.Tensor]] = []
    here: list[bool] = []

    def watch(
        fitted: VMoBAAttn,
        query: torch.Tensor,
        key: torch.Tensor,
        site: Site,
        key_mask: torch.Tensor | None,
    ) -> None:
        if here and attachment.clock.step == step - 1:
            # With guidance in one batch the prompt's sample is the last.
            bits = fitted.selection(query, key, site, key_mask=key_mask)[-1]
            own = {name: getattr(fitted, name) for name in settings}
            found.append((VMoBAAttn(**own), site, bits))
            raise _SeenError

    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    attachment: Any = diffattn.set_attn_processor(loaded.pipe, _Watched(**settings, watch=watch))
    hooks = []
    try:
        for site in _sites(loaded.pipe, call.layer):
            hooks.append(site.register_forward_pre_hook(lambda *_: here.append(True)))
            hooks.append(site.register_forward_hook(lambda *_: here.clear(), always_call=True))
        loaded.pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(request.seed)
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
