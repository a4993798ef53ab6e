"""One run: a configuration in, a folder with everything that came of it out.

    RunConfig -> language model (pruned) -> environment -> agent.learn() -> evaluation -> folder

    config.json    what was asked for: enough to repeat the run
    agent.zip      the agent, as Stable-Baselines3 saves it
    metrics.csv    the course of the training; also as TensorBoard events in tensorboard/
    learning.png   the same as a picture
    summary.json   every figure of the table
    plane.png      reward against KL: the agent, what needs no learning, the best possible
    samples.md     texts before and after
    checkpoints/   while the run goes on: what it takes to resume it

Learning and measuring use different prompts, split by template.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from torch.utils.tensorboard.writer import SummaryWriter

from agents.checkpoint import Stopped, load_checkpoint, newest_checkpoint, save_checkpoint, stop_signals
from agents.report import Report, Yardstick, draw_learning, draw_plane, evaluate_agent, samples_page
from agents.sb3_vec import SB3VecEnv
from agents.text_dqn import TextDQN
from agents.zoo import AGENTS, MASKED, OBSERVATION, Budget, acts_greedily, make_agent
from textgen_env.config import EnvConfig, check_at_least, check_type
from textgen_env.errors import ConfigError, PromptError, RunFolderError
from textgen_env.evaluation import Evaluation, choose_prompts
from textgen_env.language_model import LanguageModel
from textgen_env.models import load_language_model, load_pretrained
from textgen_env.prompts import ListPrompts, PromptSource, make_prompts
from textgen_env.registry import unknown_name
from textgen_env.rewards import make_reward, reward_spec
from textgen_env.vector_env import TextGenVectorEnv

ENV_SETTINGS: Mapping[str, Any] = {
    "top_k": 16,
    "max_new_tokens": 20,
    "min_new_tokens": 20,
    "observation": OBSERVATION,
}
"""Settings of a run's environment unless said: texts of 20 tokens."""

FEWEST_TO_SPLIT = 20
"""With fewer prompts, there would be no saying anything about the test prompts."""

CONFIG_FILE = "config.json"
AGENT_FILE = "agent.zip"
SUMMARY_FILE = "summary.json"

CHECKPOINTS = "checkpoints"

