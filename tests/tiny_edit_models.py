"""Models of images that are placed by position ids or by lists of shapes, with reference images."""

import inspect
from typing import Any

import diffusers
import torch
from tiny_case import BATCH, Case, make, names, noise, valid_text

from diffattn import TokenGrid
from diffattn.grid import Reference

TEXT = 7
HEIGHT, WIDTH = 6, 9
TOKENS = HEIGHT * WIDTH
_DUAL_AND_SINGLE = names(
    ("transformer_blocks.{}.attn", 2), ("single_transformer_blocks.{}.attn", 2)
)


def ids(*pictures: tuple[float, int, int], more: tuple[float, ...] = ()) -> torch.Tensor:
    """(tokens, 3 or more): time, row and column of pictures given as (time, height, width)."""
    return torch.cat(
        [
            torch.cartesian_prod(
                torch.tensor([float(time)]),
                torch.arange(float(height)),
                torch.arange(float(width)),
                *(torch.tensor([number]) for number in more),
            )
            for time, height, width in pictures
        ]
    )


def pictures(*references: tuple[int, int], frames: int = 1, before: int = 0) -> TokenGrid:
    """The grid of a target of 6 x 9 tokens and references after it, without text."""
    at = before + frames * TOKENS
    placed = []
    for height, width in references:
        placed.append(Reference(at, 1, height, width))
        at += height * width
    tokens = sum(r.tokens for r in placed)
    return TokenGrid(frames, HEIGHT, WIDTH, before, tokens, references=tuple(placed))


def _pixels(grid: TokenGrid) -> dict[str, Any]:
    """Where a token's numbers stand in `hidden_states`, whose tokens are those of the grid."""

    def of_reference(n: int, t: int, h: int, w: int) -> tuple[str, tuple[Any, ...]]:
        reference = grid.references[n]
        return "hidden_states", (0, reference.start + h * reference.width + w)

    def of_target(t: int, h: int, w: int) -> tuple[int, ...]:
        return 0, grid.text_before + (t * HEIGHT + h) * WIDTH + w

    return {
        "pixel": of_target,
        "reference_pixel": of_reference if grid.references else None,
    }


def edit_inputs(grid: TokenGrid, times: tuple[float, ...], **more: Any) -> dict[str, Any]:
    """Inputs as Flux takes them: the target at the first time, references at the others."""
    sizes = [(grid.height, grid.width), *((r.height, r.width) for r in grid.references)]
    placed = [(time, *size) for time, size in zip(times, sizes, strict=True)]
    return {
        "hidden_states": noise(BATCH, grid.tokens, 16),
        "encoder_hidden_states": noise(BATCH, TEXT, 16, seed=1),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_ids": ids(*placed),
        "txt_ids": torch.zeros(TEXT, 3),
    } | more


_TWO = pictures((HEIGHT, WIDTH), (4, 5))
_JOINT: dict[str, Any] = {"sites": _DUAL_AND_SINGLE, "text": ("before", TEXT)}

CASES: dict[str, Case] = {}

# --- Flux Kontext, Flux.2 editing


def _flux_like(name: str, **changes: Any) -> torch.nn.Module:
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": [4, 4, 8],
    }
    return make(name, **(config | changes))


def flux() -> torch.nn.Module:
    return _flux_like(
        "FluxTransformer2DModel",
        axes_dims_rope=(4, 4, 8),
        pooled_projection_dim=8,
        guidance_embeds=True,
    )


def flux2() -> torch.nn.Module:
    return _flux_like(
        "Flux2Transformer2DModel", axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=8
    )


CASES["flux-kontext"] = Case(
    build=flux,
    inputs=lambda: edit_inputs(
        _TWO,
        (0, 1, 2),
        pooled_projections=noise(BATCH, 8, seed=2),
        guidance=torch.tensor([3.5, 3.5]),
    ),
    grids=(_TWO,),
    **_pixels(_TWO),
    **_JOINT,
)

CASES["flux.2-edit"] = Case(
    build=flux2,
    inputs=lambda: edit_inputs(
        _TWO,
        (0, 10, 20),
        img_ids=ids((0, 6, 9), (10, 6, 9), (20, 4, 5), more=(0.0,)).expand(BATCH, -1, -1),
        txt_ids=torch.zeros(BATCH, TEXT, 4),
        guidance=torch.tensor([3.5, 3.5]),
    ),
    grids=(_TWO,),
    **_pixels(_TWO),
    **_JOINT,
)

# --- Flux 3: blocks of its own for each kind of tokens, then blocks for all


