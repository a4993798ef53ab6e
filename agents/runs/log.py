"""The course of a run: table rows, TensorBoard events, checkpoints and progress, one class for each job.

infos of ended texts  ->  RecentTexts  ->  means  ->  MetricsFile (metrics.csv)
RunLog (a callback)   ->  all of these, events, a progress bar, CheckpointSchedule, requested stops
"""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat

from agents.runs.checkpoint import save_checkpoint
from agents.runs.config import RunConfig
from agents.runs.files import CHECKPOINTS, EVENTS, METRICS_FILE
from agents.runs.progress import FirstEstimate, JobProgress, minutes
from agents.runs.signals import Stopped
from agents.runs.tracking import TrackerWriter, sb3_tags
from agents.terminal import say
from agents.text_dqn.agent import TextDQN
from textgen_env.errors import RunFolderError
from textgen_env.extras import is_installed
from textgen_env.files import check_keys, write_file

RECENT = 256
"""Texts that a row's means are about."""

LONG = 60.0
"""Seconds; of a run that takes longer an estimate is said."""

LOG_KEYS = ("rows", "steps", "seconds", "next_row", "next_checkpoint", "logged", "episodes", "latest", "parts")
"""Of a log, in a checkpoint."""

LOGGER_DICTS = ("name_to_value", "name_to_count", "name_to_excluded")
"""Where SB3's logger gathers values between two dumps."""


class RecentTexts:
    """Rewards, lengths and reward parts of the latest texts."""

    def __init__(self) -> None:
        self.episodes = 0  # ended since the start
        self._texts: deque[tuple[float, float]] = deque(maxlen=RECENT)  # reward, length
        self._parts: deque[Mapping[str, float]] = deque(maxlen=RECENT)  # of the reward, by name

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, infos: Sequence[Mapping[str, Any]]) -> None:
        """Take in the texts that have ended, given the infos of all rows."""
        ended = [info for info in infos if "episode" in info]
        self.episodes += len(ended)
        self._texts.extend((info["episode"]["r"], info["episode"]["l"]) for info in ended)
        self._parts.extend(info["reward_parts"] for info in ended if len(info["reward_parts"]) > 1)

    def means(self) -> dict[str, float]:
        """Return ``reward``, ``length`` and, where the reward has several parts, ``reward_NAME`` of each."""
        if not self._texts:
            return {}
        reward, length = np.mean(self._texts, axis=0).tolist()
        names = self._parts[-1] if self._parts else ()
        parts = {f"reward_{name}": float(np.mean([parts[name] for parts in self._parts])) for name in names}
        return {"reward": reward, "length": length, **parts}

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "episodes": self.episodes,
            "latest": list(self._texts),
            "parts": [dict(parts) for parts in self._parts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of ``state_dict``."""
        self.episodes = state["episodes"]
        self._texts.extend((reward, length) for reward, length in state["latest"])
        self._parts.extend(state["parts"])


class MetricsFile:
    """The rows of ``metrics.csv``. A column appears with the first row that has it."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, float]] = []
        self._path = path

    def append(self, row: dict[str, float]) -> None:
        """Add a row, and write the file anew."""
        self.rows.append(row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in self.rows for name in row)))
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in self.rows)
        write_file(self._path, text.getvalue())


