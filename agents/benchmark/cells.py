"""One cell of a benchmark: an agent learns a task with one seed, and is measured as it learns.

Cell  ->  environment, agent  ->  evaluations at even distances  ->  CellResult (plain data)
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from agents.benchmark.config import BenchmarkConfig, Cell, known_bounds
from agents.user_code import is_reference
from agents.zoo import (
    Budget,
    acts_greedily,
    draws_anew,
    env_settings,
    make_agent,
    name_and_settings,
    tuned_settings,
)
from textgen_env.errors import ConfigError, ContractError
from textgen_env.evaluation import Evaluation, evaluate
from textgen_env.rewards.base import Generation, Reward, RunningScore, Scored
from textgen_env.tasks import Task, open_task
from textgen_env.vector_env import TextGenVectorEnv

TRANSCRIPTS = 4
"""Texts of the last evaluation that a run keeps."""

EVALUATION_SEED = 10_000
"""Added to a run's seed, so that texts are measured with other random numbers than it learned with."""


CONTRACT = "'An agent of your own' in docs/benchmark.md says what is expected."


PRICE = 0.05
"""Price of KL for agents that know it: a nat costs this share of what the best text gains over the language model."""


class CountedReward(Reward):
    """A reward that counts the finished texts about which it is asked."""

    def __init__(self, reward: Reward) -> None:
        self.name, self.calls = reward.name, 0
        self._reward = reward

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return self.scored(generations).total

    def scored(self, generations: Sequence[Generation]) -> Scored:
        self.calls += len(generations)
        return self._reward.scored(generations)

    def running(self) -> RunningScore[Any] | None:
        return self._reward.running()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._reward, name)  # what a reward has of its own, such as a diagnostic task's process


@dataclass(frozen=True)
class CellResult:
    """The end of a run, as plain data."""

    cell: Cell
    status: str  # "ok"; "failed": it raised; "inapplicable": the agent cannot do this task
    error: str = ""
    rows: Sequence[Mapping[str, Any]] = ()  # one an evaluation, as far as it got
    transcripts: Sequence[Mapping[str, Any]] = ()  # prompt, completion, reward
    traceback: str = ""


def run_cell(config: BenchmarkConfig, cell: Cell) -> CellResult:
    """Run one agent on one task with one seed, and measure it as it learns.

    Errors of the agent, also about an illegal action, are part of the result.
    """
    rows: list[dict[str, Any]] = []
    texts: list[Mapping[str, Any]] = []
    opened = False
    try:
        agent, env, task, judge = _open(config, cell)
        opened, of_measuring = True, 0

        def measure(step: int, seconds: float) -> None:
            nonlocal of_measuring
            before = judge.calls
            measured, tokens = measure_agent(cell, config.texts, agent, env, task)
            calls = judge.calls - before
            learning_judge_calls, of_measuring = before - of_measuring, of_measuring + calls
            count, bounds = len(measured.rewards), known_bounds(cell.task)
            rows.append(
                {
                    "step": step,
                    "seconds": seconds,
                    "reward": measured.reward,
                    "normalised": float(bounds.normalise(measured.reward)),
                    "kl": measured.mean_kl,
                    "tokens": tokens,
                    "judge_calls": calls / count - 1,
                    "learning_judge_calls": learning_judge_calls,
                    "length": float(measured.lengths.mean()),
                    "texts": count,
                }
            )
            texts[:] = transcripts_of(measured)

        _learn_and_measure(config, agent, measure)
    except Exception as error:
        status = "inapplicable" if isinstance(error, ConfigError) and not opened else "failed"
        return CellResult(cell, status, f"{type(error).__name__}: {error}", rows, texts, traceback.format_exc())
    return CellResult(cell, "ok", "", rows, texts)


def check_agents(config: BenchmarkConfig) -> None:
    """Let each agent of the user's own, or with settings of the user's, act once, on the first task that it can do.

    Raises:
        ConfigError: settings that an agent in the box refuses.
        ContractError: one of the user's own can be made for no task, lacks ``predict``, or answers something
            else than one action a row.
    """
    for name in (agent for agent in config.agents if ":" in agent):
        reason = ""
        for task in config.tasks:
            try:
                agent, env, *_ = _open(replace(config, envs=2), Cell(task, name, config.seeds[0]))
            except Exception as error:  # of the user's code, or because it cannot do this task
                if isinstance(error, ConfigError) and not is_reference(name):
                    raise
                reason = reason or f"{type(error).__name__}: {error}"
                continue
            _check_agent(name, agent, env)
            break
        else:
            raise ContractError(f"agent {name!r} can be made for none of the tasks: {reason}. {CONTRACT}")


