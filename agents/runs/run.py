"""One run, from a configuration to a folder of results.

    RunConfig -> language model (pruned) -> environment -> agent.learn() -> evaluation -> folder

    config.json    the configuration: enough to repeat the run
    agent.zip      the agent, as Stable-Baselines3 saves it
    metrics.csv    the course of the training; also as TensorBoard events in tensorboard/
    learning.png   the same as a picture
    summary.json   every figure of the table
    plane.png      reward against KL: the agent, policies without learning, the best possible one
    samples.md     texts before and after
    checkpoints/   while the run goes on: its state, for resuming

Learning and measuring use different prompts, split by template.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from stable_baselines3.common.base_class import BaseAlgorithm

from agents.runs.checkpoint import load_checkpoint, newest_checkpoint
from agents.runs.config import RunConfig
from agents.runs.log import CHECKPOINTS, EVENTS, RunLog
from agents.runs.parts import open_env, open_language_model, split_prompts
from agents.runs.progress import JobProgress
from agents.runs.report import (
    Report,
    Watch,
    Yardstick,
    draw_learning,
    draw_plane,
    evaluate_agent,
    samples_page,
    unwatched,
)
from agents.runs.signals import Stopped, stop_signals
from agents.runs.sizing import budget_of, measured_sizes, work_of
from agents.runs.yardsticks import known_or_measured
from agents.sb3_vec import SB3VecEnv
from agents.terminal import say
from agents.text_dqn.agent import TextDQN
from agents.zoo import AGENTS, acts_greedily, make_agent
from textgen_env.errors import ConfigError, RunFolderError, TextGenError
from textgen_env.evaluation import Evaluation
from textgen_env.files import (
    check_keys,
    clear_half_made,
    is_free,
    locked,
    read_json,
    read_text,
    refuse_links,
    whole_file,
    write_file,
)
from textgen_env.models import load_language_model
from textgen_env.prompts import PromptSource
from textgen_env.rewards import make_reward, reward_spec
from textgen_env.vector_env import TextGenVectorEnv

CONFIG_FILE = "config.json"
AGENT_FILE = "agent.zip"
SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.md"
PLANE_FILE = "plane.png"
TOKENS_FILE = "tokens.png"
LEARNING_FILE = "learning.png"

SUMMARY_PACKAGES = ("textgen-env", "torch", "transformers", "stable-baselines3", "gymnasium", "numpy")
"""Whose versions are in the summary."""

PORTABLE_AGENTS = ("text_dqn",)
"""Agents stored without pickles: their files run no code when they are read, and their training can be resumed."""


# --- opening a run


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
        config, reward = self.env.episodes.config, self.env.episodes.reward
        keys = ["logprobs", "action_mask"]
        if reward.running() is not None and config.top_k is not None:
            keys += ["score", "candidate_scores"]
        return open_env(self.config, self.env.language_model, self.test_prompts, reward, tuple(keys))

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

    @property
    def agent_name(self) -> str:
        return f"{self.config.agent}, trained"

    @property
    def greedy(self) -> bool:
        """True for a Q-learner without a distribution: the actions that it draws are exploration."""
        return acts_greedily(self.config.agent, self.agent)


def open_run(
    config: RunConfig, *, model: Any = None, prompts: Any = None, reward: Any = None, load: Path | None = None
) -> Run:
    """Return the run of ``config``, with an untrained agent or the one saved in ``load``.

    Args:
        model, prompts, reward: Python objects in place of those that the configuration names.

    Raises:
        TextGenError: something that cannot be used, or an object that is missing.
    """
    given = {"model": model, "prompts": prompts, "reward": reward}
    _check_given(config, given)
    language_model, note = open_language_model(config) if model is None else (load_language_model(model), None)
    train_prompts, test_prompts, split = split_prompts(
        config.prompts if prompts is None else prompts, config.eval_prompts, config.seed
    )
    env = open_env(config, language_model, train_prompts, config.reward if reward is None else reward)
    budget = budget_of(config)
    if load is None:
        agent = make_agent(config.agent, env, config.seed, budget, config.agent_settings)
    else:
        agent = AGENTS[config.agent](budget)[0].load(load, env=SB3VecEnv(env))
    return Run(config, env, agent, test_prompts, tuple(filter(None, (note, split))), given)


def _check_given(config: RunConfig, given: Mapping[str, Any]) -> None:
    missing = [name for name in config.objects if given[name] is None and getattr(config, name) is None]
    if missing:
        raise ConfigError(
            f"the run was made with Python objects that JSON cannot hold: {', '.join(missing)}. Give them again, in "
            f"Python: load_run(folder, {', '.join(f'{name}=...' for name in missing)})"
        )


def load_run(
    folder: str | os.PathLike[str], *, model: Any = None, prompts: Any = None, reward: Any = None, trust: bool = False
) -> Run:
    """Return the run in ``folder``, with its trained agent.

    Args:
        model, prompts, reward: The Python objects that the run was made with, if it was.
        trust: Also load agents that Stable-Baselines3 unpickles, which runs code that the file holds.

    Raises:
        RunFolderError: the folder holds no run, or no trained agent.
        ConfigError: the agent would be unpickled, without ``trust``.
        TextGenError: as of ``open_run``.
    """
    path = Path(folder)
    config = _stored_config(path, trust)
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
    return open_run(config, model=model, prompts=prompts, reward=reward, load=path / AGENT_FILE)


# --- a run from start to end

TextSource = Callable[[Run, Callable[[str], None]], AbstractContextManager[Any]]
"""Collects the texts that a run's agent learns from, within a context; gets a function for messages to the user."""


