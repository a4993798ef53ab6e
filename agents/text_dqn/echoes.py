"""Which tokens occur in the prompt: a judge of relevance, or of given words, asks for that.

    observation, how much of it is generated   ->  echoed: (N, k) of its candidates, which the replay keeps
    whole texts of the replay                  ->  Echoes.among: also of the tokens that were taken
    observation of a running text              ->  Echoes.of_prompt: the same, from the prompt itself

In a conversation nothing counts as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class Echoes(NamedTuple):
    """Which tokens occur in the prompt."""

    own: torch.Tensor  # (B, T) bool, of the text
    candidates: torch.Tensor  # (B, S, k) bool

    @classmethod
    def none(cls, tokens: torch.Tensor, candidates: torch.Tensor) -> Echoes:
        """Return those of texts (B, T) and candidates (B, S, k) without a prompt."""
        return cls(torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(candidates, dtype=torch.bool))

    @classmethod
    def among(cls, candidates: torch.Tensor, echoes: torch.Tensor, tokens: torch.Tensor) -> Echoes:
        """Return those of whole texts (B, T), each token of which was among its step's candidates (B, T, k)."""
        return cls(((candidates == tokens.unsqueeze(-1)) & echoes).any(-1), echoes)

    @classmethod
    def of_prompt(
        cls, tokens: torch.Tensor, length: torch.Tensor, own: torch.Tensor, candidates: torch.Tensor
    ) -> Echoes:
        """Return those of texts (B, T) and candidates (B, S, k); the prompts are the first ``length`` (B, 1) tokens."""
        place = torch.arange(int(length.max()), device=tokens.device)
        prompt = torch.where(place < length, tokens[:, : len(place)], -1)  # (B, p)
        return cls(
            (own.unsqueeze(-1) == prompt.unsqueeze(1)).any(-1),
            (candidates.unsqueeze(-1) == prompt[:, None, None]).any(-1),
        )


def echoed(observation: Mapping[str, npt.NDArray[Any]], generated: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return where a candidate occurs in the prompt, (N, k). In a conversation: nowhere.

    Args:
        observation: (N, ...) a key.
        generated: (N,) tokens of each text that are not its prompt's.
    """
    candidates = observation["candidates"]
    if "speaker" in observation or not {"tokens", "length"} <= observation.keys():
        return np.zeros(candidates.shape, np.bool_)
    length = np.asarray(observation["length"])[:, 0] - generated
    place = np.arange(length.max(initial=0))
    prompt = np.where(place < length[:, None], observation["tokens"][:, : len(place)], -1)
    occurs: npt.NDArray[np.bool_] = (candidates[:, :, None] == prompt[:, None, :]).any(-1)
    return occurs
