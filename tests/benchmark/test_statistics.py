"""Statistics of few runs, against scipy and cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from agents.benchmark.statistics import (
    compare,
    holm,
    improvement_interval,
    interquartile_mean,
    least_p,
    performance_profile,
    permutation_p,
    probability_of_improvement,
    profile_band,
    seeds_needed,
    stratified_interval,
)
from textgen_env.errors import ConfigError


def runs(seed=0, count=10, **shift):
    rng = np.random.default_rng(seed)
    return {task: rng.normal(mean, 0.1, count) for task, mean in shift.items()}


@pytest.mark.parametrize("count", [1, 3, 4, 5, 10, 23])
def test_the_interquartile_mean_is_scipy_s_trimmed_mean(count):
    values = np.random.default_rng(count).normal(size=(3, count))
    np.testing.assert_allclose(interquartile_mean(values), stats.trim_mean(values, 0.25, axis=-1))


def test_the_interquartile_mean_by_hand():
    assert interquartile_mean([100.0, 1, 2, 3, 4, 5, 6, -100]) == 3.5
    with pytest.raises(ConfigError, match="no values"):
        interquartile_mean([])


def test_probability_of_improvement_is_mann_whitney_s_u():
    a, b = runs(1, x=0.5, y=0.2), runs(2, count=7, x=0.45, y=0.3)
    expected = [stats.mannwhitneyu(a[t], b[t]).statistic / (10 * 7) for t in ("x", "y")]
    assert probability_of_improvement(a, b) == pytest.approx(np.mean(expected))
    assert probability_of_improvement(b, a) == pytest.approx(1 - np.mean(expected))


def test_probability_of_improvement_by_hand():
    # 2 beats 1, ties with 2, loses to 3; 4 beats all: (1 + 0.5 + 0 + 3) / 6
    assert probability_of_improvement({"t": np.array([2.0, 4])}, {"t": np.array([1.0, 2, 3])}) == 0.75


def test_the_stratified_interval_agrees_with_scipy_on_one_task():
    scores = runs(3, count=20, t=0.4)
    expected = stats.bootstrap(
        (scores["t"],), lambda x, axis: stats.trim_mean(x, 0.25, axis), n_resamples=4000, method="percentile", rng=0
    ).confidence_interval
    assert stratified_interval(scores, resamples=4000) == pytest.approx(tuple(expected), abs=0.01)


def test_runs_are_redrawn_within_their_task_only():
    scores = {"low": np.zeros(5), "high": np.ones(5)}  # all chance is between tasks: none is left
    assert stratified_interval(scores, lambda drawn: drawn.mean(-1)) == (0.5, 0.5)


def test_a_profile_by_hand():
    scores = {"a": np.array([0.0, 0.5]), "b": np.array([1.0, 1.0, 1.0, 0.2])}
    np.testing.assert_allclose(performance_profile(scores, [0, 0.4, 0.5, 0.9, 2]), [1, 0.625, 0.625, 0.375, 0])
    low, high = profile_band(scores, [0, 0.4, 2])
    assert (low[0], high[0], low[2], high[2]) == (1, 1, 0, 0)
    assert low[1] <= 0.625 <= high[1]


def test_holm_by_hand():
    # 0.01 * 4; 0.02 * 3 = 0.06; 0.03 * 2 = 0.06; 0.04 * 1, raised to 0.06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_permutation_test_agrees_with_all_permutations():
    a, b = {"t": np.array([1.0, 2, 3, 7])}, {"t": np.array([4.0, 5, 6, 8])}
    exact = stats.permutation_test(
        (a["t"], b["t"]), lambda x, y, axis: stats.trim_mean(x, 0.25, axis) - stats.trim_mean(y, 0.25, axis), axis=-1
    ).pvalue
    assert permutation_p(a, b) == pytest.approx(exact, abs=0.03)


def test_a_difference_is_found_where_there_is_one_and_only_there():
    first, second = runs(1, x=0.9, y=0.5, z=0.1), runs(2, x=0.3, y=0.5, z=0.1)
    found = compare(first, second)
    assert [d.significant for d in found.by_task] == [True, False, False]
    assert found.overall.significant
    low, high = found.by_task[0].interval
    assert low < 0.6 < high
    assert found.overall.first - found.overall.second == pytest.approx(0.2, abs=0.1)
    low, high = improvement_interval(first, second)
    assert low <= found.improvement <= high


def test_differences_of_chance_are_called_significant_rarely():
    p_values = [permutation_p(runs(2 * i, x=0.5, y=0.5), runs(2 * i + 1, x=0.5, y=0.5), 300) for i in range(40)]
    assert sum(p < 0.05 for p in p_values) <= 6  # 2 expected; more than 6 happens once in 300 times


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        # Runs of 1 in all arrangements: as far from the mean as this one are ...
        ([1, 1, 1], [0, 0, 0], 2 / 20),  # this one and its mirror image
        ([1, 1, 1, 1], [0, 0, 0, 1], 10 / 70),  # 4 or 1 of the five 1s in the first, 5 ways each
        ([1, 1, 1, 1, 1], [0, 0, 0, 1, 1], 42 / 252),  # 5 or 2 of the seven 1s, 21 ways each
        ([1, 1], [1, 1], 1.0),
    ],
)
def test_the_p_value_of_tied_runs_counts_all_arrangements(first, second, p):
    runs = {"T": np.array(first, float)}, {"T": np.array(second, float)}
    assert compare(*runs).by_task[0].p == pytest.approx(p)
    assert not compare(*runs).by_task[0].significant


def test_the_p_value_of_runs_without_ties_is_scipy_s():
    rng = np.random.default_rng(0)
    for first, second, method in ((5, 5, "exact"), (8, 9, "exact"), (12, 12, "asymptotic")):  # the last: too many
        a, b = rng.normal(size=first), rng.normal(0.7, size=second)
        expected = stats.mannwhitneyu(a, b, alternative="two-sided", method=method).pvalue
        assert compare({"T": a}, {"T": b}).by_task[0].p == pytest.approx(expected)


def test_agents_without_a_common_task_cannot_be_compared():
    with pytest.raises(ConfigError, match="no task in common"):
        compare(runs(x=1.0), runs(y=1.0))


def test_too_few_runs_are_told_by_counting_all_arrangements():
    for first, second in ((2, 2), (3, 3), (3, 4), (4, 4)):
        pooled = np.arange(first + second)
        best = stats.mannwhitneyu(pooled[:first], pooled[first:], alternative="two-sided", method="exact").pvalue
        assert least_p(first, second) == pytest.approx(best)
    found = compare({"t": np.array([0.9, 1.0])}, {"t": np.array([0.0, 0.1])})
    assert found.by_task[0].p == pytest.approx(1 / 3)
    assert found.by_task[0].has_too_few_runs
    assert found.overall.has_too_few_runs
    assert seeds_needed(1) == 4  # 2 / 70 < 0.05 <= 2 / 20
    assert seeds_needed(6) == 5  # 12 / 252 < 0.05 <= 12 / 70
    clear = compare({"t": np.arange(4.0)}, {"t": np.arange(4.0) + 10})
    assert not clear.by_task[0].has_too_few_runs
    assert clear.by_task[0].significant


def test_of_single_runs_no_interval_is_known():
    single, several = {"a": np.array([0.3])}, {"a": np.array([0.3, 0.5])}
    found = compare(single, {"a": np.array([0.9])})
    assert found.overall.interval is found.by_task[0].interval is found.improvement_interval is None
    assert found.overall.has_too_few_runs
    assert compare(single, several).overall.interval is not None
