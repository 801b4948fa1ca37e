"""Policy: a method for each layer and each range of steps of a run, with what it was found on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch

from diffattn._checks import is_whole
from diffattn.grid import TokenGrid
from diffattn.methods.base import Compiled, Method, Site, Work
from diffattn.methods.by_head import work_of
from diffattn.methods.dense import DenseAttn
from diffattn.methods.policy.recorded import Recorded, recorded_of
from diffattn.methods.policy.rules import POLICY, Phase, Rule, rule_of
from diffattn.schedule import resolve_steps
from diffattn.spans import Span

# The format of the rules. A policy of a higher number was written by a newer diffattn.
FORMAT = 1
# Layers take turns among fewer variants than this.
_MOST_KINDS = 1000
_NO_ENDS: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}


def _nothing() -> Any:
    # As JSON has it: a list of the methods' parameters shows the default.
    return {}


@dataclass(frozen=True, kw_only=True)
class Policy(Method):
    """Methods by layer, by range of steps, and by head, with what they were found on.

    The first rule that names a layer holds for it, and layers without a rule stay dense. Methods
    may have parameters that differ from step to step, and may be `ByHeadAttn`. Methods with weights
    of their own, and methods that change the model, cannot be in a policy. `dense_layers`,
    `dense_steps` and `last_dense_steps` are those of the methods, unless the policy has more than 0
    of them, which then holds for all layers. `references` holds for methods that leave it
    at "visible".

    In a run that differs from the record a policy warns, once, in one line.

    Attributes:
        rules: `Rule`s, or objects with "layers" (a list of indices of blocks; without it all other
            blocks) and either "method" or "phases", a list of objects with "method" and "until".
            In JSON a method is its `to_dict()`. Without rules all layers are dense.
        recorded: a `Recorded`, or an object with its attributes.
        format: of the rules; 1.

    Raises:
        ValueError: for a rule that is none of these, a method that cannot be in a policy, a layer
            that the model lacks (on attaching), and a newer format.
    """

    type: ClassVar[str] = POLICY
    paper: ClassVar[str] = "methods by layer and step"
    same_in_every_step: ClassVar[frozenset[str]] = frozenset(
        ("rules", "recorded", "format", "dense_layers", "references")
    )

    rules: tuple[Rule, ...] = field(
        default=(), metadata={"help": "methods by layers and ranges of steps"}
    )
    recorded: Recorded = field(
        default_factory=_nothing,
        repr=False,
        compare=False,
        metadata={"help": "the model, size, steps and versions of the search"},
    )
    format: int = field(default=FORMAT, metadata={"help": "format of the rules"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.format) or not 1 <= self.format <= FORMAT:
            newer = is_whole(self.format) and self.format > FORMAT
            raise ValueError(
                f"format is {self.format!r}, but must be {FORMAT}, the format of rules that this"
                f" version of diffattn reads{': update diffattn' if newer else ''}"
            )
        if not isinstance(self.rules, list | tuple):
            raise ValueError(f"rules is {self.rules!r}, but must be a list of rules")
        object.__setattr__(self, "rules", tuple(map(rule_of, self.rules)))
        object.__setattr__(self, "recorded", recorded_of(self.recorded))
        taken: set[int] = set()
        for number, rule in enumerate(self.rules, start=1):
            if rule.layers is None and number < len(self.rules):
                raise ValueError(
                    f"rule {number} holds for all layers, and the rules after it for none: put it"
                    f" last"
                )
            if rule.layers is not None and not set(rule.layers) - taken:
                raise ValueError(
                    f"rule {number} decides about no layer: earlier rules name"
                    f" {', '.join(map(str, rule.layers)) or 'all'}"
                )
            taken.update(rule.layers or ())

    def at_layer(self, layer: int, layers: int) -> Method:
        beyond = [n for rule in self.rules for n in rule.layers or () if n >= layers]
        if beyond:
            raise ValueError(
                f"the policy has a rule for layer {beyond[0]}, but the model has {layers} layers,"
                f" 0 to {layers - 1}"
            )
        return self._of_rules[self._number(layer)]

    @cached_property
    def _of_rules(self) -> tuple[PolicyOfLayer, ...]:
        """The method of the layers of each rule, and of layers without a rule."""
        ends: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("dense_layers", "dense_steps", "last_dense_steps")
            if getattr(self, name)
        }
        found = []
        for rule in (*self.rules, Rule((Phase(DenseAttn()),))):
            phases = tuple(
                Phase(_with(phase.method, ends, self.references), phase.until)
                for phase in rule.phases
            )
            found.append(PolicyOfLayer(phases=phases, whole=self))
        return tuple(found)

    def _number(self, layer: int) -> int:
        """The index of a layer's rule; the number of rules for a layer without one."""
        for number, rule in enumerate(self.rules):
            if rule.layers is None or layer in rule.layers:
                return number
        return len(self.rules)

    def _each(self, methods: list[Method]) -> Policy:
        """A policy that has one method for each of these rules, for all steps."""
        rules = tuple(
            Rule((Phase(method),), rule.layers)
            for rule, method in zip(self.rules, methods, strict=True)
        )
        return replace(self, rules=rules, **_NO_ENDS)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        rules = tuple(
            Rule(tuple(Phase(p.method.for_model(family, grid), p.until) for p in of.phases), layers)
            for of, layers in zip(
                self._of_rules, (rule.layers for rule in self.rules), strict=False
            )
        )
        return replace(self, rules=rules, **_NO_ENDS)

    def at_step(self, step: int, steps: int) -> Method:
        methods = [of.at_step(step, steps) for of in self._of_rules[:-1]]
        known = tuple(map(id, methods))
        if known not in self._of_steps:
            # The policy that is kept holds its methods, and so their identities.
            self._of_steps[known] = self._each(methods)
        return self._of_steps[known]

    def in_run(self, family: str, grid: TokenGrid | None, steps: int) -> list[Method | None]:
        by_rule = [of.in_run(family, grid, steps) for of in self._of_rules]
        found: list[Method | None] = []
        for of_step in zip(*by_rule, strict=True):
            if all(method is None for method in of_step):
                found.append(None)
                continue
            methods = [DenseAttn() if m is None else m for m in of_step[:-1]]
            policy = self._each([m.for_model(family, grid) for m in methods])
            found.append(next((m for m in found if m == policy), policy))
        return found

    def with_dense_ends(self, family: str, grid: TokenGrid | None) -> Self:
        """The same policy: its layers differ in their dense steps."""
        return self

    @property
    def differs_by_step(self) -> bool:
        """Whether any layer attends in another way in some steps, dense steps included."""
        return any(
            len(of.phases) > 1
            or method.differs_by_step
            or (not method.is_dense and (method.dense_steps != 0 or method.last_dense_steps))
            for of in self._of_rules
            for method in (phase.method for phase in of.phases)
        )

    @property
    def is_dense(self) -> bool:
        return all(of.is_dense for of in self._of_rules)

    def spans(self, grid: TokenGrid) -> tuple[Span, ...]:
        methods = [phase.method for of in self._of_rules[:-1] for phase in of.phases]
        return max((m.spans(grid) for m in methods), key=len, default=super().spans(grid))

    @property
    def heads_apart(self) -> bool:
        # A policy decides about whole layers, and so cannot be a part of ByHeadAttn.
        return False

    def layer_kind(self, layer: int) -> int:
        number = self._number(layer)
        return number * _MOST_KINDS**2 + self._of_rules[number].layer_kind(layer)

    def check_family(self, family: str) -> None:
        for of in self._of_rules:
            of.check_family(family)

    def caution(self, grid: TokenGrid) -> str | None:
        said = (phase.method.caution(grid) for of in self._of_rules for phase in of.phases)
        return next(filter(None, said), None)

    def misfit(
        self, denoiser: str, variant: str, model: str, grid: TokenGrid | None, steps: int
    ) -> str | None:
        differences = self.recorded.differences(denoiser, variant, model, grid, steps)
        if not differences:
            return None
        return (
            f"the policy was found for another run and may lose quality here: this run has"
            f" {'; '.join(differences)}. `diffattn calibrate` finds one for this run"
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
        of_layer = self.at_layer(site.layer, site.layers)
        return of_layer.attend(query, key, value, site, scale=scale, key_mask=key_mask)

    def work(self, grid: TokenGrid, layer: int, heads: int, head_dim: int) -> Work | None:
        method = self._of_rules[self._number(layer)].at_step(0, 0)
        if layer < (method.dense_layers or 0):
            method = DenseAttn()
        return work_of(method, grid, layer, heads, head_dim)

    def words(self) -> str:
        """The layers with their methods, in a line."""
        return "; ".join(
            f"{_layer_words(rule.layers, alone=len(self.rules) == 1)}: {of.words()}"
            for rule, of in zip(self.rules, self._of_rules, strict=False)
        )

    def to_dict(self) -> dict[str, Any]:
        rules = [
            {
                "layers": None if rule.layers is None else list(rule.layers),
                "phases": [
                    {"method": phase.method.to_dict()}
                    | ({} if phase.until is None else {"until": phase.until})
                    for phase in rule.phases
                ],
            }
            for rule in self.rules
        ]
        recorded = asdict(self.recorded)
        recorded["grid"] = None if self.recorded.grid is None else list(self.recorded.grid)
        return super().to_dict() | {"rules": rules, "recorded": recorded}


@dataclass(frozen=True, kw_only=True)
class PolicyOfLayer(Method):
    """What a policy does in the layers of one of its rules; `Policy.at_layer` makes it.

    Attributes:
        phases: with the policy's dense layers and dense steps.
        whole: the policy.
    """

    type: ClassVar[str] = Policy.type
    paper: ClassVar[str] = Policy.paper

    phases: tuple[Phase, ...] = ()
    whole: Policy

    @property
    def described_as(self) -> Method:
        return self.whole

    def at_step(self, step: int, steps: int) -> Method:
        method = self.phases[-1].method
        for phase in self.phases[:-1]:
            assert phase.until is not None
            if steps and step < resolve_steps(phase.until, steps):
                method = phase.method
                break
        return method.at_step(step, steps)

    @property
    def differs_by_step(self) -> bool:
        """Whether methods differ; dense phases count, since the model's own attention is theirs."""
        methods = [phase.method for phase in self.phases]
        return len(methods) > 1 or any(m.differs_by_step or m.is_dense for m in methods)

    @property
    def is_dense(self) -> bool:
        return all(phase.method.is_dense for phase in self.phases)

    @property
    def dense_layers_at_most(self) -> int:
        return max(phase.method.dense_layers_at_most for phase in self.phases)

    def layer_kind(self, layer: int) -> int:
        kind = 0
        for phase in self.phases:
            kind = kind * _MOST_KINDS + phase.method.layer_kind(layer)
        return kind

    def check_family(self, family: str) -> None:
        for phase in self.phases:
            phase.method.check_family(family)

    def compiled_as(self, family: str) -> Compiled:
        return "operator"

    def misfit(
        self, denoiser: str, variant: str, model: str, grid: TokenGrid | None, steps: int
    ) -> str | None:
        return self.whole.misfit(denoiser, variant, model, grid, steps)

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        phases = (Phase(p.method.for_model(family, grid), p.until) for p in self.phases)
        return replace(self, phases=tuple(phases), **_NO_ENDS)

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
        method = self.at_step(0, 0)
        return method.attend(query, key, value, site, scale=scale, key_mask=key_mask)

    def words(self) -> str:
        """The methods in the order of the steps."""
        *first, last = self.phases
        said = [f"{phase.method.type} until {phase.until}" for phase in first]
        return ", then ".join([*said, last.method.type])

    def to_dict(self) -> dict[str, Any]:
        return self.whole.to_dict()


def _with(method: Method, ends: Mapping[str, Any], references: str) -> Method:
    changes = dict(ends)
    if method.references == "visible" and references != "visible":
        changes["references"] = references
    return replace(method, **changes) if changes else method


def _layer_words(layers: tuple[int, ...] | None, *, alone: bool) -> str:
    if layers is None:
        return "all layers" if alone else "other layers"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
