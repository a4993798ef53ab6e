"""A configuration with everything that it names, opened: language model, environment, agent, prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from agents.runs.checkpoint import newest_checkpoint
from agents.runs.config import OBJECTS, RunConfig
from agents.runs.files import AGENT_FILE, CHECKPOINTS
from agents.runs.parts import (
    load_objects,
    open_env,
    open_language_model,
    prompts_of,
    reward_and_partner,
)
from agents.runs.report import (
    LOOKAHEAD,
    SEEN,
    Report,
    Watch,
    Yardstick,
    acting_betas,
    evaluate_agent,
    unwatched,
)
from agents.runs.sizing import budget_of, new_agent
from agents.runs.stored import (
    check_stored_code,
    located,
    stored_config,
    without_reward,
)
from agents.runs.yardsticks import known_or_measured
from agents.sb3_vec import SB3VecEnv
from agents.text_dqn.agent import TextDQN
from agents.zoo import AGENTS, acts_greedily
from textgen_env.errors import ConfigError, RunFolderError
from textgen_env.evaluation import Evaluation
from textgen_env.models import load_language_model
from textgen_env.prompts import PromptSource
from textgen_env.tasks import Task
from textgen_env.vector_env import TextGenVectorEnv

PORTABLE_AGENTS = ("text_dqn",)
"""Agents stored without pickles: their files run no code when they are read, and their training can be resumed."""


@dataclass(frozen=True)
class Run:
    """A configuration with everything that it names, opened."""

    config: RunConfig
    env: TextGenVectorEnv  # the agent learns in it, on the training prompts
    agent: BaseAlgorithm
    test_prompts: PromptSource
    notes: tuple[str, ...]  # for readers of the results
    given: Mapping[str, Any]  # Python objects in place of configured names

    def scoring_env(self) -> TextGenVectorEnv:
        """Return an environment to measure policies without learning in, on the test prompts."""
        config, reward, partner = self.env.episodes.config, self.env.episodes.reward, self.env.episodes.partner
        keys = ["logprobs", "action_mask"]
        if reward.running() is not None and config.top_k is not None:
            keys += ["score", "candidate_scores"]
        return open_env(self.config, self.env.language_model, self.test_prompts, reward, tuple(keys), partner)

    def yardstick(self, watch: Watch = unwatched) -> Yardstick:
        """Return the measures of the policies without learning on the test prompts, from the cache where they are."""
        env, config = self.scoring_env(), self.config
        settings: dict[str, Any] = {"beta": config.beta, "texts": config.eval_texts, "samples": config.eval_samples}
        settings["seed"] = config.seed
        return known_or_measured(env, self.test_prompts, watch, **settings)

    def evaluate(self, watch: Watch = unwatched) -> list[Evaluation]:
        """Measure the agent on the test prompts: at its own temperature, then at others."""
        return evaluate_agent(
            self.agent,
            self.env,
            self.test_prompts,
            texts=self.config.eval_texts,
            seed=self.config.seed,
            deterministic=self.greedy,
            watch=watch,
        )

    def report(self, yardstick: Yardstick, evaluations: list[Evaluation]) -> Report:
        """Return the report of ``evaluations`` beside the policies without learning."""
        betas, task = acting_betas(self.agent), self.config.opened_task
        notes = self.notes if task is None else (*self.notes, bounds_note(task))
        return yardstick.report(self.agent_name, evaluations, notes, betas, self.seen_of_reward)

    @property
    def seen_of_reward(self) -> str:
        """What the agent sees of the reward while it writes."""
        episodes = self.env.episodes
        if isinstance(self.agent, TextDQN) and self.agent.q_net.scorer is not None:  # whatever the environment shows
            return "has learned a score from finished texts"
        if "candidate_scores" in episodes.keys:
            return SEEN[LOOKAHEAD]
        return "sees the running score" if episodes.reward.running() and "score" in episodes.keys else "sees no score"

    @property
    def agent_name(self) -> str:
        return f"{self.config.agent}, trained"

    @property
    def greedy(self) -> bool:
        """True for a Q-learner without a distribution: the actions that it draws are exploration."""
        return acts_greedily(self.config.agent, self.agent)


def bounds_note(task: Task) -> str:
    """Return a line about the known bounds of a task."""
    try:
        bounds = task.bounds()
    except ConfigError as error:
        return f"Bounds of {task.id}: {error}."
    return (
        f"Known bounds of {task.id}, mean reward over its test prompts: {bounds.language_model:.3f} for the language "
        f"model and {bounds.best:.3f} for the best policy, whatever its KL."
    )


def open_run(
    config: RunConfig,
    *,
    model: Any = None,
    prompts: Any = None,
    reward: Any = None,
    partner: Any = None,
    load: Path | None = None,
) -> Run:
    """Return the run of ``config``, with an untrained agent or the one saved in ``load``.

    The user's own code that ``config`` names is run; ``stored_config`` and ``read_config`` decide for files.

    Args:
        model, prompts, reward, partner: Python objects in place of those that the configuration names.

    Raises:
        TextGenError: something that cannot be used, or an object that is missing.
    """
    given = {"model": model, "prompts": prompts, "reward": reward, "partner": partner}
    _check_given(config, given)
    missing = [name for name in OBJECTS if given[name] is None]
    given |= load_objects(config, missing)
    model, prompts, reward, partner = given.values()
    language_model, note = open_language_model(config) if model is None else (load_language_model(model), None)
    train_prompts, test_prompts, split = prompts_of(config, prompts)
    reward, partner = reward_and_partner(config, reward, partner)
    env = open_env(config, language_model, train_prompts, reward, partner=partner)
    if load is None:
        agent = new_agent(config, env)
    else:
        agent = AGENTS[config.agent](budget_of(config))[0].load(load, env=SB3VecEnv(env))
    return Run(config, env, agent, test_prompts, tuple(filter(None, (note, split))), given)


def _check_given(config: RunConfig, given: Mapping[str, Any]) -> None:
    if config.task is not None and (
        extra := [name for name in OBJECTS if name != "prompts" and given[name] is not None]
    ):
        raise ConfigError(f"{', '.join(extra)} of the run are those of the task {config.task!r}: leave them out")
    if given["partner"] is not None and not config.has_partner:
        raise ConfigError(
            "a partner was given to a run without one: say RunConfig(objects=('partner',)), so that its settings are "
            "those of a conversation"
        )
    missing = [name for name in config.objects if given[name] is None and getattr(config, name) is None]
    if missing:
        raise ConfigError(
            f"the run was made with Python objects that JSON cannot hold: {', '.join(missing)}. Give them again, in "
            f"Python: load_run(folder, {', '.join(f'{name}=...' for name in missing)}), or name a function in a file: "
            + " ".join(f"--{name} FILE.py:NAME" for name in missing)
        )


def load_run(
    folder: str | os.PathLike[str],
    *,
    model: Any = None,
    prompts: Any = None,
    reward: Any = None,
    partner: Any = None,
    trust: bool = False,
) -> Run:
    """Return the run in ``folder``, with its trained agent.

    Args:
        model, prompts, reward, partner: The Python objects that the run was made with, if it was; or in place of
            code that it names, and that is then not run.
        trust: Also load agents that Stable-Baselines3 unpickles, which runs code that the file holds; and run code
            that the configuration names and that this user has never named.

    Raises:
        RunFolderError: the folder holds no run, or no trained agent.
        ConfigError: the agent would be unpickled, without ``trust``; or code was changed, or is not known.
        TextGenError: as of ``open_run``.
    """
    path = Path(folder)
    given = {"model": model, "prompts": prompts, "reward": reward, "partner": partner}
    config = _opened_config(path, trust, given)
    if not (path / AGENT_FILE).is_file():
        reason = "the run was stopped before it had learned anything"
        if newest_checkpoint(path / CHECKPOINTS) is not None:
            reason = f"the run was cut off; go on with textgen train --resume {path}"
        raise RunFolderError(f"{str(path)!r} holds no {AGENT_FILE}: {reason}")
    if config.agent not in PORTABLE_AGENTS and not trust:
        raise ConfigError(
            f"{str(path / AGENT_FILE)!r} holds a {config.agent!r}, which Stable-Baselines3 unpickles, and that runs "
            "any code that the file holds: load only what you trust, with --trust, or trust=True in Python"
        )
    return open_run(config, **given, load=path / AGENT_FILE)


def load_writer(
    folder: str | os.PathLike[str],
    *,
    prompts: Any = None,
    reward: Any = None,
    partner: Any = None,
    trust: bool = False,
) -> tuple[Run, str]:
    """Return the run in ``folder``, and "", or the reason why its texts cannot be scored: its reward cannot be loaded.

    Raises:
        TextGenError: as of ``load_run``; if the agent sees the reward, also about the reward.
    """
    try:
        return load_run(folder, prompts=prompts, reward=reward, partner=partner, trust=trust), ""
    except ConfigError as error:
        config = located(stored_config(Path(folder), trust, check=False), Path(folder))
        if reward is not None or config.agent_sees_reward:
            raise
        without = without_reward(config)
        return load_run(folder, prompts=prompts, reward=without, partner=partner, trust=trust), str(error)


def _opened_config(path: Path, trust: bool, given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of the run in ``path``, its paths from here; without code that ``given`` replaces."""
    config = located(stored_config(path, trust, check=False), path)
    check_stored_code(config, trust, without=[name for name, value in given.items() if value is not None])
    return config
