"""A native vector environment as a Stable-Baselines3 ``VecEnv``.

SB3 wraps lists of single environments; a Gymnasium ``VectorEnv`` steps all its rows in one call,
here with one batched forward. This adapter keeps that: one call stays one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvObs, VecEnvStepReturn

from textgen_env.errors import ConfigError


class SB3VecEnv(VecEnv):
    """Step a SAME_STEP ``VectorEnv`` through SB3's interface.

    ``infos[i]`` of an ended row holds the environment's information on the episode, and, as SB3
    expects, ``terminal_observation``, ``TimeLimit.truncated`` and ``episode`` (return ``r``,
    length ``l``, seconds ``t``).

    Raises:
        ConfigError: the environment restarts its rows in another way.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ConfigError(f"SB3 restarts ended rows in the same step; make the environment so, not with {mode}")
        self.env = env
        self._actions: npt.NDArray[Any] = np.zeros(env.num_envs, np.int64)
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, np.int64)
        self._started = time.time()
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        seeds = self._seeds if any(seed is not None for seed in self._seeds) else None
        observation, _ = self.env.reset(seed=seeds, options=self._prompts())  # type: ignore[arg-type]  # a list, as the API says
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0.0
        self._lengths[:] = 0
        return observation

    def _prompts(self) -> dict[str, Any] | None:
        """Return the options of all rows as one: each row has its own dict, and may name its prompt.

        Raises:
            ConfigError: another option than the prompt; every row is reset here.
        """
        given = [options or {} for options in self._options]
        unknown = set().union(*given) - {"prompt"}
        if unknown:
            raise ConfigError(f"unknown reset options {sorted(unknown)}; known: 'prompt'")
        prompts = [options.get("prompt") for options in given]
        # SB3 copies one dict to all rows, a list of all their prompts included.
        prompts = [
            p[row] if isinstance(p, list | tuple) and len(p) == len(given) else p for row, p in enumerate(prompts)
        ]
        return {"prompt": prompts} if any(prompt is not None for prompt in prompts) else None

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        observation, rewards, terminated, truncated, infos = self.env.step(self._actions)
        self._returns += rewards
        self._lengths += 1
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = terminated | truncated
        for i in np.flatnonzero(ended).tolist():
            rows[i] = {
                **_of_row(infos.get("final_info", {}), i),
                "terminal_observation": infos["final_obs"][i],
                "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
                "episode": {
                    "r": float(self._returns[i]),
                    "l": int(self._lengths[i]),
                    "t": round(time.time() - self._started, 6),
                },
            }
        self._returns[ended] = 0.0
        self._lengths[ended] = 0
        return observation, rewards.astype(np.float32), ended, rows

    def state_dict(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the environment's rows and the counters of this adapter, as arrays and plain data."""
        arrays, plain = self.env.unwrapped.state_dict()  # type: ignore[attr-defined]
        return arrays | {"sb3_returns": self._returns.copy(), "sb3_lengths": self._lengths.copy()}, plain

    def load_state_dict(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``."""
        self.env.unwrapped.load_state_dict(arrays, plain)  # type: ignore[attr-defined]
        self._returns[:] = arrays["sb3_returns"]
        self._lengths[:] = arrays["sb3_lengths"]
        self._reset_seeds()  # no reset is due: the rows are in the middle of their texts
        self._reset_options()

    def observe(self) -> VecEnvObs:
        """Return the observation of all rows as they are."""
        observation: VecEnvObs = self.env.unwrapped.observe()  # type: ignore[attr-defined]
        return observation

    def close(self) -> None:
        self.env.close()

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return True for each legal action, (N, k) bool."""
        masks: npt.NDArray[np.bool_] = self.env.unwrapped.action_masks()  # type: ignore[attr-defined]
        return masks

    # Attributes and methods belong to the one environment behind all rows.

    def has_attr(self, attr_name: str) -> bool:
        return hasattr(self.env.unwrapped, attr_name)

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        return [getattr(self.env.unwrapped, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: int | Iterable[int] | None = None, **kwargs: Any
    ) -> list[Any]:
        if method_name == "action_masks":  # one mask a row, as sb3-contrib asks for it
            masks = self.action_masks()
            return [masks[i] for i in self._rows(indices)]
        if method_name == "judge":
            found: list[Any] = self.env.unwrapped.episodes.judged(np.array(self._rows(indices))).tolist()  # type: ignore[attr-defined]
            return found
        method: Callable[..., Any] = getattr(self.env.unwrapped, method_name)
        return [method(*args, **kwargs)] * len(self._rows(indices))

    def env_is_wrapped(self, wrapper_class: type, indices: int | Iterable[int] | None = None) -> list[bool]:
        from stable_baselines3.common.monitor import Monitor

        # It reports episodes as Monitor does, so SB3's helpers need not add one.
        return [issubclass(wrapper_class, Monitor)] * len(self._rows(indices))

    def get_images(self) -> Sequence[npt.NDArray[np.uint8] | None]:
        images: Any = self.env.render()
        return list(images) if isinstance(images, tuple) else [None] * self.num_envs

    def _rows(self, indices: int | Iterable[int] | None) -> list[int]:
        return list(self._get_indices(indices))


def _of_row(infos: dict[str, Any], row: int) -> dict[str, Any]:
    """Return the entries of a vector environment's infos that belong to ``row``."""
    found: dict[str, Any] = {}
    for key, value in infos.items():
        if key.startswith("_") or not infos.get(f"_{key}", np.ones(row + 1, bool))[row]:
            continue
        if isinstance(value, dict):
            found[key] = _of_row(value, row)
        else:
            entry = value[row]
            found[key] = entry.item() if isinstance(entry, np.generic) else entry
    return found