PORTABLE_AGENTS = ("text_dqn",)
"""Agents stored without pickles: their files run no code when they are read, and their training can be resumed."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on, as plain data. The defaults are those of ``textgen train``.

    Raises:
        ConfigError: a value outside its range, or an unknown name.
    """

    agent: str = "text_dqn"  # a name in AGENTS
    agent_settings: Mapping[str, Any] = field(default_factory=dict)  # keywords of the agent's class
    model: str | None = "tiny"  # see textgen_env.models.load_language_model; None: an object
    prune: str | None = None  # METHOD:AMOUNT, applied to the language model once
    prompts: Any = None  # see textgen_env.prompts.make_prompts; None: the openings in the box, or an object
    reward: Any = "sentiment"  # see textgen_env.rewards.make_reward; None: an object
    env: Mapping[str, Any] = field(default_factory=dict)  # fields of EnvConfig; those of ENV_SETTINGS are added
    steps: int = 70_000  # environment steps to learn from: one token each
    checkpoint_every: int = 20_000  # steps from one checkpoint to the next, and one at the end; 0: none
    envs: int = 64  # texts written at a time
    seed: int = 0
    beta: float = 0.1  # price of KL, reward units a nat, in the agent's objective and in the report
    eval_prompts: int = 32  # at most; held out where there are enough
    eval_texts: int = 512  # for each agent measured
    eval_samples: int = 64  # of the language model, for each prompt, to estimate the best possible policy
    objects: tuple[str, ...] = ()  # of model, prompts and reward: those that were given as Python objects

    def __post_init__(self) -> None:
        check_type("agent", self.agent, str)
        AGENTS[self.agent]
        for name in ("steps", "envs", "eval_prompts", "eval_texts"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("checkpoint_every", self.checkpoint_every, 0)
        check_at_least("eval_samples", self.eval_samples, 2)
        check_at_least("seed", self.seed, 0)
        check_type("beta", self.beta, int, float)
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta must be above 0 (reward units a nat) and finite, got {self.beta!r}")
        for name in ("model", "prune"):
            check_type(name, getattr(self, name), str, type(None))
        for name in ("agent_settings", "env"):
            check_type(name, getattr(self, name), Mapping)
        if "tensorboard_log" in self.agent_settings:  # any folder of the machine
            raise ConfigError("agent_settings cannot have tensorboard_log: the run's events are in its own folder")
        check_type("objects", self.objects, list, tuple)
        if self.prune is not None:
            from agents.transformer_model import parse_pruning

            parse_pruning(self.prune)
        object.__setattr__(self, "objects", tuple(self.objects))
        env = {**ENV_SETTINGS, **self.env}  # kept whole: a stored run outlives these defaults
        object.__setattr__(self, "env", {k: list(v) if isinstance(v, tuple) else v for k, v in env.items()})
        self.env_config()

    def env_config(self) -> EnvConfig:
        """Return the environment's settings, checked."""
        maps_illegal = {} if self.agent in MASKED else {"on_illegal": "last_legal"}  # the others know no mask
        return EnvConfig.from_settings({**maps_illegal, **self.env})

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, trust: bool = False) -> RunConfig:
        """Return what ``to_json`` wrote.

        Args:
            trust: Also take a file that lets a hub repository's code run.

        Raises:
            ConfigError: not JSON, not an object, a field that does not exist (with a suggestion), or
                ``trust_remote_code`` without ``trust``.
        """
        try:
            read = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"a run's configuration must be JSON: {error}") from error
        if not isinstance(read, dict):
            raise ConfigError(f"a run's configuration must be a JSON object, got {type(read).__name__}")
        known = [f.name for f in fields(cls)]
        for name in read:
            if name not in known:
                raise unknown_name("field", name, known)
        config = cls(**read)
        if config.env_config().trust_remote_code and not trust:
            raise ConfigError(
                "the file asks to run code that a hub repository ships (trust_remote_code): load only what you trust, "
                "with --trust where a command has it, or with trust=True in Python"
            )
        return config


# --- what a run is made of


@dataclass(frozen=True)
class Run:
    """A configuration with everything that it names, opened."""

    config: RunConfig
    env: TextGenVectorEnv  # what the agent learns in, on the training prompts
    agent: BaseAlgorithm
    test_prompts: PromptSource
    notes: tuple[str, ...]  # what a reader of the results has to know
    given: Mapping[str, Any]  # Python objects in place of what the configuration names

    def yardstick(self, say: Callable[[str], None]) -> Yardstick:
        """Measure what needs no learning on the test prompts."""
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

    @property
    def agent_name(self) -> str:
        return f"{self.config.agent}, trained"

    @property
    def greedy(self) -> bool:
        """Whether the agent is a Q-learner without a distribution: what it draws is exploration."""
        return acts_greedily(self.config.agent, self.agent)


def open_run(
    config: RunConfig, *, model: Any = None, prompts: Any = None, reward: Any = None, load: Path | None = None
) -> Run:
    """Return the run that ``config`` describes, its agent untrained, or as saved in ``load``.

    Args:
        model, prompts, reward: Python objects in place of what the configuration names.

    Raises:
        TextGenError: something that cannot be used, or an object that is missing; the message says what can.
    """
    given = {"model": model, "prompts": prompts, "reward": reward}
    missing = [name for name in config.objects if given[name] is None and getattr(config, name) is None]
    if missing:
        raise ConfigError(
            f"the run was made with Python objects that JSON cannot hold: {', '.join(missing)}. Give them again, in "
            f"Python: load_run(folder, {', '.join(f'{name}=...' for name in missing)})"
        )
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


