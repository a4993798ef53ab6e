"""What is still to come: how the language model adds to a quantity of a text, token by token.

The quantities are the index of ``scorer`` and the length in characters.

    states that were visited, what each candidate adds there  ->  course  ->  mean, variance, persistence

Topics persist: who has been lucky early tends to go on so. By how much is measured on the language model's
own draws, whose luck is independent of everything before it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from agents.text_dqn.echoes import Echoes
from textgen_env.policies import Floats


class Visited(NamedTuple):
    """States of m texts that were visited, for what the language model adds on average."""

    tokens: torch.Tensor  # (m, T)
    candidates: torch.Tensor  # (m, T, k)
    probabilities: torch.Tensor  # (m, T, k) under the language model
    acted: torch.Tensor  # (m, T) bool
    by_language_model: torch.Tensor  # (m, T) bool, the language model chose the token
    echoes: Echoes
    folds: torch.Tensor  # (m,)


class Course(NamedTuple):
    """How the language model adds to a quantity of a text, token by token."""

    mean: Floats  # (T,) that a step adds
    variance: Floats  # (T,)
    goes_on: Floats  # (T,) the chance that the text does after the step
    so_far: Floats  # (T + 1,) the mean after t tokens
    persistence: Floats  # (T + 1,) what a unit more than that is worth in the end

    def still_to_come(self) -> Floats:
        """Return the mean of what is added from each step on, (T + 1,)."""
        return _later(self.mean, self.goes_on)

    def deviation(self) -> Floats:
        """Return the standard deviation in the end of what is added from each step on, (T + 1,)."""
        return np.asarray(np.sqrt(_later(self.variance * self.persistence[1:] ** 2, self.goes_on)))


def course(
    before: torch.Tensor,
    added: torch.Tensor,
    ahead: torch.Tensor,
    goes_on: torch.Tensor,
    visited: Visited,
    total: int,
) -> Course:
    """Return how a quantity grows.

    Args:
        before: (m, T) the quantity at each state.
        added: (m, T, k) what each candidate adds to it.
        ahead: (m, T) what the token that was taken lets expect of the next ones, more than others do.
        goes_on: (m, T, k) 1 for candidates after which the text goes on.
        visited: The states.
        total: Tokens of a whole text.
    """
    weight, mu, added = visited.acted.double(), visited.probabilities.double(), added.double()
    expected = (mu * added).sum(-1) * weight  # (m, T)
    count, beyond = weight.sum(0).clamp(min=1), (0, total - expected.shape[1])
    mean = expected.sum(0) / count
    variance = (((mu * added**2).sum(-1) * weight).sum(0) / count - mean**2).clamp(min=0)
    lives = ((mu * goes_on).sum(-1) * weight).sum(0) / count
    means, variances, chances = (np.pad(values.cpu().numpy(), beyond) for values in (mean, variance, lives))
    by_chance = (visited.acted & visited.by_language_model)[:, :-1]
    luck = (before.diff(dim=1) - expected[:, :-1]) * by_chance
    rate = _carried_on(luck, expected, ahead[:, :-1], total)
    so_far = float(before[:, 0].mean()) + np.append(0.0, means.cumsum())
    return Course(means, variances, chances, so_far, np.maximum(0.0, 1.0 + rate * np.arange(total, -1, -1)))


def _carried_on(luck: torch.Tensor, expected: torch.Tensor, ahead: torch.Tensor, total: int) -> float:
    """Return by how much a unit more than was to be expected raises what each later token adds.

    A regression on luck, which the language model's draws make independent of the state; less its standard error.

    Args:
        luck: (m, T - 1) more than was to be expected, 0 where the language model did not draw.
        expected: (m, T) what is to be expected at each state.
        ahead: (m, T - 1) the part of what follows that is counted already.
        total: Tokens of a whole text.
    """
    later = expected.flip(1).cumsum(1).flip(1)[:, 1:]
    later = later - later.mean(0) - ahead
    x = luck * torch.arange(total - 1, total - 1 - luck.shape[1], -1, device=luck.device)  # times the tokens left
    size = float((x**2).sum()) + 1e-12
    rate = float((x * later).sum()) / size
    error = float((x * (later - rate * x)).sum(1).square().sum()) ** 0.5 / size  # texts are independent, steps are not
    return float(np.sign(rate)) * max(0.0, abs(rate) - error)


def _later(values: Floats, goes_on: Floats) -> Floats:
    """Return the sums of (T,) values from each step on, (T + 1,), as far as texts are expected to go on."""
    sums = np.zeros(len(values) + 1)
    for step in range(len(values) - 1, -1, -1):
        sums[step] = values[step] + goes_on[step] * sums[step + 1]
    return sums
