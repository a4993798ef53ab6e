"""One run, from a configuration to a folder of results.

    RunConfig -> language model (pruned) -> environment -> agent.learn() -> evaluation -> folder

    config.json    the configuration: enough to repeat the run
    prompts.jsonl  the prompts, where they are not in the box
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

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from stable_baselines3.common.base_class import BaseAlgorithm

from agents.runs.checkpoint import load_checkpoint, newest_checkpoint
from agents.runs.config import RunConfig
from agents.runs.log import CHECKPOINTS, EVENTS, RunLog
from agents.runs.parts import OBJECTS, load_objects, open_env, open_language_model, split_prompts
from agents.runs.pictures import draw_learning, draw_plane
from agents.runs.report import (
    LOOKAHEAD,
    SEEN,
    Report,
    Yardstick,
    acting_betas,
    evaluate_agent,
    samples_page,
)
from agents.runs.signals import Stopped, stop_signals
from agents.runs.stored import (
    CONFIG_FILE,
    check_stored_code,
    check_unchanged,
    located,
    no_folder_of_a_failed_start,
    no_new_folders_of_a_failed_start,
    store,
    stored_config,
    without_reward,
    write_summary,
)
from agents.sb3_vec import SB3VecEnv
from agents.terminal import say, status_text
from agents.text_dqn.agent import TextDQN
from agents.user_code import remember
from agents.zoo import AGENTS, Budget, acts_greedily, make_agent
from textgen_env.errors import ConfigError, RunFolderError, TextGenError
from textgen_env.evaluation import Evaluation
from textgen_env.files import (
    check_keys,
    clear_half_made,
    is_free,
    locked,
    read_json,
    refuse_links,
    whole_file,
    write_file,
)
from textgen_env.models import load_language_model
from textgen_env.prompts import PromptSource
from textgen_env.vector_env import TextGenVectorEnv

AGENT_FILE = "agent.zip"
SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.md"
PLANE_FILE = "plane.png"
LEARNING_FILE = "learning.png"

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

    def yardstick(self, say: Callable[[str], None]) -> Yardstick:
        """Measure the policies without learning on the test prompts."""
        config, reward = self.env.episodes.config, self.env.episodes.reward
        keys = ["logprobs", "action_mask"]
        if reward.running() is not None and config.top_k is not None:
            keys += ["score", "candidate_scores"]
        env = open_env(self.config, self.env.language_model, self.test_prompts, reward, tuple(keys))
        return Yardstick.measure(
            env,
            self.test_prompts,
            beta=self.config.beta,
            texts=self.config.eval_texts,
            samples=self.config.eval_samples,
            seed=self.config.seed,
            say=say,
        )

    def evaluate(self, say: Callable[[str], None]) -> list[Evaluation]:
        """Measure the agent on the test prompts: at its own temperature, then at others."""
        return evaluate_agent(
            self.agent,
            self.env,
            self.test_prompts,
            texts=self.config.eval_texts,
            seed=self.config.seed,
            deterministic=self.greedy,
            say=say,
        )

    def report(self, yardstick: Yardstick, evaluations: list[Evaluation]) -> Report:
        """Return the report of ``evaluations`` beside the policies without learning."""
        betas = acting_betas(self.agent)
        return yardstick.report(self.agent_name, evaluations, self.notes, betas, self.seen_of_reward)

    @property
    def seen_of_reward(self) -> str:
        """What the agent sees of the reward while it writes."""
        episodes = self.env.episodes
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


def open_run(
    config: RunConfig, *, model: Any = None, prompts: Any = None, reward: Any = None, load: Path | None = None
) -> Run:
    """Return the run of ``config``, with an untrained agent or the one saved in ``load``.

    The user's own code that ``config`` names is run; ``stored_config`` and ``read_config`` decide for files.

    Args:
        model, prompts, reward: Python objects in place of those that the configuration names.

    Raises:
        TextGenError: something that cannot be used, or an object that is missing.
    """
    given = {"model": model, "prompts": prompts, "reward": reward}
    missing = [name for name in OBJECTS if given[name] is None]
    given |= load_objects(config, missing)
    model, prompts, reward = given.values()
    _check_given(config, given)
    language_model, note = open_language_model(config) if model is None else (load_language_model(model), None)
    train_prompts, test_prompts, split = split_prompts(
        config.prompts if prompts is None else prompts, config.eval_prompts, config.seed
    )
    env = open_env(config, language_model, train_prompts, config.reward if reward is None else reward)
    budget = Budget(config.steps, config.envs, config.env_config().max_new_tokens, config.beta)
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
            f"Python: load_run(folder, {', '.join(f'{name}=...' for name in missing)}), or name a function in a file: "
            + " ".join(f"--{name} FILE.py:NAME" for name in missing)
        )


def load_run(
    folder: str | os.PathLike[str], *, model: Any = None, prompts: Any = None, reward: Any = None, trust: bool = False
) -> Run:
    """Return the run in ``folder``, with its trained agent.

    Args:
        model, prompts, reward: The Python objects that the run was made with, if it was; or in place of code that
            it names, and that is then not run.
        trust: Also load agents that Stable-Baselines3 unpickles, which runs code that the file holds; and run code
            that the configuration names and that this user has never named.

    Raises:
        RunFolderError: the folder holds no run, or no trained agent.
        ConfigError: the agent would be unpickled, without ``trust``; or code was changed, or is not known.
        TextGenError: as of ``open_run``.
    """
    path = Path(folder)
    config = _opened_config(path, trust, {"model": model, "prompts": prompts, "reward": reward})
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

    Raises:
        RunFolderError: ``out`` holds something already (nothing is ever overwritten), or cannot be written to.
        TextGenError: something that cannot be used. Nothing was written.
    """
    folder, console = Path(out), console or Console(quiet=True)
    check_free(folder)
    with console.status("loading the language model"):
        run = open_run(config, model=model, prompts=prompts, reward=reward)
    with text_source(run, partial(say, console)), no_new_folders_of_a_failed_start(folder), locked(folder):
        check_free(folder)  # loading took a while
        with no_folder_of_a_failed_start(folder):
            stored = store(config, folder, model=model, prompts=prompts, reward=reward)
            remember(config.references)
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
    config = stored_config(path, trust)
    _check_resumable(path, config)
    with locked(path):
        refuse_links(path)
        with console.status("loading the language model"):
            run = open_run(located(config, path), model=model, prompts=prompts, reward=reward)
        log = _return_to_checkpoint(run, config, path)
        if log is None:
            say(console, "stopped before the first checkpoint: the run begins again")
            shutil.rmtree(path / EVENTS, ignore_errors=True)
        with text_source(run, partial(say, console)):
            return _carry_out(run, config, path, console, log)


