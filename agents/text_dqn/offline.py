"""Recorded texts: written as a Minari dataset, read back, learned from without an environment.

    agent, environment  ->  record  ->  FOLDER/data, HDF5
    FOLDER  ->  open_dataset  ->  fill_replay  ->  TextDQN.fit(gradient steps)

A text of L steps has L + 1 observations (each key (L + 1, ...), the mask among them), L actions and
rewards, and ``infos["behaviour_logprob"]``, (L + 1,): entry t + 1 is the log-probability of action t
under whoever acted, in nats; entry 0 belongs to the reset and is not a number.
``infos["by_language_model"]`` says where that was the language model's own distribution. Episode metadata
holds the prompt (as the options of a reset), the completion and why it ended.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from agents.text_dqn.replay import EpisodeReplay
from textgen_env.errors import CapacityError, ConfigError, DatasetError, RunFolderError
from textgen_env.evaluation import play
from textgen_env.extras import require
from textgen_env.files import is_free, locked, whole_folder
from textgen_env.observation import flatten
from textgen_env.policies import Agent
from textgen_env.prompts import Prompt
from textgen_env.vector_env import TextGenVectorEnv

if TYPE_CHECKING:
    from minari import EpisodeData, MinariDataset
    from minari.dataset.minari_storage import MinariStorage

BEHAVIOUR = "behaviour_logprob"
BY_LANGUAGE_MODEL = "by_language_model"
TEXTS_AT_A_TIME = 256
"""Texts that are kept in memory before they are written."""


def record(
    agent: Agent,
    env: TextGenVectorEnv,
    prompts: Sequence[Prompt],
    folder: str | Path,
    *,
    seed: int = 0,
    deterministic: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> MinariDataset:
    """Let ``agent`` write one text for each entry of ``prompts`` and keep them as a Minari dataset.

    Args:
        agent: With ``probabilities``, unless ``deterministic``.
        env: Its observations are recorded. What it was made with is stored where JSON can hold it,
            and ``recover_environment`` brings it back.
        folder: New or empty. ``minari.load_dataset(name)`` finds it where ``MINARI_DATASETS_PATH``
            is its parent and its name ends in a version, such as ``sentiment-v0``.
        deterministic: Record ``predict(deterministic=True)``, whose log-probabilities are 0.
        metadata: JSON data to store beside what Minari does.

    Raises:
        ConfigError: the agent cannot say how probable its actions were, or Minari is not installed.
        RunFolderError: the folder holds something already, another process records into it, or it
            cannot be written to.
    """
    if not deterministic and not hasattr(agent, "probabilities"):
        raise ConfigError(
            f"{type(agent).__name__} has no probabilities, so its texts would carry no log-probabilities: "
            "record it with deterministic=True (--greedy)"
        )
    folder = Path(folder).resolve()  # Minari joins a relative path twice
    _minari()
    if not is_free(folder):
        raise RunFolderError(f"{str(folder)!r} exists and is not an empty folder; choose another one")
    # A kill leaves no part of a dataset: the same call begins again.
    with locked(folder.parent, f".{folder.name}.lock"), whole_folder(folder, (RuntimeError,)) as half_made:
        storage = _new_storage(half_made, folder.name, env, metadata or {})
        waiting: list[tuple[Any, dict[str, str]]] = []
        for text in _texts(agent, env, prompts, seed, deterministic):
            waiting.append(text)
            if len(waiting) == TEXTS_AT_A_TIME:
                _write(storage, waiting)
        _write(storage, waiting)
    return open_dataset(folder)


def open_dataset(folder: str | Path) -> MinariDataset:
    """Return the Minari dataset in ``folder``, as ``record`` or ``minari.DataCollector`` wrote it.

    Raises:
        DatasetError: there is none, or Minari cannot read it (says why).
    """
    minari, path = _minari(), Path(folder)
    path = path / "data" if (path / "data").is_dir() else path
    try:
        return minari.MinariDataset(path)
    except Exception as error:  # Minari and h5py have a dozen kinds for damaged files
        raise DatasetError(f"{str(folder)!r} holds no Minari dataset that can be read: {error}") from error


def fill_replay(replay: EpisodeReplay, dataset: MinariDataset) -> int:
    """Store all texts of ``dataset`` in ``replay`` and return their number of steps.

    Raises:
        DatasetError: other observations or actions than the replay's, or an episode that cannot be
            (which, where, and what is wrong with it). The replay keeps the episodes before it.
        CapacityError: more steps than the replay keeps.
    """
    _check_spaces(replay, dataset)
    lengths = _lengths(dataset)
    if not lengths:
        raise DatasetError("the dataset holds no episode")
    # Each text goes to the emptiest ring, so none gets more than its share and one text.
    needed = sum(lengths) + replay.n_envs * max(lengths)
    if needed > replay.ring * replay.n_envs:
        raise CapacityError(
            f"the dataset has {sum(lengths):,} steps and the replay keeps {replay.ring * replay.n_envs:,} in "
            f"{replay.n_envs} rings: raise buffer_size to at least {needed:,}"
        )
    for episode in _episodes(dataset):
        behaviour, by_language_model = _checked(episode, replay)
        replay.add_episode(
            episode.observations,
            episode.actions,
            episode.rewards,
            behaviour,
            by_language_model,
            ended=bool(episode.terminations[-1]),
        )
    return sum(lengths)


def _texts(
    agent: Agent, env: TextGenVectorEnv, prompts: Sequence[Prompt], seed: int, deterministic: bool
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Yield each finished text as Minari's episode and its metadata."""
    from minari.data_collector import EpisodeBuffer

    def rows(observation: Any) -> list[Any]:
        if isinstance(observation, dict):
            count = len(next(iter(observation.values())))
            return [{key: value[i] for key, value in observation.items()} for i in range(count)]
        return list(observation)

    space, episodes = env.single_observation_space, env.episodes
    has_mask = isinstance(space, spaces.Dict) and "action_mask" in space.spaces
    running: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for step in play(agent, env, prompts, seed, deterministic):
        outcome, legal, ended = step.outcome, step.legal, np.flatnonzero(step.outcome.ended)
        own = step.kl < 1e-9  # rounding
        taken = zip(rows(step.observation), outcome.actions, outcome.rewards, step.behaviour, own, legal, strict=True)
        for text, entries in zip(step.texts.tolist(), taken, strict=True):
            running[text].append(entries)
        if not len(ended):
            continue
        last = rows(flatten(episodes.config, episodes.observe(step.rows[ended])))
        for j, observation in zip(ended.tolist(), last, strict=True):
            seen, actions, rewards, behaviour, by_model, masks = zip(*running.pop(int(step.texts[j])), strict=True)
            infos: dict[str, Any] = {BEHAVIOUR: np.array([np.nan, *behaviour], np.float32)}
            infos[BY_LANGUAGE_MODEL] = np.array([False, *by_model])
            if not has_mask:
                infos["action_mask"] = np.array([*masks, np.ones_like(masks[0])], np.int8)
            buffer = EpisodeBuffer(
                options={"prompt": _plain(outcome.infos[j]["prompt"])},
                observations=_stacked([*seen, observation]),
                actions=np.array(actions),
                rewards=list(rewards),
                terminations=[False] * (len(actions) - 1) + [True],
                truncations=[False] * len(actions),
                infos=infos,
            )
            yield buffer, {name: _plain(outcome.infos[j][name]) for name in ("completion", "finish_reason")}


