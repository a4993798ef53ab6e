"""``TextGen-v0``: one text at a time, as a Gymnasium environment.

The observation is the prefix, an action picks the next token among the candidates that a language
model proposes, the reward is any function of the text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import psutil
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from textgen_env.config import MOST_ROWS, EnvConfig, check_at_least, check_in_range
from textgen_env.conversation import UNLESS_SAID, make_partner
from textgen_env.episode import Episodes
from textgen_env.errors import CapacityError, ConfigError
from textgen_env.models import load_language_model
from textgen_env.models.base import LanguageModel
from textgen_env.observation import flatten, observation_space
from textgen_env.prompts import as_prompt, make_prompts
from textgen_env.render import describe, draw
from textgen_env.rewards import FunctionReward, make_reward
from textgen_env.rows import Snapshot
from textgen_env.spec import unwrap, wrap_objects

FIRST_ROW = np.zeros(1, np.int64)


class EpisodesMixin:
    """The properties that the single and the vector environment share."""

    episodes: Episodes
    _spec: EnvSpec | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return an environment in the same state, on the same model, prompts and reward."""
        new = memo[id(self)] = object.__new__(type(self))
        for name, value in vars(self).items():
            vars(new)[name] = value.copied() if name == "episodes" else copy.deepcopy(value, memo)
        return new

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "an environment is not pickled: it holds a language model and its caches. Give other processes a function "
            "that makes it, such as lambda: gym.make(...), or env.spec; within a process, copy.deepcopy works"
        )

    @property
    def language_model(self) -> LanguageModel:
        """The model that proposes, for agents that read its embeddings."""
        return self.episodes.model

    @property
    def max_new_tokens(self) -> int:
        """The budget of an episode, tokens; the observation's ``budget`` is a share of it."""
        return self.episodes.config.max_new_tokens

    @property
    def spec(self) -> EnvSpec | None:
        """The registration; objects in it are held by reference, since Gymnasium deep-copies specs."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = wrap_objects(spec)


class TextGenEnv(EpisodesMixin, gym.Env[Any, Any]):
    """Text generation, one token a step.

    ## Action space
    ``Discrete(k)``: action ``i`` appends ``candidates[i]``, the (i+1)-th likeliest next token.
    With ``top_k=None`` action ``i`` appends token id ``i``.

    ## Observation space
    A ``Dict`` of Boxes (T = max_prompt_tokens + max_new_tokens, k actions, d hidden units):

    | key | shape | meaning |
    |---|---|---|
    | `tokens` | (T,) int32 | prompt and generated ids, right-padded with 0 |
    | `length` | (1,) int32 | how many of them are real |
    | `budget` | (1,) float32 | share of `max_new_tokens` still left, 1 to 0 |
    | `candidates` | (k,) int32 | token id of each action |
    | `logprobs` | (k,) float32 | their log-probabilities, nats; masked ones -1e4 |
    | `score` | (1,) float32 | running reward of the text so far where the reward can score a prefix, else 0 |
    | `candidate_scores` | (k,) float32 | the running reward that each candidate would lead to |
    | `action_mask` | (k,) int8 | 1 where the action is allowed, never all 0 |
    | `hidden` | (d,) float32 | the model's last hidden state for the prefix |
    | `source` | (max_prompt_tokens,) int32 | the prompt's ids, padded with -1; only where it is named |

    An encoder-decoder reads the prompt once; its `tokens` are the decoder's, and `source` shows the prompt.

    ``observation="default"`` leaves out `hidden` and `candidate_scores`, ``"full"`` keeps all that
    the reward allows, a tuple names keys, ``"hidden"`` is one flat Box of hidden, logprobs, budget
    and score, ``"tokens"`` one of length, budget and the ids padded with -1.

    ## Rewards
    ``reward_at="end"``: the reward of the finished completion, once. ``"step"``: the increments of
    its running score, which sum to the same. The task is undiscounted: train with ``gamma=1.0``.

    ## Episode end
    ``terminated`` when an end token was chosen, a stop string appeared, or ``max_new_tokens`` were
    generated; ``truncated`` never. ``info`` then holds `prompt`, `completion`, `text`,
    `finish_reason`, `logprob` (nats) and `reward_parts`.

    ## Conversations
    With ``partner=`` an end token, a stop string or ``max_turn_tokens`` end a turn, and the partner's
    reply is appended in the same step. The episode ends when the partner says so, or after
    ``max_turns`` or ``max_new_tokens``. A reply may pay a reward, in its step; the environment's own is
    of everything behind the prompt. ``info`` then also holds `turns`. Three more keys can be named, and are
    part of ``"full"``: `turn`, (1,) int32, the turns that the agent has finished; `turn_budget`, (1,)
    float32, the share of the running turn's tokens still left, 1 to 0; `speaker`, (T,) int8, who each token
    is by: 0 the prompt (and padding), 1 the agent, 2 the partner. T also counts `max_turns` times
    `max_reply_tokens`. See ``textgen_env.conversation``.

    ## Reset
    ``reset(options={"prompt": text})`` chooses the prompt, a string, a ``Prompt`` or a dict with
    ``prompt``, ``reference`` and metadata; otherwise the seeded generator draws it.

    Args:
        model: A name, folder, hub id, GGUF file, ``LanguageModel`` or ``(model, tokenizer)``; see
            ``textgen_env.models.load_language_model``.
        prompts: See ``textgen_env.prompts.make_prompts``. None: the built-in ones.
        reward: See ``textgen_env.rewards.make_reward``. None, with a partner: its rewards alone.
        partner: See ``textgen_env.conversation.make_partner``. None: an episode is one text. With
            one, ``textgen_env.conversation.UNLESS_SAID`` goes over the defaults of the settings.
        settings: The fields of ``textgen_env.config.EnvConfig``, by name.

    Raises:
        ModelError, PromptError, RewardError, ConfigError, CapacityError: an argument cannot be
            used; the message names the valid ones.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        model: Any = "tiny",
        prompts: Any = None,
        reward: Any = "sentiment",
        partner: Any = None,
        **settings: Any,
    ) -> None:
        self.episodes = open_episodes(model, prompts, reward, settings, rows=1, partner=partner)
        self.render_mode = self.episodes.config.render_mode
        self.observation_space = observation_space(self.episodes.config, self.episodes.keys, self.language_model)
        self.action_space = spaces.Discrete(self.episodes.k)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start a text. See the class docstring for ``options``."""
        check_reset_seed(seed)
        super().reset(seed=None if seed is None else int(seed))
        given = chosen_prompt(options)
        prompt = self.episodes.prompts.draw(self.np_random) if given is None else as_prompt(given, "options['prompt']")
        self.episodes.begin(FIRST_ROW, [prompt])
        observation = self._observation()
        self._show_human()
        return observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Append the token that ``action`` stands for."""
        outcome = self.episodes.act(FIRST_ROW, np.atleast_1d(np.asarray(action)))
        observation = self._observation()
        self._show_human()
        return observation, float(outcome.rewards[0]), bool(outcome.ended[0]), False, outcome.infos[0]

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions are legal now, (k,) bool: MaskablePPO's protocol."""
        return self.episodes.legal(FIRST_ROW)[0]

    def judge(self) -> float:
        """Return the reward that the text would get if it ended here. Nothing is paid."""
        return float(self.episodes.judged(FIRST_ROW)[0])

    def snapshot(self) -> Snapshot:
        """Return the episode as it stands, model cache included: O(length of the text).

        The random generator is not part of it: it only draws later prompts.

        Raises:
            ResetNeeded: there was no reset yet.
        """
        return self.episodes.save(0)

    def restore(self, snapshot: Snapshot) -> Any:
        """Go back to ``snapshot`` and return its observation.

        Raises:
            ConfigError: another environment took it, or it is no snapshot.
        """
        self.episodes.load(0, snapshot)
        return self._observation()

    def render(self) -> Any:
        """Return the text and candidates as a string (``ansi``) or an image (``rgb_array``)."""
        if self.render_mode == "ansi":
            return describe(self.episodes, 0)
        if self.render_mode == "rgb_array":
            return draw(self.episodes, 0)
        return None  # human: shown at every reset and step

    def _observation(self) -> Any:
        observation = self.episodes.observe(FIRST_ROW)
        return flatten(self.episodes.config, {key: value[0] for key, value in observation.items()})

    def _show_human(self) -> None:
        if self.render_mode == "human":
            print(describe(self.episodes, 0), flush=True)