def local(run: Run, say: Callable[[str], None]) -> AbstractContextManager[Any]:
    """Write the texts in this process alone."""
    return nullcontext()


@dataclass(frozen=True)
class RunResult:
    """The end of a run."""

    folder: Path
    finished: bool  # False: stopped by a signal
    steps: int
    seconds: float  # of training
    report: Report | None  # None where the run was stopped before the agent was measured
    signum: int | None = None  # of the signal that stopped it: SIGINT is Ctrl-C


def train(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    model: Any = None,
    prompts: Any = None,
    reward: Any = None,
    text_source: TextSource = local,
    console: Console | None = None,
    minutes: float | None = None,
) -> RunResult:
    """Train an agent, measure it, and leave everything in the folder ``out``.

    Ctrl-C, SIGTERM and SIGHUP end the run: its state by then is saved, and the result says so. ``resume``
    goes on with it.

    Args:
        config: The settings.
        out: A folder that does not exist yet, or is empty.
        model, prompts, reward: Python objects in place of those that the configuration names.
        text_source: This process, or ``agents.distributed.actors.RayTextSource``.
        console: Shows progress. None: silence.
        minutes: How long the whole should take: steps, texts and samples are chosen by the speed of this machine.

    Raises:
        RunFolderError: ``out`` holds something already (nothing is ever overwritten), or cannot be written to.
        TextGenError: something that cannot be used. Nothing was written.
    """
    folder, console = Path(out), console or Console(quiet=True)
    check_free(folder)
    started = time.perf_counter()
    with console.status("loading the language model"):
        run = open_run(config, model=model, prompts=prompts, reward=reward)
    if minutes is not None:
        with console.status("timing a few steps"):
            run, estimate = sized(run, minutes, started)
        config = run.config
        say(console, estimate)
    with text_source(run, partial(say, console)), locked(folder):
        check_free(folder)  # loading took a while
        stored = _storable(config, model=model, prompts=prompts, reward=reward)
        write_file(folder / CONFIG_FILE, stored.to_json())
        return _carry_out(run, stored, folder, console)


