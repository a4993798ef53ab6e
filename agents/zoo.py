"""Agents by name, each with settings that were tuned once and are kept here.

    make_agent("text_dqn", env, seed=0, budget=Budget(steps=20_000))  ->  an agent: predict, maybe learn

Three kinds: agents that learn (Stable-Baselines3's and this project's), agents that read the
observation alone, agents that plan in the environment (one of them with values that it learns). One
with other settings is named ``best_of_n:n=4``. A user's own is named ``FILE.py:NAME`` or
``module:NAME`` and called with ``(env, seed)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from agents.baselines.guided import GuidedBestOfNAgent
from agents.baselines.one_step import ONE_STEP_AGENTS
from agents.baselines.particles import ParticlesAgent, usual_pick
from agents.baselines.planning import PLANNING_AGENTS, BestOfNAgent
from agents.sb3_vec import SB3VecEnv
from agents.text_dqn.agent import TextDQN
from agents.user_code import is_reference, load_code
from textgen_env.config import OF_CONVERSATIONS
from textgen_env.errors import ConfigError
from textgen_env.extras import require
from textgen_env.models.table import TableModel
from textgen_env.policies import Agent, last_legal
from textgen_env.registry import Registry, split_settings, unknown_name
from textgen_env.vector_env import TextGenVectorEnv

OBSERVATION = ("tokens", "length", "budget", "candidates", "logprobs", "score", "action_mask", "hidden")
"""Observation keys of agents that learn, unless said; ``TextDQN`` understands ``candidate_scores``, too."""

NOT_SETTINGS = ("policy", "env", "seed", "settings", "device", "_init_setup_model")
"""Arguments of agents that nobody can set by name."""

MASK_AWARE = ("text_dqn", "maskable_ppo")
"""Agents that learn and never choose a masked action; for the others the environment maps it."""


@dataclass(frozen=True)
class Budget:
    """The sizes of a training, by which agents choose settings."""

    steps: int  # environment steps to learn from
    envs: int = 32  # texts written at a time
    max_new_tokens: int = 20
    beta: float = 0.1  # price of KL, reward units a nat, for agents that know it


AgentRecipe = Callable[[Budget], tuple[type[BaseAlgorithm], dict[str, Any]]]

AGENTS: Registry[AgentRecipe] = Registry("agent")
"""Agents that learn, by name: their class and the settings that a run starts from."""


@AGENTS.register("text_dqn")
def _text_dqn(budget: Budget) -> tuple[type[BaseAlgorithm], dict[str, Any]]:
    """Soft Q-learning over the candidates, with the language model as prior."""
    settings: dict[str, Any] = {"policy": "CandidatePolicy", "beta": budget.beta}
    if budget.steps < 20_000:  # its own settings would hardly learn in so few
        settings |= {"learning_starts": budget.steps // 5, "steps_per_update": 20}
    elif budget.steps < 40_000:
        settings["steps_per_update"] = budget.steps // 500
    return TextDQN, settings


@AGENTS.register("dqn")
def _dqn(budget: Budget) -> tuple[type[BaseAlgorithm], dict[str, Any]]:
    """Stable-Baselines3's DQN, on the language model's hidden state."""
    return DQN, {
        **_on_hidden_states(),
        "buffer_size": min(budget.steps, 20_000),
        "learning_starts": min(budget.steps // 10, 2_000),
        "batch_size": 256,
        "train_freq": 1,
        "gradient_steps": 4,
        "target_update_interval": 2_000,
        "exploration_fraction": 0.3,
    }


@AGENTS.register("qrdqn")
def _qrdqn(budget: Budget) -> tuple[type[BaseAlgorithm], dict[str, Any]]:
    """Quantile regression DQN of sb3-contrib, on the language model's hidden state."""
    settings = _dqn(budget)[1]
    settings["policy_kwargs"]["n_quantiles"] = 50
    return _contrib("QRDQN", "qrdqn"), settings


@AGENTS.register("ppo")
def _ppo(budget: Budget) -> tuple[type[BaseAlgorithm], dict[str, Any]]:
    """Stable-Baselines3's PPO, on the language model's hidden state."""
    return TextPPO, {
        **_on_hidden_states(),
        "n_steps": 2 * budget.max_new_tokens,  # two texts a row
        "batch_size": 2 * budget.envs,
    }


@AGENTS.register("maskable_ppo")
def _maskable_ppo(budget: Budget) -> tuple[type[BaseAlgorithm], dict[str, Any]]:
    """PPO of sb3-contrib that knows the mask, on the language model's hidden state."""
    return _text_maskable_ppo(), _ppo(budget)[1]


def _on_hidden_states() -> dict[str, Any]:
    from agents.extractor import PrunedTransformerExtractor

    features = {"features_extractor_class": PrunedTransformerExtractor}
    return {
        "policy": "MultiInputPolicy",
        "gamma": 1.0,
        "policy_kwargs": {**features, "features_extractor_kwargs": {"source": "hidden"}},
    }


