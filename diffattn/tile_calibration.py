"""Calibration of AttentionTileAttn: the sparsest mask that each site of a model bears."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from diffattn._checks import check, number
from diffattn.attach.attachment import Attachment, set_attn_processor
from diffattn.methods.agent.agents import dense_attention
from diffattn.methods.attention_tile import AttentionTileAttn
from diffattn.methods.base import Site, SiteWeights

# One frame, and the shares of the paper's masks for 24 frames: 3, 4, 6, 8 and 12 of them. Of 8
# frames they are its 1, 2, 3 and 4.
CANDIDATES = (1, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2)


def calibrate_attention_tile(
    target: Any,
    run: Callable[[], object],
    error: float,
    method: AttentionTileAttn | None = None,
    *,
    global_frames: Iterable[int | float] = CANDIDATES,
) -> dict[str, AttentionTileAttn | None]:
    """Choose the sparsest attention tile for each site of a model, from a few steps of a run.

    Attention stays dense during the run, so that each site is measured on the activations of the
    dense model. In each call that `method` would make sparse, the output under every mask is
    compared with the dense output. The error of a mask is the sum of the squared differences over
    all video tokens and calls, divided by the sum of the squares of the dense output. Each site
    gets the mask with the fewest token pairs among those with an error below `error`. An
    attachment that `target` had before is removed.

    The paper's `error` is between 0.025 and 0.4, by a loss that it does not define in full.

        found = calibrate_attention_tile(pipe, lambda: pipe("a cat", num_inference_steps=10), 0.05)
        pipe.set_attn_processor(found)
        saved = json.dumps({site: tile and tile.to_dict() for site, tile in found.items()})

    Args:
        target: a diffusers pipeline, or a denoiser.
        run: calls `target`, at the size that the masks are to be used at, perhaps with several
            prompts.
        error: the error that masks must stay below.
        method: the steps and the layers that are to be sparse, and the policy for references;
            `AttentionTileAttn()` when None.
        global_frames: the values of `AttentionTileAttn.global_frames` to choose from.

    Returns:
        A method for each site, by the name of its module, as `set_attn_processor` takes them; None
        for a site that stays as it is, because no mask is good enough, or because `method` has no
        sparse calls there. Equal methods are one object. Denoisers of one pipeline with sites of
        equal names share the methods.

    Raises:
        ValueError: if `error` is no number above 0, `global_frames` is empty, no call was sparse,
            no mask leaves out a pair, or no site has a mask that is good enough.
    """
    check("error", error, number(above=0))
    method = method or AttentionTileAttn()
    candidates = tuple(replace(method, global_frames=value) for value in global_frames)
    if not candidates:
        raise ValueError("global_frames is empty: give at least one value to choose from")
    given = {f.name: getattr(method, f.name) for f in fields(AttentionTileAttn) if f.init}
    attachment = set_attn_processor(target, _Measuring(candidates=candidates, **given))
    assert attachment is not None
    try:
        run()
        errors = _errors_by_site(attachment)
    finally:
        set_attn_processor(target, None)
    _check_measured(errors.values(), candidates)
    chosen = {name: measured.sparsest(error) for name, measured in errors.items()}
    if all(index is None for index in chosen.values()):
        raise ValueError(_none_is_good_enough(errors, candidates, error))
    return {name: None if index is None else candidates[index] for name, index in chosen.items()}


class _Errors(SiteWeights):
    """Sums over all calls of one or more sites, for each candidate.

    Attributes:
        difference: float64 (candidates,), the sums of squared differences from the dense output.
        square: float64 (), the sum of squares of the dense output.
        pairs: int64 (candidates,), the pairs of video tokens that attended.
        all_pairs: int64 (), the pairs of video tokens.
    """

    def __init__(self, candidates: int) -> None:
        super().__init__()
        self.difference = torch.zeros(candidates, dtype=torch.float64)
        self.square = torch.zeros((), dtype=torch.float64)
        self.pairs = torch.zeros(candidates, dtype=torch.int64)
        self.all_pairs = torch.zeros((), dtype=torch.int64)

    def add(self, other: _Errors) -> None:
        self.difference += other.difference
        self.square += other.square
        self.pairs += other.pairs
        self.all_pairs += other.all_pairs

    @property
    def leaves_out(self) -> torch.Tensor:
        """bool (candidates,): whether the mask left out pairs in any call."""
        return self.pairs < self.all_pairs

    @property
    def relative(self) -> torch.Tensor:
        """float64 (candidates,): the error of each mask; infinite for an output of 0."""
        return (self.difference / self.square).nan_to_num(nan=torch.inf)

    def sparsest(self, error: float) -> int | None:
        """The index of the mask with the fewest pairs among those below `error`; None if none."""
        allowed = (self.relative < error) & self.leaves_out
        if not allowed.any():
            return None
        return int(self.pairs.where(allowed, self.all_pairs).argmin())


@dataclass(frozen=True, kw_only=True)
class _Measuring(AttentionTileAttn):
    """Dense attention that also sums up the errors of masks."""

    candidates: tuple[AttentionTileAttn, ...]

    def layer_weights(self, layer: int) -> SiteWeights:
        return _Errors(len(self.candidates))

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
        own_scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = dense_attention(query, key, value, own_scale, key_mask)
        errors: Any = site.weights
        video, frames = site.grid.video, site.grid.frames
        goal = out[:, video].float()
        errors.square += _square(goal)
        errors.all_pairs += site.grid.video_tokens**2
        for i, candidate in enumerate(self.candidates):
            masked = candidate.attend(query, key, value, site, scale=scale, key_mask=key_mask)
            errors.difference[i] += _square(masked[:, video].float() - goal)
            errors.pairs[i] += candidate.frame_pairs(frames) * site.grid.frame_tokens**2
        return out


def _square(x: torch.Tensor) -> torch.Tensor:
    return (x * x).sum().cpu().double()


def _errors_by_site(attachment: Attachment) -> dict[str, _Errors]:
    """The sums of each site, by the name of its module, over all denoisers."""
    total: dict[str, _Errors] = {}
    for model in attachment.models.values():
        for name, site in model.sites.items():
            assert site.weights is not None
            errors = site.module.get_submodule(site.weights)
            assert isinstance(errors, _Errors)
            if name in total:
                total[name].add(errors)
            else:
                total[name] = errors
    return total


def _check_measured(measured: Iterable[_Errors], candidates: tuple[AttentionTileAttn, ...]) -> None:
    """Raise ValueError if no call was measured, or all masks are dense."""
    called = [errors for errors in measured if int(errors.all_pairs)]
    if not called:
        raise ValueError(
            "no attention call was sparse: run made none, or all its steps or layers were to stay"
            " dense"
        )
    if not any(errors.leaves_out.any() for errors in called):
        values = ", ".join(f"{tile.global_frames:.3g}" for tile in candidates)
        raise ValueError(
            f"no mask leaves out a pair of frames: with global_frames of {values} all or all but"
            f" one of the video's frames are global; give smaller values, or make longer videos"
        )


def _none_is_good_enough(
    errors: dict[str, _Errors], candidates: tuple[AttentionTileAttn, ...], error: float
) -> str:
    least, name, index = min(
        (float(one.relative[i]), name, i)
        for name, one in errors.items()
        for i in one.leaves_out.nonzero().flatten().tolist()
    )
    return (
        f"no site has a mask with an error below {error:g}: the smallest is {least:.3g}, of {name}"
        f" with global_frames={candidates[index].global_frames:.3g}. Allow a larger error, or give"
        f" more global_frames to choose from"
    )