def _stacked(observations: list[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {key: np.stack([one[key] for one in observations]) for key in observations[0]}
    return np.stack(observations)


def _plain(text: str) -> str:
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # HDF5 strings end at a zero


def _write(storage: MinariStorage, texts: list[tuple[Any, dict[str, str]]]) -> None:
    first = storage.total_episodes
    if texts:
        storage.update_episodes([episode for episode, _ in texts])
        storage.update_episode_metadata([about for _, about in texts], range(first, first + len(texts)))
        texts.clear()


def _new_storage(folder: Path, name: str, env: TextGenVectorEnv, metadata: Mapping[str, Any]) -> MinariStorage:
    minari = _minari()
    from minari.dataset.minari_storage import MinariStorage

    (folder / "data").mkdir()
    storage = MinariStorage.new(
        folder / "data",
        observation_space=env.single_observation_space,
        action_space=env.single_action_space,
        env_spec=_single_spec(env),
    )
    name = re.sub(r"[^-\w]", "-", name)
    about = {
        "dataset_id": name if re.search(r"-v\d+$", name) else f"{name}-v0",
        "minari_version": minari.__version__,
        "language_model": env.language_model.name,
    }
    storage.update_metadata({**metadata, **about})
    return storage


def _single_spec(env: TextGenVectorEnv) -> EnvSpec | None:
    """Return what ``gym.make`` makes an environment of one such row from; None where JSON cannot hold it."""
    if env.spec is None:
        return None
    spec = copy.deepcopy(env.spec)
    for of_the_vector in ("num_envs", "autoreset_mode", "vectorization_mode"):
        spec.kwargs.pop(of_the_vector, None)
    try:
        spec.to_json()
    except (TypeError, ValueError):  # made with Python objects
        return None
    return spec


def _minari() -> Any:
    require("h5py", extra="minari", for_="a Minari dataset")  # Minari stores with it
    return require("minari", extra="minari", for_="a Minari dataset")


def _check_spaces(replay: EpisodeReplay, dataset: MinariDataset) -> None:
    have, actions = dataset.observation_space, dataset.action_space
    if not isinstance(have, spaces.Dict):
        raise DatasetError(f"the dataset's observations must be a Dict with {', '.join(replay.keys)}, got {have}")
    for key in replay.keys:
        needed = replay.store[key].shape[2:]
        shape = have[key].shape if key in have.spaces else None
        if shape != needed:
            raise DatasetError(
                f"observation {key!r} must have shape {needed}, the dataset has "
                f"{'none' if shape is None else shape}: record it in an environment like the agent's"
            )
    needed_actions = spaces.Discrete(replay.num_actions)
    if actions != needed_actions:
        raise DatasetError(f"the dataset's actions must be {needed_actions}, got {actions}")


def _lengths(dataset: MinariDataset) -> list[int]:
    with _reporting_damage():
        metadata = dataset.storage.get_episode_metadata(dataset.episode_indices)
        return [int(episode["total_steps"]) for episode in metadata]


def _episodes(dataset: MinariDataset) -> Iterator[EpisodeData]:
    with _reporting_damage():
        yield from dataset.iterate_episodes()


@contextmanager
def _reporting_damage() -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:  # as above
        raise DatasetError(f"an episode cannot be read: {error}") from error


def _checked(episode: EpisodeData, replay: EpisodeReplay) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return log-probabilities, and whether the language model chose, of the actions of an episode that can be."""

    def refuse(wrong: str) -> DatasetError:
        return DatasetError(f"episode {episode.id}: {wrong}")

    steps, actions = len(episode.rewards), np.asarray(episode.actions)
    ends = np.asarray(episode.terminations) | np.asarray(episode.truncations)
    if not steps or actions.shape != (steps,) or ends.shape != (steps,):
        raise refuse(f"{steps} rewards, actions of shape {actions.shape}, {len(ends)} ends: must be one each a step")
    if ends.nonzero()[0].tolist() != [steps - 1]:
        raise refuse(f"must end at its last step {steps - 1} and nowhere else, ends at {ends.nonzero()[0].tolist()}")
    logprobs = np.asarray((episode.infos or {}).get(BEHAVIOUR, ()), np.float32)
    if logprobs.shape != (steps + 1,):
        raise refuse(
            f"infos[{BEHAVIOUR!r}] must have shape ({steps + 1},), the log-probability of action t at t + 1, got "
            f"{logprobs.shape}: textgen record writes it"
        )
    by_language_model = np.asarray((episode.infos or {}).get(BY_LANGUAGE_MODEL, np.zeros(steps + 1)), np.bool_)
    if by_language_model.shape != (steps + 1,):
        raise refuse(f"infos[{BY_LANGUAGE_MODEL!r}] must have shape ({steps + 1},), got {by_language_model.shape}")
    read = (*replay.keys, *(key for key in ("tokens", "length") if key in episode.observations))
    numbers = {key: np.asarray(episode.observations[key]) for key in read}
    for name, values in {**numbers, "rewards": np.asarray(episode.rewards), BEHAVIOUR: logprobs[1:]}.items():
        if name in numbers and len(values) != steps + 1:
            raise refuse(f"observation {name!r} must have {steps + 1} entries, one more than steps, got {len(values)}")
        if not np.isfinite(values).all():
            raise refuse(f"{name} must be finite, got {values[~np.isfinite(values)][0]}")
    if (logprobs[1:] > 1e-6).any():
        raise refuse(f"log-probabilities must be at most 0, got {logprobs[1:].max()}")
    outside = (actions < 0) | (actions >= numbers["action_mask"].shape[1])
    illegal = outside.nonzero()[0].tolist() or (numbers["action_mask"][np.arange(steps), actions] == 0).nonzero()[0]
    if len(illegal):
        raise refuse(f"action {actions[illegal[0]]} at step {illegal[0]} is out of range or masked")
    return logprobs[1:], by_language_model[1:]
