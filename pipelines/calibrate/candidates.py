"""Candidates: method, dense warm-up, ramp, and shares of layers, made to do one wanted work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from diffattn.methods import ByHeadAttn, DenseAttn, Policy, from_dict
from diffattn.methods.by_head import work_of
from diffattn.methods.policy import Phase, Rule

from ..errors import UserError
from ..knobs import KNOBS, Knob, check_knob, knob_of

if TYPE_CHECKING:
    from diffattn import TokenGrid
    from diffattn.methods import Method
    from diffattn.methods.base import Work
    from diffattn.planning.published import ModelShape

# A ramp is so many phases of equal length.
_PHASES = 4
_HALVINGS = 16
# Of the search for a parameter, and how near a share comes to the wanted one, as a share of it.
_TURNS = 12
_NEAR_SHARE = 0.002
_LEAST_SHARE = 1e-4
# A candidate may do so much more or less than the wanted work, as shares of it: parameters that are
# whole numbers come no nearer on small grids.
_MORE, _LESS = 0.005, 0.1
_NEAR = 0.001
_NO_ENDS: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0, "last_dense_steps": 0}


# A method's `to_dict()`, as pairs.
Settings = tuple[tuple[str, Any], ...]


def settings_of(method: Method) -> Settings:
    """The settings of a method in the form of candidates."""
    return tuple(method.to_dict().items())


def check_method(method: Method) -> None:
    """Refuse a method that a policy cannot hold at a wanted, known work.

    Args:
        method: as the user gave it.

    Raises:
        UserError: if no parameter sets its share of the pairs, if the share is known only after a
            run, if a parameter differs from step to step, or if the method cannot be in a policy.
    """
    option = f"--attn {method.type}"
    knob = check_knob(method, option, f"calibrate can take {', '.join(_can_be_taken())}")
    if knob.by_content:
        raise UserError(
            f"{option}: the share of the token pairs that it computes depends on what the tokens"
            f" hold, but calibrate compares methods at equal work, which it must know before a run;"
            f" `diffattn compare --density` measures the share"
        )
    if method.differs_by_step:
        raise UserError(
            f"{option}: a parameter differs from step to step, but calibrate sets the steps itself:"
            f" give one value"
        )
    if method.changes_the_model:
        raise UserError(
            f"{option}: it has weights of its own or changes the model, and cannot be in a policy"
        )


def _can_be_taken() -> list[str]:
    """The names of the methods that `check_method` passes."""
    plain = (from_dict({"type": name}) for name, knob in KNOBS.items() if not knob.by_content)
    return [method.type for method in plain if not method.changes_the_model]


@dataclass(frozen=True)
class Candidate:
    """What a policy is made of, beside the wanted work.

    Attributes:
        method: the method's `to_dict()`, as pairs, without the values that a model recommends; its
            share of the pairs is set by the work.
        warm_up: fraction of the run at its start that stays dense.
        ramp: the share of the first sparse steps is 1 + `ramp` times the mean, that of the last
            steps 1 - `ramp` times.
        layers: factors of the shares of the layers; empty for equal shares.
        heads: factors of the shares of the heads of each layer; empty for equal shares.
    """

    method: Settings
    warm_up: float
    ramp: float = 0.0
    layers: tuple[float, ...] = ()
    heads: tuple[tuple[float, ...], ...] = ()

    @property
    def is_uniform(self) -> bool:
        """Whether all layers and all sparse steps have one share."""
        return not self.ramp and not self.layers and not self.heads

    @property
    def least_factor(self) -> float:
        """The least factor of any share."""
        by_head = min((factor for layer in self.heads for factor in layer), default=1.0)
        return min(self.layers, default=1.0) * (1 - abs(self.ramp)) * by_head

    def words(self, names: Mapping[Settings, str]) -> str:
        """A line about the candidate; `names` has the methods' names."""
        parts = [names[self.method], f"{self.warm_up:.0%} dense first"]
        if self.ramp:
            parts.append(f"ramp {self.ramp:+.1f}")
        if self.layers:
            parts.append(f"layers {','.join(f'{factor:.2f}' for factor in self.layers)}")
        if self.heads:
            spread = [factor for layer in self.heads for factor in layer]
            parts.append(f"heads {min(spread):.2f} to {max(spread):.2f}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The candidate as JSON types."""
        heads = [list(layer) for layer in self.heads]
        lists = {"layers": list(self.layers), "heads": heads}
        return asdict(self) | {"method": dict(self.method), **lists}


@dataclass
class Maker:
    """Makes candidates into policies of the wanted work.

    Attributes:
        shape: of the model.
        grid: the tokens of a call.
        steps: denoising steps of a run.
        wanted: share of a dense run's attention FLOPs.
    """

    shape: ModelShape
    grid: TokenGrid
    steps: int
    wanted: float
    _work: dict[tuple[Method, int], Work] = field(default_factory=dict)
    _turned: dict[tuple[Method, float], tuple[Method, float]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return max(self.shape.block_of_site) + 1

    def policy(
        self, candidate: Candidate, *, from_above: bool = False
    ) -> tuple[Policy, float] | None:
        """The policy of a candidate and its work; None if it cannot come near the wanted work.

        Args:
            candidate: the candidate.
            from_above: whether the work is to be at least the wanted work, not at most.
        """
        least, most = (_MORE, _LESS) if from_above else (_LESS, _MORE)
        least, most = self.wanted * (1 - least), self.wanted * (1 + most)
        # Up to where even the sparsest layer and phase are dense.
        low, high = _LEAST_SHARE, 1 / candidate.least_factor
        best: tuple[Policy, float] | None = None
        for _ in range(_HALVINGS):
            share = (low + high) / 2
            policy = self._at(candidate, share)
            work = self.work(policy)
            distance = abs(work - self.wanted)
            if least <= work <= most and (best is None or distance < abs(best[1] - self.wanted)):
                best = policy, work
            if distance <= _NEAR * self.wanted:
                break
            low, high = (low, share) if work > self.wanted else (share, high)
        return best

    def in_run(self, policy: Policy) -> tuple[tuple[Method, ...], ...]:
        """The method of each layer and step, without those of phases that no step is in."""
        rules = [self._in_steps(policy, layer) for layer in range(self.layers)]
        return tuple(tuple(rule) for rule in rules)

    def _in_steps(self, policy: Policy, layer: int) -> list[Method]:
        of_layer = policy.at_layer(layer, self.layers)
        return [of_layer.at_step(step, self.steps) for step in range(self.steps)]

    def _at(self, candidate: Candidate, share: float) -> Policy:
        """The policy of a candidate whose layers and steps have a mean share."""
        base = from_dict(dict(candidate.method))
        phases = _PHASES if candidate.ramp else 1
        rules: dict[tuple[Phase, ...], list[int]] = {}
        for layer in range(self.layers):
            factor = candidate.layers[layer] if candidate.layers else 1.0
            made = [Phase(DenseAttn(), candidate.warm_up)] if candidate.warm_up else []
            for number in range(phases):
                slope = 1 - 2 * number / max(1, phases - 1)
                part = share * factor * (1 + candidate.ramp * slope if candidate.ramp else 1.0)
                heads = candidate.heads[layer] if candidate.heads else (1.0,)
                method = self._by_head(base, [part * factor for factor in heads])
                over = (number + 1) / phases
                until = round(candidate.warm_up + (1 - candidate.warm_up) * over, 4)
                made.append(Phase(method, None if number == phases - 1 else until))
            rules.setdefault(tuple(made), []).append(layer)
        if len(rules) == 1:
            return Policy(rules=(Rule(next(iter(rules))),))
        return Policy(rules=tuple(Rule(phases, tuple(which)) for phases, which in rules.items()))

    def _by_head(self, base: Method, shares: list[float]) -> Method:
        """The method of a layer whose heads have these shares; one share is that of all heads."""
        methods = [DenseAttn() if share >= 1 else self._with_share(base, share) for share in shares]
        runs = [(method, len(list(equal))) for method, equal in groupby(methods)]
        return methods[0] if len(runs) == 1 else ByHeadAttn(parts=tuple(runs), **_NO_ENDS)

    def _with_share(self, base: Method, share: float) -> Method:
        """The method whose share of the pairs is nearest to `share`, as a plan counts it."""
        knob = knob_of(base)
        assert knob is not None
        low, high = 0.0, 1.0
        best: tuple[float, Method] | None = None
        for _ in range(_TURNS):
            place = (low + high) / 2
            method, found = self._at_place(base, knob, place)
            distance = abs(found - share)
            if best is None or distance < best[0]:
                best = distance, method
            if distance <= _NEAR_SHARE * share:
                break
            low, high = (low, place) if found > share else (place, high)
        assert best is not None
        return best[1]

    def _at_place(self, base: Method, knob: Knob, place: float) -> tuple[Method, float]:
        """A method at a place of its knob, settled, and its share of the pairs."""
        if (base, place) not in self._turned:
            method = self.settled(knob.turn(base, place, self.grid))
            shares = [self._density(method, layer) for layer in self.shape.block_of_site]
            self._turned[base, place] = method, sum(shares) / len(shares)
        return self._turned[base, place]

    def settled(self, method: Method) -> Method:
        """A method with the recommended values, without dense layers and steps of its own."""
        return replace(method.for_model(self.shape.variant, self.grid.alone), **_NO_ENDS)

    def work(self, policy: Policy) -> float:
        """The attention FLOPs of a run under a policy, relative to a dense run."""
        shares = [
            self._share(method, layer)
            for layer in self.shape.block_of_site
            for method in self._in_steps(policy, layer)
        ]
        return sum(shares) / len(shares)

    def _share(self, method: Method, layer: int) -> float:
        """The FLOPs of a call, relative to a dense call."""
        if method.is_dense:
            return 1.0
        channels = self.shape.heads * self.shape.head_dim
        return self._work_of(method, layer).flops / (4 * self.grid.tokens**2 * channels)

    def _density(self, method: Method, layer: int) -> float:
        """The share of the token pairs that a call computes."""
        density = 1.0 if method.is_dense else self._work_of(method, layer).density
        assert density is not None
        return density

    def _work_of(self, method: Method, layer: int) -> Work:
        known = method, method.layer_kind(layer)
        if known not in self._work:
            work = work_of(method, self.grid, layer, self.shape.heads, self.shape.head_dim)
            if work is None:
                raise ValueError(f"the work of {method.type} is not known before it runs")
            self._work[known] = work
        return self._work[known]
