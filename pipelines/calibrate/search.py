"""The search: successive halving over renders, first of schedules, then of ramps and of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from .candidates import Candidate, Settings

# Fractions of the run that stay dense at its start.
WARM_UPS = (0.0, 0.1, 0.25, 0.4)
_RAMPS = (0.3, 0.6)
# The shares of layers and heads grow with the errors of their outputs; or they fall, since errors
# may mislead.
_POWERS = (0.25, 0.5, 1.0, -0.25)
_SPARSER = 0.5
# Neighbouring layers are tried together, in so many groups.
_GROUPS = 8
# Survivors of each stage but the last, and the most prompts of such a stage.
_KEPT = 2
_PROMPTS_OF_A_STAGE = 8
# Candidates are ranked by no fewer prompts: the ratios of one differ by many dB from prompt to
# prompt.
_FIRST_PROMPTS = 2

Score = Callable[[Candidate, int], float]


def search(
    first: Sequence[Candidate],
    errors: Mapping[Settings, Sequence[Sequence[float]]],
    is_possible: Callable[[Candidate], bool],
    score: Score,
    prompts: int,
) -> Candidate:
    """Find the best candidate.

    Args:
        first: candidates with constant, equal shares.
        errors: the errors of the heads of each layer, by method.
        is_possible: whether a candidate can have the wanted work.
        score: renders a candidate with a prompt, and gives its score; the more the better. What it
            raises ends the search.
        prompts: number of prompts.
    """
    of_a_stage = min(prompts, _PROMPTS_OF_A_STAGE)
    best = halve(first, score, of_a_stage, _KEPT)
    for more in _STAGES:
        further = [
            candidate
            for old in best
            for candidate in more(old, errors.get(old.method, ()))
            if is_possible(candidate)
        ]
        best = halve(dict.fromkeys([*best, *further]), score, of_a_stage, _KEPT)
    return halve(best, score, prompts, 1)[0]


def halve(
    candidates: Iterable[Candidate], score: Score, prompts: int, kept: int
) -> list[Candidate]:
    """Rank candidates by their scores, the better half by twice as many prompts each time.

    Returns:
        `kept` candidates, the best first; fewer if there were fewer.
    """
    left = list(candidates)
    count = min(_FIRST_PROMPTS, prompts)
    while True:
        # Prompt by prompt, so that all have been compared at any time.
        for prompt in range(count):
            for candidate in left:
                score(candidate, prompt)
        means = {c: fmean(score(c, prompt) for prompt in range(count)) for c in left}
        left.sort(key=lambda c: -means[c])
        if count == prompts or len(left) <= 1:
            return left[:kept]
        left = left[: max(kept, math.ceil(len(left) / 2))]
        count = min(2 * count, prompts)


def leader(scores: Mapping[Candidate, Mapping[int, float]]) -> tuple[Candidate, float, int] | None:
    """The best candidate so far, its mean score, and the number of prompts of the mean.

    The mean is over as many prompts as at least two candidates have been rendered with.
    """
    counts = sorted((_in_order(of) for of in scores.values()), reverse=True)
    count = (counts[1] or counts[0]) if len(counts) > 1 else max(counts, default=0)
    if not count:
        return None
    means = {
        candidate: fmean(of[prompt] for prompt in range(count))
        for candidate, of in scores.items()
        if _in_order(of) >= count
    }
    best = max(means, key=lambda candidate: means[candidate])
    return best, means[best], count


def _in_order(of: Mapping[int, float]) -> int:
    """How many of the first prompts have a score."""
    return next(n for n in range(len(of) + 1) if n not in of)


def _with_ramps(candidate: Candidate, errors: Sequence[Sequence[float]]) -> Iterator[Candidate]:
    for warm_up in dict.fromkeys((candidate.warm_up, candidate.warm_up / 2)):
        for ramp in _RAMPS:
            yield replace(candidate, warm_up=warm_up, ramp=ramp)


def _with_errors(candidate: Candidate, errors: Sequence[Sequence[float]]) -> Iterator[Candidate]:
    """Candidates whose layers have shares by the errors of their outputs."""
    layers = [sum(heads) for heads in errors]
    if len(layers) > 1 and all(layers):
        for power in _POWERS:
            yield replace(candidate, layers=_even([error**power for error in layers]))


def _with_heads(candidate: Candidate, errors: Sequence[Sequence[float]]) -> Iterator[Candidate]:
    """Candidates whose heads have shares by their errors; their mean is that of the layer."""
    if all(len(heads) > 1 and all(heads) for heads in errors):
        for power in _POWERS if errors else ():
            factors = (_even([error**power for error in heads]) for heads in errors)
            yield replace(candidate, heads=tuple(factors))


def _with_sparser_groups(
    candidate: Candidate, errors: Sequence[Sequence[float]]
) -> Iterator[Candidate]:
    """Candidates in which some neighbouring layers are sparser, and so all others denser."""
    layers = len(errors)
    groups = min(_GROUPS, layers)
    for group in range(groups if groups > 1 else 0):
        factors = list(candidate.layers or (1.0,) * layers)
        for layer in range(group * layers // groups, (group + 1) * layers // groups):
            factors[layer] *= _SPARSER
        yield replace(candidate, layers=_even(factors))


# The groups come twice: two of them may be sparser together.
_STAGES = (_with_ramps, _with_errors, _with_heads, _with_sparser_groups, _with_sparser_groups)


def _even(factors: Sequence[float]) -> tuple[float, ...]:
    """Factors with a mean of 1, rounded."""
    mean = fmean(factors)
    return tuple(round(max(0.1, factor / mean), 3) for factor in factors)