def flux3() -> torch.nn.Module:
    return make(
        "Flux3Transformer2DModel",
        in_channels=16,
        cond_in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def flux3_inputs(references: bool = True) -> dict[str, Any]:
    inputs = {
        "hidden_states": noise(BATCH, TOKENS, 16),
        "encoder_hidden_states": noise(BATCH, TEXT, 16, seed=1),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_ids": 0.37 * ids((0, HEIGHT, WIDTH), more=(0.0,)),
        "txt_ids": torch.zeros(TEXT, 4),
    }
    if references:
        placed = [ids((0, HEIGHT, WIDTH), more=(-1 / 0.37,)), ids((0, 4, 5), more=(-2 / 0.37,))]
        inputs["image_cond_hidden_states"] = noise(BATCH, TOKENS + 20, 8, seed=2)
        inputs["image_cond_ids"] = 0.37 * torch.cat(placed)
    return inputs


_FLUX3_PARTS = (
    _TWO,
    pictures(),
    TokenGrid(1, HEIGHT, WIDTH, 0, 20, references=(Reference(TOKENS, 1, 4, 5),)),
)


def _flux3_reference(n: int, t: int, h: int, w: int) -> tuple[str, tuple[Any, ...]]:
    reference = _TWO.references[n]
    return "image_cond_hidden_states", (0, reference.start - TOKENS + h * reference.width + w)


_FLUX3: dict[str, Any] = {
    "build": flux3,
    "sites": names(
        ("mode_blocks.image.{}.attn", 1),
        ("mode_blocks.image_cond.{}.attn", 1),
        ("single_transformer_blocks.{}.attn", 2),
    ),
    "text": ("before", TEXT),
    "pixel": _pixels(_TWO)["pixel"],
}
CASES["flux.3-edit"] = Case(
    inputs=flux3_inputs, grids=_FLUX3_PARTS, reference_pixel=_flux3_reference, **_FLUX3
)

# --- LongCat-Image, Ovis-Image, Bria, Chroma: Flux' blocks


def longcat() -> torch.nn.Module:
    return _flux_like("LongCatImageTransformer2DModel", pooled_projection_dim=16)


def ovis() -> torch.nn.Module:
    return _flux_like("OvisImageTransformer2DModel", out_channels=16)


def bria() -> torch.nn.Module:
    return _flux_like("BriaTransformer2DModel")


def bria_fibo() -> torch.nn.Module:
    return _flux_like("BriaFiboTransformer2DModel", text_encoder_dim=16)


def chroma() -> torch.nn.Module:
    return _flux_like(
        "ChromaTransformer2DModel",
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


_ALONE, _ONE = pictures(), pictures((4, 5))


def _fibo_inputs(grid: TokenGrid, times: tuple[float, ...], *lengths: int) -> dict[str, Any]:
    mask = torch.cat([valid_text(TEXT, *lengths), torch.ones(BATCH, grid.tokens)], 1).bool()
    return edit_inputs(
        grid,
        times,
        text_encoder_layers=[noise(BATCH, TEXT, 16, seed=10 + i) for i in range(4)],
        joint_attention_kwargs=None if mask.all() else {"attention_mask": mask[:, None, None]},
    )


def chroma_inputs(*seen: list[int]) -> dict[str, Any]:
    """Inputs with 1 for the text tokens of each sample that count, and 0 for padding."""
    mask = torch.cat([torch.tensor(seen), torch.ones(BATCH, TOKENS)], 1).bool()
    return edit_inputs(_ALONE, (0,), attention_mask=mask)


CASES |= {
    "longcat-image": Case(
        build=longcat,
        inputs=lambda: edit_inputs(_ALONE, (1,)),
        grids=(_ALONE,),
        **_pixels(_ALONE),
        **_JOINT,
    ),
    "longcat-image-edit": Case(
        build=longcat,
        inputs=lambda: edit_inputs(_TWO, (1, 2, 3)),
        grids=(_TWO,),
        **_pixels(_TWO),
        **_JOINT,
    ),
    "ovis-image": Case(
        build=ovis,
        inputs=lambda: edit_inputs(_ALONE, (0,)),
        grids=(_ALONE,),
        **_pixels(_ALONE),
        **_JOINT,
    ),
    "bria": Case(
        build=bria,
        inputs=lambda: edit_inputs(_ALONE, (0,)),
        grids=(_ALONE,),
        **_pixels(_ALONE),
        **_JOINT,
    ),
    "bria-fibo": Case(
        build=bria_fibo,
        inputs=lambda: _fibo_inputs(_ALONE, (0,), TEXT, 4),
        grids=(_ALONE,),
        **_pixels(_ALONE),
        **_JOINT,
    ),
    "bria-fibo-edit": Case(
        build=bria_fibo,
        inputs=lambda: _fibo_inputs(_ONE, (0, 1), TEXT, TEXT),
        grids=(_ONE,),
        **_pixels(_ONE),
        **_JOINT,
    ),
    "chroma": Case(
        build=chroma,
        inputs=lambda: chroma_inputs([1] * TEXT, [1] * TEXT),
        grids=(_ALONE,),
        **_pixels(_ALONE),
        **_JOINT,
    ),
}

# --- Bria Fibo 2: gist tokens made of the prompt stand before the pictures or, padded, after them


def bria_fibo2() -> torch.nn.Module:
    return make(
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=8,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 64, 64),
    )


def fibo2_inputs(*lengths: int) -> dict[str, Any]:
    """Inputs with prompts of so many tokens each; of 16 without a mask, where none are given."""
    return {
        "hidden_states": noise(BATCH, 4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(BATCH, 2, 16, 8, seed=1),
        "encoder_attention_mask": valid_text(16, *lengths).bool() if lengths else None,
        "context_latents": [noise(BATCH, 4, 12, 18, seed=2), noise(BATCH, 4, 8, 10, seed=3)],
    }


_FIBO2: dict[str, Any] = {
    "build": bria_fibo2,
    "grids": (pictures((HEIGHT, WIDTH), (4, 5)),),
    "sites": names(("noise_refiner.{}.attention", 1), ("layers.{}.attention", 2)),
    "pixel": lambda t, h, w: (0, 1, 2 * h + 1, 2 * w),
    "reference_pixel": lambda n, t, h, w: ("context_latents", (n, 0, 1, 2 * h + 1, 2 * w)),
}
CASES |= {
    "bria-fibo-2": Case(inputs=fibo2_inputs, text=("before", 8), **_FIBO2),
    "bria-fibo-2-padded": Case(inputs=lambda: fibo2_inputs(16, 4), text=("after", 8), **_FIBO2),
}

# --- Krea 2


def krea2() -> torch.nn.Module:
    return make(
        "Krea2Transformer2DModel",
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )


def _krea2_inputs(*lengths: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, TOKENS, 16),
        "encoder_hidden_states": noise(BATCH, TEXT, 2, 16, seed=1),
        "timestep": torch.tensor([0.9, 0.4]),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), ids((0, HEIGHT, WIDTH))]),
        "encoder_attention_mask": valid_text(TEXT, *lengths).bool(),
    }