def load_run(
    folder: str | os.PathLike[str], *, model: Any = None, prompts: Any = None, reward: Any = None, trust: bool = False
) -> Run:
    """Return the run in ``folder``, with its trained agent.

    Args:
        model, prompts, reward: The Python objects that the run was made with, if it was.
        trust: Also load agents that Stable-Baselines3 unpickles, which runs whatever code the file holds.

    Raises:
        RunFolderError: the folder holds no run, or no trained agent.
        ConfigError: the agent would be unpickled, without ``trust``.
        TextGenError: what ``open_run`` raises.
    """
    path = Path(folder)
    config = _stored_config(path, trust)
    if not (path / AGENT_FILE).is_file():
        what = "the run was stopped before it had learned anything"
        if newest_checkpoint(path / CHECKPOINTS) is not None:
            what = f"the run was cut off; go on with textgen train --resume {path}"
        raise RunFolderError(f"{str(path)!r} holds no {AGENT_FILE}: {what}")
    if config.agent not in PORTABLE_AGENTS and not trust:
        raise ConfigError(
            f"{str(path / AGENT_FILE)!r} holds a {config.agent!r}, which Stable-Baselines3 unpickles, and that runs "
            "whatever code the file holds: load only what you trust, with --trust, or trust=True in Python"
        )
    return open_run(config, model=model, prompts=prompts, reward=reward, load=path / AGENT_FILE)


def open_language_model(config: RunConfig) -> tuple[LanguageModel, str | None]:
    """Return the configuration's language model, pruned once if it says so, and a line about that."""
    env = config.env_config()
    if config.prune is None:
        return load_language_model(config.model, env.dtype, trust_remote_code=env.trust_remote_code), None
    from agents.transformer_model import parse_pruning, prune_
    from textgen_env.device import pick_device
    from textgen_env.hf_model import HFModel

    model, tokenizer = load_pretrained(str(config.model), env.dtype, env.trust_remote_code)
    reports = []
    for method, amount in parse_pruning(config.prune):
        model, report = prune_(model, method, amount, tokenizer=tokenizer, seed=config.seed)
        reports.append(str(report))
    model.to(pick_device())  # type: ignore[arg-type]  # transformers types it for itself
    pruned = HFModel(model, tokenizer, name=f"{config.model}, {config.prune}")
    return pruned, f"Language model {config.model}: {'; '.join(reports)}."


def open_env(
    config: RunConfig, model: LanguageModel, prompts: PromptSource, reward: Any, observation: Any = None
) -> TextGenVectorEnv:
    """Return a vector environment of the run, on a language model that is loaded already."""
    settings = {f.name: getattr(config.env_config(), f.name) for f in fields(EnvConfig)}
    if observation is not None:
        settings["observation"] = observation
    return TextGenVectorEnv(config.envs, model, prompts, reward, **settings)


def split_prompts(spec: Any, most: int, seed: int) -> tuple[PromptSource, PromptSource, str]:
    """Return the prompts to learn from, at most ``most`` others to measure on, and a line that says which."""
    source = make_prompts(spec)
    try:
        count = len(source)
    except PromptError:  # a function's prompts never end
        fixed = ListPrompts([source[index] for index in range(most)])
        return source, fixed, f"Prompts: made by a function; measured on {most} fixed ones."
    too_few = f"Prompts: {count}, too few to hold some back, so learning and measuring use the same."
    if count < FEWEST_TO_SPLIT:
        return source, choose_prompts(source, most, seed), too_few
    try:
        train, test = source.split("train"), choose_prompts(source.split("test"), most, seed)
    except PromptError:  # too few templates
        return source, choose_prompts(source, most, seed), too_few
    return train, test, f"Prompts: {len(train)} to learn from, {len(test)} others, of other templates, to measure on."


