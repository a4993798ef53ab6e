"""The course of a run: rows, events, checkpoints, progress."""

from __future__ import annotations

import csv
import json
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from torch.utils.tensorboard.writer import SummaryWriter

from agents.runs.checkpoint import save_checkpoint
from agents.runs.config import RunConfig
from agents.runs.signals import Stopped
from agents.text_dqn.agent import TextDQN
from textgen_env.errors import RunFolderError

CHECKPOINTS = "checkpoints"


class RunLog(BaseCallback):
    """The course of the training: ``metrics.csv``, TensorBoard events, and a progress bar.

    A row is written a hundred times in a run and at its end. It holds steps, seconds of training,
    episodes, mean reward (with its parts, where it has several) and length of the latest episodes,
    and whatever the agent records.
    """

    def __init__(self, folder: Path, config: RunConfig, console: Console) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.steps = 0
        self.seconds = 0.0
        self.episodes = 0
        self._folder = folder
        self._config = config
        self._total = total = config.steps
        self._console = console
        self._next_row = 0
        self._next_checkpoint = config.checkpoint_every
        self._learning = False
        self._signum: int | None = None
        self._logged: Any = None  # what the logger had gathered at the checkpoint
        self._latest: deque[tuple[float, float]] = deque(maxlen=256)
        self._parts: deque[Mapping[str, float]] = deque(maxlen=256)  # of the reward, by name
        self._progress = Progress(
            TextColumn("learning"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, reward of recent texts {task.fields[reward]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=total, reward="–")

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        if self.steps:
            self._write_row()
            self.logger.close()

    def _on_training_start(self) -> None:
        events = TensorBoardOutputFormat(str(self._folder / "tensorboard"))
        self.model.set_logger(Logger(None, [events]))
        self._started = time.perf_counter() - self.seconds
        self._learning = True
        if self._logged is not None:  # events after the checkpoint are written again: hide the first ones
            events.writer.close()
            events.writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self.steps + 1)
            for name, gathered in self._logged.items():
                getattr(self.logger, name).update(gathered)

    def _on_step(self) -> bool:
        infos = [info for info in self.locals["infos"] if "episode" in info]
        ended = [info["episode"] for info in infos]
        self._parts.extend(info["reward_parts"] for info in infos if len(info["reward_parts"]) > 1)
        self.episodes += len(ended)
        self._latest.extend((episode["r"], episode["l"]) for episode in ended)
        self.steps = self.num_timesteps
        self.seconds = time.perf_counter() - self._started
        if self.steps >= self._next_row and self._latest:
            self._next_row = self.steps + self._total // 100
            self._write_row()
        self._progress.update(self._task, completed=min(self.steps, self._total))
        return True

    # --- checkpoints

    def stop_soon(self, signum: int) -> bool:
        """Answer whether the learning will stop by itself at its next step: once, and only while it learns."""
        soon = self._learning and self._signum is None
        self._signum = signum
        return soon

    def _on_rollout_start(self) -> None:
        every, steps = self._config.checkpoint_every, self.num_timesteps
        if steps and every and (steps >= self._next_checkpoint or self._signum is not None):
            self._next_checkpoint = (steps // every + 1) * every
            self._save_checkpoint()
        if self._signum is not None:
            raise Stopped(self._signum)

    def _on_training_end(self) -> None:
        self._learning = False
        if self._config.checkpoint_every:
            self._save_checkpoint()
        if self._signum is not None:
            raise Stopped(self._signum)

    def _save_checkpoint(self) -> None:
        if not isinstance(self.model, TextDQN):
            return
        try:
            extra = {"config": json.loads(self._config.to_json()), "log": self._state()}
            save_checkpoint(self._folder / CHECKPOINTS, self.model, extra)
        except RunFolderError as error:  # the run is worth more than its checkpoint
            self._console.print(f"warning: {error}; the one before is still there")

    def _state(self) -> dict[str, Any]:
        names = ("name_to_value", "name_to_count", "name_to_excluded")
        logged = {name: dict(getattr(self.logger, name)) for name in names}
        logged["name_to_value"] = {
            name: float(value)
            for name, value in logged["name_to_value"].items()
            if isinstance(value, int | float | np.number)
        }
        return {
            "rows": self.rows,
            "steps": self.steps,
            "seconds": self.seconds,
            "episodes": self.episodes,
            "next_row": self._next_row,
            "next_checkpoint": self._next_checkpoint,
            "latest": list(self._latest),
            "parts": [dict(parts) for parts in self._parts],
            "logged": logged,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to where a checkpoint was made."""
        self.rows, self.steps, self.seconds = state["rows"], state["steps"], state["seconds"]
        self.episodes, self._next_row = state["episodes"], state["next_row"]
        self._next_checkpoint = state["next_checkpoint"]
        self._latest.extend((reward, length) for reward, length in state["latest"])
        self._parts.extend(state["parts"])
        self._logged = state["logged"]

    def _write_row(self) -> None:
        row = {"steps": float(self.steps), "seconds": self.seconds, "episodes": float(self.episodes)}
        if self._latest:
            reward, length = np.mean(self._latest, axis=0).tolist()
            row |= {"reward": reward, "length": length}
            for name in self._parts[-1] if self._parts else ():
                row[f"reward_{name}"] = float(np.mean([parts[name] for parts in self._parts]))
                self.logger.record(f"run/reward_{name}", row[f"reward_{name}"])
            self._progress.update(self._task, reward=f"{reward:.2f}")
            self.logger.record("run/reward", reward)
            self.logger.record("run/length", length)
        for name, value in self.logger.name_to_value.items():
            if isinstance(value, int | float | np.number):
                row[name.rpartition("/")[2]] = float(value)
        self.logger.dump(self.steps)
        self.rows.append(row)
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        half_written = self._folder / ".metrics.csv"
        with half_written.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in self.rows)
        half_written.replace(self._folder / "metrics.csv")