_KREA2: dict[str, Any] = {
    "build": krea2,
    "grids": (_ALONE,),
    "sites": names(("transformer_blocks.{}.attn", 2)),
    "text": ("before", TEXT),
    **_pixels(_ALONE),
}
CASES |= {
    "krea-2": Case(inputs=lambda: _krea2_inputs(TEXT, 4), **_KREA2),
}

# --- Qwen-Image-Edit, Edit-Plus and Layered


def _qwen(**config: Any) -> torch.nn.Module:
    return make(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        **config,
    )


def qwen_layered() -> torch.nn.Module:
    return _qwen(use_layer3d_rope=True, use_additional_t_cond=True)


def _qwen_takes_lengths() -> bool:
    """Must the model be told how long texts are (older diffusers)? Newer reads the embeddings."""
    forward = diffusers.QwenImageTransformer2DModel.forward
    return "txt_seq_lens" in inspect.signature(forward).parameters


def qwen_inputs(
    shapes: list[tuple[int, int, int]], *lengths: int, layers: bool = False
) -> dict[str, Any]:
    tokens = sum(t * h * w for t, h, w in shapes)
    return (
        {
            "hidden_states": noise(BATCH, tokens, 16),
            "encoder_hidden_states": noise(BATCH, TEXT, 16, seed=1),
            "encoder_hidden_states_mask": valid_text(TEXT, *lengths),
            "timestep": torch.tensor([0.9, 0.4]),
            "img_shapes": [shapes] * BATCH,
        }
        | ({"txt_seq_lens": [TEXT] * BATCH} if _qwen_takes_lengths() else {})
        | ({"additional_t_cond": torch.zeros(BATCH, dtype=torch.long)} if layers else {})
    )


_QWEN: dict[str, Any] = {
    "sites": names(("transformer_blocks.{}.attn", 2)),
    "text": ("before", TEXT),
}
_EDIT_PLUS, _LAYERED = pictures((6, 9), (4, 5)), pictures((4, 5), frames=3)
CASES |= {
    "qwen-image-edit": Case(
        build=_qwen,
        inputs=lambda: qwen_inputs([(1, 6, 9), (1, 6, 9), (1, 4, 5)], 7, 7),
        grids=(_EDIT_PLUS,),
        **_pixels(_EDIT_PLUS),
        **_QWEN,
    ),
    "qwen-image-edit-plus": Case(
        build=lambda: _qwen(zero_cond_t=True),
        inputs=lambda: qwen_inputs([(1, 6, 9), (1, 6, 9), (1, 4, 5)], 7, 4),
        grids=(_EDIT_PLUS,),
        **_pixels(_EDIT_PLUS),
        **_QWEN,
    ),
    "qwen-image-layered": Case(
        build=qwen_layered,
        inputs=lambda: qwen_inputs([(1, 6, 9)] * 3 + [(1, 4, 5)], 7, 7, layers=True),
        grids=(_LAYERED,),
        **_pixels(_LAYERED),
        **_QWEN,
    ),
}
