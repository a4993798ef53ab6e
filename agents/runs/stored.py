"""A configuration in a file: its paths, its prompts and the user's own code.

    cwd  ->  portable(config, RUN)  ->  RUN/config.json  ->  read_config  ->  located(config, RUN)  ->  cwd

A relative path in a file is relative to the file's folder, so a folder of runs, models and scripts can move as a
whole. Prompts are copied into the run. Code is not copied: the run holds its reference and its checksum.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from agents.runs.config import CONFIG_SOURCE, RunConfig, is_own_code
from agents.runs.files import CONFIG_FILE, METRICS_FILE, PROMPTS_FILE
from agents.runs.log import RunLog
from agents.runs.parts import load_objects
from agents.runs.report import Report
from agents.user_code import absolute_reference, check_code, identify, is_file, is_reference, replace_references
from textgen_env.errors import ConfigError, PromptError, RunFolderError
from textgen_env.files import LOCK_FILE, parse_json, parse_yaml, read_text, write_file
from textgen_env.models import MODEL_NAMES
from textgen_env.prompts import PROMPT_NAMES, SPLITS, Prompt, as_prompt, make_prompts
from textgen_env.rewards import make_reward, reward_spec

MOST_KEPT = 64 << 20
"""Bytes of prompts that a run keeps; larger files stay where they are."""

PATH_SETTINGS = ("file", "model")
"""Settings of rewards that may be paths."""


def stored_config(run: Path, trust: bool = False, check: bool = True) -> RunConfig:
    """Return the configuration of the run in a folder, as it is in the file.

    Args:
        trust: Take also a configuration that lets a hub repository's code run, and code that this user has never named.
        check: False: the code that it names is not looked at, and must not be loaded.

    Raises:
        RunFolderError: no run.
        ConfigError: no configuration, or code that must not run; see ``agents.user_code.check_code``.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise RunFolderError(f"{str(run)!r} holds no {CONFIG_FILE}: not a folder that 'textgen train' made")
    config = RunConfig.from_json(read_text(path), trust)
    if check:
        check_stored_code(located(config, run), trust)
    return config


def read_config(path: Path, trust: bool = False) -> RunConfig:
    """Return the configuration in a JSON or YAML file, to start another run from; its paths from here.

    Raises:
        ConfigError: as of ``stored_config``.
    """
    text = read_text(path)
    is_yaml = path.suffix in (".yaml", ".yml")
    data = parse_yaml(text, CONFIG_SOURCE) if is_yaml else parse_json(text, CONFIG_SOURCE, allow_nan=True)
    config = located(RunConfig.from_data(data, trust), path.parent)
    check_stored_code(config, trust)
    return replace(config, code={}, agent_sees_reward=True)


def check_stored_code(config: RunConfig, trust: bool, without: Collection[str] = ()) -> None:
    """Raise ``ConfigError`` if the code that a stored configuration names must not run here.

    Args:
        without: Parts of the configuration whose code is not to run: others are at hand.
    """
    check_code({reference: config.code.get(reference, "") for reference in config.references_without(without)}, trust)


def with_present_code(config: RunConfig, run: Path, accepted: Collection[str]) -> RunConfig:
    """Return the stored configuration of ``run`` with the present checksums of the code that is accepted.

    Args:
        accepted: References to it, from here.

    Raises:
        ConfigError: one that the configuration does not name, or a file that is missing.
    """
    stored = dict(zip(map(absolute_reference, located(config, run).references), config.references, strict=True))
    code = dict(config.code)
    for reference in accepted:
        if absolute_reference(reference) not in stored:
            raise ConfigError(
                f"a run is resumed with its own functions, {', '.join(stored) or 'of which it has none'}; got "
                f"{reference}. Leave it out, or start another run with it: textgen train --config {run / CONFIG_FILE}"
            )
        code[stored[absolute_reference(reference)]] = identify(reference).sha256
    return replace(config, code=code)


