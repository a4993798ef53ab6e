"""Ridge regression on sparse and dense features, cross-fitted; and a rising curve through its predictions.

    Problem: features of n texts, rewards, folds  ->  cross_fit  ->  weights of each fold, left-out predictions
    Problem  ->  weigh_groups  ->  how little each group of features should be shrunk
    Problem  ->  bent  ->  the same through a logistic link, where that predicts better
    left-out predictions, rewards  ->  rising_curve  ->  knots
    left-out predictions, rewards  ->  correlates  ->  whether they say anything

Solved by conjugate gradients, so a fit costs a few passes over the features, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array, csr_array

from textgen_env.policies import Floats

SMALLEST = 1e-9
"""Mean squared size of features below which they are taken for constant."""

ITERATIONS = 60
TOLERANCE = 1e-8  # of the squared gradient, relative to the first
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003, 0.00001)
"""Tried from the strongest on, until the error on left-out texts rises."""

FACTORS = (0.3, 3.0)
"""Tried on the relevance of each group of features."""

LEAST_RELEVANT, MOST_RELEVANT = 0.01, 100.0
"""Bounds of a group's relevance."""

WORTHWHILE = 0.997
"""Share of the error on left-out texts below which a factor is taken."""

FLAT = 0.02
"""Slope of the logistic link, of 0.25 at most, below which a text counts as if it were so much."""

STEEPEST = 8.0
"""Largest z, either way, at which a tangent is taken."""

NEWTON_STEPS = 3
"""From the straight fit on."""

FARTHEST = 100.0
"""Largest z, either way, that is told from larger ones: the link is level there."""

ROUNDS = 8
"""Steps of Newton's method by which two numbers are found: they converge."""

KNOTS = 256
"""Of a link's curve."""

BENT = 0.005
"""Share of the variance of the rewards that a link must explain beside the rising curve of a straight fit."""

BIN = 40
"""Texts a knot of the curve, at least."""

MOST_KNOTS = 24


LEAST_CORRELATION = 3.0
"""Standard errors that the correlation with left-out rewards must have for the scorer to speak."""


