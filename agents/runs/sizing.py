"""A run that fits into so many minutes: a few steps of it are timed, and its sizes follow.

    environment, agent  ->  Speed (seconds a token)  ->  fit(minutes)  ->  Sizes: steps, texts, samples

Texts and samples are halved until measuring takes at most ``MEASURING`` of the time; learning gets the rest.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from agents.baselines.one_step import SampleAgent
from agents.runs.config import RunConfig
from agents.runs.progress import minutes
from agents.runs.report import ACTING_FACTORS, text_counts
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.unjudged import UNJUDGED_ROWS
from agents.zoo import AGENTS, Budget, make_agent, tuned_settings
from textgen_env.errors import ConfigError
from textgen_env.evaluation import play
from textgen_env.vector_env import TextGenVectorEnv

MEASURING = 0.4
"""Largest share of the time that goes into measuring: the yardstick and the agent."""

LEAST_SHARE = 1 / 8
"""Of a run's usual texts and samples: fewer say little."""

AGAIN = 2
"""Further timings, at most: settings follow the steps, and with them the cost of a step."""

LEAST_STEPS = 4_000
"""Fewer teach an agent nothing."""

PATIENCE = 2.0
"""A run that cannot be as short as asked may take so many times as long; it says so."""

END = 5.0
"""Seconds for pictures, table and files."""

LONGER = " (the smallest run; longer than asked, if need be)"
"""Said of a run of ``LEAST_STEPS``."""

TRIED = 8  # steps of all rows that are timed, after two that warm up


@dataclass(frozen=True)
class Speed:
    """Seconds a token, all rows together."""

    score: float  # writing as the yardstick does, with the running score of every candidate
    write: float  # writing as the agent does
    learn: float  # writing and learning


