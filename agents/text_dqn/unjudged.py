"""Texts that nobody judges: which token follows which costs no call of the reward.

    learner  ->  UnjudgedTexts.write  ->  texts without an end  ->  Learner.update

A reward is asked once for a whole text, so few texts are judged, and their states are too few to learn from
what is still to come. The learned scores judge every prefix, and the language model says which candidates
come next: that is all that a step within a text teaches. So the agent writes more texts of its own, learns from
them and forgets them. What the last token is worth only the reward could say: each text is cut before it.

Source: learning from steps of a model, Dyna, Sutton 1990; from unlabelled data, Yu et al. 2022, arXiv:2202.01741.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from agents.text_dqn.learner import Learner
from agents.text_dqn.networks import check_observation_space
from agents.text_dqn.replay import EpisodeBatch, EpisodeReplay
from textgen_env.vector_env import TextGenVectorEnv

UNJUDGED_ROWS = 64
"""Texts that are written at a time."""


class UnjudgedTexts:
    """The last ``UNJUDGED_ROWS`` texts that an agent wrote for itself.

    Args:
        env: ``UNJUDGED_ROWS`` rows of an environment like the agent's own, whose reward is of no use.
        device: Where batches go.
    """

    def __init__(self, env: TextGenVectorEnv, device: torch.device | str) -> None:
        self._env = env
        space = check_observation_space(env.single_observation_space)
        self.steps = env.num_envs * env.max_new_tokens  # that a call of ``write`` takes
        self._texts = EpisodeReplay(self.steps, space, device, env.num_envs, shapes=False)

    def write(self, learner: Learner, progress: float) -> None:
        """Write for ``max_new_tokens`` steps, in place of what was written before.

        Nothing but the random numbers of ``learner`` is carried from one call to the next.
        """
        self._texts.reset()
        self._texts.rng = learner.rng
        self._env.episodes.rebuild()  # memos of earlier texts would answer in other last digits than a resumed run's
        observation, _ = self._env.reset(seed=int(learner.rng.integers(2**31)))
        nothing, never = np.zeros(self._env.num_envs), np.zeros(self._env.num_envs, np.bool_)
        for step in range(self._env.max_new_tokens):
            acted = learner.act(observation, progress, freely=True)
            following, _, done, _, _ = self._env.step(acted.actions)
            is_last = step == self._env.max_new_tokens - 1  # texts that began in a row's middle are cut off here
            self._texts.add(observation, following, acted, nothing, done | is_last, never)
            observation = following

    def sample(self, batch_size: int) -> EpisodeBatch:
        """Return ``batch_size`` texts, uniformly with replacement; the last state of each has a value but no action."""
        texts = self._texts.sample(batch_size)
        return replace(texts, acted=texts.acted & ~texts.ended, ended=torch.zeros_like(texts.ended), folds=None)
