"""``make_vec("TextGen-v0", num_envs=N)``: N texts at a time, one batched forward a step.

The rows are those of N single environments; row ``i`` is seeded with ``seed + i``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from textgen_env.config import check_one_of
from textgen_env.env import EpisodesMixin, TextGenEnv, check_reset_seed, chosen_prompt, open_episodes
from textgen_env.episode import Outcome
from textgen_env.errors import ConfigError, IllegalAction
from textgen_env.models.base import Rows
from textgen_env.observation import flatten, observation_space
from textgen_env.prompts import Prompt, as_prompt
from textgen_env.render import describe, draw
from textgen_env.rows import Phase
from textgen_env.spec import unwrap

RowSeeds = int | Sequence[int | None] | npt.NDArray[np.integer] | None
"""One for all rows (row ``i`` gets ``seed + i``), or one a row, None to leave its generator alone."""


class TextGenVectorEnv(EpisodesMixin, VectorEnv[Any, Any, Any]):
    """N texts at a time. Arguments, spaces and rewards are those of ``TextGenEnv``.

    Ended rows restart as ``autoreset_mode`` says: in the same step (the default; their last
    observation and info are in ``infos["final_obs"]`` and ``infos["final_info"]``), at the next
    step (whose action they ignore), or when ``reset(options={"reset_mask": (N,) bool})`` says so.
    ``options["prompt"]`` is one text for all rows, or a list of N; None in it draws one.
    """

    metadata: dict[str, Any]

    def __init__(
        self,
        num_envs: int = 1,
        model: Any = "tiny",
        prompts: Any = None,
        reward: Any = "sentiment",
        partner: Any = None,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        **settings: Any,
    ) -> None:
        autoreset_mode = unwrap(autoreset_mode)
        check_one_of("autoreset_mode", autoreset_mode, [*AutoresetMode, *(mode.value for mode in AutoresetMode)])
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = TextGenEnv.metadata | {"autoreset_mode": self.autoreset_mode}
        self.episodes = open_episodes(model, prompts, reward, settings, rows=num_envs, partner=partner)
        num_envs = self.num_envs = self.episodes.rows
        self.render_mode = self.episodes.config.render_mode
        self.single_observation_space = observation_space(self.episodes.config, self.episodes.keys, self.language_model)
        self.single_action_space = spaces.Discrete(self.episodes.k)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._all = np.arange(num_envs)
        self._seeded = [seeding.np_random(None) for _ in range(num_envs)]

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generators of the rows, which draw their prompts."""
        return tuple(generator for generator, _ in self._seeded)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seeds of the rows' generators, -1 where a stored state took the place of one."""
        return tuple(seed for _, seed in self._seeded)

    def reset(self, *, seed: RowSeeds = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start a text in every row, or in the rows of ``options["reset_mask"]``."""
        options = dict(options or {})
        rows = self._masked_rows(options.pop("reset_mask", None))
        self._seed(rows, seed)
        self._begin(rows, chosen_prompt(options))
        return self._shown(), {}

    def step(self, actions: npt.ArrayLike) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], Any]:
        """Append one token to each row; one forward serves rows that go on and rows that restart."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,):
            raise IllegalAction(f"actions must have shape ({self.num_envs},), got {actions.shape}")
        restart = self._no_rows()
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            restart = self.episodes.phases == Phase.ENDED
        acting = self._all[~restart]
        outcome = self.episodes.act(acting, actions[acting])
        rewards, terminations = np.zeros(self.num_envs), self._no_rows()
        rewards[acting], terminations[acting] = outcome.rewards, outcome.ended
        infos = self._infos(acting, outcome)
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            restart = terminations
        if restart.any():
            self._begin(self._all[restart], None)
        return self._shown(), rewards, terminations, self._no_rows(), infos

    def _infos(self, acting: Rows, outcome: Outcome) -> dict[str, Any]:
        """Return the infos of a step. Rows that end and restart within it give their last observation, too."""
        infos: dict[str, Any] = {}
        same_step = self.autoreset_mode == AutoresetMode.SAME_STEP
        ended = acting[outcome.ended]
        if same_step and len(ended):
            final = self.episodes.observe(ended)
            for j, row in enumerate(ended):
                last = flatten(self.episodes.config, {key: value[j] for key, value in final.items()})
                infos = self._add_info(infos, {"final_obs": last}, int(row))
        for i in [i for i, info in enumerate(outcome.infos) if info]:
            row, info, is_last = acting[i], outcome.infos[i], outcome.ended[i]
            infos = self._add_info(infos, {"final_info": info} if same_step and is_last else info, int(row))
        return infos

    def fork(self, src: npt.ArrayLike, dst: npt.ArrayLike) -> Any:
        """Let row ``dst[i]`` become row ``src[i]``, model cache and running score included.

        Each row keeps its own random generator. Returns the observation of all rows.

        Raises:
            IndexError: a row out of range, or a ``dst`` named twice.
            ResetNeeded: a ``src`` that never began.
        """
        self.episodes.fork(np.atleast_1d(np.asarray(src)), np.atleast_1d(np.asarray(dst)))
        return self.observe()

    def state_dict(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return all rows and their generators as arrays and plain data; see ``Episodes.state_dict``."""
        arrays, plain = self.episodes.state_dict()
        return arrays, plain | {"generators": [generator.bit_generator.state for generator in self.np_random]}

    def load_state_dict(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Restore the rows and generators of a ``state_dict``; ``observe`` shows them.

        Raises:
            ConfigError: it is of an environment of other shapes.
        """
        self.episodes.load_state_dict(arrays, plain)
        for row, state in enumerate(plain["generators"]):
            generator, _ = self._seeded[row]
            generator.bit_generator.state, self._seeded[row] = state, (generator, -1)

    def observe(self) -> Any:
        """Return the observation of all rows as they are."""
        return flatten(self.episodes.config, self.episodes.observe(self._all))

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions are legal now, (N, k) bool."""
        return self.episodes.legal(self._all)

    def render(self) -> tuple[Any, ...] | None:
        """Return one string (``ansi``) or image (``rgb_array``) a row."""
        if self.render_mode == "ansi":
            return tuple(describe(self.episodes, row) for row in range(self.num_envs))
        if self.render_mode == "rgb_array":
            return tuple(draw(self.episodes, row) for row in range(self.num_envs))
        return None

    def _shown(self) -> Any:
        """Return the observation of all rows, after one forward for those that went on or restarted."""
        observation = self.observe()
        if self.render_mode == "human":
            print("\n\n".join(describe(self.episodes, row) for row in range(self.num_envs)), flush=True)
        return observation

    def _no_rows(self) -> npt.NDArray[np.bool_]:
        return np.zeros(self.num_envs, np.bool_)

    def _begin(self, rows: Rows, given: Any) -> None:
        if given is None:
            prompts = [self._one_prompt(row, None) for row in rows]
        elif not isinstance(given, list | tuple):
            prompts = [as_prompt(given, "options['prompt']")] * len(rows)
        elif len(given) == self.num_envs:
            prompts = [self._one_prompt(row, given[row]) for row in rows]
        else:
            raise ConfigError(f"options['prompt'] must be one text or {self.num_envs} of them, got {len(given)}")
        self.episodes.begin(rows, prompts)

    def _one_prompt(self, row: int, given: Any) -> Prompt:
        """Return the prompt ``given`` to a row, or the one that it draws."""
        if given is None:
            return self.episodes.prompts.draw(self._seeded[row][0])
        return as_prompt(given, f"options['prompt'][{row}]")

    def _seed(self, rows: Rows, seed: RowSeeds) -> None:
        if seed is None:
            return
        given: Any = seed.tolist() if isinstance(seed, np.ndarray) else seed
        if not isinstance(given, Sequence):
            check_reset_seed(given)
            given = range(int(given), int(given) + self.num_envs)
        seeds = list(given)
        if len(seeds) != self.num_envs:
            raise ConfigError(f"seed must be one number or {self.num_envs} of them, got {len(seeds)}")
        for value in seeds:
            check_reset_seed(value)
        for row in rows:
            if seeds[row] is not None:
                self._seeded[row] = seeding.np_random(int(seeds[row]))

    def _masked_rows(self, mask: Any) -> Rows:
        if mask is None:
            return self._all
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ConfigError(
                f"reset_mask must be ({self.num_envs},) bool with at least one True, got {mask.dtype} {mask.tolist()}"
            )
        return self._all[mask]
