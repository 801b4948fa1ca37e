"""Tiny models of pictures whose grid follows from shapes, for the tests of all families."""

from typing import Any

import torch
from tiny_case import BATCH, Case, make, names, noise

from diffattn import TokenGrid
from diffattn.grid import Reference

CASES: dict[str, Case] = {}

# --- Z-Image


def z_image(**changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 64, 64],
    }
    return make("ZImageTransformer2DModel", **(config | changes))


def _in_one_tensor(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose samples come out in one tensor instead of a list."""
    model.register_forward_hook(lambda module, args, out: (torch.stack(out[0]), *out[1:]))
    return model


def _z_image_inputs() -> dict[str, Any]:
    return {
        "x": noise(BATCH, 4, 1, 12, 18),
        "t": torch.tensor([0.9, 0.4]),
        "cap_feats": [noise(7, 16, seed=1), noise(40, 16, seed=2)],
    }


CASES["z-image"] = Case(
    build=lambda: _in_one_tensor(z_image()),
    inputs=_z_image_inputs,
    # 54 tokens and 10 of padding; then the longer text and its padding
    grids=(TokenGrid(1, 6, 9, text_after=10),),
    sites=names(("layers.{}.attention", 2)),
    text=("after", 64),
    pixel=lambda t, h, w: (0, 1, 0, 2 * h + 1, 2 * w),
)


def _omni_inputs() -> dict[str, Any]:
    texts = [[noise(length, 16, seed=length) for length in (5, 40, 6)] for _ in range(BATCH)]
    # The model stands in for an absent picture by patches of 64 channels.
    pictures = [
        [noise(16, 1, 8, 12, seed=3 + i), None, noise(16, 1, 12, 18, seed=i)] for i in range(BATCH)
    ]
    return {
        "x": pictures,
        "t": torch.tensor([0.9, 0.4]),
        "cap_feats": texts,
        "siglip_feats": [[noise(3, 4, 8), None, None]] * BATCH,
        "image_noise_mask": [[0, 0, 1]] * BATCH,
    }


CASES["z-image-omni"] = Case(
    build=lambda: _in_one_tensor(z_image(in_channels=16, siglip_feat_dim=8)),
    inputs=_omni_inputs,
    # texts of 32 + 64 + 32; pictures of 24 + 8, 0 + 32 and 54 + 10; SigLIP of 12 + 20, 32 and 32
    grids=(TokenGrid(1, 6, 9, 128 + 32 + 32, 10, references=(Reference(128, 1, 4, 6),)),),
    sites=names(("layers.{}.attention", 2)),
    text=("after", 3 * 32),
    pixel=lambda t, h, w: (0, 2, 1, 0, 2 * h + 1, 2 * w),
    reference_pixel=lambda n, t, h, w: ("x", (0, n, 1, 0, 2 * h + 1, 2 * w)),
)
