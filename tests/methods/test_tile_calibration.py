"""calibrate_attention_tile against a search over the stock model's own attention calls."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import tiny_wan
import torch
from stock import recorded

import diffattn
from diffattn import AttentionTileAttn
from diffattn.methods import from_dict

FRAMES = 8
SITES = tuple(f"blocks.{layer}.attn1" for layer in range(tiny_wan.LAYERS))
VALUES = (0.5, 1, 3)  # in no order; of 8 frames they are 4, 1 and 3
FEWEST_FIRST = (1, 3, 0.5)
RELATIONS = {1: (0,), 3: (0, 3, 6), 0.5: (0, 2, 4, 6)}


def sharp_model() -> torch.nn.Module:
    """A denoiser whose queries are long, so that attention is not nearly a mean."""
    model = tiny_wan.transformer()
    for name in SITES:
        model.get_submodule(name).norm_q.weight.data *= 6
    return model


def running(model: torch.nn.Module, frames: int = FRAMES) -> Callable[[], list[torch.Tensor]]:
    """Two calls with different videos."""

    def run() -> list[torch.Tensor]:
        out = []
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                (video,) = model(
                    hidden_states=torch.randn(1, 16, frames, 6, 8, generator=generator),
                    timestep=torch.tensor([400 * seed]),
                    encoder_hidden_states=torch.randn(1, 5, 16, generator=generator),
                    return_dict=False,
                )
            out.append(video)
        return out

    return run


def errors_of(calls: list[tuple[torch.Tensor, ...]]) -> dict[float, float]:
    """The relative error of each mask over all calls of a site, in float64."""
    out = {}
    tokens = calls[0][0].shape[1]
    frame = torch.arange(FRAMES).repeat_interleave(tokens // FRAMES)
    for value, seen_by_all in RELATIONS.items():
        is_global = torch.isin(frame, torch.tensor(seen_by_all))
        mask = (frame[:, None] == frame) | is_global[:, None] | is_global
        difference = square = 0.0
        for q, k, v in calls:
            q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
            scores = q @ k.mT * q.shape[-1] ** -0.5
            dense = scores.softmax(-1) @ v
            masked = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
            difference += (masked - dense).square().sum().item()
            square += dense.square().sum().item()
        out[value] = difference / square
    return out


def test_sites_get_the_sparsest_mask_that_is_good_enough() -> None:
    model = sharp_model()
    run = running(model)
    want = run()
    calls = recorded(model, SITES, run)
    assert calls.keys() == set(SITES)
    errors = {name: errors_of(calls[name]) for name in SITES}
    bounds = sorted({1.001 * e for of_site in errors.values() for e in of_site.values()})
    seen: list[torch.Tensor] = []
    kinds = set()
    for bound in bounds:
        found = diffattn.calibrate_attention_tile(
            model, lambda: seen.extend(run()), bound, global_frames=VALUES
        )
        best = {
            name: next((v for v in FEWEST_FIRST if errors[name][v] < bound), None) for name in SITES
        }
        assert {n: tile and tile.global_frames for n, tile in found.items()} == best
        kinds.add(tuple(best.values()))
    assert len(kinds) > 3
    assert any(None in kind for kind in kinds)
    # Meanwhile attention is dense, and afterwards nothing is attached.
    torch.testing.assert_close(torch.stack(seen[:2]), torch.stack(want), atol=1e-5, rtol=1e-4)
    assert diffattn.attach.attached_to(model) is None
    assert torch.equal(torch.stack(run()), torch.stack(want))


def test_larger_errors_are_never_denser() -> None:
    model = sharp_model()
    pairs = []
    for error in (0.2, 0.3, 1e9):
        found = diffattn.calibrate_attention_tile(
            model, running(model), error, AttentionTileAttn(), global_frames=(1, 0.25, 0.5, 0.999)
        )
        pairs.append([FRAMES**2 if t is None else t.frame_pairs(FRAMES) for t in found.values()])
    for tighter, looser in itertools.pairwise(pairs):
        assert all(a >= b for a, b in zip(tighter, looser, strict=True))
    assert pairs[-1] == [AttentionTileAttn(global_frames=1).frame_pairs(FRAMES)] * len(SITES)


def test_what_is_found_can_be_saved_and_attached() -> None:
    model = sharp_model()
    run = running(model)
    method = AttentionTileAttn(dense_layers=1, references="local")
    found = diffattn.calibrate_attention_tile(model, run, 1e9, method)
    # A dense layer has no sparse calls to be measured.
    assert found[SITES[0]] is None
    assert found[SITES[1]] is found[SITES[2]]
    assert found[SITES[1]] == AttentionTileAttn(global_frames=1, dense_layers=1, references="local")
    written = json.dumps({site: tile and tile.to_dict() for site, tile in found.items()})
    again: Any = {site: tile and from_dict(tile) for site, tile in json.loads(written).items()}
    assert again == found
    dense = torch.stack(run())
    attachment = diffattn.set_attn_processor(model, again)
    assert attachment is not None
    assert torch.isfinite(torch.stack(run())).all()
    assert attachment.sparse_calls == 2 * 2
    assert not torch.allclose(torch.stack(run()), dense, atol=1e-4)
    diffattn.set_attn_processor(model, None)


def test_experts_share_the_masks_of_their_sites() -> None:
    pipe = tiny_wan.PIPELINES["two experts"]()
    for name in SITES:
        pipe.transformer_2.get_submodule(name).norm_q.weight.data *= 6

    def run() -> None:
        tiny_wan.run(pipe, num_frames=29)

    calls = [recorded(model, SITES, run) for model in (pipe.transformer, pipe.transformer_2)]
    assert all(part.keys() == set(SITES) for part in calls)
    errors = {name: errors_of(calls[0][name] + calls[1][name]) for name in SITES}
    bound = 1.001 * errors[SITES[1]][3]
    found = diffattn.calibrate_attention_tile(pipe, run, bound, global_frames=VALUES)
    assert {name: tile and tile.global_frames for name, tile in found.items()} == {
        name: next((v for v in FEWEST_FIRST if errors[name][v] < bound), None) for name in SITES
    }
    attachment = diffattn.set_attn_processor(pipe, found)
    assert attachment is not None
    assert attachment.sites == 2 * sum(tile is not None for tile in found.values())


class TestBadInput:
    @pytest.mark.parametrize("error", [0, -0.1, float("nan"), "small", None])
    def test_errors(self, error: Any) -> None:
        model = sharp_model()
        with pytest.raises(ValueError, match=f"error is {error!r}, but must be a number above 0"):
            diffattn.calibrate_attention_tile(model, running(model), error)

    def test_nothing_to_choose_from(self) -> None:
        model = sharp_model()
        with pytest.raises(ValueError, match="global_frames is empty: give at least one value"):
            diffattn.calibrate_attention_tile(model, running(model), 0.1, global_frames=())
        with pytest.raises(ValueError, match="global_frames is 0, but must be an integer of"):
            diffattn.calibrate_attention_tile(model, running(model), 0.1, global_frames=(0,))

    def test_no_calls(self) -> None:
        model = sharp_model()
        with pytest.raises(ValueError, match="no attention call was sparse: run made none, or all"):
            diffattn.calibrate_attention_tile(model, lambda: None, 0.1)
        with pytest.raises(ValueError, match="no attention call was sparse: run made none, or all"):
            diffattn.calibrate_attention_tile(
                model, running(model), 0.1, AttentionTileAttn(dense_layers=9)
            )
        assert diffattn.attach.attached_to(model) is None

    def test_videos_that_are_too_short(self) -> None:
        model = sharp_model()
        with pytest.raises(ValueError, match=r"no mask leaves out a pair .* of 1, 0.5 all or all"):
            diffattn.calibrate_attention_tile(
                model, running(model, frames=2), 0.1, global_frames=(1, 0.5)
            )

    def test_no_mask_is_good_enough(self) -> None:
        model = sharp_model()
        message = r"no site has a mask with an error below 1e-09: the smallest is 0\.\d+, of blocks"
        with pytest.raises(ValueError, match=message):
            diffattn.calibrate_attention_tile(model, running(model), 1e-9)
        assert diffattn.attach.attached_to(model) is None
