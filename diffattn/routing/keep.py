"""Scores and rules of block selection as functions: `diffattn.BlockTopKAttn` takes them.

A score is a function of the pooled tokens. A rule is a function of scores and pooled tokens that
says which pairs of a query block and a key block are kept. The rules here are frozen values, and
are called as functions are. JSON writes them by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any, ClassVar, TypeAlias

import torch

from diffattn._checks import check_fields, choice, count, did_you_mean, number
from diffattn.routing.pooled import Always, Pooled
from diffattn.routing.rules import above, kept_blocks, mass, row_threshold, top

Score: TypeAlias = Callable[[Pooled], torch.Tensor]
Rule: TypeAlias = Callable[[torch.Tensor, Pooled], torch.Tensor]


@dataclass(frozen=True)
class Share:
    """The best blocks of each row, a share of its candidates; of equal scores the first."""

    name: ClassVar[str] = "share"

    share: float

    def __post_init__(self) -> None:
        check_fields(self, {"share": number(above=0, at_most=1)})

    def __call__(self, scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        return _best(scores, pooled.always.kept(self.share), pooled)

    def expected(self, always: Always) -> float:
        """The share of the candidates that the rule keeps: whole blocks, rounded up in each row."""
        rows = {
            number_of: int((always.candidates == number_of).sum()) for number_of in always.counts
        }
        kept = sum(kept_blocks(self.share, number_of) * many for number_of, many in rows.items())
        return kept / max(1, int(always.candidates.sum()))


@dataclass(frozen=True)
class Count:
    """The `blocks` best blocks of each row, or all candidates where there are fewer."""

    name: ClassVar[str] = "count"

    blocks: int

    def __post_init__(self) -> None:
        check_fields(self, {"blocks": count(1)})

    def __call__(self, scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        return _best(scores, self.blocks, pooled)

    def expected(self, always: Always) -> float:
        kept = always.candidates.clamp(max=self.blocks).sum()
        return float(kept / always.candidates.sum().clamp(min=1))


@dataclass(frozen=True)
class Mass:
    """The fewest blocks whose softmax weights among the row's candidates exceed a share.

    Scores must have the scale of a softmax: those of "mean" and "parts" do.

    Attributes:
        share: of the weight; 1 keeps all candidates.
        least: blocks to keep at least.
    """

    name: ClassVar[str] = "mass"

    share: float
    least: int = 1

    def __post_init__(self) -> None:
        check_fields(self, {"share": number(above=0, at_most=1), "least": count(1)})

    def __call__(self, scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        candidates = _candidates(scores, pooled)
        kept = mass(scores.masked_fill(~candidates, -torch.inf), self.share, self.least)
        return kept & candidates

    def expected(self, always: Always) -> None:
        return None


@dataclass(frozen=True)
class AboveMean:
    """The blocks whose score is more than `tau` standard deviations above the mean of their row.

    The mean is that of all blocks of the row (Sol-Attn, arXiv 2607.24027).

    Attributes:
        tau: standard deviations above the mean; lower keeps more.
        variance: "exact" for the variance of the row's scores; "diagonal" for Sol-Attn's estimate
            by channels, which is for the score "mean" alone.
    """

    name: ClassVar[str] = "above-mean"

    tau: float
    variance: str = "exact"

    def __post_init__(self) -> None:
        check_fields(self, {"tau": number(), "variance": choice(("diagonal", "exact"))})

    def __call__(self, scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        threshold = row_threshold(
            scores,
            pooled.query_means,
            pooled.key_means,
            pooled.scale,
            self.tau,
            self.variance,  # type: ignore[arg-type]
            pooled.holds_any,
        )
        return above(scores, threshold)

    def expected(self, always: Always) -> float:
        # Scores of models are nearly normally distributed.
        return 1 - NormalDist().cdf(self.tau)


@dataclass(frozen=True)
class Above:
    """The blocks whose score is above a constant, which was calibrated for a model.

    Attributes:
        score: the constant.
    """

    name: ClassVar[str] = "above"

    score: float

    def __post_init__(self) -> None:
        check_fields(self, {"score": number()})

    def __call__(self, scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        return _candidates(scores, pooled) & (scores > self.score)

    def expected(self, always: Always) -> None:
        return None


Value: TypeAlias = Share | Count | Mass | AboveMean | Above
_VALUES: dict[str, type[Value]] = {
    value.name: value for value in (Share, Count, Mass, AboveMean, Above)
}


def as_json(value: Value) -> dict[str, Any]:
    """A rule as `from_json` reads it: {"rule": "mass", "share": 0.9, "least": 1}."""
    return {"rule": value.name} | asdict(value)


def from_json(entry: Mapping[str, Any]) -> Value:
    """The rule that `as_json` has written.

    Raises:
        ValueError: if there is no such rule, a value is missing, unknown or not allowed.
    """
    values = dict(entry)
    name = values.pop("rule", None)
    if name not in _VALUES:
        hint = did_you_mean(str(name), _VALUES, or_list=True)
        raise ValueError(f"there is no rule {name!r}{hint}")
    known = [field.name for field in fields(_VALUES[name])]
    for key in values:
        if key not in known:
            hint = did_you_mean(str(key), known, or_list=True)
            raise ValueError(f"the rule {name!r} has no value {key!r}{hint}")
    if known[0] not in values:
        raise ValueError(f"the rule {name!r} needs a value {known[0]!r}")
    return _VALUES[name](**values)


def check_scores(out: Any, source: object, pooled: Pooled) -> torch.Tensor:
    """The scores that a function has returned, in float32 at least.

    Args:
        out: what the function has returned.
        source: the function, for messages.
        pooled: the function's argument.

    Raises:
        TypeError: if the scores are no floating-point tensor.
        ValueError: if their shape or their device is another one than that of scores.
    """
    _check(called("score", source), out, pooled, "floating-point scores")
    if not out.is_floating_point():
        raise TypeError(
            f"{called('score', source)}, which returned {out.dtype}, but must return floating-point"
            f" scores"
        )
    found: torch.Tensor = out.to(torch.promote_types(out.dtype, torch.float32))
    return found


def check_kept(out: Any, source: object, pooled: Pooled) -> torch.Tensor:
    """The pairs that a rule has returned; arguments as of `check_scores`.

    Raises:
        TypeError: if the pairs are no bool tensor.
        ValueError: if their shape or their device is another one than that of scores.
    """
    _check(called("keep", source), out, pooled, "the pairs to keep, a bool for each")
    if out.dtype != torch.bool:
        raise TypeError(
            f"{called('keep', source)}, which returned {out.dtype}, but must return torch.bool,"
            f" True for pairs to keep"
        )
    found: torch.Tensor = out
    return found


def called(what: str, function: Any) -> str:
    """How messages name a function: "score is the function my_scores"."""
    name = getattr(function, "__qualname__", None)
    return f"{what} is the function {name}" if name else f"{what} is {function!r}"


def _check(source: str, out: Any, pooled: Pooled, wanted: str) -> None:
    must = f"{wanted}, as a tensor (batch, heads, query blocks, key blocks) = {pooled.shape}"
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{source}, which returned a {type(out).__name__}, but must return {must}")
    if tuple(out.shape) != pooled.shape:
        raise ValueError(
            f"{source}, which returned a tensor {tuple(out.shape)}, but must return {must}"
        )
    if out.device != pooled.query.device:
        raise ValueError(
            f"{source}, which returned a tensor on {out.device}, but the tokens are on"
            f" {pooled.query.device}; return it there"
        )


def _candidates(scores: torch.Tensor, pooled: Pooled) -> torch.Tensor:
    """The pairs that a rule decides about; a score of -inf or NaN rules a pair out."""
    return pooled.candidates & (scores > -torch.inf)


def _best(scores: torch.Tensor, count: int | torch.Tensor, pooled: Pooled) -> torch.Tensor:
    return top(scores, count, pooled.candidates, ruled_out=True)
