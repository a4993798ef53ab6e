"""The two networks and the optimiser, as SB3's DQN wants its policy."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.dqn.policies import DQNPolicy

from agents.text_dqn.networks import CandidateQNetwork, check_observation_space


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
        return CandidateQNetwork(space, **self.q_net_kwargs).to(self.device)

    def _predict(self, observation: Any, deterministic: bool = True) -> torch.Tensor:
        """Return the candidate of highest value, (B,): SB3's own interface, which knows no prior."""
        values: torch.Tensor = self.q_net(observation)
        return values.argmax(-1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        kept = super()._get_constructor_parameters()
        for name in ("net_arch", "activation_fn", "features_extractor_class", "features_extractor_kwargs"):
            kept.pop(name)
        return kept | {"q_net_kwargs": self.q_net_kwargs}
