"""Statistics of few runs: robust means, intervals, profiles, and tests of differences.

Scores are normalised and come as one array a task, (n_t,) runs each: runs are redrawn within their
task, never across, since tasks are chosen and seeds are chance.

    scores {task: (n,)}  ->  interquartile_mean, stratified_interval, performance_profile
    two agents' scores   ->  probability_of_improvement, Comparison (p-values, Holm-corrected)

Sources: Agarwal et al. 2021, arXiv:2108.13264 (interquartile mean, stratified bootstrap, profiles,
probability of improvement); Mann and Whitney 1947; Holm 1979.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError

Floats = npt.NDArray[np.float64]
Scores = Mapping[str, Floats]
"""Normalised scores of an agent's runs, by task."""

CONFIDENCE = 0.95
RESAMPLES = 2_000
MOST_ARRANGEMENTS = 100_000
"""Ways to deal the runs out to two agents that ``rank_p`` counts one by one."""


def interquartile_mean(values: npt.ArrayLike, axis: int = -1) -> Any:
    """Return the mean of the middle half along ``axis``: the lowest and highest quarter are cut (rounded down)."""
    ordered = np.sort(np.asarray(values, np.float64), axis=axis)
    count = ordered.shape[axis]
    if not count:
        raise ConfigError("the interquartile mean of no values is not defined")
    cut = count // 4
    return np.take(ordered, range(cut, count - cut), axis=axis).mean(axis=axis)


