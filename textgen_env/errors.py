"""The error tree: everything this package raises on purpose.

Each class also derives from the built-in (or Gymnasium) error that describes it best, so
``except ValueError`` keeps working for callers who have never heard of this module. A message
gives the value, the allowed values, and the remedy.
"""

from __future__ import annotations

import gymnasium as gym


class TextGenError(Exception):
    """Base of every deliberate error."""


class ConfigError(TextGenError, ValueError):
    """A setting is outside its range, or two settings contradict each other."""


class UnknownName(ConfigError, LookupError):
    """A name that no registry entry has."""


class SpecError(ConfigError, TypeError):
    """An environment's spec holds an object that JSON cannot; ``json`` itself raises ``TypeError``."""


class UnknownArgument(UnknownName, TypeError):
    """A keyword argument that does not exist; in Python's own words too, which other software looks for."""


class ModelError(TextGenError, ValueError):
    """A language model cannot be found, loaded, or used for text generation."""


class PromptError(TextGenError, ValueError):
    """A prompt, or a source of prompts, that cannot be used."""


class RewardError(TextGenError, ValueError):
    """A reward raised, or answered something other than one finite number a text."""


class PartnerError(TextGenError, ValueError):
    """The partner of a conversation raised, took too long, or answered something that cannot be used."""


class DivergenceError(TextGenError, ArithmeticError):
    """A loss, a gradient, a weight or a policy that is no finite number any more."""


class DatasetError(TextGenError, ValueError):
    """A recorded dataset that cannot be read, or does not fit the agent that should learn from it."""


class IllegalAction(TextGenError, ValueError):
    """An action outside ``Discrete(k)``, or one that the mask forbids."""


class ResetNeeded(TextGenError, gym.error.ResetNeeded):
    """``step`` before ``reset``, or after the end of the episode."""


class CapacityError(TextGenError, MemoryError):
    """More rows, longer texts, or a larger store than memory or the context allows."""


class RunFolderError(TextGenError, OSError):
    """A run folder that exists already, is incomplete, or belongs to another configuration."""


class ClusterError(TextGenError, RuntimeError):
    """A Ray cluster that does not answer, whose nodes do not fit together, or that lost too many processes."""


class ContractError(TextGenError, AssertionError):
    """An object does not keep a promise that environments or agents rely on."""
