"""The memory and the work of a training step, worked out before anything is loaded.

The step itself is run on torch's meta device, where tensors have sizes and no values: the true
denoiser, its LoRA, its losses, its gradient checkpointing. Attention keeps what a fused kernel
keeps. Weights are counted by their ways of storage, and the optimiser's states by a step of the
optimiser on a small parameter.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffattn.attach.attachment import set_attn_processor
from diffattn.grid import TokenGrid
from diffattn.lora.adapter import add_adapter
from diffattn.lora.errors import LoraError
from diffattn.lora.frozen import STORAGES, block_names, stored_layers
from diffattn.lora.losses import Batch, Student
from diffattn.lora.optimizers import make_optimizer
from diffattn.lora.recipes import Recipe
from diffattn.lora.settings import TrainSettings
from diffattn.lora.tally import FlashAttention, Tally
from diffattn.methods import from_dict

# A CUDA context, the workspace of cuBLAS and of kernels, and what the allocator cannot use.
OVERHEAD = 1 << 30
# bitsandbytes has none on the CPU: two numbers of 8 bits, with a float32 factor for each 256.
_BYTES_OF_BITSANDBYTES = 2 * (1 + 4 / 256)
# Side of the parameter that an optimiser's states are counted on.
_SIDE = 256


@dataclass(frozen=True)
class Choice:
    """What decides how much memory a training needs, beside its model and its size.

    Attributes:
        base_dtype: how frozen weights are stored, see `diffattn.lora.frozen`; None for the dtype
            that layers compute in.
        swap_blocks: number of blocks whose weights wait in main memory.
        gradient_checkpointing, offload_activations: see `TrainSettings`.
    """

    base_dtype: str | None = None
    swap_blocks: int = 0
    gradient_checkpointing: bool = False
    offload_activations: bool = False


@dataclass(frozen=True)
class Pass:
    """The forward and backward pass of a step, in bytes and FLOPs.

    Attributes:
        kept: bytes between the passes, which the backward pass needs.
        peak: the most bytes at a time, gradients of the trained weights included.
        waiting: bytes that wait in main memory between the passes.
        linear: FLOPs of everything but video self-attention.
        sparse: FLOPs that video self-attention would have if the method were dense.
        dense: FLOPs of the dense model's video self-attention.
    """

    kept: int
    peak: int
    waiting: int
    linear: float
    sparse: float
    dense: float


@dataclass(frozen=True)
class Footprint:
    """The memory of a training on its device, and beside it in main memory, in bytes.

    Attributes:
        choice: what the figures are for.
        weights: frozen weights.
        adapter: trained weights, in float32, with their moving average if there is one.
        gradients: gradients of the trained weights.
        optimizer: states of the optimiser.
        activations: the most that the passes of a step hold beside gradients.
        unpacked: weights of blocks in the dtype that layers compute in, and those that come for the
            block at work.
        overhead: what the device needs beside tensors.
        waiting: in main memory: weights of blocks that wait, and activations.
    """

    choice: Choice
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    unpacked: int
    overhead: int
    waiting: int

    @property
    def total(self) -> int:
        """All on the device, at the moment of the most."""
        named = dataclasses.asdict(self)
        return sum(named[name] for name in PARTS)


PARTS = (
    "weights", "adapter", "gradients", "optimizer", "activations", "unpacked", "overhead",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The frozen weights of a denoiser, in numbers and bytes.

    Attributes:
        rest: bytes of what no way of storage is about.
        blocks: for each block, the sizes (rows, columns) of its linear layers.
        size: bytes of a weight in the dtype that layers compute in.
    """

    rest: int
    blocks: tuple[tuple[tuple[int, int], ...], ...]
    size: int

    def of_block(self, block: int, base_dtype: str | None) -> int:
        """Bytes of the linear layers of a block."""
        return sum(self._layer(rows, columns, base_dtype) for rows, columns in self.blocks[block])

    def _layer(self, rows: int, columns: int, base_dtype: str | None) -> int:
        if base_dtype is None:
            return rows * columns * self.size
        storage = STORAGES[base_dtype]
        return round(rows * columns * storage.bytes_of_weight + rows * storage.bytes_of_row)

    def on_device(self, choice: Choice) -> int:
        """Bytes on the device between the passes of blocks."""
        staying = range(len(self.blocks) - choice.swap_blocks)
        return self.rest + sum(self.of_block(block, choice.base_dtype) for block in staying)

    def waiting(self, choice: Choice) -> int:
        """Bytes in main memory."""
        first = len(self.blocks) - choice.swap_blocks
        return sum(self.of_block(i, choice.base_dtype) for i in range(first, len(self.blocks)))

    def unpacked(self, choice: Choice) -> int:
        """Bytes of copies of weights while blocks work.

        fp8 and int8 layers compute with a copy in their dtype, which a backward pass needs: that of
        a block at a time under gradient checkpointing, and else those of all blocks. nf4 layers
        unpack themselves again. The weights of a block that has come stay until its backward pass
        is over, and the next layer's come meanwhile.
        """
        whole = [self.of_block(block, None) for block in range(len(self.blocks))]
        layers = [
            self._layer(rows, columns, None) for block in self.blocks for rows, columns in block
        ]
        copies = 0
        if choice.base_dtype == "nf4":
            copies = max(layers)
        elif choice.base_dtype is not None:
            copies = max(whole) if choice.gradient_checkpointing else sum(whole)
        if not choice.swap_blocks:
            return copies
        coming = max(self.of_block(i, choice.base_dtype) for i in range(len(self.blocks)))
        largest = max(
            self._layer(rows, columns, choice.base_dtype)
            for block in self.blocks
            for rows, columns in block
        )
        return copies + coming + largest


