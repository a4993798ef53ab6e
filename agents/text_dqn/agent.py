"""TextDQN: soft Q-learning over the candidates of a language model, as an SB3 ``DQN``.

The policy is the language model, tilted: pi(a|s) proportional to mu(a|s) exp(Q(s, a) / beta).
Before the first update Q is equal for all candidates, so the policy *is* the language model (or
exactly score lookahead, where the observation has ``candidate_scores``); what learning adds is
judged against that, and ``beta`` says what a nat of KL is worth.

    observation -> CandidateQNetwork -> Q (B, k) -> + log mu, / beta -> pi -> action
    episodes -> EpisodeReplay -> lambda_targets (slow network) -> squared error -> AdamW
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import save_to_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.common.utils import check_for_correct_spaces, polyak_update
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.dqn.policies import DQNPolicy

from agents.sb3_vec import SB3VecEnv
from agents.text_dqn import portable
from agents.text_dqn.networks import CandidateQNetwork, check_observation_space, prior
from agents.text_dqn.replay import EpisodeReplay
from agents.text_dqn.targets import OBJECTIVES, ObjectiveSettings, log_policy
from textgen_env.errors import ConfigError
from textgen_env.models import load_language_model
from textgen_env.models.base import LanguageModel
from textgen_env.policies import kl_to, renormalise, sample

if TYPE_CHECKING:
    from agents.text_dqn.steering import Steering

Self = TypeVar("Self", bound="TextDQN")


class CandidatePolicy(DQNPolicy):
    """The online and the slow candidate network, and the optimiser of the first.

    Args:
        q_net_kwargs: For ``CandidateQNetwork``.
        optimizer_class, optimizer_kwargs: AdamW with a weight decay of 0.1 unless said.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Any,
        q_net_kwargs: dict[str, Any],
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.q_net_kwargs = q_net_kwargs
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            optimizer_class=optimizer_class,
            optimizer_kwargs={"weight_decay": 0.1} if optimizer_kwargs is None else optimizer_kwargs,
        )

    def make_q_net(self) -> CandidateQNetwork:  # type: ignore[override]
        space = check_observation_space(self.observation_space)
        assert isinstance(self.action_space, spaces.Discrete)  # SB3 has checked it
        return CandidateQNetwork(space, self.action_space, **self.q_net_kwargs).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        kept = super()._get_constructor_parameters()
        for name in ("net_arch", "activation_fn", "features_extractor_class", "features_extractor_kwargs"):
            kept.pop(name)
        return kept | {"q_net_kwargs": self.q_net_kwargs}


class EpisodeSource(Protocol):
    """Who writes the texts that an agent learns from, where its own environment does not."""

    def collect(self, agent: TextDQN, callback: BaseCallback) -> RolloutReturn:
        """Add some episodes to the agent's replay and count their steps, as ``DQN.collect_rollouts`` does."""
        ...


