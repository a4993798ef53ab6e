"""Soft Q-learning over the candidates of a language model: act, remember, update.

The policy is the language model, tilted: pi(a|s) proportional to mu(a|s) exp(Q(s, a) / beta).
Before the first update Q is equal for all candidates, so the policy *is* the language model (or
score lookahead, where the observation has ``candidate_scores``).

    act      observation -> slow network -> Q (N, k) -> + log mu, / beta -> pi -> actions (N,)
    add      one step of N texts -> EpisodeReplay
    update   whole episodes -> objective -> AdamW -> the slow network follows
    learn_unjudged   updates on texts that the reward was not asked about

It knows torch and numpy, and neither Stable-Baselines3 nor files: ``agent.TextDQN`` is the shell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from agents.text_dqn.networks import CandidateQNetwork, Tensors, prior
from agents.text_dqn.replay import Acted, EpisodeBatch, EpisodeReplay
from agents.text_dqn.scorer import LEAST_TEXTS
from agents.text_dqn.scores import fit_scores, scored_batch
from agents.text_dqn.settings import COUNT, MANY, NATS, Range
from agents.text_dqn.targets import OBJECTIVES, ObjectiveSettings, log_policy
from textgen_env.errors import ConfigError, DivergenceError
from textgen_env.policies import Floats, kl_to, renormalise, sample

FIRST_SAMPLE = 256
"""Texts whose mean return is where Q starts."""

REFIT = 1.3
"""The learned scorer is fitted anew when there are so many times as many texts."""

ASKED = 4
"""Prefixes of a text about which the judge is asked, on average, with ``score="judge"``."""

LEAST_CARRIED = 0.7
"""Share of a return that is carried back a token however good the learned scores are: what they miss may matter."""

UNJUDGED_PER_UPDATE = 8
"""Unjudged steps that owe as many updates as one judged step; as many again follow on judged texts."""


class EpisodeSampler(Protocol):
    """Whole episodes to learn from."""

    def sample(self, batch_size: int) -> EpisodeBatch:
        """Return ``batch_size`` of them."""
        ...


class Learner:
    """The algorithm of TextDQN.

    Args:
        network, slow_network: Online and slow copy, bound to a language model. The slow one gives
            the targets, acts, and is evaluated.
        optimizer: Of the online network.
        replay: Where ``add`` writes and ``update`` samples.
        beta: Temperature of the policy, reward units a nat. May be changed at any time.
        target_beta: The trade E[R] - target_beta KL that Q is trained for.
        beta_start: Temperature of the behaviour at the first step; it falls geometrically to
            ``beta`` over ``exploration_fraction`` of the training. None: four times ``target_beta``.
        lm_share: Share of the texts that the language model writes: what the scorer learns most from.
        unjudged: Steps of unjudged texts for each step of a judged one, once learned scores explain something.
        target, trace_lambda, gamma: See ``agents.text_dqn.targets``; beside learned scores less of the
            lambda, see ``objective_now``.
        steps_per_update: Environment steps for each update.
        batch_size: Whole episodes an update.
        tau: Share of the online network that the slow one takes over at each update.
        max_grad_norm: Gradients are clipped to this norm.
        rng: Draws the actions.
    """

    def __init__(
        self,
        network: CandidateQNetwork,
        slow_network: CandidateQNetwork,
        optimizer: torch.optim.Optimizer,
        replay: EpisodeReplay,
        *,
        beta: float = 0.1,
        target_beta: float = 0.1,
        beta_start: float | None = None,
        exploration_fraction: float = 1.0,
        target: str = "retrace",
        trace_lambda: float = 1.0,
        gamma: float = 1.0,
        lm_share: float = 0.0,
        unjudged: float = 0.0,
        steps_per_update: int = 80,
        batch_size: int = 32,
        tau: float = 0.02,
        max_grad_norm: float = 10.0,
        rng: np.random.Generator,
    ) -> None:
        self.network, self.slow_network = network, slow_network
        self.optimizer = optimizer
        self.replay = replay
        self.beta = beta
        self.beta_start = 4 * target_beta if beta_start is None else beta_start
        self.exploration_fraction = exploration_fraction
        self.target = target
        self.objective = ObjectiveSettings(target_beta, trace_lambda, gamma)
        self.lm_share = lm_share
        self.unjudged = unjudged
        self.steps_per_update = steps_per_update
        self.batch_size = batch_size
        self.tau = tau
        self.max_grad_norm = max_grad_norm
        self.rng = rng
        self.steps = 0  # environment steps ever learned from
        self.updates = 0
        self.offline_updates = 0  # updates that no environment step has paid for
        self.unjudged_owed = 0.0  # steps of unjudged texts that are due
        self.unjudged_steps = 0  # steps of unjudged texts ever learned from
        self.judge_calls = 0  # texts and prefixes that the reward has judged
        self.scorer_r2 = 0.0  # on texts that were left out of its fit
        self._fit_at = LEAST_TEXTS  # finished texts at which the scores are fitted next
        self._lm_takes_over_at: npt.NDArray[np.int64] = np.zeros(replay.n_envs, np.int64)  # step of each row's text

    @property
    def beta(self) -> float:
        """Temperature of the policy, reward units a nat."""
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        self._beta: float = Range(above=True, unit=NATS).check("beta", beta)

    # --- acting

    def act(self, observation: Mapping[str, npt.NDArray[Any]], progress: float, freely: bool = False) -> Acted:
        """Choose one action a row.

        Args:
            observation: (N, ...) a key.
            progress: Share of the training that is done.
            freely: Leave no text to the language model.
        """
        budget = observation["budget"][:, 0]
        by_language_model = np.zeros(len(budget), bool) if freely else self._chosen_by_lm(budget)
        tensors = {key: torch.as_tensor(value, device=self.network.device) for key, value in observation.items()}
        logprobs = self.log_policy(tensors, self.behaviour_beta(progress))
        log_mu, _ = renormalise(observation["logprobs"], observation["action_mask"])
        logprobs = np.where(by_language_model[:, None], log_mu, logprobs)
        policy = np.exp(logprobs)
        actions = self.draw(policy)
        rows = np.arange(len(actions))
        return Acted(actions, logprobs[rows, actions], by_language_model, float(kl_to(policy, log_mu).mean()))

    def log_policy(self, observation: Tensors, beta: float) -> Floats:
        """Return log pi at temperature ``beta``, (B, k) nats."""
        with torch.inference_mode():
            logprobs = log_policy(prior(observation), self.slow_network(observation), beta)
        if not bool(torch.isfinite(logprobs).all()):
            raise DivergenceError(
                f"the policy after {self.updates:,} updates is not finite: Q / beta overflows at beta={beta:g}; raise "
                "beta, or lower the learning rate or the scale of the reward"
            )
        return logprobs.double().cpu().numpy()

    def q(self, observation: Mapping[str, Any]) -> Floats:
        """Return Q of the slow network, (B, k): the reward of the text, or what is left of it where ``score`` is seen.

        Args:
            observation: (B, ...) a key, arrays or tensors.
        """
        seen: Tensors = {key: torch.as_tensor(value, device=self.network.device) for key, value in observation.items()}
        with torch.inference_mode():
            tensors = self.slow_network.scored(seen)
            values = self.slow_network.head_values(tensors).mean(0)
            if self.slow_network.scorer is not None:  # its values count from the learned score
                values = values + tensors["score"]
            elif self.slow_network.score_value is not None:  # from the value of the score that was given
                values = values + tensors["score"] - seen["score"]
        q: Floats = values.double().cpu().numpy()
        return q

    def draw(self, policy: Floats) -> npt.NDArray[np.int64]:
        """Return one action a row, each drawn with a random number of its own."""
        return sample(policy, self.rng.random(len(policy)))

    def asks_about(self, going_on: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return the rows, of those that go on, (N,), about whose prefixes the judge is asked now."""
        chosen = self.rng.random(len(going_on)) < ASKED / self.network.max_new_tokens
        helps = self.network.scorer is None or bool(self.network.scorer.prefixes)
        return np.flatnonzero(chosen & going_on & helps)

    def behaviour_beta(self, progress: float) -> float:
        """Return the temperature that acts while learning, annealed from ``beta_start`` to ``beta``."""
        share = 1.0 if self.exploration_fraction <= 0 else min(1.0, progress / self.exploration_fraction)
        return float(self.beta_start * (self.beta / self.beta_start) ** share)

    def _chosen_by_lm(self, budget: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return the rows, (N,), where the language model writes: some texts; for ``q_sharp`` the ends of all."""
        if self.target != "q_sharp" and not self.lm_share:
            return np.zeros(len(budget), bool)
        length = self.network.max_new_tokens
        step = np.rint((1.0 - budget) * length)
        if self.target == "q_sharp":
            fresh = self.rng.integers(length, size=len(budget))
        else:
            fresh = np.where(self.rng.random(len(budget)) < self.lm_share, 0, length)
        self._lm_takes_over_at = np.where(step == 0, fresh, self._lm_takes_over_at)
        return np.asarray(step >= self._lm_takes_over_at)

    # --- learning

    def add(
        self,
        observation: Mapping[str, npt.NDArray[Any]],
        next_observation: Mapping[str, npt.NDArray[Any]],
        acted: Acted,
        rewards: npt.NDArray[Any],
        done: npt.NDArray[np.bool_],
        truncated: npt.NDArray[np.bool_],
        judged: Floats | None = None,
    ) -> None:
        """Remember one step of N rows; see ``EpisodeReplay.add``."""
        self.replay.add(observation, next_observation, acted, rewards, done, truncated, judged)
        self.judge_calls += int(done.sum()) + (0 if judged is None else int(np.isfinite(judged).sum()))
        self._count(len(acted.actions))

    def put(self, steps: Mapping[str, npt.NDArray[Any]], lengths: npt.NDArray[np.int64], counted: int) -> None:
        """Remember whole episodes that were written elsewhere; ``counted`` steps are paid for by them."""
        self.replay.put(steps, lengths)
        self.judge_calls += len(lengths)
        self._count(counted)

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.scorer_r2 > 0:
            self.unjudged_owed += self.unjudged * steps

    @property
    def updates_owed(self) -> int:
        """Updates that ``steps_per_update`` asks for by now; 0 before the first finished text."""
        owed = self.steps // self.steps_per_update - (self.updates - self.offline_updates)
        return max(0, owed) if self.replay.episodes_seen else 0

    @property
    def updates_per_step(self) -> float:
        """Updates that a judged step leads to, those of the unjudged ones with it included."""
        with_it = 0.0 if self.network.scorer is None else 2 * self.unjudged / UNJUDGED_PER_UPDATE
        return (1 + with_it) / self.steps_per_update

    @property
    def objective_now(self) -> ObjectiveSettings:
        """The objective, with returns carried back less far where learned scores explain the reward.

        A score of the next candidates is a target without noise; a return has the noise of all that followed.
        """
        carried = max(LEAST_CARRIED, 1.0 - max(0.0, self.scorer_r2))
        return replace(self.objective, trace_lambda=self.objective.trace_lambda * carried)

    def update(self, count: int = 1, offline: bool = False, texts: EpisodeSampler | None = None) -> Floats:
        """Do ``count`` gradient steps and return their losses.

        Args:
            offline: They are extra, and no environment step pays for them.
            texts: To learn from. None: the replay.

        Raises:
            ConfigError: the replay holds no finished text.
        """
        if count:
            self._fit_scores_if_due()
        if count and self.updates == 0:
            first = scored_batch(self.network, self.replay.sample(FIRST_SAMPLE))
            returns = (first.rewards * first.acted).sum(-1)
            self.network.start_at(returns)
            self.slow_network.start_at(returns)
        self.network.train()
        losses = np.zeros(count)
        for i in range(count):
            losses[i] = self._update((texts or self.replay).sample(self.batch_size))
            self.updates += 1
            self.offline_updates += offline
        self.network.eval()
        return losses

    def learn_unjudged(self, texts: EpisodeSampler, steps: int) -> None:
        """Do the updates that unjudged texts of so many steps are worth, and as many on judged ones.

        The latter keep what the scores miss and only the reward has told.
        """
        before, each = self.unjudged_steps, UNJUDGED_PER_UPDATE * self.steps_per_update
        self.unjudged_owed -= steps
        self.unjudged_steps += steps
        for _ in range(self.unjudged_steps // each - before // each):
            self.update(offline=True, texts=texts)
            self.update(offline=True)

    def _update(self, batch: EpisodeBatch) -> float:
        batch = scored_batch(self.network, batch)
        loss = OBJECTIVES[self.target](self.network, self.slow_network, batch, self.objective_now)
        self.optimizer.zero_grad()
        loss.backward()
        weights = list(self.network.parameters())
        norm = torch.nn.utils.clip_grad_norm_(weights, self.max_grad_norm)
        self._check_finite(loss=loss, **{"gradient norm": norm})
        self.optimizer.step()
        try:
            self._check_finite(weights=torch.stack(torch._foreach_norm([weight.detach() for weight in weights])))
        except DivergenceError:
            self.network.load_state_dict(self.slow_network.state_dict())  # both are saved, and must be readable
            raise
        with torch.no_grad():
            for own, slow in zip(self.network.parameters(), self.slow_network.parameters(), strict=True):
                slow.mul_(1 - self.tau)
                torch.add(slow, own, alpha=self.tau, out=slow)
        return float(loss.detach())

    def _fit_scores_if_due(self) -> None:
        """Fit the scores of prefixes each time that the texts are more by ``REFIT``."""
        seen = self.replay.episodes_seen
        if seen < self._fit_at:
            return
        r2 = fit_scores(self.network, self.replay, self.objective.beta)
        if r2 is None:
            self._fit_at = seen + LEAST_TEXTS
            return
        self.scorer_r2 = r2
        for own, slow in zip(self.network.scores, self.slow_network.scores, strict=True):
            slow.load_state_dict(own.state_dict())
        self._fit_at = max(seen + LEAST_TEXTS, int(seen * REFIT))

    def _check_finite(self, **found: torch.Tensor) -> None:
        """Raise unless all numbers are finite; the slow network, which acts and is evaluated, still is."""
        for name, value in found.items():
            if not bool(torch.isfinite(value).all()):
                raise DivergenceError(
                    f"{name} not finite in update {self.updates + 1:,}, after {self.steps:,} steps: the training has "
                    "diverged. Lower the learning rate or the scale of the reward, or raise target_beta; the network "
                    "that acts is that of the last finite update"
                )

    # --- what stays

    def counters(self) -> dict[str, Any]:
        """Return everything but networks, optimiser and replay, as plain data."""
        return {
            "steps": self.steps,
            "updates": self.updates,
            "offline_updates": self.offline_updates,
            "unjudged_owed": self.unjudged_owed,
            "unjudged_steps": self.unjudged_steps,
            "fit_at": self._fit_at,
            "held_out": self.scorer_r2,
            "judge_calls": self.judge_calls,
            "lm_takes_over_at": self._lm_takes_over_at.tolist(),
            "rng": self.rng.bit_generator.state,
        }

    def load_counters(self, stored: Mapping[str, Any]) -> None:
        """Put back what ``counters`` returned.

        Raises:
            ConfigError: a count out of range, or no state of a generator.
        """
        steps, updates, offline = (COUNT.check(name, stored[name]) for name in ("steps", "updates", "offline_updates"))
        if offline > updates:
            raise ConfigError(f"offline_updates must be at most updates={updates}, got {offline}")
        self.rng.bit_generator.state = stored["rng"]
        places = np.array(stored["lm_takes_over_at"], np.int64)
        if places.ndim != 1:
            raise ConfigError(f"lm_takes_over_at must be a list of steps, got {stored['lm_takes_over_at']!r}")
        if len(places) == self.replay.n_envs:  # else the rows are others: each starts a text of its own
            self._lm_takes_over_at = places
        self.steps, self.updates, self.offline_updates = steps, updates, offline
        self._fit_at = COUNT.check("fit_at", stored.get("fit_at", LEAST_TEXTS))
        self.judge_calls = COUNT.check("judge_calls", stored.get("judge_calls", 0))
        self.unjudged_steps = COUNT.check("unjudged_steps", stored.get("unjudged_steps", 0))
        self.unjudged_owed = Range(-MANY, MANY).check("unjudged_owed", stored.get("unjudged_owed", 0.0))
        self.scorer_r2 = Range(-MANY, 1).check("held_out", stored.get("held_out", 0.0))

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return tensors and plain data: networks, optimiser and counters. The replay has its own."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"slow_network.{name}": tensor for name, tensor in self.slow_network.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        moments: dict[str, dict[str, Any]] = {}
        for index, values in optimizer["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    moments.setdefault(str(index), {})[name] = value
        plain = {"groups": optimizer["param_groups"], "moments": moments}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return contiguous, {"optimizer": plain, "counters": self.counters()}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned.

        Raises:
            ConfigError: counters out of range.
            KeyError, RuntimeError, ValueError: it is of other networks.
        """

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        self.slow_network.load_state_dict(part("slow_network."))
        moments: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in plain["optimizer"]["moments"].items()}
        for key, tensor in part("optimizer.").items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = tensor.clone()
        groups = [  # JSON makes lists of tuples
            {name: tuple(value) if name == "betas" else value for name, value in group.items()}
            for group in plain["optimizer"]["groups"]
        ]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.load_counters(plain["counters"])