class Design(NamedTuple):
    """n rows of features in groups, each group scaled to a mean squared size of 1 a row, times its relevance.

    Weights are one vector: those of the u sparse features that occur, then those of the e dense ones.
    """

    used: npt.NDArray[np.int64]  # (u,) the sparse features that occur
    sparse: csr_array  # (n, u) how often each does
    turned: csc_array  # its transpose, which takes long to make
    dense: Floats  # (n, e)
    scales: Floats  # (u + e,) factors of the features
    groups: Mapping[str, slice]  # of ``scales``
    relevance: Mapping[str, float]  # of each group, a factor in ``scales``

    @classmethod
    def of(cls, sparse: Mapping[str, npt.NDArray[np.int64]], dense: Mapping[str, Floats], padding: int) -> Design:
        """Return the features side by side.

        Args:
            sparse: (n, F) numbers of features a group, below ``padding``, which stands for none, and above those of
                the groups before.
            dense: (n, e) numbers a group.
        """
        scales, groups, start = [], {}, 0
        for name, index in sparse.items():
            _, counts = np.unique(index[index < padding], return_counts=True)
            sizes = counts * (1.0 - counts / index.size)
            scales.append(np.full(len(counts), _scale(sizes.sum() / len(index))))
            groups[name] = slice(start, start := start + len(counts))
        for name, block in dense.items():
            scales.append(np.full(block.shape[1], _scale(((block - block.mean(0)) ** 2).sum() / len(block))))
            groups[name] = slice(start, start := start + block.shape[1])
        features = np.concatenate(list(sparse.values()), 1)
        occurring = features < padding
        used, columns = np.unique(features[occurring], return_inverse=True)
        counts = csr_array((np.ones(len(columns)), (occurring.nonzero()[0], columns)), (len(features), len(used)))
        whole = np.concatenate(list(dense.values()), 1)
        return cls(used, counts, counts.T, whole, np.concatenate(scales), groups, dict.fromkeys(groups, 1.0))

    def sized(self, **relevance: float) -> Design:
        """Return the features with these groups as relevant as this: the larger, the less their weights are shrunk."""
        scales = self.scales.copy()
        for group, value in relevance.items():
            scales[self.groups[group]] *= value / self.relevance[group]
        return self._replace(scales=scales, relevance={**self.relevance, **relevance})

    def rows(self, chosen: npt.NDArray[np.int64]) -> Design:
        sparse = self.sparse[chosen]
        return self._replace(sparse=sparse, turned=sparse.T, dense=self.dense[chosen])

    def parts(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return the weights (..., u + e) of the sparse features and of the dense ones."""
        return weights[..., : len(self.used)], weights[..., len(self.used) :]

    def times(self, weights: Floats) -> Floats:
        """Return the product with the weights, (n,)."""
        sparse, dense = self.parts(self.scales * weights)
        return np.asarray(self.sparse @ sparse + self.dense @ dense)

    def transposed_times(self, errors: Floats) -> Floats:
        """Return the product of the transpose with (n,) numbers."""
        return self.scales * np.concatenate([self.turned @ errors, errors @ self.dense])


def _scale(size: float) -> float:
    """Return the factor that makes a mean squared size 1; of features that are the same in all rows, 0."""
    return float(1 / np.sqrt(size)) if size > SMALLEST else 0.0


class Logistic(NamedTuple):
    """A link: the expected reward is low + (high - low) / (1 + exp(-z)), as a judge that saturates makes of a sum z."""

    low: float
    high: float

    def expected(self, z: Floats) -> Floats:
        return np.asarray(self.low + (self.high - self.low) / (1 + np.exp(-np.clip(z, -FARTHEST, FARTHEST))))

    def tangent(self, z: Floats, rewards: Floats) -> tuple[Floats, Floats]:
        """Return targets and weights for z (..., n): least squares on them are a step of Newton's method from there.

        Weights are 1 on average, and z counts up to ``STEEPEST`` either way.
        """
        z, wanted = np.clip(z, -STEEPEST, STEEPEST), (rewards - self.low) / (self.high - self.low)
        share = 1 / (1 + np.exp(-z))
        slope = np.maximum(share * (1 - share), FLAT)
        return z + (wanted - share) / slope, slope / slope.mean(-1, keepdims=True)

    def curve(self, index: Floats, rewards: Floats) -> tuple[Floats, Floats]:
        """Return knots (x, y) of the link through left-out predictions, stretched and moved until it fits.

        It goes on beyond them, where a curve through the means of neighbours is flat: the best texts are there.
        """
        stretch, offset = 1.0, 0.0
        for _ in range(ROUNDS):
            targets, weights = self.tangent(stretch * index + offset, rewards)
            shares = weights / weights.sum()
            centred = index - shares @ index
            stretch = max(0.0, float((shares * centred) @ targets / ((shares * centred) @ centred)))
            offset = float(shares @ targets - stretch * (shares @ index))
        x = np.linspace(2 * index.min() - index.max(), 2 * index.max() - index.min(), KNOTS)
        return x, self.expected(stretch * x + offset)


class Bend(NamedTuple):
    """A link, and the z of each fold's weights, (folds, n), at which it is taken for its tangent."""

    link: Logistic
    near: Floats


class Problem(NamedTuple):
    """n texts to predict the rewards of, in parts."""

    design: Design
    rewards: Floats  # (n,)
    folds: npt.NDArray[np.int64]  # (n,)
    counted: npt.NDArray[np.bool_]  # (n,) whose predictions are to be good

    def rows(self, chosen: npt.NDArray[np.int64]) -> Problem:
        return Problem(self.design.rows(chosen), self.rewards[chosen], self.folds[chosen], self.counted[chosen])

    def sized(self, **relevance: float) -> Problem:
        return self._replace(design=self.design.sized(**relevance))


@dataclass(frozen=True)
class Fitted:
    """Weights for each fold, fitted to all others, and what they predict for it."""

    weights: Floats  # (folds, u + e); see ``Design.parts``
    biases: Floats  # (folds,)
    index: Floats  # (n,) z, by weights that have not seen the text
    left_out: Floats  # (n,) the rewards that it lets expect
    penalty: float
    error: float  # mean squared, of ``left_out``
    link: Logistic | None = None  # None: the index is the reward


def penalties_up_to(strongest: float) -> list[float]:
    """Return those of ``PENALTIES`` that are no stronger."""
    return [penalty for penalty in PENALTIES if penalty <= 1.01 * strongest]  # as float32 keeps them


def cross_fit(
    problem: Problem,
    count: int,
    penalties: Sequence[float] = PENALTIES,
    start: Floats | None = None,
    bend: Bend | None = None,
) -> Fitted:
    """Fit weights for each of ``count`` folds to the others, with the penalty that predicts left-out rewards best.

    Args:
        start: Weights of a similar fit, to begin with; see ``Fitted``.
        bend: How a reward follows from the index. None: the index is the reward.
    """
    design, rewards, folds, counted = problem
    parts = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(count)]
    designs = [(design.rows(kept), design.rows(left)) for kept, left in parts]
    targets, sizes = rewards[None].repeat(count, 0), np.ones((count, len(rewards)))
    if bend is not None:
        targets, sizes = bend.link.tangent(bend.near, rewards)
    weights = np.zeros((count, len(design.scales))) if start is None else start
    best = None
    for penalty in penalties:
        weights, biases, index = weights.copy(), np.zeros(count), np.zeros(len(rewards))
        for fold, ((kept, left), (seen, unseen)) in enumerate(zip(parts, designs, strict=True)):
            weights[fold], biases[fold] = _solve(seen, targets[fold, kept], sizes[fold, kept], penalty, weights[fold])
            index[left] = unseen.times(weights[fold]) + biases[fold]
        left_out = index if bend is None else bend.link.expected(index)
        error = float(((rewards - left_out) ** 2).mean(where=counted))
        if best is not None and error >= best.error:
            break
        best = Fitted(weights, biases, index, left_out, penalty, error, None if bend is None else bend.link)
    assert best is not None
    return best