def _return_to_checkpoint(run: Run, stored: RunConfig, path: Path) -> Mapping[str, Any] | None:
    """Put the agent where the newest checkpoint was made and return the log in it; None without a checkpoint."""
    checkpoint = newest_checkpoint(path / CHECKPOINTS)
    if checkpoint is None:
        return None
    assert isinstance(run.agent, TextDQN)
    extra = load_checkpoint(checkpoint, run.agent)
    check_keys(extra, ("config", "log"), f"the checkpoint {str(checkpoint)!r}")
    check_unchanged(check_keys(extra["config"], (), "the configuration in the checkpoint"), stored)
    log: Mapping[str, Any] = extra["log"]
    return log


def load_writer(
    folder: str | os.PathLike[str], *, prompts: Any = None, reward: Any = None, trust: bool = False
) -> tuple[Run, str]:
    """Return the run in ``folder``, and "", or the reason why its texts cannot be scored: its reward cannot be loaded.

    Raises:
        TextGenError: as of ``load_run``; if the agent sees the reward, also about the reward.
    """
    try:
        return load_run(folder, prompts=prompts, reward=reward, trust=trust), ""
    except ConfigError as error:
        config = located(stored_config(Path(folder), trust, check=False), Path(folder))
        if reward is not None or config.agent_sees_reward:
            raise
        return load_run(folder, prompts=prompts, reward=without_reward(config), trust=trust), str(error)


def _opened_config(path: Path, trust: bool, given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of the run in ``path``, its paths from here; without code that ``given`` replaces."""
    config = located(stored_config(path, trust, check=False), path)
    replaced: dict[str, Any] = {name: None for name, value in given.items() if value is not None}
    check_stored_code(replace(config, **replaced), trust)
    return config


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
    with console.status("measuring") as status:
        yardstick = run.yardstick(lambda policy: status.update(status_text(f"measuring: {policy}")))
    _learn(run, log, folder)
    draw_learning(log.rows, yardstick.samples.reward, folder / LEARNING_FILE)
    with console.status("measuring") as status:
        evaluations = run.evaluate(lambda policy: status.update(status_text(f"measuring: {policy}")))
    report = run.report(yardstick, evaluations)
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