@dataclass(frozen=True)
class Work:
    """The work of a run beside learning."""

    prompts: int  # that it is measured on
    tokens: int  # of a text, at most
    texts: int  # of each agent, as usual
    samples: int  # of the language model a prompt, as usual
    lookahead: bool  # the reward can score prefixes

    def seconds(self, share: float, speed: Speed) -> tuple[float, float]:
        """Return how long yardstick and agent take to measure with ``share`` of the usual texts and samples."""
        texts, samples = self.sizes(share)
        agent = self.agent_texts(share)
        yardstick = max(texts, samples * self.prompts) + self.prompts + (agent if self.lookahead else 0)
        return yardstick * self.tokens * speed.score, agent * self.tokens * speed.write

    def agent_texts(self, share: float = 1.0) -> int:
        """Return how many texts the agent writes to be measured, at all its temperatures."""
        own, other = text_counts(self.sizes(share)[0], self.prompts)
        return own + len(ACTING_FACTORS) * other

    def sizes(self, share: float) -> tuple[int, int]:
        """Return ``share`` of the usual texts and samples."""
        return max(1, round(self.texts * share)), max(2, round(self.samples * share))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run, and the seconds that its parts are expected to take."""

    steps: int
    texts: int
    samples: int
    yardstick: float
    learning: float
    agent: float

    def of(self, config: RunConfig) -> RunConfig:
        """Return ``config`` with these sizes."""
        return replace(config, steps=self.steps, eval_texts=self.texts, eval_samples=self.samples)

    def note(self, given: float) -> str:
        """Return a line for the readers of the results."""
        return (
            f"Sized for {given:g} minutes on this machine: {self.steps:,} steps, {self.texts} texts an agent, "
            f"{self.samples} samples a prompt."
        )

    def estimate(self) -> str:
        """Return a line that says how long the parts will take."""
        whole = self.yardstick + self.learning + self.agent + END
        smallest = LONGER if self.steps == LEAST_STEPS else ""
        return (
            f"about {minutes(whole)} from here{smallest}: measuring the language model {minutes(self.yardstick)}, "
            f"learning {minutes(self.learning)}, measuring the agent {minutes(self.agent)}"
        )


def fit(given: float, spent: float, speed: Speed, work: Work) -> Sizes:
    """Return the sizes with which a run takes ``given`` minutes, ``spent`` seconds of them so far.

    Where the smallest run takes longer, but not ``PATIENCE`` times as long, it is that one.

    Raises:
        ConfigError: it is too short even for that; says how much is needed.
    """
    seconds = 60 * given - spent - END
    share = 1.0
    while share > LEAST_SHARE and sum(work.seconds(share, speed)) > MEASURING * seconds:
        share /= 2
    yardstick, agent = work.seconds(share, speed)
    steps = int((seconds - yardstick - agent) / speed.learn) // 100 * 100
    if steps < LEAST_STEPS:
        least = sum(work.seconds(LEAST_SHARE, speed)) + LEAST_STEPS * speed.learn + spent + END
        # Rounded up to a tenth, and a tenth for a second measurement that comes out otherwise.
        needed = math.ceil(10 * 1.1 * least / 60) / 10
        if needed > PATIENCE * given:
            raise ConfigError(
                f"--minutes {given:g} is too short on this machine: the smallest run needs {needed:g} (loading and "
                f"timing took {minutes(spent)}; {LEAST_STEPS:,} steps to learn from take "
                f"{minutes(LEAST_STEPS * speed.learn)}). Give it more (make demo MINUTES=...), or a smaller model"
            )
        share, steps = LEAST_SHARE, LEAST_STEPS
        yardstick, agent = work.seconds(share, speed)
    return Sizes(steps, *work.sizes(share), yardstick, steps * speed.learn, agent)


def measured_sizes(
    config: RunConfig, own: TextGenVectorEnv, scoring: TextGenVectorEnv, work: Work, given: float, started: float
) -> Sizes:
    """Return the sizes with which a run that ``started`` (``time.perf_counter``) takes ``given`` minutes.

    Args:
        own, scoring: See ``measured_speed``.

    Raises:
        ConfigError: too few minutes for the smallest run.
    """

    def timed(steps: int) -> Sizes:
        speed = measured_speed(replace(config, steps=steps), own, scoring)
        return fit(given, time.perf_counter() - started, speed, work)

    def settings(steps: int) -> dict[str, Any]:
        """Return what the cost of a step depends on."""
        chosen = AGENTS[config.agent](budget_of(replace(config, steps=steps)))[1]
        return {name: value for name, value in chosen.items() if name != "learning_starts"}

    tried, sizes = config.steps, timed(config.steps)
    for _ in range(AGAIN):
        if settings(sizes.steps) == settings(tried):
            break
        tried = sizes.steps
        again = timed(tried)
        steps = min(again.steps, tried)
        sizes = replace(again, steps=steps, learning=again.learning * steps / again.steps)
    return sizes


def budget_of(config: RunConfig) -> Budget:
    """Return the sizes of a training, by which agents choose settings."""
    return Budget(config.steps, config.envs, config.env_config().max_new_tokens, config.beta)


def new_agent(config: RunConfig, env: TextGenVectorEnv) -> Any:
    """Return the agent of a run before it has learned; in a task on a table, with the settings that suit tables."""
    tuned = {} if config.task is None else {**tuned_settings(config.agent, env)}
    tuned.pop("beta", None)  # the price of KL is the run's own
    if "learning_starts" in tuned:
        tuned["learning_starts"] = min(tuned["learning_starts"], config.steps // 5)
    return make_agent(config.agent, env, config.seed, budget_of(config), {**tuned, **config.agent_settings})


def measured_speed(config: RunConfig, own: TextGenVectorEnv, scoring: TextGenVectorEnv) -> Speed:
    """Time a few steps of a run, in environments that it does not go on with.

    Args:
        config: With the steps that the agent's settings should be those of.
        own: An environment as the agent learns in.
        scoring: An environment as the yardstick is measured in.
    """
    for env in (own, scoring):
        env.episodes.rebuild()  # an earlier trial wrote the same texts, and memos would answer for the model
    tokens = own.episodes.config.max_new_tokens
    trial = config.envs * (tokens + 2)
    settings = dict(config.agent_settings)
    if issubclass(AGENTS[config.agent](budget_of(config))[0], OffPolicyAlgorithm):
        settings["learning_starts"] = trial // 2  # updates are owed for the steps before it, too
    agent = new_agent(replace(config, agent_settings=settings), own)
    clock = _StepTimes()
    unjudged = 0.0
    if isinstance(agent, TextDQN):  # its unjudged texts are timed on their own
        unjudged, agent.learner.unjudged = agent.learner.unjudged, 0.0
    started = time.perf_counter()
    agent.learn(trial, callback=clock)
    learn = (time.perf_counter() - started) / agent.num_timesteps
    if unjudged and agent.q_net.scorer is not None:
        agent.learner.unjudged = unjudged
        learn += unjudged * _unjudged_seconds(agent)
    write = float(np.median(clock.seconds[2 : 2 + TRIED] or [learn * config.envs])) / config.envs
    return Speed(_scoring_seconds(scoring), min(write, learn), learn)


def _unjudged_seconds(agent: TextDQN) -> float:
    """Return the seconds a token of an unjudged text; nearly 0 where the agent writes none."""
    learner = agent.learner
    learner.unjudged_owed = float(UNJUDGED_ROWS * learner.network.max_new_tokens)
    before, started = learner.unjudged_steps, time.perf_counter()
    agent.learn_unjudged()
    return (time.perf_counter() - started) / max(1, learner.unjudged_steps - before)


def _scoring_seconds(env: TextGenVectorEnv) -> float:
    """Return the seconds a token of the language model in ``env``."""
    prompts = [env.episodes.prompts.draw(np.random.default_rng(row)) for row in range(env.num_envs)]
    times, before = [], time.perf_counter()
    for step in play(SampleAgent(), env, prompts, seed=0):
        now = time.perf_counter()
        times.append((now - before) / len(step.rows))
        before = now
        if len(times) == 2 + TRIED:
            break
    return float(np.median(times[2:] or times))


class _StepTimes(BaseCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._before = math.nan

    def _on_step(self) -> bool:
        now = time.perf_counter()
        if not math.isnan(self._before):
            self.seconds.append(now - self._before)
        self._before = now
        return True


def work_of(config: RunConfig, env: TextGenVectorEnv, prompts: Any) -> Work:
    """Return the work of a run that is measured on ``prompts``."""
    tokens = env.episodes.config.max_new_tokens
    lookahead = env.episodes.reward.running() is not None and config.env_config().top_k is not None
    return Work(len(prompts), tokens, config.eval_texts, config.eval_samples, lookahead)