def resume(
    folder: str | os.PathLike[str],
    *,
    model: Any = None,
    prompts: Any = None,
    reward: Any = None,
    trust: bool = False,
    text_source: TextSource = local,
    console: Console | None = None,
) -> RunResult:
    """Go on with a run that was stopped or killed, from its last checkpoint, or from the start before there is one.

    It ends with the weights and metrics of a run that passed the same checkpoints and was never
    stopped: bit for bit on the same machine with the same number of threads, on a CPU.

    Args:
        folder: Of the run.
        model, prompts, reward: The Python objects that the run was made with, if it was.
        trust: Also go on with a run whose configuration lets a hub repository's code run.
        text_source: As of ``train``; may differ from that of the first start.
        console: Shows progress. None: silence.

    Raises:
        RunFolderError: no run, a finished one, one that another process works on, or one with links in it.
        ConfigError: an agent that cannot be resumed, or a configuration that was changed.
        TextGenError: as of ``train``.
    """
    path, console = Path(folder), console or Console(quiet=True)
    config = _stored_config(path, trust)
    _check_resumable(path, config)
    with locked(path):
        refuse_links(path)
        with console.status("loading the language model"):
            run = open_run(config, model=model, prompts=prompts, reward=reward)
        log = _return_to_checkpoint(run, path)
        if log is None:
            say(console, "stopped before the first checkpoint: the run begins again")
            shutil.rmtree(path / EVENTS, ignore_errors=True)
        with text_source(run, partial(say, console)):
            return _carry_out(run, config, path, console, log)


def _return_to_checkpoint(run: Run, path: Path) -> Mapping[str, Any] | None:
    """Put the agent where the newest checkpoint was made and return the log in it; None without a checkpoint."""
    checkpoint = newest_checkpoint(path / CHECKPOINTS)
    if checkpoint is None:
        return None
    assert isinstance(run.agent, TextDQN)
    extra = load_checkpoint(checkpoint, run.agent)
    check_keys(extra, ("config", "log"), f"the checkpoint {str(checkpoint)!r}")
    _check_unchanged(check_keys(extra["config"], (), "the configuration in the checkpoint"), run.config)
    log: Mapping[str, Any] = extra["log"]
    return log


def sized(run: Run, minutes: float, started: float) -> tuple[Run, str]:
    """Return ``run`` with sizes for so many minutes since ``started``, and a line that says how long its parts take.

    Raises:
        ConfigError: too few minutes for the smallest run.
    """
    config, episodes = run.config, run.env.episodes
    trial = open_env(config, run.env.language_model, episodes.prompts, episodes.reward)
    sizes = measured_sizes(
        config, trial, run.scoring_env(), work_of(config, run.env, run.test_prompts), minutes, started
    )
    chosen = sizes.of(config)
    agent = make_agent(chosen.agent, run.env, chosen.seed, budget_of(chosen), chosen.agent_settings)
    return replace(run, config=chosen, agent=agent, notes=(*run.notes, sizes.note(minutes))), sizes.estimate()


def _stored_config(path: Path, trust: bool = False) -> RunConfig:
    if not (path / CONFIG_FILE).is_file():
        raise RunFolderError(f"{str(path)!r} holds no {CONFIG_FILE}: not a folder that 'textgen train' made")
    return RunConfig.from_json(read_text(path / CONFIG_FILE), trust)


def _check_resumable(path: Path, config: RunConfig) -> None:
    if config.agent not in PORTABLE_AGENTS:
        raise ConfigError(
            f"agent {config.agent!r} keeps no checkpoints, since Stable-Baselines3 does not say all that it is made "
            f"of: only {', '.join(PORTABLE_AGENTS)} can be resumed; start again in another folder"
        )
    summary = path / SUMMARY_FILE
    if summary.is_file() and read_json(summary, ["finished"], allow_nan=True)["finished"]:
        with locked(path):  # a kill after the summary left them
            shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
            clear_half_made(path)
        raise RunFolderError(f"{str(path)!r} holds a finished run: there is nothing to resume")


def _check_unchanged(then: Mapping[str, Any], config: RunConfig) -> None:
    now = json.loads(config.to_json())
    changed = [f"{name} ({now[name]!r}, was {then.get(name)!r})" for name in now if now[name] != then.get(name)]
    if changed:
        raise ConfigError(
            f"{CONFIG_FILE} was changed since the checkpoint: {', '.join(changed)}. Put it back, or start a new run "
            "with textgen train --config"
        )


