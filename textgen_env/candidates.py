"""Logits to candidates: exact top-k and log-probabilities without a sort over the vocabulary.

Action ``i`` means "append ``ids[row, i]``", so the order must be exact and the same on every
machine: by log-probability, ties to the smaller id. bfloat16 logits tie all the time.

A full sort of (64, 49152) costs more than the model's attention. So the vocabulary is cut into
blocks. The k blocks with the largest maxima (ties: the lower block) contain the top k: a block
left out has k blocks before it, and each of them holds an element that comes before all of its
own. Values and positions are packed into one integer, so that no two keys are equal and an
unstable ``topk`` gives the stable order.

    logits (B, V)  ->  log_softmax in float32, a few rows at a time, within the cache
                   ->  block maxima (b, V / 64)  ->  k blocks  ->  (b, 64 k)  ->  ids, logprobs (B, k)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError, ModelError
from textgen_env.language_model import MASKED_LOGPROB

if TYPE_CHECKING:
    import torch

BLOCK = 64  # tokens a block
CHUNK = 1 << 20  # logits worked on at a time: 4 MB in float32


def top_candidates(
    logits: torch.Tensor,
    k: int | None,
    end_ids: Sequence[int] = (),
    block_end: npt.NDArray[np.bool_] | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the ``k`` likeliest tokens of each row, best first, and their log-probabilities.

    Args:
        logits: (B, V) of any float dtype, left unchanged. Arithmetic is float32.
        k: Candidates a row, 1 <= k <= V; None for the whole vocabulary in id order.
        end_ids: Tokens that can be blocked.
        block_end: (B,) True where ``end_ids`` get no probability, and the rest is normalised
            without them.

    Returns:
        ids (B, k) int32 and logprobs (B, k) float32, nats, at least ``MASKED_LOGPROB``.

    Raises:
        ConfigError: ``k`` is out of range.
        ModelError: a row of logits holds NaN.
    """
    import torch

    rows, vocab = logits.shape
    if k is not None and not 1 <= k <= vocab:
        raise ConfigError(f"k must be in 1..{vocab} (the vocabulary) or None, got {k}")
    ids = torch.empty((rows, k or vocab), dtype=torch.int32)
    logprobs = torch.empty((rows, k or vocab), dtype=torch.float32)
    step = max(1, CHUNK // vocab)
    scores, normalised = torch.empty((2, min(step, rows), vocab), device=logits.device)
    ends = torch.tensor(list(end_ids), dtype=torch.long, device=logits.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        size = part.stop - part.start
        raw, scaled = scores[:size].copy_(logits[part]), normalised[:size]
        if block_end is not None and block_end[part].any():
            blocked = torch.from_numpy(np.flatnonzero(block_end[part])).to(logits.device)
            raw[blocked[:, None], ends] = -torch.inf
        torch.log_softmax(raw, -1, out=scaled)
        if k is None:
            logprobs[part] = scaled
        else:
            best_ids, best = _top_k(scaled, k)
            ids[part], logprobs[part] = best_ids, best
    if k is None:
        ids[:] = torch.arange(vocab, dtype=torch.int32)
    found = logprobs.numpy()
    if np.isnan(found[:, 0]).any():
        raise ModelError(f"the model answered NaN in row {int(np.isnan(found[:, 0]).argmax())} of a batch of {rows}")
    return ids.numpy(), np.maximum(found, np.float32(MASKED_LOGPROB))


def nucleus(logprobs: npt.NDArray[np.float32], top_p: float) -> npt.NDArray[np.bool_]:
    """Return which candidates belong to the nucleus, (B, k).

    A candidate stays when the likelier ones before it hold less than ``top_p`` of the probability
    (of the full vocabulary). The first one always stays.

    Args:
        logprobs: (B, k) nats, best first.
        top_p: In (0, 1].

    Source: Holtzman et al. 2020, arXiv:1904.09751.
    """
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be in (0, 1], got {top_p}")
    if top_p == 1:
        return np.ones(logprobs.shape, dtype=bool)
    probs = np.exp(logprobs.astype(np.float64))
    before = np.cumsum(probs, axis=-1) - probs
    legal = before < top_p
    legal[:, 0] = True
    return legal


def _top_k(logprobs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top k of (b, V) log-probabilities: ids (b, k) and values (b, k), ties to the smaller id."""
    import torch

    rows, vocab = logprobs.shape
    blocks = vocab // BLOCK
    ids = torch.arange(vocab, device=logprobs.device)
    if blocks <= k:
        ids = ids.expand(rows, -1)
    else:
        whole, rest = ids[: blocks * BLOCK].view(blocks, BLOCK), ids[blocks * BLOCK :]
        maxima = logprobs[:, : blocks * BLOCK].view(rows, blocks, BLOCK).amax(-1)  # (b, V / 64)
        chosen = _keys(maxima, ids[:blocks]).topk(k, largest=False, sorted=False).indices
        # The rest, less than a block, always takes part.
        ids = torch.cat([whole[chosen].flatten(1), rest.expand(rows, -1)], dim=1)  # (b, 64 k + rest)
        logprobs = logprobs.gather(1, ids)
    best = _keys(logprobs, ids).topk(k, largest=False).indices
    return ids.gather(1, best), logprobs.gather(1, best)


def _keys(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pack log-probabilities and ids into int64 keys, the best one smallest, no two equal.

    The bits of floats that are not negative are ordered like the floats themselves.
    """
    import torch

    return (logprobs.abs().view(torch.int32).long() << 32) | ids