# --- a run from start to end

Engine = Callable[[Run, Callable[[str], None]], AbstractContextManager[Any]]
"""What collects the texts that the agent of a run learns from; told where to say what a user should know."""


def local(run: Run, say: Callable[[str], None]) -> AbstractContextManager[Any]:
    """The engine that is this process alone."""
    return nullcontext()


@dataclass(frozen=True)
class RunResult:
    """What became of a run."""

    folder: Path
    finished: bool  # False: stopped by a signal
    steps: int
    seconds: float  # of training
    report: Report | None  # None where the run was stopped before the agent was measured
    signum: int | None = None  # what stopped it: SIGINT is Ctrl-C


def train(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    model: Any = None,
    prompts: Any = None,
    reward: Any = None,
    engine: Engine = local,
    console: Console | None = None,
) -> RunResult:
    """Train an agent, measure it, and leave everything in the folder ``out``.

    Ctrl-C and SIGTERM end the run: what there is by then is saved, and the result says so. ``resume``
    goes on with it.

    Args:
        config: What to do.
        out: A folder that does not exist yet, or is empty.
        model, prompts, reward: Python objects in place of what the configuration names.
        engine: What collects the texts to learn from: this process, or ``agents.distributed.RayEngine``.
        console: Shows progress. None: silence.

    Raises:
        RunFolderError: ``out`` holds something already; nothing is ever overwritten.
        TextGenError: something that cannot be used. Nothing was written.
    """
    folder, console = Path(out), console or Console(quiet=True)
    check_free(folder)
    with console.status("loading the language model"):
        run = open_run(config, model=model, prompts=prompts, reward=reward)
    with engine(run, partial(console.print, markup=False)):
        folder.mkdir(parents=True, exist_ok=True)
        stored = _storable(config, model=model, prompts=prompts, reward=reward)
        with (folder / CONFIG_FILE).open("x", encoding="utf-8") as file:
            file.write(stored.to_json())
        return _carry_out(run, stored, folder, console)


def resume(
    folder: str | os.PathLike[str],
    *,
    model: Any = None,
    prompts: Any = None,
    reward: Any = None,
    trust: bool = False,
    engine: Engine = local,
    console: Console | None = None,
) -> RunResult:
    """Go on with a run that was stopped or killed, from its last checkpoint.

    It ends with the weights and metrics of a run that passed the same checkpoints and was never
    stopped: bit for bit on the same machine with the same number of threads, on a CPU.

    Args:
        folder: Of the run.
        model, prompts, reward: The Python objects that the run was made with, if it was.
        trust: Also go on with a run whose configuration lets a hub repository's code run.
        engine: As of ``train``; need not be the one that the run began with.
        console: Shows progress. None: silence.

    Raises:
        RunFolderError: no run, a finished one, or one without a checkpoint.
        ConfigError: an agent that cannot be resumed, or a configuration that was changed.
        TextGenError: what ``train`` raises.
    """
    path, console = Path(folder), console or Console(quiet=True)
    config = _stored_config(path, trust)
    if config.agent not in PORTABLE_AGENTS:
        raise ConfigError(
            f"agent {config.agent!r} keeps no checkpoints, since Stable-Baselines3 does not say all that it is made "
            f"of: only {', '.join(PORTABLE_AGENTS)} can be resumed; start again in another folder"
        )
    if (path / SUMMARY_FILE).is_file() and json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))["finished"]:
        raise RunFolderError(f"{str(path)!r} holds a finished run: there is nothing to resume")
    checkpoint = newest_checkpoint(path / CHECKPOINTS)
    if checkpoint is None:
        raise RunFolderError(
            f"{str(path)!r} holds no checkpoint: it was stopped before the first. Start it again with textgen train "
            f"--config {path / CONFIG_FILE} --out another folder"
        )
    with console.status("loading the language model"):
        run = open_run(config, model=model, prompts=prompts, reward=reward)
    assert isinstance(run.agent, TextDQN)
    extra = load_checkpoint(checkpoint, run.agent)
    _check_unchanged(extra["config"], config)
    with engine(run, partial(console.print, markup=False)):
        return _carry_out(run, config, path, console, extra["log"])