def check_free(folder: Path) -> None:
    """Raise ``RunFolderError`` unless ``folder`` is new or empty."""
    if (folder / CONFIG_FILE).exists():
        raise RunFolderError(f"{str(folder)!r} already holds a run; choose another folder, or delete this one")
    if not is_free(folder):
        raise RunFolderError(f"{str(folder)!r} exists and is not an empty folder; choose another one")


def _carry_out(
    run: Run, stored: RunConfig, folder: Path, console: Console, logged: Mapping[str, Any] | None = None
) -> RunResult:
    """Measure, learn, measure, from the start or from the checkpoint that holds ``logged``."""
    say(console, *run.notes)
    log = RunLog(folder, stored, console)
    if logged is not None:
        log.restore(logged)
        say(console, f"going on after {log.steps:,} steps")
    report: Report | None = None
    signum: int | None = None
    try:
        with stop_signals(log.request_stop):
            report = _measure_and_learn(run, log, folder, console)
    except KeyboardInterrupt as stop:
        stopped = stop if isinstance(stop, Stopped) else Stopped()
        signum = stopped.signum
        say(console, f"stopped by {stopped.name} after {log.steps:,} steps")
        _say_how_to_go_on(folder, console)
    except TextGenError:
        _say_how_to_go_on(folder, console)
        raise
    finally:
        write_summary(folder / SUMMARY_FILE, log, report)
    if report is not None:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return RunResult(folder, report is not None, log.steps, log.seconds, report, signum)


def _say_how_to_go_on(folder: Path, console: Console) -> None:
    checkpoint = newest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is not None:
        say(console, f"the last checkpoint is of step {int(checkpoint.name):,}")
        say(console, f"go on with: textgen train --resume {folder}")


def _measure_and_learn(run: Run, log: RunLog, folder: Path, console: Console) -> Report:
    with JobProgress(console, "texts") as progress:
        yardstick = run.yardstick(progress.measuring)
    _learn(run, log, folder)
    draw_learning(log.rows, yardstick.samples.reward, folder / LEARNING_FILE)
    with JobProgress(console, "texts") as progress:
        evaluations = run.evaluate(progress.measuring)
    report = yardstick.report(run.agent_name, evaluations, run.notes)
    draw_plane(report, folder / PLANE_FILE)
    write_file(folder / SAMPLES_FILE, samples_page(yardstick.samples, evaluations[0], run.notes))
    return report


def _learn(run: Run, log: RunLog, folder: Path) -> None:
    """Train the agent. It is saved even if the training is stopped or fails."""
    agent, done = run.agent, run.agent.num_timesteps
    try:
        with log:
            agent.learn(run.config.steps - done, log, log_interval=sys.maxsize, reset_num_timesteps=not done)
    finally:
        with whole_file(folder / AGENT_FILE, (RuntimeError,)) as half_made, half_made.open("wb") as file:
            agent.save(file)


def write_summary(path: Path, log: RunLog, report: Report | None) -> None:
    """Write the results of a run, and the versions that it ran with."""
    versions = {name: metadata.version(name) for name in SUMMARY_PACKAGES}
    summary = {
        "finished": report is not None,
        "steps": log.steps,
        "episodes": log.episodes,
        "seconds_of_training": log.seconds,
        "report": None if report is None else report.as_dict(),
        "versions": {"python": platform.python_version(), **versions},
    }
    write_file(path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _storable(config: RunConfig, **given: Any) -> RunConfig:
    """Return ``config`` with the given objects: as plain data where possible, else by mention."""
    objects = {name: value for name, value in given.items() if value is not None}
    if "reward" in objects and (spec := reward_spec(make_reward(objects["reward"]))) is not None:
        del objects["reward"]
        config = replace(config, reward=spec)
    changes: dict[str, Any] = dict.fromkeys(objects)
    if "model" in objects:
        changes["prune"] = None
    return replace(config, **changes, objects=tuple(objects))
