"""Yardsticks that were measured before: they depend on model, prompts, reward and settings alone.

    what it depends on  ->  SHA-256  ->  cache_folder()/yardsticks/DIGEST.json  ->  Yardstick

A reward or a prompt that plain data cannot hold is measured anew each time, and so are one that names a file, and a
conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from agents.runs.report import Watch, Yardstick
from textgen_env.errors import TextGenError
from textgen_env.evaluation import Evaluation
from textgen_env.files import read_json, write_file
from textgen_env.models import cache_folder
from textgen_env.models.base import LanguageModel
from textgen_env.prompts import PromptSource
from textgen_env.rewards import REWARDS, reward_spec
from textgen_env.vector_env import TextGenVectorEnv

MOST = 32
"""Yardsticks that are kept; the oldest go."""

VERSIONS = ("textgen-env", "torch", "transformers", "numpy")
"""Packages whose versions a yardstick is of."""

OF_ORIGIN = ("_name_or_path", "name_or_path", "transformers_version")
"""Entries of a model's configuration that say where it came from, and change nothing that it writes."""

_PARTS = ("samples", "greedy", "lookahead")


def known_or_measured(env: TextGenVectorEnv, prompts: PromptSource, watch: Watch, **settings: Any) -> Yardstick:
    """Return the yardstick that is kept, or measure it, and keep it. Arguments are those of ``Yardstick.measure``."""
    path = yardstick_file(env, prompts, **settings)
    found = None if path is None else read_yardstick(path)
    if found is None:
        found = Yardstick.measure(env, prompts, **settings, watch=watch)
        if path is not None:
            write_yardstick(path, found)
    return found


def yardstick_file(env: TextGenVectorEnv, prompts: PromptSource, **settings: Any) -> Path | None:
    """Return where the yardstick of these is kept, None if plain data cannot say what it depends on."""
    model, reward = env.language_model, reward_spec(env.episodes.reward)
    if env.episodes.partner is not None or reward is None:
        return None
    if any(_is_path(text) or _is_own_reward(text) for text in _strings(reward)):
        return None
    weights = getattr(model, "model", None)
    if not isinstance(weights, nn.Module):
        return None
    depends: dict[str, Any] = {
        "weights": _digest_of_weights(weights),
        "configs": [_settings_of(getattr(weights, name, None)) for name in ("config", "generation_config")],
        "tokens": _digest_of_tokens(model),
        "prompts": [[p.text, p.reference, dict(p.metadata), list(model.encode(p.text))] for p in prompts],
        "reward": reward,
        "env": asdict(env.episodes.config),
        "rows": env.num_envs,
        "versions": {name: metadata.version(name) for name in VERSIONS},
        **settings,
    }
    try:
        text = json.dumps(depends, sort_keys=True)
    except (TypeError, ValueError):
        return None
    return cache_folder() / "yardsticks" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def read_yardstick(path: Path) -> Yardstick | None:
    """Return the yardstick in ``path``, None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        found = read_json(path, ["beta", *_PARTS], allow_nan=True)
        lookahead = [_evaluation(item) for item in found["lookahead"]]
        return Yardstick(found["beta"], _evaluation(found["samples"]), _evaluation(found["greedy"]), lookahead)
    except (TextGenError, TypeError, ValueError, AttributeError):  # it is measured again
        return None


def write_yardstick(path: Path, yardstick: Yardstick) -> None:
    """Keep a yardstick in ``path``. A disk that cannot take it costs nothing but the next measurement."""
    plain = {"beta": yardstick.beta, "lookahead": [_plain(item) for item in yardstick.lookahead]}
    plain |= {"samples": _plain(yardstick.samples), "greedy": _plain(yardstick.greedy)}
    with suppress(TextGenError, OSError):
        write_file(path, json.dumps(plain))
        kept = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for file in kept[:-MOST]:
            file.unlink(missing_ok=True)


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(Evaluation):
        value = getattr(evaluation, field.name)
        if isinstance(value, Mapping):
            value = {name: part.tolist() for name, part in value.items()}
        found[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
    return found


def _evaluation(plain: Mapping[str, Any]) -> Evaluation:
    given: dict[str, Any] = {field.name: plain.get(field.name) for field in fields(Evaluation)}
    count = len(given["prompts"])
    for name in ("rewards", "lengths", "logprobs", "kl", "outside"):
        if given[name] is not None:
            given[name] = np.asarray(given[name], np.int64 if name == "lengths" else np.float64)
            if given[name].shape != (count,):
                raise ValueError(f"{name} has shape {given[name].shape}, not ({count},)")
    parts = {name: np.asarray(values, np.float64) for name, values in given["parts"].items()}
    texts = {name: tuple(given[name]) for name in ("prompts", "completions")} | {"turns": ()}
    return Evaluation(**{**given, "parts": parts, **texts})


def _digest_of_weights(module: nn.Module) -> str:
    digest, seen = hashlib.blake2b(digest_size=32), set()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.data_ptr() in seen:  # tied to one before
            continue
        seen.add(tensor.data_ptr())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings_of(config: Any) -> Any:
    """Return a configuration of transformers as plain data, without its origin; None where there is none."""
    return None if config is None else _without_origin(config.to_dict())


def _without_origin(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: _without_origin(part) for name, part in value.items() if name not in OF_ORIGIN}


def _digest_of_tokens(model: LanguageModel) -> str:
    vocabulary: dict[str, int] = getattr(getattr(model, "tokenizer", None), "get_vocab", dict)()
    text = json.dumps([sorted(vocabulary.items()), list(model.end_ids)])
    return hashlib.sha256(text.encode()).hexdigest()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def _is_own_reward(name: str) -> bool:
    """Return True if the user registered a reward under this name: its code may change."""
    return name in REWARDS and not REWARDS[name].__module__.startswith("textgen_env.")


def _is_path(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
