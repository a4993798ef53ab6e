"""Logits to candidates: exact top-k and log-probabilities without a sort over the vocabulary.

Action ``i`` means "append ``ids[row, i]``", so the order must be exact and the same on every
machine: by log-probability, ties to the smaller id. bfloat16 logits tie all the time.

A full sort of (64, 49152) costs more than the model's attention. So the vocabulary is cut into
blocks: a token below the k-th largest of their maxima is not among the k largest. A few
dozen tokens of each row reach it, and only they are sorted. Logits are ranked as they are, and no
array of log-probabilities is written: the normaliser alone is computed, in float32.

    logits (B, V)  ->  maxima of n blocks (B, n)  ->  tokens that reach the k-th  ->  ids, logits (B, k)
                   ->  log of the sum of exponentials (B, 1)                      ->  logprobs (B, k)

The passes over the logits go a few rows at a time, within the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError, ModelError
from textgen_env.models.base import MASKED_LOGPROB

if TYPE_CHECKING:
    import torch

SCAN_CHUNK = 1 << 18  # logits worked on at a time: 1 MB in float32


def top_candidates(
    logits: torch.Tensor,
    k: int | None,
    end_ids: Sequence[int] = (),
    block_end: npt.NDArray[np.bool_] | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the ``k`` likeliest tokens of each row, best first, and their log-probabilities.

    Args:
        logits: (B, V) of any float dtype, unchanged in the end. Arithmetic is float32.
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

    vocab = logits.shape[-1]
    if k is not None and not 1 <= k <= vocab:
        raise ConfigError(f"k must be in 1..{vocab} (the vocabulary) or None, got {k}")
    blocked = np.flatnonzero(block_end) if block_end is not None and len(end_ids) else ()
    with torch.inference_mode():
        if len(blocked):
            ends = torch.from_numpy(blocked)[:, None].to(logits.device), torch.tensor(end_ids, device=logits.device)
            kept = logits[ends]
            logits[ends] = -torch.inf
        ids, logprobs = _whole_vocabulary(logits) if k is None else _top_k(logits, k)
        if len(blocked):
            logits[ends] = kept
    return ids, np.maximum(logprobs, np.float32(MASKED_LOGPROB))


def nucleus(logprobs: npt.NDArray[np.float32], top_p: float) -> npt.NDArray[np.bool_]:
    """Return the mask of the nucleus, (B, k): True for the candidates in it.

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


def _whole_vocabulary(logits: torch.Tensor) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return all ids of (B, V) logits in their order, and their log-probabilities: (B, V) each."""
    rows, vocab = logits.shape
    return np.tile(np.arange(vocab, dtype=np.int32), (rows, 1)), _without_nan(logits.float().log_softmax(-1))


def _top_k(logits: torch.Tensor, k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the exact top k of (B, V) logits, ties to the smaller id, and their log-probabilities: (B, k) each."""
    import torch

    vocab = logits.shape[-1]
    size = 1 << ((vocab // k).bit_length() - 1) // 2  # tokens a block: at most sqrt(V / k)
    blocks = -(-vocab // size)
    maxima, log_sum = _scan(logits, size, blocks)
    least = np.partition(maxima, blocks - k)[:, blocks - k, None]
    rows, chosen = np.divmod(np.flatnonzero(maxima >= least), blocks)
    places = (rows * vocab + chosen)[:, None] + np.arange(0, size * blocks, blocks)  # in the flat logits
    found = logits.reshape(-1)[torch.from_numpy(np.minimum(places, logits.numel() - 1).ravel())]
    values = found.float().cpu().numpy().reshape(places.shape)
    values[chosen + (size - 1) * blocks >= vocab, -1] = np.nan  # the last blocks are one token shorter
    reach = np.flatnonzero(values >= least[rows])
    block, place = np.divmod(reach, size)
    rows, ids, values = rows[block], chosen[block] + blocks * place, values.ravel()[reach]
    order = np.lexsort((ids, -values, rows))
    best = order[np.searchsorted(rows, np.arange(len(logits)))[:, None] + np.arange(k)]
    return ids[best].astype(np.int32), values[best] - log_sum


def _scan(logits: torch.Tensor, size: int, blocks: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the maxima of the blocks (B, blocks) and the log-normaliser (B, 1) of (B, V) logits, float32.

    Token i is in block i modulo their number, so that maxima are taken at vector speed.
    """
    import torch

    rows, vocab = logits.shape
    step = min(rows, max(1, SCAN_CHUNK // vocab))
    scratch = torch.full((step, size * blocks), -torch.inf, device=logits.device)  # behind the last token too
    maxima, log_sum = (torch.empty((rows, n), device=logits.device) for n in (blocks, 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        table = scratch[: part.stop - start]
        values = table[:, :vocab].copy_(logits[part])
        torch.amax(table.view(-1, size, blocks), 1, out=maxima[part])
        largest = maxima[part].amax(-1, keepdim=True)
        torch.sum(values.sub_(largest).exp_(), -1, keepdim=True, out=log_sum[part]).log_().add_(largest)
    return maxima.cpu().numpy(), _without_nan(log_sum)


def _without_nan(found: torch.Tensor) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = found.cpu().numpy()
    broken = np.isnan(values[:, 0])
    if broken.any():
        raise ModelError(f"the model answered NaN in row {int(broken.argmax())} of a batch of {len(broken)}")
    return values