def open_episodes(
    model: Any, prompts: Any, reward: Any, settings: dict[str, Any], rows: int, partner: Any = None
) -> Episodes:
    """Return the episodes that the arguments of ``gym.make`` describe."""
    check_in_range("num_envs", rows, 1, MOST_ROWS)
    model, prompts, reward, partner = map(unwrap, (model, prompts, reward, partner))
    given = {name: unwrap(value) for name, value in settings.items()}
    answering = make_partner(partner)
    config = EnvConfig.from_settings(given if answering is None else {**UNLESS_SAID, **given})
    if answering is not None and reward is None:
        reward = FunctionReward(lambda completion: 0.0, "none")
    language_model = load_language_model(model, config.dtype, trust_remote_code=config.trust_remote_code)
    _check_memory(language_model, config, int(rows))
    return Episodes(language_model, make_prompts(prompts), make_reward(reward), config, int(rows), answering)


def _check_memory(model: LanguageModel, config: EnvConfig, rows: int) -> None:
    """Raise ``CapacityError`` if states and observations of the rows would not fit into memory.

    Of each token, candidate and hidden unit a few numbers of 4 bytes are kept: in the state, the observation, and
    the lower and upper bounds of its space. The model's cache is checked where it is made.
    """
    k = config.num_actions(model.vocab_size)
    needed = 4 * rows * (4 * config.max_length + 16 * k + 4 * model.hidden_size)
    free = psutil.virtual_memory().available
    if needed > free:
        raise CapacityError(
            f"{rows} rows of {config.max_length} tokens and {k} candidates need {needed:,} bytes and {free:,} are "
            "free: use fewer rows, shorter texts or a smaller top_k"
        )


def check_reset_seed(seed: object) -> None:
    """Raise ``ConfigError`` unless ``seed`` is None or a whole number from 0 on."""
    if seed is not None:
        check_at_least("seed", seed, 0)


def chosen_prompt(options: Mapping[str, Any] | None) -> Any:
    """Return ``options["prompt"]``, or None.

    Raises:
        ConfigError: an option that does not exist.
    """
    unknown = set(options or ()) - {"prompt"}
    if unknown:
        raise ConfigError(f"unknown reset options {sorted(unknown)}; known: 'prompt'")
    return (options or {}).get("prompt")
