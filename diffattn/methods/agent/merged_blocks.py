"""The transformer blocks of a U-Net with merged tokens, as AgentSD has them.

AgentSD compares tokens by the input of a block, before the first normalisation. Attention does not
see this input. So hooks keep the input, merge the tokens before a layer and unmerge them after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from diffattn.methods.agent.merging import Merging, cell_offsets, match, sources_and_destinations
from diffattn.methods.base import AttachedSites, Method, SiteState
from diffattn.models import family_of
from diffattn.models.base import argument, first_input


@dataclass(frozen=True)
class MergedBlocks:
    """Token merging in the blocks of a U-Net whose attention site has Agent Attention attached.

    Attributes:
        model: the U-Net.
        agent: the class of the method whose sites merge tokens.
    """

    model: torch.nn.Module
    agent: type[Method]
    _handles: list[RemovableHandle] = field(default_factory=list, repr=False, compare=False)

    def apply(self, sites: AttachedSites) -> None:
        latents = _Latents(_finest(self.model))
        hooks = [self.model.register_forward_pre_hook(latents.learn, with_kwargs=True)]
        for name, layer in family_of(self.model).layers(self.model).items():
            block: Any = self.model.get_submodule(name.rpartition(".")[0])
            merged = _Block(sites, self.agent, name, layer, latents)
            hooks += [
                block.register_forward_pre_hook(merged.enter, with_kwargs=True),
                block.register_forward_hook(merged.leave, always_call=True),
                block.attn1.register_forward_pre_hook(merged.merge, with_kwargs=True),
                block.attn1.register_forward_hook(merged.unmerge, always_call=True),
            ]
            for part, setting in (("attn2", "merge_crossattn"), ("ff", "merge_mlp")):
                module = getattr(block, part)
                if module is not None:
                    hooks += [
                        module.register_forward_pre_hook(
                            partial(merged.merge_more, setting), with_kwargs=True
                        ),
                        module.register_forward_hook(partial(merged.unmerge_more, setting)),
                    ]
        self._handles.extend(hooks)

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __str__(self) -> str:
        return "token merging"


@dataclass
class _Latents:
    """The size of the latents in the current call of a U-Net.

    Attributes:
        finest: the factor by which the U-Net's finest attention grid is smaller than the latents.
        height: rows of the latents in the current call.
    """

    finest: int
    height: int = 0

    def learn(self, model: torch.nn.Module, args: Any, kwargs: Any) -> None:
        name = "sample" if "sample" in kwargs else "hidden_states"
        self.height = first_input(args, {"hidden_states": kwargs.get(name)}).shape[-2]

    def is_touched(self, height: int, max_downsample: int | None) -> bool:
        """Whether blocks on a grid of `height` rows merge tokens."""
        return -(-self.height // height) <= (max_downsample or self.finest)


@dataclass
class _Block:
    """The hooks of one transformer block."""

    sites: AttachedSites
    agent: type[Method]
    site: str
    layer: int
    latents: _Latents
    _input: torch.Tensor | None = None
    _merging: Merging | None = None
    _group: SiteState | None = None

    def enter(self, block: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._input = first_input(args, kwargs)

    def leave(self, *_: Any) -> None:
        self._input = self._merging = self._group = None

    # The choice of the tokens to merge depends on their values: compiled code breaks here.
    @torch.compiler.disable
    def merge(self, attn: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Merge the tokens before self-attention; leave the call alone if nothing is to merge."""
        group = self.sites.group_at(self.site)
        if group is None or not isinstance(group.method, self.agent) or self._input is None:
            return None
        assert group.video is not None
        method: Any = group.method
        grid = group.video
        stride = method.stride if group.sparse else method.late_stride
        if not self.latents.is_touched(grid.height, method.max_downsample) or (
            method.ratio == 0 and not group.sparse
        ):
            return None
        if argument(args, kwargs, 1, "encoder_hidden_states") is not None:
            return None
        if argument(args, kwargs, 2, "attention_mask") is not None:
            raise ValueError(
                f"the model passes an attention mask to {self.site}, but merged tokens are made of"
                f" several, which a mask may treat differently; attach another method, or leave the"
                f" mask out"
            )
        seed = None if method.seed is None else (method.seed, self.sites.step, self.layer)
        offsets = cell_offsets(grid.height, grid.width, stride, seed)
        parts = sources_and_destinations(grid.height, grid.width, stride, offsets)
        agent_ratio = method.agent_ratio if group.sparse else 0.0
        self._merging = match(self._input, *parts, method.ratio, agent_ratio)
        self._group, group.merging = group, self._merging
        return _with_first(args, kwargs, self._merging.merge(first_input(args, kwargs)))

    @torch.compiler.disable
    def unmerge(self, attn: torch.nn.Module, args: Any, output: Any) -> Any:
        if self._group is None or self._merging is None:
            return None
        self._group.merging = None
        return None if output is None else self._merging.unmerge(output)

    @torch.compiler.disable
    def merge_more(self, setting: str, layer: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Merge the tokens before another layer of the block as before self-attention."""
        if not self._merges(setting):
            return None
        assert self._merging is not None
        tokens = first_input(args, kwargs)
        given, all_of_them = tokens.shape[:2].numel(), self._merging.owner.numel()
        if given != all_of_them:
            raise ValueError(
                f"{setting} is True, but {self.site.rpartition('.')[0]} gives its layers {given} of"
                f" its {all_of_them} tokens at a time, as after enable_forward_chunking: leave one"
                f" of the two out"
            )
        return _with_first(args, kwargs, self._merging.merge(tokens))

    @torch.compiler.disable
    def unmerge_more(
        self, setting: str, layer: torch.nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        if not self._merges(setting):
            return None
        assert self._merging is not None
        return self._merging.unmerge(output)

    def _merges(self, setting: str) -> bool:
        if self._merging is None or self._group is None:
            return False
        return bool(getattr(self._group.method, setting))


def _with_first(args: Any, kwargs: Any, tokens: torch.Tensor) -> tuple[Any, Any]:
    """The arguments of a call with `tokens` in place of its `hidden_states`."""
    if args:
        return (tokens, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": tokens}


def _finest(unet: Any) -> int:
    """The factor by which the U-Net's finest attention grid is smaller than the latents."""
    attends = [bool(len(getattr(block, "attentions", ()))) for block in unet.down_blocks]
    level = attends.index(True) if True in attends else len(attends) - 1
    return int(2**level)