def weigh_groups(problem: Problem, count: int, penalty: float, start: Floats) -> Mapping[str, float]:
    """Return how relevant each group of features is: tried up and down, as left-out rewards are predicted best.

    A judge of word pairs does not care about last tokens: at a common size they are noise to it.

    Args:
        count: Of folds.
        penalty: With which the problem is fitted best.
        start: Weights of such a fit.
    """
    best = cross_fit(problem, count, [penalty], start)
    for group in problem.design.groups:
        for factor in FACTORS:
            relevance = problem.design.relevance[group] * factor
            if not LEAST_RELEVANT <= relevance <= MOST_RELEVANT:
                continue
            trial = problem.sized(**{group: relevance})
            found = cross_fit(trial, count, [penalty], best.weights)
            if found.error < WORTHWHILE * best.error:
                problem, best = trial, found
                break
    return problem.design.relevance


def bent(problem: Problem, count: int, straight: Fitted) -> Fitted:
    """Fit through a logistic link; return that, or ``straight``, whichever predicts left-out rewards better.

    A classifier, or a score with bounds, saturates: a straight line takes what is added at the ends for less than what
    is added in the middle.
    """
    rewards = problem.rewards
    if not correlates(straight.left_out[problem.counted], rewards[problem.counted]):
        return straight
    link = Logistic(float(rewards.min()), float(rewards.max()))
    share = (float(rewards.mean()) - link.low) / (link.high - link.low)
    scale = 1 / ((link.high - link.low) * share * (1 - share))
    best, penalty, start = straight, straight.penalty, straight.weights * scale  # a first step, from one z everywhere
    biases = np.log(share / (1 - share)) + (straight.biases - rewards.mean()) * scale
    error = min(straight.error, _curved_error(problem, straight)) - BENT * float(rewards.var())
    for _ in range(NEWTON_STEPS):
        near = np.stack([problem.design.times(w) + bias for w, bias in zip(start, biases, strict=True)])
        found = cross_fit(problem, count, penalties_up_to(penalty), start, Bend(link, near))
        start, biases, penalty = found.weights, found.biases, found.penalty
        if (curved := _curved_error(problem, found)) < error:
            best, error = found, curved
    return best


