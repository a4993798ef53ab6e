"""A Stable-Baselines3 features extractor around a pruned transformer.

    hidden (B, d)                            source="hidden": computed by the environment already
    tokens (B, T), length (B, 1) -> model    source="tokens": a transformer of the agent's own
        -> last hidden state (B, d), normalised; log-probabilities (B, k), budget, score -> features

Frozen weights are there once: shared by the online and the target network of a DQN, left out of
the files of SB3, and states seen before are not computed again. Trained weights (``trainable``: LoRA,
the last layers, or all) each network has for itself, as its only registered parameters.
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
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from agents.pruning.model import PrunedTransformerModel
from textgen_env.config import check_at_least, check_one_of
from textgen_env.errors import ConfigError, ModelError
from textgen_env.extras import require
from textgen_env.models.device import pick_device

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
        trainable: The part of the transformer that is trained: ``False`` nothing, ``"lora"`` low-rank
            adapters of its linear layers (needs ``peft``), ``"last_layers"`` its last layers,
            ``True`` all of it. A ``model`` that was passed stays as it is.
        lora_rank: For ``"lora"``: the rank r of the adapters.
        last_layers: For ``"last_layers"``: how many.
        memo_bytes: Bound of the remembered features of a frozen transformer.

    Output: (B, d + k + 2), fewer where the observation lacks a scalar key.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685.

    Raises:
        ConfigError: the observation space lacks the keys that ``source`` reads, ``trainable`` asks for
            layers that are not there, or ``peft`` is not installed.
        ModelError: the transformer has another vocabulary.
    """

    transformer: PrunedTransformerModel

    def __init__(
        self,
        observation_space: spaces.Dict,
        source: str = "hidden",
        model: str | PrunedTransformerModel = "tiny",
        pruning_amount: float = 0.1,
        method: str = "l1_unstructured",
        trainable: bool | str = False,
        lora_rank: int = 4,
        last_layers: int = 2,
        memo_bytes: int = 64 << 20,
    ) -> None:
        have = _checked_keys(observation_space, source, trainable)
        transformer = None if source == "hidden" else _frozen_transformer(model, method, pruning_amount)
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
        self.trained = nn.ParameterDict()
        if transformer is None:
            return
        _check_vocabulary(transformer, observation_space)
        if trainable:
            transformer = trainable_copy(transformer, trainable, lora_rank, last_layers)
            named = transformer.named_parameters()
            self.trained.update({name.replace(".", "/"): p for name, p in named if p.requires_grad})
        # Outside module registration: SB3's target update scales target parameters in place, a
        # registered backbone would be saved twice, and PPO would initialise its layers anew.
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
        scalars = {key: observations[key].float() for key in self.scalars}
        if "logprobs" in scalars:
            scalars["logprobs"] = scalars["logprobs"].clamp(min=-20.0)  # masked ones are -1e4
        features += scalars.values()
        return torch.cat(features, dim=-1)

    def _run(self, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Return the hidden state of the last real token, (B, d)."""
        if next(self.transformer.parameters()).device != tokens.device:
            self.transformer.to(tokens.device)
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


def _checked_keys(observation_space: spaces.Dict, source: str, trainable: bool | str) -> tuple[str, ...]:
    """Return the keys of the observation space, if ``source`` and ``trainable`` can be had with it."""
    needed = {"hidden": ("hidden",), "tokens": ("tokens", "length")}
    check_one_of("source", source, tuple(needed))
    check_one_of("trainable", trainable, (False, True, "lora", "last_layers"))
    if trainable and source == "hidden":
        raise ConfigError(
            f"trainable={trainable!r} needs source='tokens': the environment's hidden states carry no gradients"
        )
    have = tuple(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else ()
    missing = [key for key in needed[source] if key not in have]
    if missing:
        raise ConfigError(
            f"source={source!r} needs the observation keys {missing}; the environment gives {have}: "
            "make it with observation='full', or with a tuple of keys"
        )
    return have


def _numbers(space: spaces.Space[Any]) -> int:
    return int(np.prod(space.shape or ()))


def trainable_copy(
    transformer: PrunedTransformerModel, trainable: bool | str, lora_rank: int, last_layers: int
) -> PrunedTransformerModel:
    """Return a copy whose trained weights are its own and all others those of ``transformer``, in the same memory.

    LoRA's output starts at zero, so every copy starts as the frozen model.

    Raises:
        ConfigError: more layers than there are, a rank below 1, or ``peft`` is not installed.
    """
    check_at_least("lora_rank", lora_rank, 1)
    check_at_least("last_layers", last_layers, 1)
    own = _own_parameters(transformer, trainable, last_layers)
    learns = {id(parameter) for parameter in own}
    memo: dict[int, Any] = {id(kept): kept for kept in (transformer.tokenizer, *transformer.buffers())}
    for parameter in transformer.parameters():
        if id(parameter) not in learns:  # the same memory, and gradients of one's own
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    learner = copy.deepcopy(transformer, memo)
    for parameter in own:
        memo[id(parameter)].requires_grad_(True)
    if trainable == "lora":
        _add_lora(learner, lora_rank)
    return learner


def _own_parameters(transformer: PrunedTransformerModel, trainable: bool | str, last_layers: int) -> list[nn.Parameter]:
    """Return the weights that a copy has for itself."""
    if trainable is True:
        return list(transformer.model.base_model.parameters())
    if trainable != "last_layers":
        return []
    layers = transformer.layers
    if last_layers > len(layers):
        raise ConfigError(f"last_layers must be at most {len(layers)}, the layers there are, got {last_layers}")
    return list(layers[-last_layers:].parameters())


def _add_lora(transformer: PrunedTransformerModel, rank: int) -> None:
    require("peft", extra="lora", for_="trainable='lora'")
    from peft import LoraConfig, inject_adapter_in_model

    transposed = any(isinstance(module, Conv1D) for module in transformer.modules())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    inject_adapter_in_model(config, transformer.model)


def _frozen_transformer(model: str | PrunedTransformerModel, method: str, amount: float) -> PrunedTransformerModel:
    return model if isinstance(model, PrunedTransformerModel) else _shared_transformer(model, method, amount)


@lru_cache(maxsize=2)
def _shared_transformer(model: str, method: str, amount: float) -> PrunedTransformerModel:
    """Return the one frozen copy that all extractors of this description share."""
    return PrunedTransformerModel(model, amount, method).to(pick_device())


def _check_vocabulary(transformer: PrunedTransformerModel, observation_space: spaces.Dict) -> None:
    tokens: Any = observation_space["tokens"]
    needed, have = int(tokens.high.max()) + 1, int(transformer.model.config.vocab_size)
    if have < needed:
        raise ModelError(
            f"the extractor's transformer knows {have} tokens, the environment's language model {needed}: "
            "use a transformer with the same vocabulary, or source='hidden'"
        )
