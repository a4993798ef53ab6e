"""A training that can be killed: everything it is made of, in one folder that is whole or not there.

    RUN/checkpoints/000000020000/   state.safetensors   networks, optimiser, rows of the environment, random states
                                    replay.safetensors  the steps held so far
                                    state.json          counters, prompts, generators, and what the caller adds

A checkpoint is a barrier: the process that goes on forgets its memos and caches too, as one that
resumes must, so both compute the same from there on, bit for bit. It is written beside the last
one, flushed, and renamed; only then is the last one deleted.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agents.text_dqn.agent import TextDQN
from textgen_env.errors import ConfigError, RunFolderError, TextGenError
from textgen_env.files import HALF_MADE, read_json, whole_folder


def save_checkpoint(folder: str | os.PathLike[str], agent: TextDQN, extra: dict[str, Any]) -> Path:
    """Write ``folder/STEPS`` and delete the ones before it. Call it between two environment steps.

    Args:
        folder: Where checkpoints live.
        agent: In the middle of ``learn``, in a native vector environment.
        extra: Plain data to keep with it.

    Raises:
        RunFolderError: it could not be written (a full disk, say); the one before is still there.
        ConfigError: the environment cannot be stored, or ``extra`` is no plain data.
    """
    parent = Path(folder)
    target = parent / f"{agent.num_timesteps:012d}"
    if target.is_dir():
        return target  # nothing has happened since
    tensors, plain = _state(agent)
    try:
        text = json.dumps(plain | {"extra": extra})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"prompts and their metadata must be plain data to be kept in a checkpoint: {error}"
        ) from error
    try:
        with whole_folder(target, (SafetensorError,)) as half_made:
            save_file(tensors, half_made / "state.safetensors")
            agent.save_replay_buffer(half_made / "replay.safetensors")
            (half_made / "state.json").write_text(text, encoding="utf-8")
    except RunFolderError as error:
        raise RunFolderError(f"no checkpoint could be written to {str(parent)!r}: {error}") from error
    for older in (*_checkpoints(parent), *parent.glob(f".*{HALF_MADE}")):  # killed processes left the latter
        if older != target:
            shutil.rmtree(older, ignore_errors=True)
    return target


def load_checkpoint(checkpoint: str | os.PathLike[str], agent: TextDQN) -> dict[str, Any]:
    """Put a new agent, made with the same settings, where the stored one was; return ``extra``.

    Go on with ``agent.learn(steps left, reset_num_timesteps=False)``.

    Raises:
        RunFolderError: no checkpoint, or a damaged one.
        ModelError: it is of another language model or vocabulary.
        ConfigError: it is of an agent or environment of another shape.
    """
    path = Path(checkpoint)
    try:
        tensors = load_file(path / "state.safetensors")
        plain = _read_state(path / "state.json")
        extra = dict(plain["extra"])
        _restore(agent, tensors, plain)
    except TextGenError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise RunFolderError(f"the checkpoint {str(path)!r} is damaged, or of another agent: {error}") from error
    agent.load_replay_buffer(path / "replay.safetensors")
    return extra


def _read_state(path: Path) -> Any:
    """Return what ``state.json`` holds.

    Raises:
        ValueError: no JSON, too large or too deep.
    """
    try:
        return read_json(path, allow_nan=True)
    except RunFolderError as error:
        raise ValueError(str(error)) from error


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint with the most steps, or None."""
    return max(_checkpoints(Path(folder)), default=None)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()] if folder.is_dir() else []


# --- what there is to store


def _state(agent: TextDQN) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors and plain data, the global random generators among them: SB3 draws from those."""
    tensors, plain = agent.state_dict()
    version, words, spare = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    tensors["random.torch"] = torch.get_rng_state()
    tensors["random.numpy"] = torch.from_numpy(legacy["state"].pop("key").astype(np.int64))
    tensors["random.python"] = torch.tensor(words)
    return tensors, plain | {"random": {"numpy": legacy, "python": [version, spare]}}


def _restore(agent: TextDQN, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    agent.load_state_dict(tensors, plain)
    version, spare = plain["random"]["python"]
    random.setstate((version, tuple(tensors["random.python"].tolist()), spare))
    legacy: dict[str, Any] = plain["random"]["numpy"]
    words: Any = tensors["random.numpy"].numpy().astype(np.uint32)
    legacy["state"]["key"] = words
    np.random.set_state(legacy)
    torch.set_rng_state(tensors["random.torch"])
