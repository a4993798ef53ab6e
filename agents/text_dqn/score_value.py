"""What a running score is worth: the value of a text, read off its score so far.

A reward that can score prefixes shows how far a text has come, and not what it will come to: VADER's score of five
words says little about twenty, and a text that is good already has little to gain. So the value of a text is
taken as a line in its score, one for each number of tokens:

    V(t, s) = intercept_t + slope_t s  ~  beta log E_mu[exp(R / beta) | score s after t tokens]

which is what the best possible policy would make of it. As a potential it moves no optimum, however wrong
it is; the Q-network learns the rest. Before ``fit`` the value of a text is its score.

    scores, rewards, behaviour of whole texts  ->  fit      ->  intercepts, slopes
    a score, those of k candidates             ->  forward  ->  their values

Source: potentials, Ng et al. 1999; regression of an exponential by Poisson pseudo-likelihood, Gourieroux,
Monfort and Trognon 1984.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from agents.text_dqn.scorer import LEAST_TEXTS
from textgen_env.policies import Floats

SPREAD = 3.0
"""Deviation of log weights above which a warmer temperature is tried: a few texts would have nearly all the weight."""

WARMER = tuple(2.0 ** (i / 2) for i in range(80))
"""Multiples of beta that are tried."""

PRIOR_TEXTS = 10.0
"""Texts that a slope of 1 counts as much as."""

MOST_ROUNDS = 60
"""Of Newton's method."""

CONVERGED = 1e-6
"""Change of level and slope below which they are found."""


class ScoredTexts(NamedTuple):
    """n whole texts, whoever wrote them."""

    scores: Floats  # (n, T) before each token
    rewards: Floats  # (n,) when finished
    log_ratio: Floats  # (n, T) log b / mu of each token: as it was drawn, against the language model; nats
    acted: npt.NDArray[np.bool_]  # (n, T) False for padding


class ScoreValue(nn.Module):
    """The lines. All their state is buffers, so networks save and load it.

    Args:
        max_new_tokens: T.
    """

    intercept: torch.Tensor  # (T + 1,) reward units
    slope: torch.Tensor  # (T + 1,)

    def __init__(self, max_new_tokens: int) -> None:
        super().__init__()
        self.register_buffer("intercept", torch.zeros(max_new_tokens + 1))
        self.register_buffer("slope", torch.ones(max_new_tokens + 1))

    def forward(self, scores: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return the values of texts with these scores after so many tokens; shapes as broadcast."""
        return self.intercept[steps] + self.slope[steps] * scores

    def fit(self, texts: ScoredTexts, beta: float) -> None:
        """Fit the lines; where texts are few a score is worth itself.

        Args:
            texts: To be learned from.
            beta: The trade between reward and KL, reward units a nat.
        """
        self.intercept.zero_()
        self.slope.fill_(1.0)
        followed = np.where(texts.acted, texts.log_ratio, 0.0)[:, ::-1].cumsum(1)[:, ::-1]
        for step in range(texts.acted.shape[1]):
            here = texts.acted[:, step]
            if here.sum() >= LEAST_TEXTS:
                line = soft_line(texts.scores[here, step], texts.rewards[here], followed[here, step], beta)
                self.intercept[step], self.slope[step] = line


def soft_line(scores: Floats, rewards: Floats, log_ratio: Floats, beta: float) -> tuple[float, float]:
    """Return intercept and slope of tau log E_mu[exp(R / tau)] in the score, tau at least ``beta``.

    The expectation is under the language model: a text counts by mu / b of what followed the score. The nearer
    the behaviour b is to the best possible policy, the more alike the texts count.

    Args:
        scores: (n,)
        rewards: (n,)
        log_ratio: (n,) log b / mu of what followed, nats.
        beta: Reward units a nat.
    """
    tau = _temperature(rewards, rewards - scores, log_ratio, beta)
    log_weights = rewards / tau - log_ratio
    weights = np.exp(log_weights - log_weights.max())
    mean, deviation = float(scores.mean()), float(scores.std()) + 1e-9
    x = (scores - mean) / deviation
    prior = deviation / tau
    level, slope = float(np.log(weights.mean())), 0.0
    strength = PRIOR_TEXTS * float((weights**2).sum() / weights.sum())  # the weight of a text that counts
    for _ in range(MOST_ROUNDS):
        expected = np.exp(np.clip(level + slope * x, -50.0, 5.0))
        errors = weights - expected
        gradient = np.array([errors.sum(), x @ errors - strength * (slope - prior)])
        curvature = np.array([[expected.sum(), x @ expected], [x @ expected, x**2 @ expected + strength]])
        step = np.linalg.solve(curvature, gradient)
        step /= max(1.0, float(np.abs(step).max()))
        level, slope = level + float(step[0]), slope + float(step[1])
        if np.abs(step).max() < CONVERGED:
            break
    slope *= tau / deviation
    return tau * (level + float(log_weights.max())) - slope * mean, slope


def _temperature(rewards: Floats, still_to_come: Floats, log_ratio: Floats, beta: float) -> float:
    """Return the lowest temperature from ``beta`` on at which texts count alike enough, beside what the score tells."""
    spreads = {}
    for tau in (beta * factor for factor in WARMER):
        spreads[tau] = min(float((gains / tau - log_ratio).std()) for gains in (rewards, still_to_come))
        if spreads[tau] <= SPREAD:
            return tau
    return min(spreads, key=lambda tau: spreads[tau])