def _check_agent(name: str, agent: Any, env: TextGenVectorEnv) -> None:
    wanted = f"{CONTRACT} Agent {name!r}"
    if not callable(getattr(agent, "predict", None)):
        raise ContractError(f"{wanted} must have predict(observation, deterministic=False), got {type(agent).__name__}")
    if hasattr(agent, "learn"):
        if not callable(agent.learn):
            raise ContractError(f"{wanted} has a learn that cannot be called: it must be learn(steps)")
        _check_call(f"{wanted} must have learn(steps)", agent.learn, 1)
    observation, _ = env.reset(seed=0)
    try:
        answer = agent.predict(observation, deterministic=True)
    except Exception as error:
        raise ContractError(f"{wanted} raised {type(error).__name__} in predict: {error}") from error
    actions = np.asarray(answer[0] if isinstance(answer, tuple) and len(answer) == 2 else None)
    if actions.shape != (2,) or actions.dtype.kind not in "iu":
        raise ContractError(
            f"{wanted} must answer (actions, state) with one whole number a row, (2,) here, got {answer!r}"
        )
    if callable(getattr(agent, "probabilities", None)):
        policy = np.asarray(agent.probabilities(observation), np.float64)
        if policy.shape != (2, env.episodes.k) or not np.allclose(policy.sum(-1), 1, atol=1e-4):
            raise ContractError(f"{wanted} must have probabilities of shape (2, {env.episodes.k}) that sum to 1")


def _check_call(wanted: str, method: Callable[..., Any], *arguments: Any) -> None:
    """Raise ``ContractError`` if a method cannot be called with these arguments."""
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError as error:
        raise ContractError(f"{wanted}: {error}") from error
    except ValueError:  # it has no signature
        pass


def _open(config: BenchmarkConfig, cell: Cell) -> tuple[Any, TextGenVectorEnv, Task, CountedReward]:
    """Return a new agent in an environment of its own, the environment to measure it in, the task, and its reward."""
    task, (name, given) = open_task(cell.task), name_and_settings(cell.agent)
    judge, bounds = CountedReward(task.reward), known_bounds(cell.task)
    task = replace(task, reward=judge)
    whole, has_partner = task.settings.get("top_k", 16) is None, task.partner is not None
    settings = env_settings(name, whole_vocabulary=whole, has_partner=has_partner)
    env = task.make_vec(config.envs, **settings)
    budget = Budget(config.steps, config.envs, env.max_new_tokens, PRICE * (bounds.best - bounds.language_model))
    agent = make_agent(name, env, cell.seed, budget, {**tuned_settings(name, env), **given})
    # Planning agents search in the environment that they are asked in; SB3's must not lose their place.
    return agent, task.make_vec(config.envs, **settings) if isinstance(agent, BaseAlgorithm) else env, task, judge


def _learn_and_measure(config: BenchmarkConfig, agent: Any, measure: Callable[[int, float], None]) -> None:
    if isinstance(agent, BaseAlgorithm):
        agent.learn(config.steps, callback=LearningCurve(config, measure))
        return
    measure(0, 0.0)
    if hasattr(agent, "learn"):
        started = time.perf_counter()
        agent.learn(config.steps)
        measure(config.steps, time.perf_counter() - started)


class LearningCurve(BaseCallback):
    """Measure an agent before it learns, at even distances, and when it has learned; learning time only counts."""

    def __init__(self, config: BenchmarkConfig, measure: Callable[[int, float], None]) -> None:
        super().__init__()
        parts = config.evaluations - 1
        self._points = [config.steps * i // parts for i in range(1, parts)]
        self._measure = measure
        self._seconds = self._since = 0.0

    def _on_training_start(self) -> None:
        self._measured()

    def _on_step(self) -> bool:
        if self._points and self.num_timesteps >= self._points[0]:
            self._points = [point for point in self._points if point > self.num_timesteps]
            self._measured()
        return True

    def _on_training_end(self) -> None:
        self._measured()

    def _measured(self) -> None:
        if self.num_timesteps:
            self._seconds += time.perf_counter() - self._since
        self._measure(self.num_timesteps, self._seconds)
        self._since = time.perf_counter()


def measure_agent(cell: Cell, texts: int, agent: Any, env: Any, task: Task) -> tuple[Evaluation, float]:
    """Return the agent's evaluation on the test prompts, and the tokens that a text has cost."""
    name, prompts = name_and_settings(cell.agent)[0], task.test_prompts
    greedy = acts_greedily(name, agent)
    count = max(texts, len(prompts)) if draws_anew(name, agent) else len(prompts)
    before = getattr(agent, "tokens_used", None)
    measured = evaluate(agent, env, count, EVALUATION_SEED + cell.seed, prompts, greedy)
    spent = float(measured.lengths.sum()) if before is None else agent.tokens_used - before
    return measured, spent / len(measured.rewards)


def transcripts_of(measured: Evaluation) -> list[dict[str, Any]]:
    """Return the first texts: not a selection."""
    texts = zip(measured.prompts, measured.completions, measured.rewards.tolist(), strict=True)
    return [
        {"prompt": prompt, "completion": completion, "reward": reward}
        for (prompt, completion, reward), _ in zip(texts, range(TRANSCRIPTS), strict=False)
    ]
