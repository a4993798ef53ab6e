"""The settings of a run: plain data that is checked once, and that JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from agents.text_dqn.settings import MANY
from agents.user_code import is_reference, replace_references
from agents.zoo import AGENTS, MASK_AWARE, OBSERVATION, env_settings
from textgen_env.config import MOST_ROWS, EnvConfig, check_in_range, check_one_of, check_seed, check_type, check_unicode
from textgen_env.conversation import UNLESS_SAID
from textgen_env.errors import ConfigError
from textgen_env.files import parse_json
from textgen_env.prompts import SPLITS
from textgen_env.registry import unknown_name
from textgen_env.tasks import Task, open_task, task_id

MOST_TEXTS = 2**24
"""Of an evaluation."""

ENV_SETTINGS: Mapping[str, Any] = {
    "top_k": 16,
    "max_new_tokens": 20,
    "min_new_tokens": 20,
    "observation": OBSERVATION,
}
"""Settings of a run's environment unless said: texts of 20 tokens."""

CONVERSATION_SETTINGS: Mapping[str, Any] = {**ENV_SETTINGS, **UNLESS_SAID, "min_new_tokens": 0}
"""The same with a partner; the observation then has ``OF_CONVERSATIONS``, too."""

FREE_IN_TASKS = ("observation", "reward_at", "on_illegal", "render_mode", "dtype", "reply_seconds")
"""Settings that leave a task the same problem."""

OBJECTS = ("model", "prompts", "reward", "partner")
"""Parts of a run that may be Python objects, or the user's own code."""

NO_REWARD = "none"
"""The reward of a run with a partner whose rewards are all there are."""

CONFIG_SOURCE = "a run's configuration"


