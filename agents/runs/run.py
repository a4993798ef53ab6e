"""One run, from a configuration to a folder of results.

    RunConfig -> language model (pruned) -> environment -> agent.learn() -> evaluation -> folder

``agents.runs.files`` says what is in the folder. Learning and measuring use different prompts, split by template.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from agents.runs.checkpoint import load_checkpoint, newest_checkpoint
from agents.runs.config import RunConfig
from agents.runs.files import (
    AGENT_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    EVENTS,
    LEARNING_FILE,
    PLANE_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
)
from agents.runs.log import RunLog
from agents.runs.opening import PORTABLE_AGENTS, Run, load_run, load_writer, open_run
from agents.runs.parts import VALIDATION_PROMPTS, open_env, some_prompts
from agents.runs.pictures import draw_learning, draw_plane
from agents.runs.progress import JobProgress
from agents.runs.report import Report
from agents.runs.samples import samples_page
from agents.runs.signals import Stopped, stop_signals
from agents.runs.sizing import measured_sizes, new_agent, work_of
from agents.runs.stored import (
    check_stored_code,
    check_unchanged,
    located,
    no_folder_of_a_failed_start,
    no_new_folders_of_a_failed_start,
    store,
    stored_config,
    with_present_code,
    write_summary,
)
from agents.runs.tracking import check_tracker, evaluation_tags
from agents.terminal import say
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.validation import LANGUAGE_MODEL
from agents.user_code import remember
from textgen_env.errors import ConfigError, RunFolderError, TextGenError
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

__all__ = [
    "Run",
    "RunConfig",
    "RunResult",
    "TextSource",
    "load_run",
    "load_writer",
    "local",
    "open_run",
    "resume",
    "train",
]

VALIDATED = 32
"""Texts at each temperature that an agent may choose to act at."""


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
    partner: Any = None,
    text_source: TextSource = local,
    console: Console | None = None,
    minutes: float | None = None,
    track: str | None = None,
) -> RunResult:
    """Train an agent, measure it, and leave everything in the folder ``out``.

    Ctrl-C, SIGTERM and SIGHUP end the run: its state by then is saved, and the result says so. ``resume``
    goes on with it.

    Args:
        config: The settings.
        out: A folder that does not exist yet, or is empty.
        model, prompts, reward, partner: Python objects in place of those that the configuration names.
        text_source: This process, or ``agents.distributed.actors.RayTextSource``.
        console: Shows progress. None: silence.
        minutes: How long the whole should take: steps, texts and samples are chosen by the speed of this machine.
        track: ``"wandb"`` or ``"trackio"``, which also get the figures; ``"tensorboard"``, whose events are in the
            folder, must be installed then. None: events if it is installed.

    Raises:
        RunFolderError: ``out`` holds something already (nothing is ever overwritten), or cannot be written to.
        TextGenError: something that cannot be used. Nothing was written.
    """
    folder, console = Path(out), console or Console(quiet=True)
    check_tracker(track)
    check_free(folder)
    started = time.perf_counter()
    with console.status("loading the language model"):
        run = open_run(config, model=model, prompts=prompts, reward=reward, partner=partner)
    if minutes is not None:
        with console.status("timing a few steps"):
            run, estimate = sized(run, minutes, started)
        config = run.config
        say(console, estimate)
    with text_source(run, partial(say, console)), no_new_folders_of_a_failed_start(folder), locked(folder):
        check_free(folder)  # loading took a while
        with no_folder_of_a_failed_start(folder):
            stored = store(config, folder, model=model, prompts=prompts, reward=reward, partner=partner)
            remember(config.references)
            return _carry_out(run, stored, folder, console, track=track)


def resume(
    folder: str | os.PathLike[str],
    *,
    model: Any = None,
    prompts: Any = None,
    reward: Any = None,
    partner: Any = None,
    accept: Sequence[str] = (),
    trust: bool = False,
    text_source: TextSource = local,
    console: Console | None = None,
    track: str | None = None,
) -> RunResult:
    """Go on with a run that was stopped or killed, from its last checkpoint, or from the start before there is one.

    It ends with the weights and metrics of a run that passed the same checkpoints and was never
    stopped: bit for bit on the same machine with the same number of threads, on a CPU.

    Args:
        folder: Of the run.
        model, prompts, reward, partner: The Python objects that the run was made with, if it was; or in place of
            code that it names.
        accept: References to code that the run names, ``FILE.py:NAME`` from here: accepted as it is now, which
            ``config.json`` then holds.
        trust: Also go on with a run whose configuration lets a hub repository's code run.
        text_source: As of ``train``; may differ from that of the first start.
        console: Shows progress. None: silence.
        track: As of ``train``. A tracker gets a run of its own for each start.

    Raises:
        RunFolderError: no run, a finished one, one that another process works on, or one with links in it.
        ConfigError: an agent that cannot be resumed, or a configuration that was changed.
        TextGenError: as of ``train``.
    """
    check_tracker(track)
    path, console = Path(folder), console or Console(quiet=True)
    given = {"model": model, "prompts": prompts, "reward": reward, "partner": partner}
    config = _with_accepted_code(path, trust, given, accept)
    _check_resumable(path, config)
    with locked(path):
        refuse_links(path)
        with console.status("loading the language model"):
            run = open_run(located(config, path), **given)
        if accept:
            write_file(path / CONFIG_FILE, config.to_json())
        log = _return_to_checkpoint(run, config, path)
        if log is None:
            say(console, "stopped before the first checkpoint: the run begins again")
            shutil.rmtree(path / EVENTS, ignore_errors=True)
        with text_source(run, partial(say, console)):
            return _carry_out(run, config, path, console, log, track)


def _with_accepted_code(path: Path, trust: bool, given: Mapping[str, Any], accept: Sequence[str]) -> RunConfig:
    """Return the configuration of a run that may run here: its own code was accepted, or is as it was."""
    config = with_present_code(stored_config(path, trust, check=False), path, accept)
    remember(accept)
    without = [name for name, value in given.items() if value is not None]
    check_stored_code(located(config, path), trust, without=without)
    return config


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


def sized(run: Run, minutes: float, started: float) -> tuple[Run, str]:
    """Return ``run`` with sizes for so many minutes since ``started``, and a line that says how long its parts take.

    Raises:
        ConfigError: too few minutes for the smallest run.
    """
    config, episodes = run.config, run.env.episodes
    trial = open_env(config, run.env.language_model, episodes.prompts, episodes.reward, partner=episodes.partner)
    sizes = measured_sizes(
        config, trial, run.scoring_env(), work_of(config, run.env, run.test_prompts), minutes, started
    )
    chosen = sizes.of(config)
    return replace(
        run, config=chosen, agent=new_agent(chosen, run.env), notes=(*run.notes, sizes.note(minutes))
    ), sizes.estimate()


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
    run: Run,
    stored: RunConfig,
    folder: Path,
    console: Console,
    logged: Mapping[str, Any] | None = None,
    track: str | None = None,
) -> RunResult:
    """Measure, learn, measure, from the start or from the checkpoint that holds ``logged``."""
    say(console, *run.notes)
    log = RunLog(folder, stored, console, track)
    if logged is not None:
        log.restore(logged)
        say(console, f"going on after {log.steps:,} steps")
    report: Report | None = None
    signum: int | None = None
    try:
        with stop_signals(log.request_stop), log:
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
    work = work_of(run.config, run.env, run.test_prompts)
    log.tokens_to_measure = work.agent_texts() * work.tokens
    run = _learned(run, log, folder)
    draw_learning(log.rows, yardstick.samples.reward, folder / LEARNING_FILE)
    with JobProgress(console, "texts") as progress:
        evaluations = run.evaluate(progress.measuring)
    report = run.report(yardstick, evaluations)
    log.record_evaluation(evaluation_tags(report))
    draw_plane(report, folder / PLANE_FILE)
    write_file(folder / SAMPLES_FILE, samples_page(yardstick.samples, evaluations[0], run.notes))
    return report


def _learned(run: Run, log: RunLog, folder: Path) -> Run:
    """Train the agent, and let it choose its temperature. It is saved even if the training is stopped or fails."""
    agent, config, done = run.agent, run.config, run.agent.num_timesteps
    try:
        with log.learning():
            agent.learn(config.steps - done, log, log_interval=sys.maxsize, reset_num_timesteps=not done)
        if isinstance(agent, TextDQN):
            some = list(some_prompts(run.env.episodes.prompts, VALIDATION_PROMPTS, config.seed))
            chosen = agent.choose_beta(run.env, min(VALIDATED, config.eval_texts), config.seed, some)
            note = (
                f"Acts as {chosen}; J = E[R] - {agent.target_beta:g} KL. Another beta than that of the training must "
                "be better by three standard errors."
            )
            if chosen.beta == LANGUAGE_MODEL:
                note += f" {config.steps:,} steps have not taught it to be better: give it more, or a lower beta."
            run = replace(run, notes=(*run.notes, note))
        return run
    finally:
        with whole_file(folder / AGENT_FILE, (RuntimeError,)) as half_made, half_made.open("wb") as file:
            agent.save(file)
