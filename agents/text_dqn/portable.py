"""An agent as plain data and tensors: what leaves the process is never a pickle.

    TextDQN  <->  settings (JSON) + weights  <->  agent.zip, laid out as Stable-Baselines3 does
                                             <->  a folder of safetensors, JSON and a model card

Stable-Baselines3 unpickles whatever its zip holds pickled, and unpickling runs code. Here every
setting is JSON; the few objects among them (spaces, the optimiser's class) are rebuilt from
descriptions. What cannot be described, a learning rate given as a function, is left out and
asked for at loading.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from stable_baselines3.common.save_util import open_path

from agents.text_dqn.replay import EpisodeReplay
from agents.text_dqn.settings import COUNTERS, Range, check_settings
from textgen_env.config import check_type
from textgen_env.errors import ConfigError, TextGenError
from textgen_env.files import MOST_BYTES, parse_json, read_json, whole_file, write_file

SETTINGS_FILE = "agent.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"

SPACE_SIZE = Range(1, 2**24, whole=True)
"""Actions, rows, and numbers in a part of an observation."""


# --- settings


@dataclass(frozen=True)
class Restored:
    """What a stored agent is made of."""

    policy_class: Any  # a name, or a class that was given
    policy_kwargs: dict[str, Any]
    observation_space: spaces.Dict
    action_space: spaces.Discrete
    n_envs: int
    settings: dict[str, Any]  # arguments of the constructor
    counters: dict[str, Any]
    model_name: str | None
    task: dict[str, Any] | None


def described(
    settings: Mapping[str, Any],
    *,
    policy_class: str | None,
    policy_kwargs: dict[str, Any],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
) -> dict[str, Any]:
    """Return all of it as plain data; ``left_out`` names what has no such form."""
    plain: dict[str, Any] = {
        "policy_class": policy_class,
        "policy_kwargs": _plain_kwargs(policy_kwargs),
        "observation_space": {key: _box(box) for key, box in observation_space.spaces.items()},  # type: ignore[attr-defined]
        "action_space": int(action_space.n),  # type: ignore[attr-defined]  # SB3 has checked it
        **{name: None if callable(value) else value for name, value in settings.items()},
    }
    left_out = [name for name in ("policy_class", "policy_kwargs") if plain[name] is None]
    return plain | {"left_out": left_out + [name for name, value in settings.items() if callable(value)]}


def restored(stored: Any, given: Mapping[str, Any], policies: Mapping[str, type], source: Any) -> Restored:
    """Return what ``stored`` describes, with ``given`` settings over it. Names that are no settings are passed over.

    Raises:
        ConfigError: something pickled, something left out that is not ``given``, a value out of
            range, or no settings at all.
    """
    left_out = stored.get("left_out") if isinstance(stored, dict) else None
    if not isinstance(left_out, list) or not all(isinstance(name, str) for name in left_out):
        raise ConfigError(f"{source} holds no agent that TextDQN.save or save_pretrained wrote")
    pickled = [k for k, v in stored.items() if isinstance(v, dict) and ":serialized:" in v and k not in given]
    if pickled:
        raise ConfigError(
            f"{source} holds pickled entries ({', '.join(sorted(pickled))}), and unpickling runs whatever code they "
            "hold: TextDQN reads only what it wrote itself. Give trusted values in custom_objects"
        )
    missing = [name for name in left_out if name not in given]
    if missing:
        raise ConfigError(
            f"{source} could not store {', '.join(missing)}, which is no plain data: give it again, as "
            f"custom_objects={{{', '.join(f'{name!r}: ...' for name in missing)}}}"
        )
    try:
        check_type("model_name", stored["model_name"], str, type(None))
        check_type("task", stored["task"], dict, type(None))
        boxes = {key: _box_from(**box) for key, box in stored["observation_space"].items()}
        policy, kwargs = stored["policy_class"], stored["policy_kwargs"] or {}
        return Restored(
            policy_class=given["policy_class"] if "policy_class" in given else policies[policy],
            policy_kwargs=given["policy_kwargs"] if "policy_kwargs" in given else _kwargs_from(kwargs),
            observation_space=spaces.Dict(dict(boxes)),
            action_space=spaces.Discrete(SPACE_SIZE.check("action_space", stored["action_space"])),
            n_envs=SPACE_SIZE.check("n_envs", stored["n_envs"]),
            settings=check_settings({**stored, **given}),
            counters=checked_counters(stored["counters"]),
            model_name=stored["model_name"],
            task=stored["task"],
        )
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"the settings in {source} are damaged: {type(error).__name__}: {error}") from error


def checked_counters(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counters of ``COUNTERS``, each checked, and the learner's own, which it checks itself."""
    counters = {name: bounds.check(name, stored[name]) for name, bounds in COUNTERS.items()}
    np.random.default_rng().bit_generator.state = stored["learner"]["rng"]  # refuses what is no state
    return counters | {"learner": dict(stored["learner"])}


def read_zip(path: Any) -> Any:
    """Return the settings in an agent's zip, without reading anything else of it.

    Raises:
        ConfigError: no zip, or none of an agent.
    """
    file: Any = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            if (size := archive.getinfo("data").file_size) > MOST_BYTES:
                raise ConfigError(f"the settings in {path} have {size:,} bytes, more than {MOST_BYTES:,}")
            return parse_json(archive.read("data"), f"the settings in {path}", allow_nan=True)
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"{path} is no zip of an agent: {error}") from error
    finally:
        if file is path:
            file.seek(0)
        else:
            file.close()


@contextmanager
def reporting_damage(path: Any) -> Iterator[None]:
    """Turn what Python and torch say of settings and weights that cannot be read, or would run code, into one error."""
    try:
        yield
    except TextGenError:
        raise
    except Exception as error:  # there are a dozen kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the agent in {path} cannot be read: damaged, or of another version: {reason}") from error