def is_own_code(value: Any) -> bool:
    """Return True if a model or prompts are named as the user's own code: no part of a split, and no path."""
    return is_reference(value) and value.rpartition(":")[2] not in SPLITS and not Path(value).exists()


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on, as plain data. The defaults are those of ``textgen train``.

    Raises:
        ConfigError: a value outside its range, or an unknown name.
    """

    agent: str = "text_dqn"  # a name in AGENTS
    agent_settings: Mapping[str, Any] = field(default_factory=dict)  # keywords of the agent's class
    task: str | None = None  # TextGen/GuessNumber-v0 or GuessNumber:numbers=15; model, prompts, reward, partner are its
    model: str | None = "tiny"  # see textgen_env.models.load_language_model; None: an object, or the task's
    prune: str | None = None  # METHOD:AMOUNT, applied to the language model once
    prompts: Any = None  # see textgen_env.prompts.make_prompts; None: the openings in the box, or an object
    reward: Any = "sentiment"  # see textgen_env.rewards.make_reward; "none": the partner's; None: an object, the task's
    partner: Any = None  # see textgen_env.conversation.make_partner; None: nobody, an object, or the task's
    env: Mapping[str, Any] = field(default_factory=dict)  # fields of EnvConfig; those of ENV_SETTINGS (with a
    # partner CONVERSATION_SETTINGS, with a task its own) are added
    steps: int = 70_000  # environment steps to learn from: one token each
    checkpoint_every: int = 20_000  # steps from one checkpoint to the next, and one at the end; 0: none
    envs: int = 64  # texts written at a time
    seed: int = 0
    beta: float = 0.1  # price of KL, reward units a nat, in the agent's objective and in the report
    eval_prompts: int = 32  # at most; held out where there are enough
    eval_texts: int = 512  # for each agent measured
    eval_samples: int = 64  # of the language model, for each prompt, to estimate the best possible policy
    objects: tuple[str, ...] = ()  # of model, prompts, reward, partner: those that were given as Python objects
    code: Mapping[str, str] = field(
        default_factory=dict
    )  # SHA-256 of the user's own code, by reference, in a stored run
    agent_sees_reward: bool = True  # False: the reward is an object or the user's code, and scores no prefix

    def __post_init__(self) -> None:
        check_type("agent", self.agent, str)
        AGENTS[self.agent]
        self._check_numbers()
        for item in fields(self):
            check_unicode(item.name, getattr(self, item.name))
        for name in ("task", "model", "prune"):
            check_type(name, getattr(self, name), str, type(None))
        if not isinstance(self.partner, str | Mapping | None):
            raise ConfigError(
                f"partner must be a name, FILE.py:NAME, module:NAME, or a dict with a name, got {self.partner!r}; a "
                "Python object is given to train(..., partner=...), with RunConfig(objects=('partner',))"
            )
        for name in ("agent_settings", "env", "code"):
            check_type(name, getattr(self, name), Mapping)
        for checksum in self.code.values():
            check_type("a checksum in code", checksum, str)
        check_type("agent_sees_reward", self.agent_sees_reward, bool)
        if "tensorboard_log" in self.agent_settings:  # any folder of the machine
            raise ConfigError("agent_settings cannot have tensorboard_log: the run's events are in its own folder")
        check_type("objects", self.objects, list, tuple)
        for name in self.objects:
            check_one_of("an entry of objects", name, OBJECTS)
        if self.prune is not None:
            from agents.pruning.methods import parse_pruning

            parse_pruning(self.prune)
        object.__setattr__(self, "objects", tuple(self.objects))
        self._check_task()
        if self.reward == NO_REWARD and not self.has_partner:
            raise ConfigError("reward 'none' leaves a partner's rewards alone, and there is no partner: give one")
        env = {**self._env_unless_said(), **self.env}  # kept whole: a stored run outlives these defaults
        object.__setattr__(self, "env", {k: list(v) if isinstance(v, tuple) else v for k, v in env.items()})
        self.env_config()

    def _check_numbers(self) -> None:
        check_in_range("steps", self.steps, 1, MANY)
        check_in_range("envs", self.envs, 1, MOST_ROWS)
        for name, least in (("eval_prompts", 1), ("eval_texts", 1), ("eval_samples", 2)):
            check_in_range(name, getattr(self, name), least, MOST_TEXTS)
        check_in_range("checkpoint_every", self.checkpoint_every, 0, MANY)
        check_seed("seed", self.seed)
        check_type("beta", self.beta, int, float)
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta must be above 0 (reward units a nat) and finite, got {self.beta!r}")

    def _check_task(self) -> None:
        """Let the task have its own model, prompts, reward, partner and settings.

        Raises:
            ConfigError: one of them was given beside it.
        """
        if self.task is None:
            return
        object.__setattr__(self, "task", task_id(self.task))
        task = open_task(self.task)
        for name in ("model", "prune", "prompts", "reward", "partner"):
            if getattr(self, name) not in (None, RunConfig.__dataclass_fields__[name].default):
                raise ConfigError(f"{name} is that of the task {self.task!r}: leave out one or the other")
            object.__setattr__(self, name, None)
        for name, value in self.env.items():
            own = task.settings.get(name, getattr(EnvConfig(), name, value))
            if name not in FREE_IN_TASKS and value != own and not (isinstance(own, tuple) and value == list(own)):
                raise ConfigError(
                    f"{name} is {own!r} in the task {self.task!r}, got {value!r}: leave it out, or give the task a "
                    f"size, such as Needle:depth=6 ({', '.join(task.sizes)})"
                )

    def _env_unless_said(self) -> dict[str, Any]:
        task = self.opened_task
        settings = CONVERSATION_SETTINGS if self.has_partner else ENV_SETTINGS
        settings = settings if task is None else task.settings
        whole = task is not None and task.settings.get("top_k", 16) is None
        if task is None and not self.has_partner and isinstance(self.env.get("max_new_tokens"), int):
            settings = {**settings, "min_new_tokens": self.env["max_new_tokens"]}  # full texts, whatever their length
        keys = env_settings(self.agent, whole_vocabulary=whole, has_partner=self.has_partner)["observation"]
        return {**settings, "observation": keys}

    @property
    def opened_task(self) -> Task | None:
        """The task, None without one."""
        return None if self.task is None else open_task(self.task)

    @property
    def has_partner(self) -> bool:
        """True if the run's episodes are conversations."""
        task = self.opened_task
        return self.partner is not None or "partner" in self.objects or bool(task and task.partner)

    def env_config(self) -> EnvConfig:
        """Return the environment's settings, checked."""
        maps_illegal = {} if self.agent in MASK_AWARE else {"on_illegal": "last_legal"}  # the others know no mask
        return EnvConfig.from_settings({**maps_illegal, **self.env})

    @property
    def references(self) -> tuple[str, ...]:
        """The user's own code in model, prompts, reward and partner; see ``agents.user_code``."""
        return self.references_without(())

    def references_without(self, parts: Collection[str]) -> tuple[str, ...]:
        """Return the user's own code, but for that in ``parts``, of which others are at hand."""
        found: list[str] = []
        for name in ("model", "prompts", "reward", "partner"):
            value = getattr(self, name)
            if name in parts:
                continue
            if name == "reward":
                replace_references(value, found.append)
            elif is_reference(value) if name == "partner" else is_own_code(value):
                found.append(str(value))
        return tuple(dict.fromkeys(found))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, trust: bool = False) -> RunConfig:
        """Return the configuration that ``to_json`` wrote.

        Args:
            trust: Also take a file that lets a hub repository's code run.

        Raises:
            ConfigError: not JSON, no mapping, a field that does not exist (with a suggestion), or
                ``trust_remote_code`` without ``trust``.
        """
        return cls.from_data(parse_json(text, CONFIG_SOURCE, allow_nan=True), trust)  # SB3 takes infinities

    @classmethod
    def from_data(cls, data: Any, trust: bool = False) -> RunConfig:
        """Return the configuration of plain data; see ``from_json``."""
        if not isinstance(data, dict):
            raise ConfigError(f"{CONFIG_SOURCE} must be a mapping (in JSON an object), got {type(data).__name__}")
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise unknown_name("field", str(name), known)
        config = cls(**data)
        if config.env_config().trust_remote_code and not trust:
            raise ConfigError(
                "the file asks to run code that a hub repository ships (trust_remote_code): load only what you trust, "
                "with --trust where a command has it, or with trust=True in Python"
            )
        return config
