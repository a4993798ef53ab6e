"""The numbers that a network says of each candidate, from the state, the memory and the candidate's embedding.

What a token is worth changes sharply towards the end of a text: an article is a good last token but
one for no judge that wants a whole sentence. So the output layer has weights of their own for the
last tokens, beside those for all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

LAST_TOKENS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Tokens left for which the network has weights of their own, linear in between; from the last one on it has none."""

TOGETHER = 160
"""States whose candidates are computed together, where nothing is learned: so few stay in a core's cache."""


def near_the_end(left: torch.Tensor) -> torch.Tensor:
    """Return how much each of ``LAST_TOKENS`` but the last counts, (..., m) in 0..1, with ``left`` (..., 1) to come."""
    marks = torch.tensor(LAST_TOKENS, dtype=left.dtype, device=left.device)
    widths = functional.pad(marks.diff(), (1, 0), value=1.0)
    away = left - marks[:-1]
    return (1 - torch.where(away < 0, -away / widths[:-1], away / widths[1:])).clamp(min=0)


class LookedUp(NamedTuple):
    """Token embeddings: the distinct vectors, and which of them each candidate and each token has."""

    vectors: torch.Tensor  # (U, e)
    candidates: torch.Tensor  # (..., k) int64 rows of ``vectors``
    tokens: torch.Tensor  # (B, t) int64


class CandidateHead(nn.Module):
    """``outputs`` numbers a candidate. The last layer starts at zero, so before learning all are equal.

    Args:
        hidden_size: d.
        embedding_size: e, of the language model's tokens.
        width: h, of the state and of the two layers above it.
        memory: m, of the running memory.
        uses_score: The state reads the running score.
        turn_scalars: Numbers of the running turn that it reads.
        uses_candidate_scores: Each candidate is also judged by what it adds to the score.
        dropout: Share of units dropped while learning.
        outputs: n, numbers a candidate.
    """

    def __init__(
        self,
        hidden_size: int,
        embedding_size: int,
        *,
        width: int = 128,
        memory: int = 32,
        uses_score: bool = False,
        turn_scalars: int = 0,
        uses_candidate_scores: bool = False,
        dropout: float = 0.1,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        token = 64
        self.outputs = outputs
        self.embed = nn.Linear(embedding_size, token, bias=False)
        self.from_token = nn.Linear(token, token)
        self.from_previous = nn.Linear(token, token, bias=False)
        self.contribution = nn.Linear(token, memory)
        self.from_hidden = nn.Linear(hidden_size, width)
        self.from_scalars = nn.Linear((2 if uses_score else 1) + turn_scalars, width, bias=False)
        self.from_left = nn.Linear(len(LAST_TOKENS) - 1, width, bias=False)
        self.from_candidate = nn.Linear(token, width, bias=False)
        self.from_candidate_scalars = nn.Linear(2 if uses_candidate_scores else 1, width, bias=False)
        self.from_memory = nn.Linear(memory, width, bias=False)
        self.mix = nn.Linear(width, width)
        self.value = nn.Linear(width, len(LAST_TOKENS) * outputs)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def embedded(self, looked_up: LookedUp) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the vectors of the candidates (..., k, 64) and of the tokens (B, t, 64)."""
        vectors = self.embed(looked_up.vectors)
        # Not vectors[index]: the gradient of plain indexing sums in an order that changes from run to run.
        return functional.embedding(looked_up.candidates, vectors), functional.embedding(looked_up.tokens, vectors)

    def contributions(self, tokens: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return what each token adds to the memory after its predecessor: (..., 64) twice to (..., m)."""
        return self.contribution(functional.gelu(self.from_token(tokens) + self.from_previous(previous)))

    def forward(
        self,
        hidden: torch.Tensor,
        scalars: torch.Tensor,
        places: torch.Tensor,
        candidates: torch.Tensor,
        candidate_scalars: torch.Tensor,
        memory: torch.Tensor,
        last: torch.Tensor,
    ) -> torch.Tensor:
        given = (hidden, scalars, places, candidates, candidate_scalars, memory, last)
        entries, states = len(hidden), max(1, hidden.shape[:-1].numel())
        if states > TOGETHER and entries > 1 and not torch.is_grad_enabled():
            size = max(1, TOGETHER * entries // states)
            return torch.cat([self(*part) for part in zip(*(tensor.split(size) for tensor in given), strict=True)])
        hidden = functional.layer_norm(hidden.float(), hidden.shape[-1:])
        state = self.from_hidden(self.dropout(hidden)) + self.from_scalars(scalars) + self.from_left(places)  # (..., h)
        after = memory.unsqueeze(-2) + self.contributions(candidates, last.unsqueeze(-2))  # (..., k, m)
        x = state.unsqueeze(-2) + self.from_candidate(candidates) + self.from_memory(after)  # (..., k, h)
        x = self.dropout(functional.gelu(x + self.from_candidate_scalars(candidate_scalars)))
        x = x + functional.gelu(self.mix(x))
        by_place = self.value(x).unflatten(-1, (-1, self.outputs))  # (..., k, places, n)
        weights = functional.pad(places, (1, 0), value=1.0)  # the first ones hold for all
        values: torch.Tensor = (by_place * weights[..., None, :, None]).sum(-2)  # (..., k, n)
        return values