def _stored_config(path: Path, trust: bool = False) -> RunConfig:
    if not (path / CONFIG_FILE).is_file():
        raise RunFolderError(f"{str(path)!r} holds no {CONFIG_FILE}: not a folder that 'textgen train' made")
    return RunConfig.from_json((path / CONFIG_FILE).read_text(encoding="utf-8"), trust)


def _carry_out(
    run: Run, stored: RunConfig, folder: Path, console: Console, logged: Mapping[str, Any] | None = None
) -> RunResult:
    """Measure, learn, measure, from the start or from where a checkpoint had ``logged``."""
    for note in run.notes:
        console.print(note)
    log = RunLog(folder, stored, console)
    if logged is not None:
        log.restore(logged)
        console.print(f"going on after {log.steps:,} steps")
    report: Report | None = None
    signum: int | None = None
    try:
        with stop_signals(log.stop_soon):
            with console.status("measuring") as status:
                yardstick = run.yardstick(lambda what: status.update(f"measuring: {what}"))
            _learn(run, log, folder)
            draw_learning(log.rows, yardstick.samples.reward, folder / "learning.png")
            with console.status("measuring") as status:
                evaluations = run.evaluate(lambda what: status.update(f"measuring: {what}"))
            report = yardstick.report(run.agent_name, evaluations, run.notes)
            draw_plane(report, folder / "plane.png")
            page = samples_page(yardstick.samples, evaluations[0], run.notes)
            (folder / "samples.md").write_text(page, encoding="utf-8")
    except KeyboardInterrupt as stop:
        stopped = stop if isinstance(stop, Stopped) else Stopped()
        signum = stopped.signum
        console.print(f"stopped by {stopped.name} after {log.steps:,} steps")
        if newest_checkpoint(folder / CHECKPOINTS) is not None:
            console.print(f"go on with: textgen train --resume {folder}", soft_wrap=True, markup=False)
    finally:
        write_summary(folder / SUMMARY_FILE, log, report)
    if report is not None:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return RunResult(folder, report is not None, log.steps, log.seconds, report, signum)


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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{str(folder)!r} exists and is not an empty folder; choose another one")


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


def _learn(run: Run, log: RunLog, folder: Path) -> None:
    """Train the agent, and save it whatever happens."""
    agent, done = run.agent, run.agent.num_timesteps
    try:
        with log:
            agent.learn(run.config.steps - done, log, log_interval=sys.maxsize, reset_num_timesteps=not done)
    finally:
        half_written = folder / f".{AGENT_FILE}"
        agent.save(half_written)
        half_written.replace(folder / AGENT_FILE)


def write_summary(path: Path, log: RunLog, report: Report | None) -> None:
    """Write what became of the run, and with which versions."""
    packages = ("textgen-env", "torch", "transformers", "stable-baselines3", "gymnasium", "numpy")
    summary = {
        "finished": report is not None,
        "steps": log.steps,
        "episodes": log.episodes,
        "seconds_of_training": log.seconds,
        "report": None if report is None else report.as_dict(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _storable(config: RunConfig, **given: Any) -> RunConfig:
    """Return ``config`` with what was given as objects: as plain data where there is any, else by mention."""
    objects = {name: value for name, value in given.items() if value is not None}
    if "reward" in objects and (spec := reward_spec(make_reward(objects["reward"]))) is not None:
        del objects["reward"]
        config = replace(config, reward=spec)
    changes: dict[str, Any] = dict.fromkeys(objects)
    if "model" in objects:
        changes["prune"] = None
    return replace(config, **changes, objects=tuple(objects))
