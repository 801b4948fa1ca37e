"""Published weights of VSA: gates beside a model's own weights, or in a file of changes.

FastWan and FastH3 are published as whole models, whose gates diffusers does not know, and as files
of changes to the model that they were made from. A file of changes has low-rank pairs, whole
differences of weights (`.diff`) and of biases (`.diff_b`), and whole gates (`.set_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diffattn._checks import check, number
from diffattn.methods.checkpoint import (
    check_at_hand,
    models_in,
    parameters_by_own_name,
    shapes_in,
)
from diffattn.methods.vsa.gate import VSAGate
from diffattn.methods.vsa.method import VSAAttn
from diffattn.models import family_of

_GATE = "to_gate_compress"
_PREFIX = "diffusion_model."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<half>A|B|down|up)(?:\.[^.]+)?\.weight")
_SINGLE = re.compile(r"(?P<module>.+)\.(?P<form>weight|bias|diff|diff_b|set_weight|alpha)")
_HALVES = {"A": "down", "down": "down", "B": "up", "up": "up"}
# The forms that change a module's weight, and its bias.
_OF_WEIGHT = ("weight", "set_weight", "diff", "pair")
_OF_BIAS = ("bias", "diff_b")


@dataclass(frozen=True)
class _Change:
    """A change of one parameter.

    Attributes:
        parameter: the parameter of the model.
        keys: the key of the tensor to take or to add; or those of a low-rank pair, down and up,
            and of the pair's alpha if there is one.
        takes: whether the tensor takes the place of the parameter's values.
    """

    parameter: torch.nn.Parameter
    keys: tuple[str, ...]
    takes: bool

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """The shape of the change; None for two halves that do not fit together."""
        if len(self.keys) == 1:
            return shapes[self.keys[0]]
        down, up = (shapes[key] for key in self.keys[:2])
        fits = len(down) == len(up) == 2 and up[1] == down[0]
        return (up[0], down[1]) if fits else None

    def apply(self, file_of: Mapping[str, Any], strength: float) -> None:
        first, *others = (file_of[key].get_tensor(key).float() for key in self.keys)
        if others:
            # Without an alpha, a pair's product is added as it is.
            factor = float(others[1]) / len(first) if len(others) > 1 else 1.0
            first = factor * (others[0] @ first)
        change = strength * first.to(self.parameter.device)
        old = 0 if self.takes else self.parameter.float()
        self.parameter.copy_(old + change)


def load_vsa_checkpoint(target: Any, path: str | PathLike[str], *, strength: float = 1.0) -> None:
    """Load trained gates, and changes of the model's own weights, into a model with `VSAAttn`.

    Two kinds of files are known. A whole model in the layout of diffusers, such as FastWan or
    FastH3: its gates are read, and all other weights are left to `from_pretrained`. A file of
    changes, such as the LoRA of FastH3: gates are read, and low-rank pairs and differences are
    added to the model's own weights, in float32. These additions stay when the method is taken off,
    and loading a file twice adds them twice. All keys and shapes are checked before the first
    weight changes.

    Args:
        target: a diffusers pipeline with one denoiser that has `VSAAttn(coarse=True)` attached, or
            that denoiser.
        path: a safetensors file, or a folder of such files that make one checkpoint.
        strength: factor of every gate and of every change.

    Raises:
        FileNotFoundError: if there is no such file, or none in the folder.
        ValueError: if the keys or shapes do not fit the model, several keys are for one parameter,
            the file has no gate for a site of the method, or offloading has moved a weight away.
    """
    check("strength", strength, number())
    files = _files(Path(path))
    model, gates = _attached(target, Path(path).name)
    with ExitStack() as opened, torch.no_grad():
        file_of: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            file = opened.enter_context(safe_open(name, framework="pt"))
            for key, shape in shapes_in(file).items():
                if key in file_of:
                    raise ValueError(f"{key} is in several files of {path}, but must be in one")
                file_of[key], shapes[key] = file, shape
        what = f"{Path(path).name} does not fit {type(model).__name__}"
        changes = _changes(model, gates, shapes, what)
        for change in changes:
            if change.shape(shapes) != tuple(change.parameter.shape):
                given = " and ".join(str(shapes[key]) for key in change.keys[:2])
                raise ValueError(
                    f"{what}: {' and '.join(change.keys[:2])} has shape {given}, but the model's"
                    f" weight {tuple(change.parameter.shape)}"
                )
            check_at_hand(change.keys[0], change.parameter, "load the checkpoint")
        for change in changes:
            change.apply(file_of, strength)


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path}: pass a safetensors file, or the folder of a"
            f" transformer with such files"
        )
    return files


def _attached(target: Any, name: str) -> tuple[torch.nn.Module, dict[str, str]]:
    """The denoiser with gates, and the name of each gate's layer by the names of modules in files.

    Raises:
        ValueError: unless just one denoiser has gates.
    """
    found = []
    for model in models_in(target):
        sites = [
            site
            for site in family_of(model).layers(model)
            if isinstance(model.get_submodule(site)._modules.get(VSAAttn.type), VSAGate)
        ]
        if sites:
            found.append((model, sites))
    if len(found) != 1:
        problem = (
            "has no gates; call set_attn_processor(VSAAttn(coarse=True)) first"
            if not found
            else f"has {len(found)} denoisers with gates; pass the one that the file is for, such"
            f" as pipe.transformer"
        )
        raise ValueError(f"{name} is a checkpoint of VSA, but {type(target).__name__} {problem}")
    model, sites = found[0]
    gates = {}
    for site in sites:
        # FastWan has gates in blocks, and FastH3 in attention modules. ComfyUI's layout of FastH3
        # has another name for the blocks.
        block = site.rpartition(".")[0]
        own = f"{site}.{VSAAttn.type}.{_GATE}"
        native = site.replace("transformer_blocks.", "blocks.", 1)
        for home in (f"{site}.{VSAAttn.type}", site, block, native):
            gates[f"{home}.{_GATE}"] = own
    return model, gates


def _changes(
    model: torch.nn.Module, gates: Mapping[str, str], keys: Iterable[str], what: str
) -> list[_Change]:
    """What the keys of a checkpoint change.

    Raises:
        ValueError: for keys that reach nothing, several keys for one parameter, half a pair, or a
            gate without a key.
    """
    parameters = parameters_by_own_name(model)
    own_gates = set(gates.values())
    changes: list[_Change] = []
    strange: list[str] = []
    given: set[str] = set()
    own = parameters.keys() | dict(model.named_buffers()).keys()
    # The model's own weights, in a file of a whole model, are not those of the method.
    others = [
        key
        for key in keys
        if key.removeprefix(_PREFIX) not in own or key.rpartition(".")[0] in own_gates
    ]
    for module, forms in _by_module(others, gates, strange, what).items():
        if module not in own_gates:
            strange += forms.pop("set_weight", ())
        pair = [*forms.pop("down", ()), *forms.pop("up", ())]
        if len(pair) == 1:
            raise ValueError(f"{what}: {pair[0]} is half of a low-rank pair, without the other")
        alpha = forms.pop("alpha", ())
        if pair:
            forms["pair"] = (*pair, *alpha)
        else:
            strange += alpha
        for kind, possible in (("weight", _OF_WEIGHT), ("bias", _OF_BIAS)):
            found = [form for form in possible if form in forms]
            name = f"{module}.{kind}"
            if len(found) > 1:
                raise ValueError(
                    f"{what}: {' and '.join(forms[form][0] for form in found)} are both for"
                    f" {name}, but one key must say what it becomes"
                )
            for form in found:
                if name not in parameters:
                    strange += forms[form]
                    continue
                takes = form in ("weight", "bias", "set_weight")
                changes.append(_Change(parameters[name], forms[form], takes))
                given.add(name)
    if strange:
        raise ValueError(
            f"{what}: it has keys that reach nothing in the model, {len(strange)} in all, such as"
            f" {min(strange)}; it must be a checkpoint of VSA for this model, in the layout of"
            f" diffusers, and the method attached to all of it"
        )
    missing = {gate for gate in own_gates if f"{gate}.weight" not in given}
    if missing:
        raise ValueError(
            f"{what}: it has no gate for {len(missing)} of {len(own_gates)} sites of the method,"
            f" such as {min(missing).removesuffix(f'.{VSAAttn.type}.{_GATE}')}"
        )
    return changes


def _by_module(
    keys: Iterable[str], gates: Mapping[str, str], strange: list[str], what: str
) -> dict[str, dict[str, tuple[str, ...]]]:
    """The keys of each module, by form; keys of no known form are added to `strange`."""
    modules: dict[str, dict[str, tuple[str, ...]]] = {}
    for key in sorted(keys):
        plain = key.removeprefix(_PREFIX)
        if match := _PAIR.fullmatch(plain):
            form = _HALVES[match["half"]]
        elif match := _SINGLE.fullmatch(plain):
            form = match["form"]
        else:
            strange.append(key)
            continue
        module = gates.get(match["module"], match["module"])
        forms = modules.setdefault(module, {})
        if form in forms:
            raise ValueError(
                f"{what}: {forms[form][0]} and {key} are both for {module}, but one key must say"
                f" what it becomes"
            )
        forms[form] = (key,)
    return modules
