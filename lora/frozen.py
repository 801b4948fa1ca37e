"""The frozen weights of a denoiser in few bytes: fp8, int8 and nf4, by libraries of others.

Only linear layers of the transformer blocks are stored so. Embeddings and the last layer are a
small part of a model, and lose the most.

- fp8: float8_e4m3fn, diffusers' layerwise casting: a layer's weight is cast up while it works;
- int8: a factor and a zero point for each row, torchao;
- nf4: 4 bits with a factor for each 64 weights, and factors in 8 bits themselves, bitsandbytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffattn.attach.sites import site_names
from diffattn.lora.errors import LoraError
from diffattn.models import family_of

if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig


@dataclass(frozen=True)
class Storage:
    """A way to store the weight of a linear layer.

    Attributes:
        bytes_of_weight: bytes of each weight.
        bytes_of_row: bytes beside them for each row, which is an output channel.
        needs: the package that stores and computes; None for diffusers itself.
    """

    bytes_of_weight: float
    bytes_of_row: int = 0
    needs: str | None = None


# nf4 has float32 factors of blocks of 64 weights, which are stored in 8 bits with a float32 factor
# for each 256 of them.
STORAGES: dict[str, Storage] = {
    "fp8": Storage(1.0),
    "int8": Storage(1.0, bytes_of_row=5, needs="torchao"),
    "nf4": Storage(0.5 + 1 / 64 + 4 / (64 * 256), needs="bitsandbytes"),
}
BASE_DTYPES = tuple(STORAGES)


def block_names(model: torch.nn.Module) -> list[str]:
    """The names of the transformer blocks that hold the attention sites of a denoiser, in order."""
    names = site_names(model, family_of(model))
    return list(dict.fromkeys(_numbered(name) for name in names))


def _numbered(site: str) -> str:
    """The name of the block of a site: the part that ends with the block's number."""
    parts = site.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: last + 1])


def stored_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of a denoiser that `base_dtype` is about, by name."""
    return {
        f"{block}.{name}": layer
        for block in block_names(model)
        for name, layer in _linear(model.get_submodule(block))
    }


def _linear(block: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, layer in block.named_modules():
        if isinstance(layer, torch.nn.Linear):
            yield name, layer


def check_available(base_dtype: str, device: torch.device) -> None:
    """Raise LoraError if the package that stores weights so is missing, or refuses the device."""
    needs = STORAGES[base_dtype].needs
    if needs is not None and importlib.util.find_spec(needs) is None:
        raise LoraError(
            f"base_dtype is {base_dtype}, which needs {needs}: pip install diffattn[{needs}], or"
            f" take fp8, which needs nothing"
        )
    if needs == "bitsandbytes" and device.type == "cpu":
        raise LoraError(
            f"base_dtype is {base_dtype}, but diffusers loads weights of bitsandbytes on"
            f" accelerators only, and the device is {device.type}: take int8 or fp8"
        )


def quantisation(
    classes: dict[str, Any], source: Any, base_dtype: str, dtype: torch.dtype
) -> PipelineQuantizationConfig | None:
    """The configuration with which diffusers stores the weights of a pipeline's denoisers.

    Args:
        classes: the class of each denoiser, by its name in the pipeline.
        source: folder or hub id of the pipeline.
        base_dtype: one of `BASE_DTYPES`.
        dtype: the dtype that layers compute in.

    Returns:
        The configuration for `from_pretrained`; None where weights are stored after loading, see
        `store_in_fp8`.
    """
    from diffusers import PipelineQuantizationConfig

    if base_dtype == "fp8":
        return None
    return PipelineQuantizationConfig(
        quant_mapping={
            name: _config(_kept_layers(cls, source, name), base_dtype, dtype)
            for name, cls in classes.items()
        }
    )


def _config(kept: Sequence[str], base_dtype: str, dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if base_dtype == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(kept),
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(kept))


def _kept_layers(cls: Any, source: Any, name: str) -> list[str]:
    """The linear layers of a denoiser that stay as they are, by name."""
    config = cls.load_config(source, subfolder=name)
    with torch.device("meta"):
        model = cls.from_config(config)
    stored = stored_layers(model)
    return [layer for layer, _ in _linear(model) if layer not in stored]


def store_in_fp8(model: Any, dtype: torch.dtype) -> None:
    """Store the weights of a loaded denoiser's blocks in float8_e4m3fn, by diffusers.

    Args:
        model: the denoiser.
        dtype: the dtype that layers compute in.
    """
    from diffusers.hooks import apply_layerwise_casting_hook

    for layer in stored_layers(model).values():
        apply_layerwise_casting_hook(layer, torch.float8_e4m3fn, dtype, non_blocking=False)
