"""The temperature to act at, chosen by texts: where learning has gained nothing, that of the language model.

agent, environment with validation prompts  ->  texts at each temperature, on the same luck
                                            ->  the one with the most E[R] - target_beta KL

A few hundred texts for a few prompts tell two temperatures apart only roughly, and other prompts may
prefer another. So the temperature that the agent learned for stays, unless another is better by more
than ``LEAST_EVIDENCE`` standard errors, or the language model is as good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agents.text_dqn.learner import Learner
from textgen_env.errors import ConfigError
from textgen_env.evaluation import evaluate
from textgen_env.policies import Agent, Floats
from textgen_env.prompts import Prompt, PromptSource
from textgen_env.vector_env import TextGenVectorEnv

MULTIPLES = (0.7, 1.0, 1.4, 2.0)
"""Temperatures that are tried, in multiples of ``target_beta``; and the language model itself."""

LANGUAGE_MODEL = 1e6
"""A temperature, reward units a nat, at which an agent is the language model."""

LEAST_EVIDENCE = 3.0
"""Standard errors of the difference, text by text, by which another temperature must be better."""


@dataclass(frozen=True)
class Validated:
    """What was tried and what was chosen.

    Attributes:
        beta: The temperature chosen; ``LANGUAGE_MODEL`` where learning has gained nothing.
        values: E[R] - target_beta KL at each temperature that was tried.
        texts: Texts at each.
    """

    beta: float
    values: Mapping[float, float]
    texts: int

    def __str__(self) -> str:
        tried = ", ".join(f"{_named(beta)}: {value:.3f}" for beta, value in self.values.items())
        return f"{_named(self.beta)}, chosen by J of {self.texts} validation texts each ({tried})"


def _named(beta: float) -> str:
    return "the language model" if beta == LANGUAGE_MODEL else f"beta {beta:g}"


def validate(
    agent: Agent,
    learner: Learner,
    env: TextGenVectorEnv,
    texts: int,
    seed: int,
    prompts: PromptSource | Sequence[Prompt] | None = None,
) -> Validated:
    """Try temperatures, and leave the agent at the best one.

    Args:
        agent: Acts by ``learner``.
        env: Best with prompts that were not learned from.
        texts: To be written at each temperature, at least 1.
        seed: The same luck for all.
        prompts: Instead of the environment's own.

    Raises:
        ConfigError: see ``evaluate``.
    """
    price, own = learner.objective.beta, learner.beta
    found: dict[float, Floats] = {}
    try:
        for beta in (LANGUAGE_MODEL, *(multiple * price for multiple in MULTIPLES)):
            learner.beta = beta
            of_texts: Floats | None = evaluate(agent, env, texts, seed, prompts).values(price)
            if of_texts is None:
                raise ConfigError("temperatures are compared by KL, and this agent has no probabilities")
            found[beta] = of_texts
    finally:
        learner.beta = own
    learner.beta = best_supported(found, price)
    return Validated(learner.beta, {beta: float(values.mean()) for beta, values in found.items()}, len(found[price]))


def best_supported(found: Mapping[float, Floats], learned_for: float) -> float:
    """Return the temperature of ``found``, which has (n,) values of texts at each, that the values speak for."""
    means = {beta: float(values.mean()) for beta, values in found.items()}
    chosen = max(means, key=lambda beta: means[beta])
    if chosen != LANGUAGE_MODEL:
        gains = found[chosen] - found[learned_for]
        if len(gains) < 2 or gains.mean() <= LEAST_EVIDENCE * gains.std(ddof=1) / np.sqrt(len(gains)):
            chosen = learned_for
    return LANGUAGE_MODEL if means[LANGUAGE_MODEL] >= means[chosen] else chosen
