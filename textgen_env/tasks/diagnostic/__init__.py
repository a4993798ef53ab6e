"""Six tasks, each of one difficulty, with exact optima and an exact language model.

In all of them the model ranks the tokens differently from prefix to prefix, so an action's number
means nothing by itself; all prompts are trained and tested on; rewards are in [0, 1].
"""

from __future__ import annotations

from textgen_env.tasks.diagnostic.credit import DelayedKey, Needle
from textgen_env.tasks.diagnostic.noise import NoisyBandit
from textgen_env.tasks.diagnostic.stack import Dyck
from textgen_env.tasks.diagnostic.walks import RandomWalks, StarGraph

__all__ = ["DelayedKey", "Dyck", "Needle", "NoisyBandit", "RandomWalks", "StarGraph"]