def check_unchanged(then: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ``ConfigError`` if the configuration of a run is not that of its checkpoint."""
    now = json.loads(config.to_json())
    del now["code"]  # check_code looks at that, and a resumed run may have accepted another
    changed = [f"{name} ({now[name]!r}, was {then.get(name)!r})" for name in now if now[name] != then.get(name)]
    if changed:
        raise ConfigError(
            f"{CONFIG_FILE} was changed since the checkpoint: {', '.join(changed)}. Put it back, or start a new run "
            "with textgen train --config"
        )


@contextmanager
def no_folder_of_a_failed_start(folder: Path) -> Iterator[None]:
    """Empty a new run's folder if an error ends the run before it has learned anything."""
    try:
        yield
    except Exception:
        if not (folder / METRICS_FILE).exists():
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name != LOCK_FILE:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


@contextmanager
def no_new_folders_of_a_failed_start(folder: Path) -> Iterator[None]:
    """Remove ``folder``, and those above it that did not exist either, if an error leaves them empty."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        yield
    except Exception:
        for path in made:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        raise


# --- paths


def located(config: RunConfig, folder: Path) -> RunConfig:
    """Return a configuration that lies in ``folder`` with its paths as they are from here."""

    def from_here(path: str) -> str:
        return os.path.normpath(folder / path)

    return _moved(config, from_here, lambda path: path.startswith(".") or (folder / path).exists())


def portable(config: RunConfig, folder: Path) -> RunConfig:
    """Return a configuration with its relative paths as they are from ``folder``."""

    def from_folder(path: str) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    return _moved(config, from_folder, lambda path: Path(path).exists())


def _moved(config: RunConfig, move: Callable[[str], str], exists: Callable[[str], bool]) -> RunConfig:
    """Return ``config`` with ``move`` applied to the relative paths in it."""

    def path(value: str) -> str:
        relative = not Path(value).is_absolute() and not value.startswith("~")
        return move(value) if relative and exists(value) else value

    def code(reference: str) -> str:
        place, _, name = reference.rpartition(":")
        relative = is_file(reference) and not Path(place).is_absolute() and not place.startswith("~")
        return f"{move(place)}:{name}" if relative else reference

    def prompts(value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("dataset"), str):
            return {**value, "dataset": path(value["dataset"])}
        if not isinstance(value, str) or is_own_code(value):
            return code(value) if isinstance(value, str) else value
        source, colon, part = value.rpartition(":")
        if not (colon and part in SPLITS):
            source, colon, part = value, "", ""
        return value if source in PROMPT_NAMES else f"{path(source)}{colon}{part}"

    model = config.model
    if model is not None and model not in MODEL_NAMES:
        model = code(model) if is_own_code(model) else path(model)
    reward = _with_paths(replace_references(config.reward, code), path)
    checksums = {code(reference) if is_reference(reference) else reference: c for reference, c in config.code.items()}
    parts = {"model": model, "prompts": prompts(config.prompts), "reward": reward}
    if is_reference(config.partner):
        parts["partner"] = code(config.partner)
    return replace(config, **parts, code=checksums)


def _with_paths(reward: Any, path: Callable[[str], str]) -> Any:
    """Return the description of a reward with ``path`` applied to the settings that may be paths."""
    if isinstance(reward, Mapping) and "name" in reward:
        return {
            key: path(value) if key in PATH_SETTINGS and isinstance(value, str) else _with_paths(value, path)
            for key, value in reward.items()
        }
    if isinstance(reward, list):
        return [[_with_paths(p[0], path), *p[1:]] if isinstance(p, list) and p else p for p in reward]
    return reward


# --- what a run keeps

SUMMARY_PACKAGES = ("textgen-env", "torch", "transformers", "stable-baselines3", "gymnasium", "numpy")
"""Whose versions are in the summary."""


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


def store(config: RunConfig, folder: Path, **given: Any) -> RunConfig:
    """Write ``config.json``, and prompts that are not in the box, into the folder of a new run.

    Args:
        given: Objects in place of model, prompts, reward and partner, or None: stored as plain data where possible,
            else named as objects that are missing.

    Returns:
        The configuration as it is in the file.
    """
    objects = {name: value for name, value in given.items() if value is not None}
    if "reward" in objects and (spec := reward_spec(make_reward(objects["reward"]))) is not None:
        del objects["reward"]
        config = replace(config, reward=spec)
    config = replace(config, agent_sees_reward=_agent_sees_reward(config, objects.get("reward")))
    in_file = isinstance(config.prompts, list | tuple) and "prompts" not in objects  # plain data of the configuration
    kept = None if in_file else kept_prompts(objects.get("prompts", config.prompts))
    if kept is not None:
        objects.pop("prompts", None)
        write_file(folder / PROMPTS_FILE, kept)
    changes: dict[str, Any] = dict.fromkeys(objects)
    if "model" in objects:
        changes["prune"] = None
    config = replace(config, **changes, objects=tuple(objects))
    config = replace(config, code={reference: identify(reference).sha256 for reference in config.references})
    config = portable(config, folder)
    if kept is not None:
        config = replace(config, prompts=PROMPTS_FILE)
    write_file(folder / CONFIG_FILE, config.to_json())
    return config


def _agent_sees_reward(config: RunConfig, given: Any) -> bool:
    """Return False if what JSON cannot hold of a reward scores no prefix: an agent then acts the same without it."""
    if given is not None:
        return make_reward(given).running() is not None
    own: list[Any] = []
    replace_references(config.reward, own.append)
    if not own:
        return True
    loaded = [load_objects(replace(config, reward=reference), ("reward",))["reward"] for reference in own]
    return any(make_reward(reward).running() is not None for reward in loaded)


def without_reward(config: RunConfig) -> Any:
    """Return a reward in place of one that is missing or must not run: its unknown parts are 0.

    Raises:
        ConfigError: the agent sees the running score of the reward.
    """
    if config.agent_sees_reward:
        raise ConfigError("the agent sees the running score of the run's reward, so it cannot write without it")

    def unknown(completion: str) -> float:
        return 0.0

    return unknown if "reward" in config.objects else replace_references(config.reward, lambda reference: unknown)


def kept_prompts(spec: Any) -> str | None:
    """Return the lines of ``prompts.jsonl``, or None for prompts that need no copy, or of which there is none.

    Names in the box need none; there is none of endless, very large or unusual prompts.
    """
    plain = spec is None or (isinstance(spec, str) and spec.rpartition(":")[0] in PROMPT_NAMES)
    if plain or (isinstance(spec, str) and (spec in PROMPT_NAMES or is_own_code(spec))):
        return None
    lines, size = [], 0
    try:
        source = make_prompts(spec)
        for index in range(len(source)):
            line = _line(source[index])
            size += len(line)
            if line == "" or size > MOST_KEPT:
                return None
            lines.append(line)
    except PromptError:  # a function's prompts never end
        return None
    return "".join(lines)


def _line(prompt: Prompt) -> str:
    """Return a prompt as a line of JSON, or nothing if it does not come back as it was."""
    plain = {"prompt": prompt.text, **({} if prompt.reference is None else {"reference": prompt.reference})}
    try:
        line = json.dumps({**prompt.metadata, **plain}, ensure_ascii=False)
    except (TypeError, ValueError):
        return ""
    return line + "\n" if as_prompt(json.loads(line), "a line") == prompt else ""
