"""TextDQN: the learner in the shell of a Stable-Baselines3 ``DQN``.

Constructor, ``learn``, callbacks, logger, ``save`` and ``load`` are SB3's; acting, remembering and
updating are the ``Learner``'s; files are ``portable``'s. What learning adds is judged against the
language model (or score lookahead), which the policy is before the first update.

    env.step -> collect_rollouts -> learner.act, learner.add
    learn    -> train            -> learner.update
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.common.vec_env import VecEnv

from agents.baselines.particles import ParticlesAgent, WeightedTexts, usual_pick
from agents.baselines.planning import ROWS
from agents.hub import MOST_WEIGHT_BYTES, fetched, push
from agents.sb3_vec import SB3VecEnv
from agents.space import write_space
from agents.text_dqn import portable
from agents.text_dqn.learner import Learner
from agents.text_dqn.networks import NEEDED_KEYS, CandidateQNetwork, check_observation_space
from agents.text_dqn.policy import CandidatePolicy
from agents.text_dqn.replay import EpisodeReplay
from agents.text_dqn.settings import check_settings
from agents.text_dqn.sources import EpisodeSource, add_step
from agents.text_dqn.steering import Steering
from agents.text_dqn.targets import TRACES
from agents.text_dqn.task import check_fits, check_trained_on, env_to_write_in, task_of
from agents.text_dqn.unjudged import UNJUDGED_ROWS, UnjudgedTexts
from agents.text_dqn.validation import Validated, validate
from textgen_env.config import check_at_least
from textgen_env.errors import CapacityError, ConfigError
from textgen_env.files import MOST_BYTES
from textgen_env.models.base import LanguageModel
from textgen_env.models.hub import load_language_model
from textgen_env.prompts import Prompt
from textgen_env.vector_env import TextGenVectorEnv

Self = TypeVar("Self", bound="TextDQN")

SB3_SETTINGS, LEARNER_SETTINGS = (signature(part).parameters for part in (DQN, Learner))
"""Which of the settings each of the two takes."""


class TextDQN(DQN):
    """A DQN that writes: it gets the reward without losing the language.

    Args:
        policy: ``"CandidatePolicy"``, or a subclass of it.
        env: An environment with the observation keys of ``networks.NEEDED_KEYS``: a
            ``gym.make_vec`` environment (taken as it is, one forward a step), a single one, or an
            SB3 ``VecEnv``.
        beta: Temperature of the policy, reward units a nat, positive. May be changed at any time,
            also after training: smaller is more reward and more KL.
        target_beta: The trade E[R] - target_beta KL that Q is trained for. None: ``beta``.
        beta_start, exploration_fraction, target, trace_lambda, steps_per_update, tau: See ``Learner``.
        score: Where the running scores come from that tell candidates apart before a text is finished:
            ``"given"``, the observation's; ``"learned"``, from rewards of finished
            texts, by a ``TextScorer``; ``"judge"``, learned as well, and while learning the reward is
            also asked about some prefixes, about ``learner.ASKED`` a text, as long as that helps; None, nothing is
            learned beside Q: scores that the observation has are used.
            ``"auto"``: given where the reward can score a prefix and the observation shows it, else learned.
        lm_share: Share of the texts that the language model itself writes while learning, which is what
            the scorer learns most from. None: a half with learned scores, else 0.
        unjudged: Where scores are learned: texts that the agent writes and learns from without asking the reward, for
            each one that is judged. They are no environment steps, but cost time, and memory for
            ``unjudged.UNJUDGED_ROWS`` further rows. 0: none. None are written in conversations, nor where a
            function makes the prompts: it may have an order, or an end. Prompts are those of the first environment.
        learning_starts: Environment steps before the first update.
        batch_size: Whole episodes a gradient step.
        buffer_size: Steps kept; see ``EpisodeReplay`` for the bytes.
        gamma: 1 unless said. Anything else is refused with running scores, whose increments only
            keep the optimum undiscounted.
        policy_kwargs: ``q_net_kwargs`` (``heads``, ``width``, ``memory``, ``dropout``),
            ``optimizer_class``, ``optimizer_kwargs``.

    Everything else is as in ``stable_baselines3.DQN``. Settings but ``beta`` are fixed once it is made.

    Raises:
        ConfigError: a value out of range, or an observation space without the keys needed.
        CapacityError: the replay would not fit into memory.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CandidatePolicy": CandidatePolicy}
    q_net: CandidateQNetwork  # type: ignore[assignment]
    q_net_target: CandidateQNetwork  # type: ignore[assignment]
    replay_buffer: EpisodeReplay  # type: ignore[assignment]
    learner: Learner

    def __init__(
        self,
        policy: str | type[CandidatePolicy] = "CandidatePolicy",
        env: GymEnv | VectorEnv[Any, Any, Any] | str | None = None,
        *,
        beta: float = 0.1,
        target_beta: float | None = None,
        beta_start: float | None = None,
        exploration_fraction: float = 1.0,
        target: str = "retrace",
        score: str | None = "auto",
        trace_lambda: float = 1.0,
        lm_share: float | None = None,
        unjudged: float = 4.0,
        learning_rate: float | Any = 1e-3,
        learning_starts: int = 5_000,
        steps_per_update: int = 80,
        batch_size: int = 32,
        tau: float = 0.02,
        buffer_size: int = 200_000,
        gamma: float = 1.0,
        max_grad_norm: float = 10.0,
        stats_window_size: int = 256,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        self.settings = check_settings(
            {
                "beta": beta,
                "target_beta": beta if target_beta is None else target_beta,
                "beta_start": beta_start,
                "exploration_fraction": exploration_fraction,
                "target": target,
                "score": score,
                "trace_lambda": trace_lambda,
                "lm_share": lm_share,
                "unjudged": unjudged,
                "learning_rate": learning_rate,
                "learning_starts": learning_starts,
                "steps_per_update": steps_per_update,
                "batch_size": batch_size,
                "tau": tau,
                "buffer_size": buffer_size,
                "gamma": gamma,
                "max_grad_norm": max_grad_norm,
                "stats_window_size": stats_window_size,
                "seed": seed,
            }
        )
        self.episode_source: EpisodeSource | None = None  # None: its own environment
        self._unjudged: UnjudgedTexts | None = None  # made when the first ones are due
        self.task: dict[str, Any] | None = None  # what it has learned on, as plain data
        self.model_name: str | None = None
        self.language_model: LanguageModel = None  # type: ignore[assignment]  # found in _setup_model
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            **{name: value for name, value in self.settings.items() if name in SB3_SETTINGS},
            train_freq=1,
            replay_buffer_class=EpisodeReplay,  # type: ignore[arg-type]
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    @property
    def beta(self) -> float:
        """Temperature of the policy, reward units a nat."""
        return self.learner.beta

    @beta.setter
    def beta(self, beta: float) -> None:
        self.learner.beta = beta

    @property
    def target_beta(self) -> float:
        """The trade E[R] - target_beta KL that Q is trained for."""
        return self.learner.objective.beta

    # --- acting

    def predict(
        self,
        observation: npt.NDArray[Any] | dict[str, npt.NDArray[Any]],
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[np.int64], tuple[npt.NDArray[Any], ...] | None]:
        """Return one action a row: sampled from the policy, or its most probable one."""
        logprobs, single = self._log_policy(observation)
        actions = logprobs.argmax(-1) if deterministic else self.learner.draw(np.exp(logprobs))
        return (actions[0] if single else actions), state

    def probabilities(self, observation: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        """Return pi over the candidates, (B, k), or (k,) for a single observation."""
        logprobs, single = self._log_policy(observation)
        return np.exp(logprobs[0] if single else logprobs)

    def _log_policy(self, observation: Any) -> tuple[npt.NDArray[np.float64], bool]:
        """Return log pi, (B, k), and whether the observation was a single one."""
        tensors, vectorized = self.policy.obs_to_tensor(observation)
        return self.learner.log_policy(tensors, self.beta), not vectorized  # type: ignore[arg-type]

    def write(
        self,
        prompts: Sequence[str | Prompt],
        particles: int = 8,
        *,
        reward: Any = None,
        seed: int | None = None,
        **settings: Any,
    ) -> list[WeightedTexts]:
        """Write a text for each prompt, each picked from ``particles`` weighted ones.

        It costs so many times the tokens of a text, and one call of the reward for each of them. With 1
        the texts are the policy's own; as there are more, they follow the best policy at ``target_beta``,
        at whatever temperature the agent acts.

        Args:
            prompts: Texts, or ``Prompt`` objects.
            particles: Texts to draw each text from, at least 1.
            reward: What judges them. None: that of the agent's environment, or the stored one. Where it
                was not stored the last weight is left out: the texts follow Q alone.
            seed: Of the random numbers. None: goes on with the agent's own.
            settings: ``beta``, ``pick``, ``trust``, ``threshold``, ``judge`` and ``rows`` of ``ParticlesAgent``;
                ``pick`` is that of ``usual_pick`` unless given.

        Raises:
            ConfigError: a value out of range, a task that the agent does not know, or scores that it needs
                of a reward that was not stored.
            CapacityError: the rows do not fit into memory.
        """
        check_at_least("particles", particles, 1)
        if seed is None:
            seed = int(self.learner.rng.integers(2**63))
        sees_scores = self.q_net.reads_given_scores
        env, is_judged = env_to_write_in(self.env, self.task, self.language_model, reward, sees_scores)
        settings = {"judge": is_judged, "rows": min(ROWS, particles * max(1, len(prompts))), **settings}
        settings.setdefault("pick", usual_pick(particles, settings["judge"]))
        return ParticlesAgent(env, seed, n=particles, values=self, **settings).write(prompts)

    def logits_processor(self, model: Any, *, max_new_tokens: int | None = None, reward: Any = None) -> Steering:
        """Return what steers ``model.generate`` with this agent: a context manager and logits processor in one::

            with agent.logits_processor(model) as steer:
                model.generate(**inputs, logits_processor=[steer], **steer.settings)

        Args:
            model: The Hugging Face causal LM that generates.
            max_new_tokens: As given to ``generate``. None: those that the agent was trained with.
            reward: Where the agent sees running scores: see ``make_reward``. None: the stored one.

        Raises:
            ModelError: another language model than the agent's.
            ConfigError: scores are needed, and the reward is neither stored nor given.
        """
        return Steering(self.learner, self.language_model, self.task, model, max_new_tokens, reward)

    # --- learning

    def learn(  # the names and order are SB3's
        self: Self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 64,
        tb_log_name: str = "TextDQN",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for ``total_timesteps`` environment steps; as in SB3."""
        if self.env is None:
            raise ConfigError("the agent has no environment to learn in: use load(path, env=env) or set_env(env)")
        self.task = task_of(self.env)
        if self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs:
            raise ConfigError(
                "VecNormalize normalises observations, among them token ids and masks: give it norm_obs=False"
            )
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any
    ) -> tuple[int, BaseCallback]:
        if reset_num_timesteps or self._last_obs is None:  # SB3 resets the environment: its texts do not go on
            self.replay_buffer.give_up_open()
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> RolloutReturn:
        """Take one step in the environment, or texts from ``episode_source``; as in SB3."""
        callback.on_rollout_start()
        if self.episode_source is not None:
            return self._collect_from(self.episode_source, callback)
        observation: Any = self._last_obs
        acted = self.learner.act(observation, self._progress)
        self.logger.record_mean("rollout/kl_per_token", acted.kl)
        new_obs, rewards, dones, infos = env.step(acted.actions)
        self.num_timesteps += env.num_envs
        callback.update_locals(
            {"actions": acted.actions, "new_obs": new_obs, "rewards": rewards, "dones": dones, "infos": infos}
        )
        goes_on = callback.on_step()  # if not, the step is still one of a text that a later ``learn`` goes on with
        self._update_info_buffer(infos, dones)
        if self._vec_normalize_env is not None:  # the replay keeps rewards as they are paid, as SB3's does
            rewards = self._vec_normalize_env.get_original_reward()
        add_step(self.learner, observation, new_obs, acted, rewards, dones, infos, self._judged(env, dones))
        self._last_obs = new_obs  # type: ignore[assignment]  # Dict observations
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        for _ in range(int(dones.sum())):
            self._episode_num += 1
            log_interval = kwargs.get("log_interval")
            if log_interval is not None and self._episode_num % log_interval == 0:
                self.dump_logs()
        callback.on_rollout_end()
        return RolloutReturn(env.num_envs, int(dones.sum()), goes_on)

    def _judged(self, env: VecEnv, dones: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64] | None:
        """Return what the judge says of some prefixes, (N,), NaN where it is not asked; None if it never is."""
        if self.settings["score"] != "judge":
            return None
        judged = np.full(len(dones), np.nan)
        rows = self.learner.asks_about(~dones)
        if rows.size:
            judged[rows] = env.env_method("judge", indices=rows.tolist())
        return judged

    def _collect_from(self, source: EpisodeSource, callback: BaseCallback) -> RolloutReturn:
        found = source.collect(self.learner, self.logger, self._progress, self._total_timesteps - self.num_timesteps)
        if found is None:
            return RolloutReturn(0, 0, continue_training=True)
        self.learner.put(found.steps, found.lengths, found.counted)
        self.num_timesteps += found.counted
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        self._episode_num += len(found.lengths)
        self._update_info_buffer(found.infos)
        callback.update_locals({"infos": found.infos})
        goes_on = callback.on_step()
        callback.on_rollout_end()
        return RolloutReturn(found.counted, len(found.lengths), goes_on)

    def train(self, gradient_steps: int, batch_size: int = 32) -> None:
        """Do the gradient steps that ``steps_per_update`` owes by now."""
        owed = self.learner.updates_owed
        if not owed:
            return
        self._update_learning_rate(self.policy.optimizer)
        losses = self.learner.update(owed)
        self.learn_unjudged()
        self._n_updates = self.learner.updates
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", float(losses.mean()))
        self.logger.record("train/behaviour_beta", self.learner.behaviour_beta(self._progress))
        self.logger.record("train/unjudged_steps", self.learner.unjudged_steps)

    def learn_unjudged(self) -> None:
        """Write and learn from the unjudged texts that are due, where they can teach something.

        Raises:
            CapacityError: so many rows beside the environment's own do not fit into memory.
        """
        length = self.q_net.max_new_tokens
        if self.learner.unjudged_owed < UNJUDGED_ROWS * length:
            return
        assert self.env is not None
        task = self.task or {}
        useless = not self.learner.unjudged or self.settings["target"] not in TRACES or length == 1
        if useless or "partner" in task or not task.get("prompts"):  # a function's have no number
            self.learner.unjudged_owed = 0.0
            return
        if self._unjudged is None:
            episodes = self.env.get_attr("episodes")[0]
            try:
                env, _ = env_to_write_in(
                    self.env, self.task, episodes.model, lambda text: 0.0, sees_scores=False, rows=UNJUDGED_ROWS,
                    prompts=episodes.prompts, observation=NEEDED_KEYS, reward_at="end",
                )  # fmt: skip
            except CapacityError as error:
                raise CapacityError(f"unjudged texts, {UNJUDGED_ROWS} at a time: {error}; or set unjudged=0") from error
            self._unjudged = UnjudgedTexts(env, self.device)
        while self.learner.unjudged_owed >= self._unjudged.steps:
            self._unjudged.write(self.learner, self._progress)
            self.learner.learn_unjudged(self._unjudged, self._unjudged.steps)

    def fit(self, gradient_steps: int) -> npt.NDArray[np.float64]:
        """Do gradient steps on the texts in the replay, without stepping an environment; return their losses.

        ``agents.text_dqn.offline.fill_replay`` fills the replay with recorded texts.

        Raises:
            ConfigError: the replay holds no finished text.
        """
        if not hasattr(self, "_logger"):
            self.set_logger(Logger(None, []))
        losses = np.zeros(gradient_steps)
        for i in range(gradient_steps):
            self._current_progress_remaining = 1.0 - i / gradient_steps
            self._update_learning_rate(self.policy.optimizer)
            losses[i] = self.learner.update(offline=True)[0]
        self._n_updates = self.learner.updates
        return losses

    def choose_beta(
        self, env: TextGenVectorEnv, texts: int = 256, seed: int = 0, prompts: Sequence[Prompt] | None = None
    ) -> Validated:
        """Act at the temperature that does best from now on, the language model itself included.

        Args:
            env: Used, and left without live episodes.
            texts: Written at each temperature.
            seed: The same luck for all.
            prompts: To write on, better none that were measured on. None: those of ``env``.
        """
        vector = getattr(env, "unwrapped", env)
        if not isinstance(vector, TextGenVectorEnv):
            raise ConfigError(
                "choose_beta writes many texts at a time: give it gym.make_vec('TextGen-v0', ...), got "
                f"{type(vector).__name__}"
            )
        space = check_observation_space(self.observation_space)
        if missing := [key for key in space.spaces if key not in vector.episodes.keys]:
            raise ConfigError(
                f"the observation lacks {', '.join(missing)}, which the agent was trained with: make the environment "
                "with the same observation"
            )
        return validate(self, self.learner, vector, texts, seed, prompts)

    @property
    def _progress(self) -> float:
        """Share of the current ``learn`` that is done; a little above 1 in its last step."""
        return 1.0 - self._current_progress_remaining

    # --- SB3 asks for the parts

    def _setup_model(self) -> None:
        self.language_model = language_model = self._find_language_model()
        if self.task is None and self.env is not None:
            self.task = task_of(self.env)
        space = check_observation_space(self.observation_space)
        if self.gamma != 1.0 and "score" in space.spaces:
            raise ConfigError(
                f"gamma must be 1 where the observation has running scores, got {self.gamma}: their increments keep "
                "the optimum only undiscounted; leave gamma out, or make the environment without 'score'"
            )
        self.model_name = language_model.name
        self.policy_kwargs = self.policy_kwargs | {"q_net_kwargs": self._network_settings(language_model)}
        self.replay_buffer = EpisodeReplay(
            self.buffer_size, space, self.device, self.n_envs, self.seed, shapes=not self._learns_scores()
        )
        super()._setup_model()
        for network in (self.q_net, self.q_net_target):
            network.bind(language_model)
        settings = {**self.settings, "lm_share": self._share_of_language_model()}
        self.learner = Learner(
            self.q_net,
            self.q_net_target,
            self.policy.optimizer,
            self.replay_buffer,
            rng=np.random.default_rng(self.seed),
            **{name: value for name, value in settings.items() if name in LEARNER_SETTINGS},
        )

    def _network_settings(self, language_model: LanguageModel) -> dict[str, Any]:
        kwargs = {"embedding_size": language_model.embedding_size, **self.policy_kwargs.get("q_net_kwargs", {})}
        if self.env is not None:
            kwargs["max_new_tokens"] = self.env.get_attr("max_new_tokens")[0]
            talks = self.env.has_attr("episodes") and self.env.get_attr("episodes")[0].partner is not None
            if talks and "speaker" not in check_observation_space(self.observation_space).spaces:
                raise ConfigError(
                    "in a conversation TextDQN must know which tokens are its own: make the environment with "
                    "observation='full', or with 'speaker' among the keys"
                )
        if self._learns_scores():
            kwargs["vocab_size"] = language_model.vocab_size
        if self.settings["target"] == "q_sharp":
            kwargs = {"atoms": 51, **kwargs, "beta": self.settings["target_beta"]}
        return kwargs

    def _learns_scores(self) -> bool:
        score, space = self.settings["score"], check_observation_space(self.observation_space)
        given = "score" in space.spaces and (self.task is None or self.task.get("scores", True))
        if score in ("learned", "judge") and self.gamma != 1.0:
            raise ConfigError(
                f"score={score!r} needs gamma=1, got {self.gamma}: potentials keep the optimum undiscounted"
            )
        if score == "given" and not given:
            raise ConfigError(
                "score='given' needs running scores, and this environment shows none: take a reward that can score a "
                "prefix and observation='full', or score='auto', which learns scores where none are given"
            )
        return score in ("learned", "judge") or (score == "auto" and not given and self.gamma == 1.0)

    def _share_of_language_model(self) -> float:
        share = self.settings["lm_share"]
        return (0.5 if self._learns_scores() else 0.0) if share is None else share

    def _find_language_model(self) -> LanguageModel:
        if self.env is not None:
            return self.env.get_attr("language_model")[0]
        if self.language_model is not None:
            return self.language_model
        if self.model_name is None:
            raise ConfigError("TextDQN needs an environment: pass env=gym.make_vec('TextGen-v0', ...)")
        return load_language_model(self.model_name)

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Learn in ``env`` from now on; as in SB3.

        Raises:
            ModelError: it has another language model.
            ConfigError: its sizes or spaces are others.
        """
        env = self._wrap_env(env, self.verbose)
        check_fits(env, self.task, self.observation_space, self.action_space)
        super().set_env(env, force_reset)
        self._unjudged = None

    def set_random_seed(self, seed: int | None = None) -> None:
        super().set_random_seed(seed)
        if seed is not None and hasattr(self, "learner"):
            self.learner.rng = np.random.default_rng(seed)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VectorEnv):
            env = SB3VecEnv(env)
        return DQN._wrap_env(env, verbose, monitor_wrapper)

    # --- files

    def save(self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Write SB3's zip, but without a pickle in it: settings as JSON, weights for ``weights_only``.

        Stored are the settings and counters of ``agents.text_dqn.settings``. One that has no plain
        form is left out, and ``load`` asks for it. The replay has ``save_replay_buffer``; the
        language model is not stored.

        Args:
            exclude: Settings to leave out; ``load`` takes the constructor's defaults.
            include: Settings to store although they are in ``exclude``.
        """
        excluded = set(exclude or ()) - set(include or ())
        save_to_zip_file(path, data=self._described(excluded), params=self.get_parameters())

    @classmethod
    def load(  # the names and order are SB3's
        cls: type[Self],
        path: Any,
        env: GymEnv | VectorEnv[Any, Any, Any] | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Read what ``save`` wrote; as in SB3, but nothing is unpickled.

        Args:
            custom_objects: Settings in place of the stored ones; other names are passed over.
            kwargs: The same, or another argument of the constructor.

        Raises:
            ConfigError: no zip of a ``TextDQN``, a damaged one, or pickled entries in it.
            ModelError: the environment has another language model or vocabulary.
        """
        if unknown := sorted(kwargs.keys() - signature(cls).parameters):
            raise ConfigError(f"TextDQN has no settings {', '.join(unknown)}: leave them out, or spell them as it does")
        given = {**(custom_objects or {}), **kwargs}
        agent = cls._restored(portable.read_zip(path), given, env, None, device, path)
        with portable.reporting_damage(path):
            _, parameters, _ = load_from_zip_file(
                path, device=device, load_data=False, print_system_info=print_system_info
            )
            agent.set_parameters(parameters, exact_match=True, device=device)
            portable.check_finite(agent.policy.state_dict())
        return agent

    def save_pretrained(self, folder: Any, space: bool = False) -> None:
        """Write a folder to share: safetensors, JSON, and a model card. No optimiser, no replay.

        Args:
            space: Also write what makes it a Space of the Hugging Face Hub: an ``app.py`` that opens the
                playground, its requirements, and a Space's metadata on the card.
        """
        stored, numbers = self._described(), sum(parameter.numel() for parameter in self.q_net.parameters())
        card = portable.model_card(stored, self.language_model.vocab_size, numbers)
        portable.save_pretrained(Path(folder), stored, self.policy.state_dict(), card)
        if space:
            write_space(Path(folder), self.task)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        results: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Add a TextDQN",
    ) -> str:
        """Upload what ``save_pretrained`` writes to the Hugging Face Hub, and return the address of the commit.

        Args:
            repo_id: ``"user/agent"``; made if it does not exist.
            results: Measures for the card and the hub's metadata, numbers by name, such as
                ``evaluate(...).figures()``. Other values are left out.
            private: Visibility of a new repository. None: as the user's default is.
            token: Of the hub. None: that of ``hf auth login`` or ``HF_TOKEN``.
            commit_message: Of the commit.

        Raises:
            ConfigError: no such form of an id, no right to write, or the hub cannot be reached.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(Path(folder), repo_id, results or {}, private=private, token=token, message=commit_message)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        folder: Any,
        env: Any = None,
        *,
        model: Any = None,
        device: torch.device | str = "auto",
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Return the agent that ``save_pretrained`` or ``push_to_hub`` wrote, to act, to steer, or to learn on.

        Args:
            folder: What ``save_pretrained`` wrote, or ``"user/agent"`` on the Hugging Face Hub. It means the
                hub where there is no folder ``user`` here.
            env: An environment like the one it was trained in.
            model: Without ``env``: its language model, as ``load_language_model`` takes it. None:
                the one of the same name.
            revision: Branch, tag or commit on the hub. None: the main branch.
            token: Of the hub. None: that of ``hf auth login`` or ``HF_TOKEN``.

        Raises:
            ConfigError: no such folder or repository, or a damaged one.
            ModelError: another language model or vocabulary than it was trained on.
        """
        files = {portable.SETTINGS_FILE: MOST_BYTES, portable.WEIGHTS_FILE: MOST_WEIGHT_BYTES}
        stored, weights = portable.read_pretrained(fetched(folder, files, revision, token))
        agent = cls._restored(stored, {}, env, model, device, repr(str(folder)))
        with portable.reporting_damage(folder):
            agent.policy.load_state_dict(weights)
            portable.check_finite(weights)
        return agent

    @classmethod
    def _restored(
        cls: type[Self], stored: Any, given: Mapping[str, Any], env: Any, model: Any, device: Any, source: Any
    ) -> Self:
        """Return an agent with the settings and counters that are ``stored``, and new weights."""
        found = portable.restored(stored, given, cls.policy_aliases, source)
        if env is not None:
            env = cls._wrap_env(env)
            check_fits(env, found.task, found.observation_space, found.action_space)
            language_model = env.get_attr("language_model")[0]
        else:
            language_model = load_language_model(found.model_name if model is None else model)
            check_trained_on(found.task, language_model)
        with portable.reporting_damage(source):
            agent = cls(
                found.policy_class, None, policy_kwargs=found.policy_kwargs, device=device, _init_setup_model=False,
                **found.settings, **{name: given[name] for name in ("tensorboard_log", "verbose") if name in given},
            )  # fmt: skip
            agent.observation_space, agent.action_space = found.observation_space, found.action_space
            agent.n_envs, agent.task, agent.language_model = found.n_envs, found.task, language_model
            if env is not None:
                agent.env, agent.n_envs = env, env.num_envs
            agent._setup_model()
            agent._load_counters(found.counters)
        return agent

    def _described(self, excluded: Iterable[str] = ()) -> dict[str, Any]:
        """Return settings and counters as plain data; ``left_out`` names what has no such form."""
        settings = {**self.settings, "beta": self.beta}
        names = [name for name, policy in self.policy_aliases.items() if policy is self.policy_class]
        return portable.described(
            {name: value for name, value in settings.items() if name not in set(excluded)},
            policy_class=names[0] if names else None,
            policy_kwargs=self.policy_kwargs,
            observation_space=self.observation_space,
            action_space=self.action_space,
        ) | {
            "n_envs": self.n_envs,
            "model_name": self.model_name,
            "task": self.task,
            "counters": self._counters(),
        }

    def _counters(self) -> dict[str, Any]:
        return {
            "num_timesteps": self.num_timesteps,
            "episodes": self._episode_num,
            "progress_remaining": self._current_progress_remaining,
            "learner": self.learner.counters(),
        }

    def _load_counters(self, stored: Mapping[str, Any]) -> None:
        self.num_timesteps = stored["num_timesteps"]
        self._episode_num = stored["episodes"]
        self._current_progress_remaining = stored["progress_remaining"]
        self.learner.load_counters(stored["learner"])
        self._n_updates = self.learner.updates

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return learner, counters and the rows of the environment, as tensors and plain data.

        The environment forgets its caches: who goes on and who resumes are alike.

        Raises:
            ConfigError: its environment is no native vector environment.
        """
        arrays, rows = self._native_env().state_dict()
        tensors, learner = self.learner.state_dict()
        tensors |= {f"env.{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return tensors, {"env": rows, "learner": learner, "agent": self._described()}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        """Put an agent, made with the same settings, where the stored one was.

        Raises:
            ConfigError: its environment is no native vector environment, or of another shape.
            ModelError: it was trained on another language model or vocabulary.
            KeyError, RuntimeError, TypeError, ValueError: it is of another agent, or damaged.
        """
        check_trained_on(plain["agent"]["task"], self.language_model)
        counters = portable.checked_counters(plain["agent"]["counters"])
        self.learner.load_state_dict(tensors, plain["learner"])
        env = self._native_env()
        env.load_state_dict(
            {name.removeprefix("env."): t.numpy() for name, t in tensors.items() if name.startswith("env.")},
            plain["env"],
        )
        self.beta = plain["agent"]["beta"]
        self._load_counters(counters)
        observation: Any = env.observe()
        self._last_obs = observation
        self._last_episode_starts = np.zeros(env.num_envs, bool)

    def _native_env(self) -> SB3VecEnv:
        if not isinstance(self.env, SB3VecEnv):
            raise ConfigError(
                f"a checkpoint holds the rows of a native vector environment, got {type(self.env).__name__}: make it "
                "with gym.make_vec('TextGen-v0', ...)"
            )
        return self.env

    def save_replay_buffer(self, path: Any) -> None:
        """Write the replay as one safetensors file."""
        portable.write_replay(self.replay_buffer, Path(path))

    def load_replay_buffer(self, path: Any, truncate_last_traj: bool = True) -> None:
        """Read what ``save_replay_buffer`` wrote; the buffer's shape must be the same.

        Raises:
            ConfigError: no replay file, or one of another shape.
        """
        portable.read_replay(self.replay_buffer, Path(path))
