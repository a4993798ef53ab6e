"""Agents as a user might write them: one that works, one that is the best possible, and five ways to fail."""

from __future__ import annotations

import os

import numpy as np

from textgen_env.tasks import OptimalAgent, make_task


class Likeliest:
    """A user's agent: the likeliest candidate."""

    def __init__(self, env, seed):
        self.env = env

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.zeros(len(observation["length"]), np.int64), None


class Illegal(Likeliest):
    def predict(self, *args, **kwargs):
        return super().predict(*args, **kwargs)[0] + 99, None


class Raises(Likeliest):
    def learn(self, steps):
        raise ZeroDivisionError(f"nothing to learn in {steps} steps")


class Dies(Likeliest):
    def learn(self, steps):
        os._exit(7)


class TakesNoSteps(Likeliest):
    def learn(self):
        return self


class TakesSteps(Likeliest):
    def learn(self, total_timesteps, log_interval=1):
        return self


def planted(env, seed):
    """The best possible policy of the task at hand."""
    name = f"TextGen/{type(env.episodes.reward.process).__name__}-v0"
    return OptimalAgent(make_task(name), seed)