def stratified_resamples(scores: Scores, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Return (resamples, runs of all tasks): runs redrawn within each task, tasks side by side."""
    rng = np.random.default_rng(seed)
    return np.concatenate([runs[rng.integers(len(runs), size=(resamples, len(runs)))] for runs in scores.values()], -1)


def interval(statistics: npt.ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of a statistic's resamples."""
    low, high = np.quantile(np.asarray(statistics, np.float64), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def stratified_interval(
    scores: Scores, statistic: Callable[[Floats], Any] = interquartile_mean, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the stratified bootstrap interval of ``statistic``, which takes (resamples, runs) to (resamples,)."""
    return interval(statistic(stratified_resamples(scores, resamples, seed)))


def performance_profile(scores: Scores, thresholds: npt.ArrayLike) -> Floats:
    """Return the share of runs that reach each threshold, (thresholds,); each task weighs the same."""
    at = np.asarray(thresholds, np.float64)
    return np.mean([(runs[:, None] >= at).mean(0) for runs in scores.values()], axis=0)


def profile_band(
    scores: Scores, thresholds: npt.ArrayLike, resamples: int = 500, seed: int = 0
) -> tuple[Floats, Floats]:
    """Return the pointwise bootstrap interval of ``performance_profile``."""
    at, rng = np.asarray(thresholds, np.float64), np.random.default_rng(seed)
    total = np.zeros((resamples, len(at)))
    for runs in scores.values():
        drawn = runs[rng.integers(len(runs), size=(resamples, len(runs)))]
        total += (drawn[:, :, None] >= at).mean(1)
    low, high = np.quantile(total / len(scores), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def probability_of_improvement(first: Scores, second: Scores) -> float:
    """Return P(a run of ``first`` beats one of ``second`` on the same task), ties half, mean over common tasks."""
    return float(np.mean([_beats(first[task], second[task]) for task in common_tasks(first, second)]))


def improvement_interval(first: Scores, second: Scores, resamples: int = 500, seed: int = 0) -> tuple[float, float]:
    """Return the stratified bootstrap interval of ``probability_of_improvement``."""
    rng = np.random.default_rng(seed)
    drawn: list[Floats] = []
    for task in common_tasks(first, second):
        a, b = (runs[rng.integers(len(runs), size=(resamples, len(runs)))] for runs in (first[task], second[task]))
        drawn.append(_beats(a, b))
    return interval(np.mean(drawn, axis=0))


def common_tasks(first: Scores, second: Scores) -> list[str]:
    """Return the tasks on which both have runs.

    Raises:
        ConfigError: there are none.
    """
    common = [task for task in first if task in second]
    if not common:
        raise ConfigError("the two have no task in common, so there is nothing to compare")
    return common


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: as many as one likes may be read at 0.05 together."""
    p, count = np.asarray(p_values, np.float64), len(p_values)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(count)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * (count - np.arange(count))), 1.0)
    return corrected.tolist()


@dataclass(frozen=True)
class Difference:
    """First minus second on one task, or over all of them."""

    task: str
    first: float  # interquartile means
    second: float
    interval: tuple[float, float] | None  # 95%, by bootstrap, of the difference; None of single runs
    p: float  # two-sided; over tasks, corrected by Holm
    least_p: float  # of any difference between so few runs

    @property
    def significant(self) -> bool:
        return self.p < 1 - CONFIDENCE

    @property
    def has_too_few_runs(self) -> bool:
        """True if no difference at all between so few runs could be significant."""
        return self.least_p >= 1 - CONFIDENCE


@dataclass(frozen=True)
class Comparison:
    """Which differences between two agents, or two results of one, are more than chance."""

    overall: Difference
    by_task: list[Difference]
    improvement: float  # probability of improvement of the first over the second
    improvement_interval: tuple[float, float] | None


def compare(first: Scores, second: Scores, seed: int = 0) -> Comparison:
    """Compare two agents task by task, and over all common tasks.

    Task by task: two-sided Mann-Whitney U tests (``rank_p``), corrected by Holm. Overall: a permutation test in
    which runs change sides within their task only, on the mean over tasks of the difference of
    interquartile means.

    Raises:
        ConfigError: no task in common.
    """
    tasks = common_tasks(first, second)
    a, b = ({task: runs[task] for task in tasks} for runs in (first, second))
    p_values = [rank_p(a[t], b[t]) for t in tasks]
    least = min(1.0, len(tasks) * min(least_p(len(a[t]), len(b[t])) for t in tasks))  # Holm's first step
    corrected = zip(tasks, holm(p_values), strict=True)
    by_task = [
        _difference(t, {t: a[t]}, {t: b[t]}, p, max(least, least_p(len(a[t]), len(b[t]))), seed) for t, p in corrected
    ]
    least_overall = math.prod(least_p(len(a[t]), len(b[t])) / 2 for t in tasks) * 2
    return Comparison(
        _difference("all tasks", a, b, permutation_p(a, b, seed=seed), min(1.0, least_overall), seed),
        by_task,
        probability_of_improvement(a, b),
        improvement_interval(a, b, seed=seed) if have_spread(a, b) else None,
    )


def have_spread(*scores: Scores) -> bool:
    """Return True if some task has several runs: chance among single runs is not known."""
    return any(len(runs) > 1 for own in scores for runs in own.values())


def rank_p(first: Floats, second: Floats) -> float:
    """Return the two-sided p-value of the Mann-Whitney U test of (n,) runs against (m,) others.

    It is the share of arrangements whose U is at least as far from its mean, ties included, up to
    ``MOST_ARRANGEMENTS`` of them; with more runs it is SciPy's, which is approximate where there are ties.
    """
    from scipy.stats import mannwhitneyu, rankdata

    count, runs = len(first), len(first) + len(second)
    if math.comb(runs, count) > MOST_ARRANGEMENTS:
        return float(mannwhitneyu(first, second, alternative="two-sided").pvalue)
    ranks = rankdata(np.concatenate([first, second])) - (runs + 1) / 2  # from their mean; ties share one
    # U is the sum of the ranks of the first, less a constant. Ranks are halves: sums of them are exact.
    sums = ranks[np.array(list(itertools.combinations(range(runs), count)))].sum(-1)
    return float(np.mean(np.abs(sums) >= abs(ranks[:count].sum())))


def least_p(first: int, second: int) -> float:
    """Return the smallest two-sided p-value of a rank or permutation test of so many runs against so many others."""
    return min(1.0, 2 / math.comb(first + second, first))


def seeds_needed(tasks: int) -> int:
    """Return the runs of each of two agents with which a difference on one of so many tasks can be significant."""
    return next(runs for runs in itertools.count(2) if tasks * least_p(runs, runs) < 1 - CONFIDENCE)


def permutation_p(first: Scores, second: Scores, permutations: int = 4_000, seed: int = 0) -> float:
    """Return the two-sided p-value of the mean difference over tasks, if runs could as well be the other agent's."""
    rng, tasks = np.random.default_rng(seed), common_tasks(first, second)
    observed, shuffled = 0.0, np.zeros(permutations)
    for task in tasks:
        count = len(first[task])
        pooled = np.concatenate([first[task], second[task]])
        drawn = rng.permuted(np.tile(pooled, (permutations, 1)), axis=-1)
        observed += interquartile_mean(pooled[:count]) - interquartile_mean(pooled[count:])
        shuffled += interquartile_mean(drawn[:, :count]) - interquartile_mean(drawn[:, count:])
    as_far = np.abs(shuffled) >= abs(observed) - 1e-12
    return float((1 + as_far.sum()) / (1 + permutations))  # the observed arrangement is one of them


def _difference(task: str, first: Scores, second: Scores, p: float, least: float, seed: int) -> Difference:
    def mean(resampled: Floats) -> Floats:
        return np.asarray(interquartile_mean(resampled))

    means, drawn = [], []
    for place, scores in enumerate((first, second)):
        means.append(np.mean([interquartile_mean(runs) for runs in scores.values()]))
        rows = [
            mean(stratified_resamples({t: runs}, seed=seed + 2 * i + place))
            for i, (t, runs) in enumerate(scores.items())
        ]
        drawn.append(np.mean(rows, axis=0))
    spread = interval(drawn[0] - drawn[1]) if have_spread(first, second) else None
    return Difference(task, float(means[0]), float(means[1]), spread, p, least)


def _beats(first: Floats, second: Floats) -> Any:
    """Return the share of pairs in which ``first`` (..., n) is above ``second`` (..., m), ties half."""
    difference = first[..., :, None] - second[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((-2, -1))
