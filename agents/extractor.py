"""A Stable-Baselines3 features extractor around a pruned transformer.

    hidden (B, d)                            source="hidden": computed by the environment already
    tokens (B, T), length (B, 1) -> model    source="tokens": a transformer of the agent's own
        -> last hidden state (B, d), normalised; log-probabilities (B, k), budget, score -> features

A frozen transformer is shared by the online and the target network of a DQN and left out of what
SB3 saves; states seen before are not computed again.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch.nn import functional

from agents.transformer_model import PrunedTransformerModel
from textgen_env.errors import ConfigError, ModelError

SCALARS = ("logprobs", "budget", "score")
"""Observation keys that become features beside the hidden state, where they are there."""


class PrunedTransformerExtractor(BaseFeaturesExtractor):
    """Features of a prefix: the hidden state of a pruned transformer, log-probabilities, budget, score.

    Args:
        observation_space: A Dict with ``hidden``, or with ``tokens`` and ``length``.
        source: ``"hidden"`` reads the environment's hidden state (one forward serves candidates
            and features); ``"tokens"`` runs a transformer of its own on the ids.
        model: For ``"tokens"``: a name, folder, hub id, or a ``PrunedTransformerModel``. It must
            share the vocabulary of the environment's language model.
        pruning_amount, method: How to prune a named model.
        trainable: Train the transformer too. Otherwise it is frozen and shared.
        memo_bytes: Bound of the remembered features of a frozen transformer.

    Output: (B, d + k + 2), fewer where the observation lacks a scalar key.

    Raises:
        ConfigError: the observation space lacks the keys that ``source`` reads.
        ModelError: the transformer has another vocabulary.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        source: str = "hidden",
        model: str | PrunedTransformerModel = "smollm2",
        pruning_amount: float = 0.1,
        method: str = "l1_unstructured",
        trainable: bool = False,
        memo_bytes: int = 64 << 20,
    ) -> None:
        needed = {"hidden": ("hidden",), "tokens": ("tokens", "length")}
        if source not in needed:
            raise ConfigError(f"source must be 'hidden' or 'tokens', got {source!r}")
        have = tuple(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else ()
        missing = [key for key in needed[source] if key not in have]
        if missing:
            raise ConfigError(
                f"source={source!r} needs the observation keys {missing}; the environment gives {have}: "
                "make it with observation='full', or with a tuple of keys"
            )
        transformer = None if source == "hidden" else _transformer(model, method, pruning_amount, trainable)
        width = (
            int(np.prod(observation_space["hidden"].shape or ())) if transformer is None else transformer.hidden_size
        )
        self.scalars = [key for key in SCALARS if key in have]
        extra = sum(_numbers(observation_space[key]) for key in self.scalars)
        super().__init__(observation_space, features_dim=width + extra)
        self.source = source
        self._memo: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._memo_rows = max(1, memo_bytes // (4 * width))
        self.trainable = trainable
        if transformer is None:
            return
        _check_vocabulary(transformer, observation_space)
        if trainable:
            self.transformer = transformer
        else:
            # Frozen weights stay out of parameters(): SB3's target update scales target parameters
            # in place, and a registered backbone would be saved twice.
            object.__setattr__(self, "transformer", transformer.eval())

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return features, (B, features_dim) float32."""
        if self.source == "hidden":
            hidden = observations["hidden"].float()
        elif self.trainable:
            hidden = self._run(observations["tokens"].long(), observations["length"].long())
        else:
            hidden = self._remembered(observations["tokens"].long(), observations["length"].long())
        features = [functional.layer_norm(hidden, hidden.shape[-1:])]
        features += [observations[key].float().clamp(min=-20.0) for key in self.scalars]  # masked ones are -1e4
        return torch.cat(features, dim=-1)

    def _run(self, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Return the hidden state of the last real token, (B, d)."""
        longest = max(1, int(length.max()))
        mask = (torch.arange(longest, device=tokens.device) < length).long()  # (B, T')
        hidden = self.transformer(tokens[:, :longest], mask)  # (B, T', d)
        last = (length.clamp(min=1) - 1).unsqueeze(-1).expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, last).squeeze(1).float()

    @torch.no_grad()
    def _remembered(self, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        ids, lengths = tokens.cpu().numpy(), length.cpu().numpy()[:, 0]
        keys = [row[: max(1, n)].tobytes() for row, n in zip(ids, lengths, strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in self._memo}
        known = {key: self._memo[key] for key in keys if key in self._memo}
        if new:
            rows = torch.tensor(list(new.values()), device=tokens.device)
            known |= dict(zip(new, self._run(tokens[rows], length[rows]), strict=True))
        for key in keys:
            self._memo[key] = known[key]
            self._memo.move_to_end(key)
        while len(self._memo) > self._memo_rows:
            self._memo.popitem(last=False)
        return torch.stack([known[key] for key in keys])


def _numbers(space: spaces.Space[Any]) -> int:
    return int(np.prod(space.shape or ()))


def _transformer(
    model: str | PrunedTransformerModel, method: str, amount: float, trainable: bool
) -> PrunedTransformerModel:
    if isinstance(model, PrunedTransformerModel):
        return copy.deepcopy(model) if trainable else model  # online and target network each learn their own
    if trainable:
        return PrunedTransformerModel(model, amount, method)
    return _shared_transformer(model, method, amount)


@lru_cache(maxsize=2)
def _shared_transformer(model: str, method: str, amount: float) -> PrunedTransformerModel:
    """Return the one frozen copy that all extractors of this description share."""
    return PrunedTransformerModel(model, amount, method)


def _check_vocabulary(transformer: PrunedTransformerModel, observation_space: spaces.Dict) -> None:
    tokens: Any = observation_space["tokens"]
    needed, have = int(tokens.high.max()) + 1, int(transformer.model.config.vocab_size)
    if have < needed:
        raise ModelError(
            f"the extractor's transformer knows {have} tokens, the environment's language model {needed}: "
            "use a transformer with the same vocabulary, or source='hidden'"
        )