class Training:
    """A training that nothing has been loaded for.

    Attributes:
        weights: the frozen weights.
        trained: number of trained weights, those of the method's own included.
        recipe: the recipe at the dtype that layers compute in.
        latents: latent channels, frames, height and width of a sample.
        conditions: shapes of the denoiser's conditions by name, without batch axis.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        settings: TrainSettings,
        grid: TokenGrid,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make the denoiser with its LoRA on the meta device.

        Args:
            model: the denoiser, loaded or not, which is left alone.
            recipe: its recipe.
            settings: the settings of the training.
            grid: the tokens of a sample.
            dtype: the dtype that layers compute in.
            device: the device of the training.

        Raises:
            LoraError: if the method does not fit the model.
        """
        self._settings, self._tokens = settings.completed(), grid.video_tokens
        self.recipe, self._device = replace(recipe, dtype=dtype), device
        model = _meta_copy(model, dtype)
        self.weights = _weights_of(model, dtype)
        self._model = model
        self.latents = latents_of(recipe, model.config, grid)
        self.conditions = conditions_of(recipe, model.config)
        try:
            with warnings.catch_warnings():
                # Without a pipeline there are no dense steps, which a method would say.
                warnings.simplefilter("ignore")
                set_attn_processor(model, from_dict(settings.attention))
            trained = add_adapter(model, settings)
            self.trained = sum(weight.numel() for weight in trained.values())
            set_attn_processor(model, None)
        except (ValueError, TypeError) as error:
            raise LoraError(error) from None
        model.train()
        self._passes: dict[tuple[bool, bool], Pass] = {}

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.weights.blocks)

    @property
    def bytes_of_clip(self) -> int:
        """Bytes of an encoded clip on the disk: float32 latents, and the text in `dtype`."""
        text = sum(math.prod(shape) for shape in self.conditions.values())
        return 4 * math.prod(self.latents) + self.recipe.dtype.itemsize * text

    def one_pass(self, checkpointing: bool, offload: bool) -> Pass:
        """The forward and backward pass of a step, under gradient checkpointing or not."""
        key = checkpointing, offload
        if key not in self._passes:
            self._passes[key] = self._count(*key)
        return self._passes[key]

    def footprint(self, choice: Choice) -> Footprint:
        """The memory of the training with a choice."""
        made = self.one_pass(choice.gradient_checkpointing, choice.offload_activations)
        settings = self._settings
        gradients = 4 * self.trained
        # The gradients of earlier parts of a step are there from its start.
        earlier = gradients if settings.accumulation > 1 else 0
        return Footprint(
            choice,
            weights=self.weights.on_device(choice),
            adapter=4 * self.trained * (1 if settings.ema is None else 2),
            gradients=gradients,
            optimizer=round(bytes_of_states(settings) * self.trained),
            activations=max(0, made.peak + earlier - gradients),
            unpacked=self.weights.unpacked(choice),
            overhead=0 if self._device.type == "cpu" else OVERHEAD,
            waiting=self.weights.waiting(choice) + made.waiting,
        )

    def _count(self, checkpointing: bool, offload: bool) -> Pass:
        model = self._model
        if checkpointing:
            model.enable_gradient_checkpointing()
        else:
            model.disable_gradient_checkpointing()
        settings = replace(self._settings, offload_activations=False, swap_blocks=None)
        student = Student(
            model,
            _AnyLevel(self.recipe),  # type: ignore[arg-type]
            None,
            _Unattached(),  # type: ignore[arg-type]
            settings,
        )
        waiting = _Waiting()
        with Tally(model) as tally, FlashAttention(self._tokens) as attention:
            batch = self._batch()
            start = tally.now
            with waiting.keeping() if offload else nullcontext():
                loss = student(batch)["loss"]
            kept = tally.now - start
            # A mode sees `loss.backward()` as a call, inside which the mode is off.
            edge = torch.autograd.graph.get_gradient_edge(loss)
            torch.autograd.backward(edge, torch.ones_like(loss))
        for parameter in model.parameters():
            parameter.grad = None
        return Pass(
            kept=kept,
            peak=tally.peak,
            waiting=waiting.bytes,
            linear=tally.flops + attention.other,
            sparse=attention.sparse,
            dense=attention.dense,
        )

    def _batch(self) -> Batch:
        count = self._settings.batch_size
        latents = torch.empty(count, *self.latents, device="meta")
        conditions = {
            name: torch.empty(count, *shape, device="meta")
            for name, shape in self.conditions.items()
        }
        times = torch.empty(count, device="meta")
        return Batch(latents, torch.empty_like(latents), times, conditions)