class TextDQN(DQN):
    """A DQN that writes: it gets the reward without losing the language.

    Args:
        policy: ``"CandidatePolicy"``, or a subclass of it.
        env: An environment with the observation keys of ``q_networks.NEEDED_KEYS``: a
            ``gym.make_vec`` environment (taken as it is, one forward a step), a single one, or an
            SB3 ``VecEnv``.
        beta: Temperature of the policy, reward units a nat, positive. May be changed at any time,
            also after training: smaller is more reward and more KL.
        target_beta: The trade E[R] - target_beta KL that Q is trained for. None: ``beta``.
        beta_start: Temperature of the behaviour at the first step; it falls geometrically to
            ``beta`` over ``exploration_fraction`` of the training.
        target, trace_lambda: See ``agents.text_dqn.targets``.
        learning_starts: Environment steps before the first update.
        steps_per_update: Environment steps for each gradient step.
        batch_size: Whole episodes a gradient step.
        tau: Share of the online network that the slow one takes over at each gradient step. The
            slow network gives the targets, acts, and is evaluated.
        buffer_size: Steps kept; see ``EpisodeReplay`` for the bytes.
        gamma: 1 unless said. Anything else is refused with running scores, whose increments only
            keep the optimum undiscounted.
        policy_kwargs: ``q_net_kwargs`` (``heads``, ``width``, ``memory``, ``dropout``),
            ``optimizer_class``, ``optimizer_kwargs``.

    Everything else is as in ``stable_baselines3.DQN``.

    Raises:
        ConfigError: a value out of range, or an observation space without the keys needed.
        CapacityError: the replay would not fit into memory.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CandidatePolicy": CandidatePolicy}
    q_net: CandidateQNetwork  # type: ignore[assignment]
    q_net_target: CandidateQNetwork  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[CandidatePolicy] = "CandidatePolicy",
        env: GymEnv | VectorEnv[Any, Any, Any] | str | None = None,
        *,
        beta: float = 0.1,
        target_beta: float | None = None,
        beta_start: float = 0.4,
        exploration_fraction: float = 1.0,
        target: str = "retrace",
        trace_lambda: float = 1.0,
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
        self.target_beta = _positive("target_beta", beta if target_beta is None else target_beta)
        self.beta = beta
        self.beta_start = _positive("beta_start", beta_start)
        self.target = target
        self.trace_lambda = trace_lambda
        self.steps_per_update = steps_per_update
        self.episode_source: EpisodeSource | None = None  # None: its own environment
        self.offline_updates = 0  # gradient steps that no environment step has paid for
        self.model_name: str | None = None
        self.task: dict[str, Any] | None = None  # what it has learned on, as plain data
        self.language_model: LanguageModel = None  # type: ignore[assignment]  # found in _setup_model
        self._rng = np.random.default_rng(seed)
        self._behaviour_logprobs: npt.NDArray[np.float64] | None = None
        self._by_reference: npt.NDArray[np.bool_] | None = None
        self._hand_over_at: int | list[int] = 0  # the step from which the language model finishes each row's text
        OBJECTIVES[target]  # an unknown name is refused here, with a suggestion
        if steps_per_update < 1:
            raise ConfigError(f"steps_per_update must be at least 1, got {steps_per_update}")
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=1,
            replay_buffer_class=EpisodeReplay,
            exploration_fraction=exploration_fraction,
            max_grad_norm=max_grad_norm,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    @property
    def beta(self) -> float:
        """Temperature of the policy, reward units a nat."""
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        self._beta = _positive("beta", beta)

    # --- acting

    def predict(
        self,
        observation: npt.NDArray[Any] | dict[str, npt.NDArray[Any]],
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[np.int64], tuple[npt.NDArray[Any], ...] | None]:
        """Return one action a row: sampled from the policy, or its most probable one."""
        logprobs, single = self._log_policy(observation, self.beta)
        actions = logprobs.argmax(-1) if deterministic else self._draw(np.exp(logprobs))
        return (actions[0] if single else actions), state

    def probabilities(self, observation: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        """Return pi over the candidates, (B, k), or (k,) for a single observation."""
        logprobs, single = self._log_policy(observation, self.beta)
        return np.exp(logprobs[0] if single else logprobs)

    def behaviour_beta(self) -> float:
        """Return the temperature that acts while learning, annealed from ``beta_start`` to ``beta``."""
        done = 1.0 - self._current_progress_remaining
        share = 1.0 if self.exploration_fraction <= 0 else min(1.0, done / self.exploration_fraction)
        return float(self.beta_start * (self.beta / self.beta_start) ** share)

    def _draw(self, policy: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return one action a row, each drawn with a random number of its own."""
        return sample(policy, self._rng.random(len(policy)))

    def _log_policy(self, observation: Any, beta: float) -> tuple[npt.NDArray[np.float64], bool]:
        """Return log pi at temperature ``beta``, (B, k), and whether the observation was a single one."""
        tensors, vectorized = self.policy.obs_to_tensor(observation)
        with torch.inference_mode():
            logprobs = log_policy(prior(tensors), self.q_net_target(tensors), beta)  # type: ignore[arg-type]
        return logprobs.double().cpu().numpy(), not vectorized

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        assert isinstance(self._last_obs, dict)  # check_observation_space has seen to it
        logprobs, _ = self._log_policy(self._last_obs, self.behaviour_beta())
        log_mu, _ = renormalise(self._last_obs["logprobs"], self._last_obs["action_mask"])
        self._by_reference = self._handed_over(n_envs)
        logprobs = np.where(self._by_reference[:, None], log_mu, logprobs)
        policy = np.exp(logprobs)
        actions = self._draw(policy)
        self._behaviour_logprobs = logprobs[np.arange(n_envs), actions]
        self.logger.record_mean("rollout/kl_per_token", float(kl_to(policy, log_mu).mean()))
        return actions, actions

    def _handed_over(self, n_envs: int) -> npt.NDArray[np.bool_]:
        """Return the rows, (N,), that the language model finishes: from a random step on, where the target asks."""
        if self.target != "q_sharp":
            return np.zeros(n_envs, bool)
        assert isinstance(self._last_obs, dict)
        budget = self.q_net.max_new_tokens
        step = np.rint((1.0 - self._last_obs["budget"][:, 0]) * budget)
        fresh = step == 0
        at = np.where(fresh, self._rng.integers(budget, size=n_envs), self._hand_over_at)
        self._hand_over_at = at.tolist()
        return np.asarray(step >= at)

    # --- learning

    def train(self, gradient_steps: int, batch_size: int = 32) -> None:
        """Do the gradient steps that ``steps_per_update`` owes by now."""
        assert isinstance(self.replay_buffer, EpisodeReplay)
        owed = self.num_timesteps // self.steps_per_update - (self._n_updates - self.offline_updates)
        if owed < 1 or self.replay_buffer.episodes_seen == 0:
            return
        if self._n_updates == 0:
            self._start_at_returns(self.replay_buffer)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        losses = [self._update(self.replay_buffer, batch_size) for _ in range(owed)]
        self.policy.set_training_mode(False)
        self._n_updates += owed
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", float(np.mean(losses)))
        self.logger.record("train/behaviour_beta", self.behaviour_beta())

    def fit(self, gradient_steps: int) -> npt.NDArray[np.float64]:
        """Do gradient steps on the texts in the replay, without stepping an environment; return their losses.

        ``agents.text_dqn.offline.fill_replay`` fills the replay with recorded texts.

        Raises:
            ConfigError: the replay holds no finished text.
        """
        assert isinstance(self.replay_buffer, EpisodeReplay)
        if not hasattr(self, "_logger"):
            self.set_logger(Logger(None, []))
        if self._n_updates == 0:
            self._start_at_returns(self.replay_buffer)
        self.policy.set_training_mode(True)
        losses = np.zeros(gradient_steps)
        for i in range(gradient_steps):
            self._current_progress_remaining = 1.0 - i / gradient_steps
            self._update_learning_rate(self.policy.optimizer)
            losses[i] = self._update(self.replay_buffer, self.batch_size)
        self.policy.set_training_mode(False)
        self._n_updates += gradient_steps
        self.offline_updates += gradient_steps
        return losses

    def _start_at_returns(self, replay: EpisodeReplay) -> None:
        first = replay.sample(256)
        for network in (self.q_net, self.q_net_target):
            network.start_at((first.rewards * first.acted).sum(-1))

    def _update(self, replay: EpisodeReplay, batch_size: int) -> float:
        batch = replay.sample(batch_size)
        trade = ObjectiveSettings(self.target_beta, self.trace_lambda, self.gamma)
        loss = OBJECTIVES[self.target](self.q_net, self.q_net_target, batch, trade)
        self.policy.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.q_net.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()
        polyak_update(self.q_net.parameters(), self.q_net_target.parameters(), self.tau)
        return float(loss.detach())

    # --- what SB3 calls

    def _setup_model(self) -> None:
        self.language_model = language_model = self._find_language_model()
        if self.task is None and self.env is not None:
            self.task = portable.task_of(self.env)
        if self.gamma != 1.0 and "score" in getattr(self.observation_space, "spaces", {}):
            raise ConfigError(
                f"gamma must be 1 where the observation has running scores, got {self.gamma}: their increments keep "
                "the optimum only undiscounted; leave gamma out, or make the environment without 'score'"
            )
        check_observation_space(self.observation_space)
        self.model_name = language_model.name
        kwargs = dict(self.policy_kwargs.get("q_net_kwargs", {}))
        kwargs.setdefault("embedding_size", language_model.embedding_size)
        if self.env is not None:
            kwargs["max_new_tokens"] = self.env.get_attr("max_new_tokens")[0]
        if self.target == "q_sharp":
            kwargs = {"atoms": 51, **kwargs, "beta": self.target_beta}
        self.policy_kwargs["q_net_kwargs"] = kwargs
        self.replay_buffer_kwargs = {"seed": self.seed}
        super()._setup_model()
        for network in (self.q_net, self.q_net_target):
            network.bind(language_model)

    def _find_language_model(self) -> LanguageModel:
        if self.env is not None:
            return self.env.get_attr("language_model")[0]
        if self.language_model is not None:
            return self.language_model
        if self.model_name is None:
            raise ConfigError("TextDQN needs an environment: pass env=gym.make_vec('TextGen-v0', ...)")
        return load_language_model(self.model_name)

    def set_random_seed(self, seed: int | None = None) -> None:
        super().set_random_seed(seed)
        if seed is not None:
            self._rng = np.random.default_rng(seed)

    def _on_step(self) -> None:
        """The slow network moves with the gradient steps, the temperature with the progress."""

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VectorEnv):
            env = SB3VecEnv(env)
        return DQN._wrap_env(env, verbose, monitor_wrapper)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> RolloutReturn:
        """Step the environment, or take texts from ``episode_source``; as in SB3."""
        if self.episode_source is not None:
            return self.episode_source.collect(self, callback)
        return super().collect_rollouts(env, callback, *args, **kwargs)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: npt.NDArray[Any],
        new_obs: Any,
        reward: npt.NDArray[Any],
        dones: npt.NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        assert isinstance(replay_buffer, EpisodeReplay)
        next_obs = new_obs
        if dones.any():
            next_obs = {key: value.copy() for key, value in new_obs.items()}
            for i in np.flatnonzero(dones):
                for key, value in next_obs.items():
                    value[i] = infos[i]["terminal_observation"][key]
        replay_buffer.add(
            self._last_obs,  # type: ignore[arg-type]
            next_obs,
            buffer_action,
            reward,
            dones,
            infos,
            self._behaviour_logprobs,
            self._by_reference,
        )
        self._last_obs = new_obs

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
        if self.env is not None:
            self.task = portable.task_of(self.env)
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    # --- what stays

    def save(self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Write SB3's zip, but without a pickle in it: settings as JSON, weights for ``weights_only``.

        Arguments as in SB3. What has no plain form is left out, and ``load`` asks for it. The replay
        has ``save_replay_buffer``; the language model is not stored.
        """
        excluded = {*self._excluded_save_params(), *(exclude or ())} - set(include or ())
        save_to_zip_file(path, data=portable.settings_of(self, excluded), params=self.get_parameters())

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

        Raises:
            ConfigError: no zip of a ``TextDQN``, a damaged one, or pickled entries in it.
            ModelError: the environment has another language model or vocabulary.
        """
        objects = portable.objects_from(portable.read_zip(path), custom_objects or {}, cls.policy_aliases, path)
        if env is not None:
            env = cls._wrap_env(env)
            portable.check_trained_on(objects["task"], env.get_attr("language_model")[0])
        with portable.reporting_damage(path):
            agent = super().load(path, env, device, objects, print_system_info, force_reset, **kwargs)
            agent.beta = agent._beta  # a damaged one is refused
        agent._rng = objects["_rng"]  # the seed has just set it to its beginning
        return agent

    def save_pretrained(self, folder: Any) -> None:
        """Write a folder to share: safetensors, JSON, and a model card. No optimiser, no replay."""
        portable.save_pretrained(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls: type[Self], folder: Any, env: Any = None, *, model: Any = None, device: torch.device | str = "auto"
    ) -> Self:
        """Return the agent that ``save_pretrained`` wrote, to act, to steer, or to learn on.

        Args:
            folder: What ``save_pretrained`` wrote.
            env: An environment like the one it was trained in.
            model: Without ``env``: its language model, as ``load_language_model`` takes it. None:
                the one of the same name.

        Raises:
            ConfigError: no such folder, or a damaged one.
            ModelError: another language model or vocabulary than it was trained on.
        """
        settings, weights = portable.read_pretrained(Path(folder))
        objects = portable.objects_from(settings, {}, cls.policy_aliases, repr(str(folder)))
        if env is not None:
            env = cls._wrap_env(env)
            model = env.get_attr("language_model")[0]
        language_model = load_language_model(objects["model_name"] if model is None else model)
        portable.check_trained_on(objects["task"], language_model)
        with portable.reporting_damage(folder):
            agent = cls(objects["policy_class"], None, device=device, _init_setup_model=False)
            agent.__dict__.update(objects, language_model=language_model)
            agent.beta = agent._beta  # a damaged one is refused
            if env is not None:
                check_for_correct_spaces(env, agent.observation_space, agent.action_space)
                agent.env, agent.n_envs = env, env.num_envs
            agent._setup_model()
            agent.policy.load_state_dict(weights)
        agent._rng = objects["_rng"]  # the seed has just set it to its beginning
        return agent

    def logits_processor(self, model: Any, *, max_new_tokens: int | None = None, reward: Any = None) -> Steering:
        """Return what steers ``model.generate`` with this agent: a context manager and logits processor in one.

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
        from agents.text_dqn.steering import Steering

        return Steering(self, model, max_new_tokens, reward)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "language_model", "episode_source"]

    def save_replay_buffer(self, path: Any) -> None:
        """Write the replay as one safetensors file."""
        assert isinstance(self.replay_buffer, EpisodeReplay)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.replay_buffer.save(path)

    def load_replay_buffer(self, path: Any, truncate_last_traj: bool = True) -> None:
        """Read what ``save_replay_buffer`` wrote; the buffer's shape must be the same."""
        assert isinstance(self.replay_buffer, EpisodeReplay)
        self.replay_buffer.load(path)


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < np.inf:
        raise ConfigError(f"{name} must be a positive number (reward units a nat), got {value!r}")
    return float(value)