class CheckpointSchedule:
    """When the next checkpoint is due: every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every  # 0: never
        self.next = every

    def take_due(self, steps: int, stopping: bool) -> bool:
        """Return True if a checkpoint is due, and plan the next one."""
        due = bool(steps and self.every) and (steps >= self.next or stopping)
        if due:
            self.next = (steps // self.every + 1) * self.every
        return due


class RunLog(BaseCallback):
    """Follow a training: ``metrics.csv``, TensorBoard events, checkpoints, and a progress bar.

    A row is written a hundred times in a run and at its end. It holds steps, seconds of training,
    episodes, mean reward (with its parts, where it has several) and length of the latest episodes,
    and every figure that the agent records. Events and a tracker (``track``: ``"wandb"``, ``"trackio"``)
    also get the figures under SB3's own tags, and those of the final measurement: they are open until the log is
    left, and the agent learns within ``learning``.
    """

    def __init__(self, folder: Path, config: RunConfig, console: Console, track: str | None = None) -> None:
        super().__init__()
        self.steps = 0
        self.seconds = 0.0
        self.tokens_to_measure = 0  # that the agent writes after it has learned, about
        self._folder = folder
        self._config = config
        self._console = console
        self._track = track
        self._metrics = MetricsFile(folder / METRICS_FILE)
        self._texts = RecentTexts()
        self._schedule = CheckpointSchedule(config.checkpoint_every)
        self._next_row = 0
        self._learning = False
        self._is_open = False  # events and tracker
        self._signum: int | None = None  # of a stop that was requested
        self._gathered: Mapping[str, Any] | None = None  # by the logger, at the checkpoint that the run goes on from
        self._progress = JobProgress(console, "steps")
        self._recent = ""  # reward of recent texts, as it is shown
        self._exits = ExitStack()

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv`` so far."""
        return self._metrics.rows

    @property
    def episodes(self) -> int:
        """Texts that have ended."""
        return self._texts.episodes

    def __enter__(self) -> RunLog:
        self._exits.enter_context(quiet_event_threads())
        return self

    def __exit__(self, *exception: object) -> None:
        with self._exits:
            if self._is_open:
                self._close_events()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within, there is a progress bar; a last row is written behind it."""
        try:
            with self._progress:
                yield
        finally:
            if self._is_open and self.steps:
                self._write_row()

    def record_evaluation(self, tags: Mapping[str, float]) -> None:
        """Send the figures of a measurement, by tag, to events and tracker."""
        for tag, value in tags.items():
            self.logger.record(tag, value)
        with self._writing_events():
            self.logger.dump(self.steps)

    def _close_events(self) -> None:
        with self._writing_events():
            self.logger.close()

    # --- SB3's hooks

    def _on_training_start(self) -> None:
        self.model.set_logger(Logger(None, [*self._event_writers(), *self._tracker()]))
        self._is_open = True
        self._started = time.perf_counter() - self.seconds
        self._writing = 0.0, 0  # seconds without updates, and the steps in them
        self._learning = True
        envs, starts = self.training_env.num_envs, getattr(self.model, "learning_starts", 0)
        begin = max(starts and starts + envs * self._config.env_config().max_new_tokens, self.num_timesteps)
        rollout = getattr(self.model, "n_steps", 0) * envs  # of an actor-critic, which then learns from it
        self._estimate = FirstEstimate(begin, begin + rollout + 1)
        if self._gathered is not None:
            for name, gathered in self._gathered.items():
                getattr(self.logger, name).update(gathered)

    def _event_writers(self) -> list[KVWriter]:
        """Return the writer of TensorBoard events, or none if TensorBoard is not installed."""
        if not is_installed("tensorboard"):
            message = "no events for TensorBoard: pip install 'textgen-env[tensorboard]'"
            say(self._console, message)
            return []
        events = TensorBoardOutputFormat(str(self._folder / EVENTS))
        if self._gathered is not None:  # events after the checkpoint are written again: hide the first ones
            from torch.utils.tensorboard.writer import SummaryWriter

            events.writer.close()
            events.writer = SummaryWriter(str(self._folder / EVENTS), purge_step=self.steps + 1)
        return [events]

    def _tracker(self) -> list[KVWriter]:
        if self._track in (None, EVENTS):  # events are written in any case
            return []
        return [TrackerWriter(str(self._track), self._folder.resolve().name, json.loads(self._config.to_json()))]

    def _on_step(self) -> bool:
        self._texts.add(self.locals["infos"])
        self.steps = self.num_timesteps
        self.seconds = time.perf_counter() - self._started
        if self.steps >= self._next_row and len(self._texts):
            self._next_row = self.steps + self._config.steps // 100
            self._write_row()
        self._say_estimate()
        self._progress("learning", self.steps, self._config.steps, self._recent)
        return True

    def _say_estimate(self) -> None:
        """Say once how long the rest of the run takes, as soon as that is known."""
        learning = self._estimate.left(self.seconds, self.steps, self._config.steps)
        if learning is None:
            return
        writing, written = self._writing
        measuring = self.tokens_to_measure * writing / max(1, written)
        if learning + measuring >= LONG:
            parts = f"learning {minutes(learning)}, measuring the agent {minutes(measuring)}"
            say(self._console, f"about {minutes(learning + measuring)} from here: {parts}")

    def _on_rollout_end(self) -> None:
        seconds, steps = self._writing
        now = time.perf_counter() - self._started
        self._writing = seconds + now - self._rollout[0], steps + self.num_timesteps - self._rollout[1]

    def _on_rollout_start(self) -> None:
        self._rollout = time.perf_counter() - self._started, self.num_timesteps
        if self._schedule.take_due(self.num_timesteps, stopping=self._signum is not None):
            self._save_checkpoint()
        if self._signum is not None:
            raise Stopped(self._signum)

    def _on_training_end(self) -> None:
        self._learning = False
        if self._schedule.every:
            self._save_checkpoint()
        if self._signum is not None:
            raise Stopped(self._signum)

    # --- stops

    def request_stop(self, signum: int) -> bool:
        """Return True if the training will stop by itself at its next step: once, and only while it learns."""
        soon = self._learning and self._signum is None
        self._signum = signum
        return soon

    # --- checkpoints

    def _save_checkpoint(self) -> None:
        if not isinstance(self.model, TextDQN):
            return
        try:
            extra = {"config": json.loads(self._config.to_json()), "log": self._state_dict()}
            save_checkpoint(self._folder / CHECKPOINTS, self.model, extra)
        except RunFolderError as error:  # the run is worth more than its checkpoint
            say(self._console, f"warning: {error}; the one before is still there")

    def _state_dict(self) -> dict[str, Any]:
        logged = {name: dict(getattr(self.logger, name)) for name in LOGGER_DICTS}
        logged["name_to_value"] = _numbers(logged["name_to_value"])
        return {
            "rows": self.rows,
            "steps": self.steps,
            "seconds": self.seconds,
            "next_row": self._next_row,
            "next_checkpoint": self._schedule.next,
            "logged": logged,
            **self._texts.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to the point where a checkpoint was made.

        Raises:
            RunFolderError: ``state`` is not the log of a checkpoint.
        """
        check_keys(state, LOG_KEYS, "the log in the checkpoint")
        try:
            self._restore(state)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise RunFolderError(f"the log in the checkpoint is damaged: {error}") from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.steps, self.seconds = int(state["steps"]), float(state["seconds"])
        self._metrics.rows[:] = [{name: float(value) for name, value in row.items()} for row in state["rows"]]
        self._next_row, self._schedule.next = int(state["next_row"]), int(state["next_checkpoint"])
        self._texts.load_state_dict(state)
        self._gathered = {name: dict(state["logged"][name]) for name in LOGGER_DICTS}

    # --- rows

    def _write_row(self) -> None:
        means = self._texts.means()
        for name, value in means.items():
            self.logger.record(f"run/{name}", value)
        if means:
            self._recent = f", reward of recent texts {means['reward']:.2f}"
        row = {"steps": float(self.steps), "seconds": self.seconds, "episodes": float(self.episodes), **means}
        for name, value in _numbers(self.logger.name_to_value).items():
            row[name.rpartition("/")[2]] = value
        for name, value in sb3_tags(means, self.steps, self.seconds, self.episodes).items():
            self.logger.record(name, value)
        with self._writing_events():
            self.logger.dump(self.steps)
        self._metrics.append(row)

    @contextmanager
    def _writing_events(self) -> Iterator[None]:
        """Turn what TensorBoard's writer raises on a full disk into ``RunFolderError``."""
        try:
            yield
        except OSError as error:
            raise RunFolderError(f"cannot write events to {str(self._folder / EVENTS)!r}: {error}") from error


@contextmanager
def quiet_event_threads() -> Iterator[None]:
    """Within, no traceback of TensorBoard's threads on a full disk: its writer raises the error again."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float | np.number)}