def latents_of(recipe: Recipe, config: Any, grid: TokenGrid) -> tuple[int, int, int, int]:
    """The latents of a sample: channels, frames, height and width."""
    if recipe.family == "flux":  # which packs latents by itself
        return config.in_channels // 4, grid.frames, 2 * grid.height, 2 * grid.width
    size = config.patch_size
    rows, columns = size[1:] if isinstance(size, tuple | list) else (size, size)
    frames = size[0] if isinstance(size, tuple | list) else config.get("patch_size_t") or 1
    return config.in_channels, grid.frames * frames, grid.height * rows, grid.width * columns


def conditions_of(recipe: Recipe, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a denoiser's conditions, without batch axis.

    Raises:
        LoraError: for a family whose steps cannot be counted.
    """
    length = recipe.text_length
    widths = {
        "wan": "text_dim",
        "hunyuanvideo": "text_embed_dim",
        "cogvideox": "text_embed_dim",
        "ltx": "caption_channels",
        "flux": "joint_attention_dim",
    }
    if recipe.family not in widths:
        raise LoraError(
            f"the steps of {recipe.family} models cannot be counted; those of"
            f" {', '.join(widths)} can"
        )
    if recipe.edits:
        raise LoraError("the steps of models that edit cannot be counted: sources are tokens, too")
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (length, config[widths[recipe.family]])}
    if recipe.family in ("hunyuanvideo", "ltx"):
        shapes["prompt_attention_mask"] = (length,)
    if recipe.family in ("hunyuanvideo", "flux"):
        shapes["pooled_prompt_embeds"] = (config["pooled_projection_dim"],)
    return shapes


@dataclass(frozen=True)
class _AnyLevel:
    """A recipe at noise levels that no scheduler gives, as on the meta device there are none."""

    recipe: Recipe

    def at_guidance(self, scale: float | None) -> _AnyLevel:
        return _AnyLevel(self.recipe.at_guidance(scale))

    def add_noise(self, scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return latents + noise * times.view(-1, *(1 for _ in latents.shape[1:]))

    def target(self, scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - latents

    def predict(self, *arguments: Any) -> Tensor:
        return self.recipe.predict(*arguments)


class _Unattached:
    """An attachment of nothing: dense attention is what is counted, see `FlashAttention`."""

    def leave_run(self) -> None:
        """Do nothing."""

    @contextmanager
    def dense(self) -> Iterator[None]:
        yield


class _Waiting:
    """Keeps what a backward pass needs in main memory, as `torch.autograd.graph.save_on_cpu`.

    Attributes:
        bytes: of all that was kept.
    """

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def keeping(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
            self.bytes += tensor.nbytes
            return tensor.shape, tensor.dtype

        def unpack(packed: tuple[torch.Size, torch.dtype]) -> Tensor:
            shape, dtype = packed
            return torch.empty(shape, dtype=dtype, device="meta")

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def _meta_copy(model: Any, dtype: torch.dtype) -> Any:
    """A denoiser of the same configuration on the meta device, in the dtypes that it loads in."""
    with torch.device("meta"):
        made = type(model).from_config(model.config)
    exact = set(type(model)._keep_in_fp32_modules or ())
    for name, parameter in made.named_parameters():
        if not exact.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return made


def _weights_of(model: torch.nn.Module, dtype: torch.dtype) -> Weights:
    stored = stored_layers(model)
    names = block_names(model)
    in_blocks = {f"{name}.weight" for name in stored}
    rest = sum(p.nbytes for name, p in model.named_parameters() if name not in in_blocks)
    rest += sum(buffer.nbytes for buffer in model.buffers())
    return Weights(
        rest,
        tuple(
            tuple(
                (layer.out_features, layer.in_features)
                for name, layer in stored.items()
                if name.startswith(f"{block}.")
            )
            for block in names
        ),
        dtype.itemsize,
    )


def bytes_of_states(settings: TrainSettings) -> float:
    """Bytes of an optimiser's states for each trained weight."""
    if settings.optimizer.startswith("bitsandbytes.") and settings.optimizer.endswith("8bit"):
        return _BYTES_OF_BITSANDBYTES
    parameter = torch.nn.Parameter(torch.zeros(_SIDE, _SIDE))
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        optimizer = make_optimizer(
            [parameter],
            settings.optimizer,
            settings.learning_rate,
            settings.weight_decay,
            settings.optimizer_args,
        )
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return sum(_size(value) for value in optimizer.state[parameter].values()) / parameter.numel()


def _size(value: Any) -> int:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return 0
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(_size(getattr(value, name)) for name in names)
    return value.nbytes