def _contrib(name: str, agent: str) -> Any:
    return getattr(require("sb3_contrib", extra="contrib", for_=f"agent {agent!r}"), name)


class WithProbabilities(OnPolicyAlgorithm):
    """An actor-critic of SB3 with the distribution that it acts by."""

    def probabilities(self, observation: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        """Return (B, k) probabilities of the actions that are played, for an observation with a batch axis.

        Mass on masked actions counts for the last legal one, to which ``on_illegal="last_legal"`` maps them.
        """
        tensors, _ = self.policy.obs_to_tensor(observation)
        with torch.inference_mode():
            policy = self.policy.get_distribution(tensors).distribution.probs.double().cpu().numpy()  # type: ignore[union-attr]
        legal = np.asarray(observation["action_mask"], bool)
        policy[np.arange(len(policy)), last_legal(legal)] += np.where(legal, 0.0, policy).sum(-1)
        return np.where(legal, policy, 0.0)


class TextPPO(WithProbabilities, PPO):
    """SB3's PPO, with ``probabilities``."""


@cache
def _text_maskable_ppo() -> type[BaseAlgorithm]:
    base: Any = _contrib("MaskablePPO", "maskable_ppo")

    class TextMaskablePPO(base):
        """sb3-contrib's MaskablePPO, which reads the mask from the observation, with ``probabilities``."""

        def probabilities(self, observation: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
            legal = np.asarray(observation["action_mask"], bool)
            tensors, _ = self.policy.obs_to_tensor(observation)
            with torch.inference_mode():
                policy = self.policy.get_distribution(tensors, action_masks=legal).distribution.probs
            return np.where(legal, policy.double().cpu().numpy(), 0.0)

        def predict(self, observation: Any, *args: Any, action_masks: Any = None, **kwargs: Any) -> Any:
            if action_masks is None:
                action_masks = np.asarray(observation["action_mask"], bool)
            return super().predict(observation, *args, action_masks=action_masks, **kwargs)

    return TextMaskablePPO


_DQN_ON_TABLES: Mapping[str, Any] = {
    "learning_rate": 1e-3,
    "learning_starts": 500,
    "batch_size": 128,
    "gradient_steps": 8,
    "target_update_interval": 250,
    "exploration_fraction": 0.6,
}
_PPO_ON_TABLES: Mapping[str, Any] = {
    "learning_rate": 2e-3,
    "n_steps": 8,
    "batch_size": 64,
    "gae_lambda": 1.0,
    "ent_coef": 0.01,
}
TUNED: Mapping[str, Mapping[str, Any]] = {
    "text_dqn": {"beta": 0.02, "beta_start": 0.5, "learning_starts": 1_000, "steps_per_update": 16, "score": None},
    "dqn": _DQN_ON_TABLES,
    "qrdqn": _DQN_ON_TABLES,
    "ppo": _PPO_ON_TABLES,
    "maskable_ppo": _PPO_ON_TABLES,
}
"""Settings for small exact tasks that go over an agent's own: the best of a handful for each, by seed 1000."""


def tuned_settings(name: str, env: TextGenVectorEnv) -> Mapping[str, Any]:
    """Return the settings that suit an environment: those of ``TUNED`` on a table, none on a transformer."""
    return TUNED.get(name, {}) if isinstance(env.language_model, TableModel) else {}


# --- an agent that learns and plans


@PLANNING_AGENTS.register("text_dqn_particles")
class LearnedParticlesAgent(ParticlesAgent):
    """TextDQN learns, and writes each text with n particles that its values guide.

    Before ``learn`` the particles have no values: they are weighted best-of-n.

    Args:
        env: What it learns and acts in.
        seed: Of the random numbers.
        n: Rows a text, at least 1; each costs its tokens.
        beta: The price of KL, reward units a nat. None: TextDQN's own.
        settings: Of ``TextDQN``.
    """

    needs = "full"

    def __init__(
        self, env: TextGenVectorEnv, seed: int | None = None, *, n: int = 4, beta: float | None = None, **settings: Any
    ) -> None:
        super().__init__(env, seed, n=n, values="zero", beta=beta)
        self._seed, self._settings = seed, settings if beta is None else {"beta": beta, **settings}

    def learn(self, steps: int) -> LearnedParticlesAgent:
        """Let a new TextDQN learn for so many environment steps; its values guide the particles from now on."""
        budget = Budget(steps, self._env.num_envs, self._env.max_new_tokens)
        settings = {**tuned_settings("text_dqn", self._env), **self._settings}
        agent = make_agent("text_dqn", self._env, self._seed or 0, budget, settings).learn(steps)
        spent = self.tokens_used
        pick = usual_pick(self.n, judge=True)
        super().__init__(self._env, self._seed, n=self.n, values=agent, pick=pick)  # plans and luck begin anew
        self.tokens_used = spent
        return self


RANDOM_PLANNERS = (BestOfNAgent, GuidedBestOfNAgent, ParticlesAgent, LearnedParticlesAgent)
"""Agents that plan and are random by design: they answer the same prompt with different texts."""


# --- any of them, in an environment


def agent_names() -> tuple[str, ...]:
    """Return the names of all agents, those that learn last."""
    return (*ONE_STEP_AGENTS, *PLANNING_AGENTS, *AGENTS)


def name_and_settings(agent: str) -> tuple[str, dict[str, Any]]:
    """Return the name of an agent and the settings that go over its own: ``best_of_n:n=4``, ``FILE.py:NAME``.

    Raises:
        ConfigError: a setting that is not written ``name=value``.
    """
    own = is_reference(agent) and agent.partition(":")[0] not in agent_names()
    return (agent, {}) if own else split_settings(agent, "agent")


def find_agent(name: str) -> Any:
    """Return the agent called ``name``: a recipe, a class, or the user's own callable.

    Raises:
        UnknownName: no agent is called so (with a suggestion).
        ConfigError: ``FILE.py:NAME`` or ``module:NAME`` that cannot be imported, or is not callable.
    """
    for registry in (AGENTS, ONE_STEP_AGENTS, PLANNING_AGENTS):
        if name in registry:
            return registry[name]
    if not is_reference(name):
        raise unknown_name("agent", name, [*agent_names(), "FILE.py:NAME", "module:NAME"])
    found = load_code(name)
    if not callable(found):
        raise ConfigError(f"agent {name!r} must be callable with (env, seed), got {type(found).__name__}")
    return found


def env_settings(name: str, whole_vocabulary: bool = False, has_partner: bool = False) -> dict[str, Any]:
    """Return the settings of ``EnvConfig`` that an agent needs. A user's own may say so in ``env_settings``.

    Args:
        whole_vocabulary: The environment has ``top_k=None``, and so no ``candidates``.
        has_partner: A partner answers in it.
    """
    found = find_agent(name)
    keys = tuple(key for key in OBSERVATION if not (whole_vocabulary and key == "candidates"))
    keys += OF_CONVERSATIONS if has_partner else ()
    if name in ONE_STEP_AGENTS:
        return {"observation": found.needs}
    if name in PLANNING_AGENTS:
        return {"observation": getattr(found, "needs", tuple(key for key in keys if key not in ("score", "hidden")))}
    if name == "text_dqn":
        return {"observation": "full"}  # all that the environment has: each candidate's score where the reward tells it
    if name in AGENTS:
        return {"observation": keys, "on_illegal": "raise" if name in MASK_AWARE else "last_legal"}
    return {"observation": keys, **getattr(found, "env_settings", {})}


def make_agent(
    name: str, env: TextGenVectorEnv, seed: int, budget: Budget, settings: Mapping[str, Any] | None = None
) -> Any:
    """Return a new agent for ``env``, which has the agent's ``env_settings``.

    Args:
        budget: What it may learn from, and the price of KL for agents that know it.
        settings: Keywords of its class that go over its own.

    Raises:
        UnknownName: no agent is called so.
        ConfigError: the agent refuses the environment or its settings; says why.
    """
    found, given = find_agent(name), dict(settings or {})
    kind, own = found(budget) if name in AGENTS else (found, {})
    try:
        if name in AGENTS:
            return kind(env=SB3VecEnv(env), seed=seed, **{**own, **given})
        if not is_reference(name) and "beta" in inspect.signature(found).parameters:
            given = {"beta": budget.beta, **given}
        return found(seed=seed, **given) if name in ONE_STEP_AGENTS else found(env, seed, **given)
    except TypeError as error:
        known = () if is_reference(name) else inspect.signature(kind).parameters
        takes = ", ".join(setting for setting in known if setting not in NOT_SETTINGS)
        raise ConfigError(
            f"agent {name!r} refuses its settings: {error}" + f"; it takes {takes}" * bool(takes)
        ) from error


def acts_greedily(name: str, agent: Agent) -> bool:
    """Return True if an agent is measured at its most probable actions.

    Those with a distribution are sampled from it; draws of the others would be exploration. The
    exceptions: tree search plays what it tried most, and the ``RANDOM_PLANNERS`` draw.
    """
    if name in PLANNING_AGENTS:
        return PLANNING_AGENTS[name] not in RANDOM_PLANNERS
    return not hasattr(agent, "probabilities")


def draws_anew(name: str, agent: Agent) -> bool:
    """Return True if an agent may answer the same prompt with different texts when it is measured."""
    return name == "mcts" or not (name == "greedy" or acts_greedily(name, agent))