def _curved_error(problem: Problem, fitted: Fitted) -> float:
    """Return the mean squared error of the rising curve through what was left out."""
    index, rewards = fitted.index[problem.counted], problem.rewards[problem.counted]
    return _error_along(rising_curve(index, rewards), index, rewards)


def _error_along(knots: tuple[Floats, Floats], index: Floats, rewards: Floats) -> float:
    """Return the mean squared error of the curve through ``knots``."""
    return float(((rewards - np.interp(index, *knots)) ** 2).mean())


def _solve(design: Design, targets: Floats, sizes: Floats, penalty: float, start: Floats) -> tuple[Floats, float]:
    """Return the weights that minimise mean squared error + penalty |w|^2, from ``start`` on, and the bias.

    Args:
        sizes: (n,) how much the error of each row counts, 1 on average.
    """
    rows, shares = len(targets), sizes / sizes.sum()
    mean = design.transposed_times(shares)  # of each feature: the bias takes it

    def gram(weights: Floats) -> Floats:
        predicted = sizes * (design.times(weights) - mean @ weights)
        return design.transposed_times(predicted) - mean * predicted.sum() + penalty * rows * weights

    centre = float(shares @ targets)
    target = design.transposed_times(sizes * (targets - centre))
    weights = start.copy()
    residual = target - gram(weights)
    direction, size, first = residual.copy(), residual @ residual, target @ target
    for _ in range(ITERATIONS):
        if size <= TOLERANCE * first:
            break
        pushed = gram(direction)
        step = size / (direction @ pushed)
        weights += step * direction
        residual -= step * pushed
        before, size = size, residual @ residual
        direction = residual + size / before * direction
    return weights, float(centre - mean @ weights)


def rising_curve(predictions: Floats, rewards: Floats) -> tuple[Floats, Floats]:
    """Return knots (x, y) of a rising curve through the mean rewards of equally many neighbours each.

    Source: pool adjacent violators, Ayer et al. 1955.
    """
    bins = int(np.clip(len(rewards) // BIN, 4, MOST_KNOTS))
    order = np.argsort(predictions, kind="stable")
    knots: list[list[float]] = []  # each: x, y, weight
    for part in np.array_split(order, bins):
        knots.append([float(predictions[part].mean()), float(rewards[part].mean()), float(len(part))])
    pooled: list[list[float]] = []  # each: y, weight, knots
    for _, y, weight in knots:
        pooled.append([y, weight, 1])
        while len(pooled) > 1 and pooled[-2][0] > pooled[-1][0]:
            (low, a, m), (high, b, n) = pooled[-2:]
            pooled[-2:] = [[(low * a + high * b) / (a + b), a + b, m + n]]
    heights = np.repeat([y for y, _, _ in pooled], [int(count) for _, _, count in pooled])
    return np.array([x for x, _, _ in knots]), heights


def straight_line(predictions: Floats, rewards: Floats) -> tuple[Floats, Floats]:
    """Return knots (x, y) of the line of least squares, from the lowest to the highest reward."""
    centred = predictions - predictions.mean()
    slope = max(float(centred @ rewards / (centred @ centred)), SMALLEST)
    ends = np.array([rewards.min(), rewards.max()])
    return predictions.mean() + (ends - rewards.mean()) / slope, ends


def best_curve(fitted: Fitted, counted: npt.NDArray[np.bool_], rewards: Floats) -> tuple[Floats, Floats]:
    """Return knots (x, y) of a curve from index to reward: that of the link, or of a line, or a rising one.

    The first two go on beyond what was seen, where the best texts are. A curve through means of neighbours does not.
    """
    index, rewards = fitted.index[counted], rewards[counted]
    if fitted.link is not None:
        return fitted.link.curve(index, rewards)
    curves = straight_line(index, rewards), rising_curve(index, rewards)
    return min(curves, key=lambda knots: _error_along(knots, index, rewards))


def correlates(predicted: Floats, rewards: Floats) -> bool:
    """Return True if left-out predictions go with the rewards beyond chance."""
    if predicted.std() < 1e-9 or rewards.std() < 1e-9:
        return False
    correlation = float(np.corrcoef(predicted, rewards)[0, 1])
    return correlation * np.sqrt(len(rewards)) > LEAST_CORRELATION