def _box(space: spaces.Box) -> dict[str, Any]:
    low, high = ((b.flat[0].item() if (b == b.flat[0]).all() else b.tolist()) for b in (space.low, space.high))
    return {"low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}


def _box_from(low: Any, high: Any, shape: list[int], dtype: str) -> spaces.Box:
    if not 0 < math.prod(SPACE_SIZE.check("a size in observation_space", size) for size in shape) <= SPACE_SIZE.high:
        raise ConfigError(f"observation_space has a part of shape {shape}, more than {SPACE_SIZE.high:g} numbers")
    bounds: list[Any] = [np.broadcast_to(np.array(bound, dtype), shape) for bound in (low, high)]
    return spaces.Box(*bounds, dtype=bounds[0].dtype.type)


def _plain_kwargs(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return ``policy_kwargs`` with the optimiser's class by name, or None if there is other code in them."""
    optimizer = kwargs.get("optimizer_class")
    name: str = getattr(optimizer, "__name__", "")
    if name and getattr(torch.optim, name, None) is optimizer:
        kwargs = kwargs | {"optimizer_class": name}
    try:
        json.dumps(kwargs)
    except (TypeError, ValueError):
        return None
    return kwargs


def _kwargs_from(kwargs: dict[str, Any]) -> dict[str, Any]:
    if "optimizer_class" not in kwargs:
        return kwargs
    optimizer = getattr(torch.optim, kwargs["optimizer_class"])
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise ValueError(f"torch.optim has no optimiser {kwargs['optimizer_class']!r}")
    return kwargs | {"optimizer_class": optimizer}


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise ``ConfigError`` where a weight is no finite number (says which)."""
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(
                f"the agent's weights {name!r} are not all finite: the file is of a training that diverged"
            )


# --- the replay


def write_replay(replay: EpisodeReplay, path: Path) -> None:
    """Write the steps as safetensors, with the counters and the random state as JSON in its header."""
    steps, state = replay.state_dict()
    with whole_file(path, (SafetensorError,)) as half_made:
        save_arrays(steps, half_made, metadata={"state": json.dumps(state)})


def read_replay(replay: EpisodeReplay, path: Path) -> None:
    """Read what ``write_replay`` wrote, into a replay of the same shape.

    Raises:
        ConfigError: the file holds other keys or shapes, or no replay.
    """
    try:
        with safe_open(path, "np") as file:
            state = json.loads(file.metadata()["state"])
            steps = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        replay.load_state_dict(steps, state)
    except ConfigError as error:
        raise ConfigError(f"replay file {path}: {error}") from error
    except (OSError, OverflowError, RecursionError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no replay file that save_replay_buffer wrote: {error}") from error


# --- a folder to share


def save_pretrained(folder: Path, settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor], card: str) -> None:
    """Write weights, settings and a model card."""
    with whole_file(folder / WEIGHTS_FILE, (SafetensorError,)) as half_made:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, half_made)
    write_file(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    write_file(folder / CARD_FILE, card)


def read_pretrained(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the settings and weights that ``save_pretrained`` wrote.

    Raises:
        ConfigError: the folder lacks a file, or one is damaged.
    """
    try:
        settings = read_json(folder / SETTINGS_FILE, None, ConfigError, allow_nan=True)
        return settings, load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{str(folder)!r} holds no agent that save_pretrained wrote: {error}") from error


def model_card(settings: Mapping[str, Any], vocab_size: int, numbers: int) -> str:
    """Return a Markdown page that says what the agent is for, what it learned from, and how to use it.

    Args:
        settings: As stored.
        vocab_size: Of its language model.
        numbers: Weights of the online network.
    """
    task, counters = settings["task"] or {}, settings["counters"]
    updates = counters["learner"]["updates"]
    reward, model = task.get("reward_name", "?"), task.get("model", "?")
    spec = json.dumps(task["reward"]) if task.get("reward") is not None else f"{reward} (a Python object; not stored)"
    seen = [name for name in ("score", "candidate_scores") if name in settings["observation_space"]]
    prompts = task.get("prompts")
    rows = {
        "language model": f"{model}, {vocab_size:,} tokens; not included",
        "reward": f"`{spec}`",
        "running scores seen": ", ".join(f"`{name}`" for name in seen) or "none",
        "beta": f"{settings['beta']:g} reward units a nat of KL when acting; trained for {settings['target_beta']:g}",
        "candidates": f"the {task.get('top_k')} likeliest tokens, of them the nucleus of {task.get('top_p')}",
        "texts": f"{task.get('min_new_tokens')} to {task.get('max_new_tokens')} tokens",
        "learned from": f"{counters['num_timesteps']:,} steps (tokens), {updates:,} gradient steps",
        "prompts": "made by a function" if prompts is None else f"{prompts:,}",
        "seed": str(settings["seed"]),
        "size": f"{numbers:,} numbers, twice (online and slow network)",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: textgen-env
base_model: {json.dumps(model)}
tags: [reinforcement-learning, text-generation, textgen-env]
---

# TextDQN for {reward}, on {model}

A small network that tilts the language model's choice among its likeliest next tokens towards a
reward: pi(token) is proportional to p(token) exp(Q / beta).

| | |
|---|---|
{table}

```python
from agents.text_dqn import TextDQN

agent = TextDQN.from_pretrained("this folder", model=(model, tokenizer))
with agent.logits_processor(model) as steer:
    model.generate(**inputs, logits_processor=[steer], **steer.settings)
```

It works with the language model above and no other, and on prompts like those it learned from.
The reward is all it wants: it inherits the language model's faults, and what the reward overlooks.
"""
