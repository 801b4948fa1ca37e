"""Calibration of AgentAttn: its two factors for each block of a model, from dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from diffattn.attach.attachment import Attachment, set_attn_processor
from diffattn.methods.agent.agents import dense_attention
from diffattn.methods.agent.method import AgentAttn, asking, sharpness
from diffattn.methods.base import Site, SiteWeights

# From 0, where scores have no scale and are sharpest, to 1.5, which is softer than the usual 1.
CANDIDATES = tuple(i / 10 for i in range(16))


def calibrate_agent(
    target: Any,
    run: Callable[[], object],
    method: AgentAttn | None = None,
    *,
    k_scale2: Iterable[float] = CANDIDATES,
) -> AgentAttn:
    """Choose `k_scale2` and `k_shortcut` for each block of a model, from a few steps of a run.

    Attention stays dense during the run. In each call where `method` has agents, the output of the
    agents is compared with the dense output. Each block gets the `k_scale2` whose output, with the
    best `k_shortcut` for that `k_scale2`, is nearest in least squares. An attachment that `target`
    had before is removed.

    Blocks with factors of their own are compiled one by one: compile the whole denoiser, not its
    repeated blocks.

        method = calibrate_agent(pipe, lambda: pipe("a cat", num_inference_steps=10))
        pipe.set_attn_processor(method)
        Path("agent.json").write_text(json.dumps(method.to_dict()))  # for --attn-config

    Args:
        target: a diffusers pipeline, or a denoiser.
        run: calls `target`, at the size that the method is to be used at.
        method: the agents, and the steps that have them; `AgentAttn()` when None.
        k_scale2: the values to choose from.

    Returns:
        The method with two factors for each block; blocks without agents keep those of `method`.

    Raises:
        ValueError: if no call had agents, or `k_scale2` is empty.
    """
    method = method or AgentAttn()
    candidates = tuple(float(value) for value in k_scale2)
    if not candidates:
        raise ValueError("k_scale2 is empty: give at least one value to choose from")
    given = {f.name: getattr(method, f.name) for f in fields(AgentAttn) if f.init}
    attachment = set_attn_processor(target, _Comparing(candidates=candidates, **given))
    assert attachment is not None
    try:
        run()
        layers, sums = _sums_by_layer(attachment)
    finally:
        set_attn_processor(target, None)
    if not any(float(total.value_square) for total in sums.values()):
        raise ValueError(
            "no attention call had agents: run made none, all its steps were to stay dense, or"
            " boxes and strides make half as many agents as there are tokens, or more"
        )
    chosen = {layer: total.best(candidates) for layer, total in sums.items()}
    return replace(
        method,
        k_scale2=tuple(_chosen(chosen, layer, 0, method.k_scale2) for layer in range(layers)),
        k_shortcut=tuple(_chosen(chosen, layer, 1, method.k_shortcut) for layer in range(layers)),
    )


class _Sums(SiteWeights):
    """Sums over all calls of one or more sites, from which least squares find the factors.

    Each candidate has a residual r, the dense output minus the agents' output. The sums are over
    all elements of the tensors.

    Attributes:
        layer: index of the sites' block.
        residual_square: float64 (candidates,), the sums of r * r.
        residual_value: float64 (candidates,), the sums of r * value.
        value_square: float64 (), the sum of value * value.
    """

    def __init__(self, layer: int, candidates: int) -> None:
        super().__init__()
        self.layer = layer
        self.residual_square = torch.zeros(candidates, dtype=torch.float64)
        self.residual_value = torch.zeros(candidates, dtype=torch.float64)
        self.value_square = torch.zeros((), dtype=torch.float64)

    def add(self, other: _Sums) -> None:
        self.residual_square += other.residual_square
        self.residual_value += other.residual_value
        self.value_square += other.value_square

    def best(self, candidates: tuple[float, ...]) -> tuple[float, float] | None:
        """`k_scale2` and `k_shortcut` of the smallest sum of squares; None without a call."""
        if not float(self.value_square):
            return None
        shortcut = self.residual_value / self.value_square
        error = self.residual_square - shortcut * self.residual_value
        index = int(error.argmin())
        return candidates[index], float(shortcut[index])


@dataclass(frozen=True, kw_only=True)
class _Comparing(AgentAttn):
    """Dense attention that also sums up the distance of the agents' output from its own."""

    candidates: tuple[float, ...]

    def layer_weights(self, layer: int) -> SiteWeights:
        return _Sums(layer, len(self.candidates))

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
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = dense_attention(query, key, value, scale, key_mask)
        agents = self.agents(query, site, key_mask)
        if agents is None:
            return out
        sums: Any = site.weights
        division = self.division(site.grid)
        goal, own = division.inside(out).float(), division.inside(value).float()
        counted = None if key_mask is None else division.inside(key_mask)[..., None, None]
        if counted is not None:
            own = own.masked_fill(~counted, 0)
        sums.value_square += _product(own, own)
        ask = asking(agents, query, key, value, division, scale, key_mask)
        for i, k_scale2 in enumerate(self.candidates):
            residual = goal - ask(sharpness(query.shape[-1], k_scale2)).float()
            if counted is not None:
                residual = residual.masked_fill(~counted, 0)
            sums.residual_square[i] += _product(residual, residual)
            sums.residual_value[i] += _product(residual, own)
        return out


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum().cpu().double()


def _sums_by_layer(attachment: Attachment) -> tuple[int, dict[int, _Sums]]:
    """The number of blocks, and the sums of each block over all its sites and denoisers."""
    total: dict[int, _Sums] = {}
    for sums in _all_sums(attachment):
        if sums.layer in total:
            total[sums.layer].add(sums)
        else:
            total[sums.layer] = sums
    return max(total) + 1, total


def _all_sums(attachment: Attachment) -> Iterator[_Sums]:
    for model in attachment.models.values():
        for site in model.sites.values():
            if site.weights is not None:
                sums = site.module.get_submodule(site.weights)
                assert isinstance(sums, _Sums)
                yield sums


def _chosen(
    chosen: dict[int, tuple[float, float] | None],
    layer: int,
    which: int,
    otherwise: float | tuple[float, ...],
) -> float:
    found = chosen.get(layer)
    if found is not None:
        return found[which]
    return otherwise[layer] if isinstance(otherwise, tuple) else otherwise
