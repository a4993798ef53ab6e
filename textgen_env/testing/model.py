"""The contract of language models and their slots."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from textgen_env.models.base import MASKED_LOGPROB, LanguageModel, Proposals, Slots
from textgen_env.testing.promise import promise


def check_language_model(
    model: LanguageModel, prompts: Sequence[str] = ("The", "It was a"), k: int = 2, tolerance: float = 1e-4
) -> None:
    """Check the promises of a language model and its slots that environments rely on.

    Args:
        model: Left as it was; slots of a few rows are opened on it.
        prompts: At least two texts that the model can encode, of different lengths if possible.
        k: Candidates to ask for, fewer than the vocabulary.
        tolerance: Largest difference of log-probabilities (nats) and hidden units between two ways to
            compute the same: 0 for an exact model.

    Raises:
        ContractError: a promise of ``textgen_env.models.base`` that does not hold.
    """
    promise(len(prompts) >= 2, "check_language_model needs at least two prompts")
    encoded = [model.encode(prompt) for prompt in prompts]
    _check_token_ids(model, encoded)
    checks = (_check_proposals, _check_whole_vocabulary, _check_blocked_ends, _check_rows, _check_copies)
    for check in checks:
        check(model, encoded, k, tolerance)


def _check_token_ids(model: LanguageModel, encoded: Sequence[Sequence[int]]) -> None:
    vocab = model.vocab_size
    promise(all(encoded), "a prompt must have at least one token")
    promise(
        all(0 <= i < vocab for ids in (*encoded, model.end_ids) for i in ids),
        f"token ids and end_ids must be in 0..{vocab - 1}, the vocabulary",
    )
    ids = np.array([[encoded[0][0]] * 2])
    vectors = model.embed(ids)
    promise(
        vectors.shape == (1, 2, model.embedding_size) and vectors.dtype == np.float32,
        f"embed must answer (..., embedding_size={model.embedding_size}) float32, got {vectors.shape} {vectors.dtype}",
    )
    promise(np.isfinite(vectors).all(), "embeddings must be finite")
    prompt, new = list(encoded[0]), list(encoded[1])
    together = model.continuations(prompt, new[:-1], new[-1:] * 2)
    promise(
        together == model.continuations(prompt, new[:-1], new[-1:]) * 2 and all(isinstance(t, str) for t in together),
        "continuations must answer one string a candidate, whatever the other candidates are",
    )


def _check_proposals(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    slots = _started(model, encoded, k)
    rows, free = np.arange(len(encoded)), np.zeros(len(encoded), np.bool_)
    found = slots.propose(rows, free)
    _check_arrays(found, len(encoded), k, model.hidden_size)
    _check_order(found)
    promise(all(len(set(ids)) == k for ids in found.candidates.tolist()), "a candidate must not be listed twice")
    before = copy.deepcopy(found)
    for array in (found.candidates, found.logprobs, found.hidden):
        if array.flags.writeable:
            array[...] = 0
    again = slots.propose(rows, free)
    promise(_equal(before, again), "proposing again must answer the same, in arrays that nobody else writes to")
    promise(
        _equal(before, _started(model, encoded, k).propose(rows, free)),
        "the same texts in new slots must get the same proposals, bit for bit",
    )


def _check_arrays(found: Proposals, rows: int, k: int, hidden: int) -> None:
    for name, array, shape, dtype in (
        ("candidates", found.candidates, (rows, k), np.int32),
        ("logprobs", found.logprobs, (rows, k), np.float32),
        ("hidden", found.hidden, (rows, hidden), np.float32),
    ):
        promise(
            array.shape == shape and array.dtype == dtype,
            f"{name} must be {shape} {np.dtype(dtype)}, got {array.shape} {array.dtype}",
        )
    promise(np.isfinite(found.hidden).all(), "hidden states must be finite")
    promise(
        (found.logprobs >= MASKED_LOGPROB).all() and (found.logprobs <= 1e-6).all(),
        f"log-probabilities must be in [{MASKED_LOGPROB}, 0] nats",
    )
    promise((np.exp(found.logprobs).sum(-1) <= 1 + 1e-4).all(), "probabilities must not sum to more than 1")


def _check_order(found: Proposals) -> None:
    for ids, logprobs in zip(found.candidates.tolist(), found.logprobs.tolist(), strict=True):
        order = sorted(range(len(ids)), key=lambda i: (-logprobs[i], ids[i]))
        promise(
            order == list(range(len(ids))),
            f"candidates must be sorted by log-probability, ties by smaller id; got {ids[:5]} with {logprobs[:5]}",
        )


def _check_whole_vocabulary(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    rows, free = np.arange(len(encoded)), np.zeros(len(encoded), np.bool_)
    whole = _started(model, encoded, None).propose(rows, free)
    promise(
        (whole.candidates == np.arange(model.vocab_size)).all(),
        "with k=None candidate i must be token id i",
    )
    total = np.exp(whole.logprobs.astype(np.float64)).sum(-1)
    promise(np.allclose(total, 1, atol=1e-3), f"probabilities over the vocabulary must sum to 1, got {total.tolist()}")
    some = _started(model, encoded, k).propose(rows, free)
    best = -np.sort(-whole.logprobs, axis=-1)[:, :k]
    promise(
        np.allclose(some.logprobs, best, atol=tolerance)
        and np.allclose(np.take_along_axis(whole.logprobs, some.candidates, -1), best, atol=tolerance),
        "k candidates must be the k likeliest of the vocabulary, normalised over all of it",
    )


def _check_blocked_ends(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    if not model.end_ids:
        return
    rows = np.arange(len(encoded))
    blocked = np.arange(len(encoded)) == 0
    whole = _started(model, encoded, None).propose(rows, blocked)
    promise(
        (whole.logprobs[0, list(model.end_ids)] <= MASKED_LOGPROB).all(),
        "an end token must not be proposed where block_end says so",
    )
    total = np.exp(whole.logprobs.astype(np.float64)).sum(-1)
    promise(np.allclose(total, 1, atol=1e-3), "the rest must be normalised without the end tokens that are blocked")
    free = _started(model, encoded, None).propose(rows, np.zeros_like(blocked))
    promise(
        np.allclose(whole.logprobs[1:], free.logprobs[1:], atol=tolerance),
        "blocking the end in one row must not change another row",
    )


def _check_rows(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    rows, free = np.arange(len(encoded)), np.zeros(len(encoded), np.bool_)
    slots = _started(model, encoded, k)
    together = slots.propose(rows, free)
    for row, ids in enumerate(encoded):
        alone = _started(model, [ids], k).propose(np.zeros(1, np.int64), free[:1])
        promise(
            _close(alone, _part(together, [row]), tolerance),
            f"a row must not depend on its neighbours: row {row} alone and in a batch differ",
        )
    backwards = slots.propose(rows[::-1], free)
    promise(
        _close(backwards, _part(together, rows[::-1]), tolerance),
        "proposals must come in the order of the rows that were asked for",
    )
    slots.rebuild()
    promise(_close(slots.propose(rows, free), together, tolerance), "rebuilding must keep every row's text")
    if model.begin:
        return  # its texts do not go on from their prompts
    token = together.candidates[:, 0].astype(np.int64)
    slots.advance(rows, token)
    longer = _started(model, [[*ids, int(t)] for ids, t in zip(encoded, token, strict=True)], k)
    promise(
        _close(slots.propose(rows, free), longer.propose(rows, free), tolerance),
        "advancing by a token must equal starting with the longer text",
    )


def _check_copies(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    first, last, free = np.array([0]), np.array([len(encoded) - 1]), np.zeros(1, np.bool_)
    slots = _started(model, encoded, k)
    here = slots.propose(first, free)
    saved = slots.save(0)
    slots.fork(first, last)
    promise(_close(slots.propose(last, free), here, tolerance), "a forked row must propose what its source does")
    slots.advance(last, here.candidates[:, -1].astype(np.int64))
    moved = slots.propose(last, free)
    promise(_close(slots.propose(first, free), here, tolerance), "a fork that goes on must leave its source alone")
    slots.load(int(last[0]), saved)
    promise(_close(slots.propose(last, free), here, tolerance), "a saved row must come back as it was saved")
    slots.advance(last, here.candidates[:, -1].astype(np.int64))
    promise(_close(slots.propose(last, free), moved, tolerance), "a row that was loaded must go on as the original did")
    slots.load(int(last[0]), saved)
    promise(_close(slots.propose(last, free), here, tolerance), "what was saved must not change with the row")


def _started(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int | None) -> Slots:
    slots = model.slots(len(encoded), max(map(len, encoded)) + 4, k)
    slots.start(np.arange(len(encoded)), encoded)
    return slots


def _part(found: Proposals, rows: Any) -> Proposals:
    return Proposals(found.candidates[rows], found.logprobs[rows], found.hidden[rows])


def _equal(one: Proposals, other: Proposals) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("candidates", "logprobs", "hidden")
    )


def _close(one: Proposals, other: Proposals, tolerance: float) -> bool:
    """Near ties may swap places: a token that both list must be about as likely in both."""
    for a, b, p, q in zip(one.candidates, other.candidates, one.logprobs, other.logprobs, strict=True):
        _, here, there = np.intersect1d(a, b, return_indices=True)
        if not here.size or not np.allclose(p[here], q[there], atol=tolerance) or not np.allclose(p, q, atol=tolerance):
            return False
    scale = max(1.0, float(np.abs(other.hidden).max()))
    return bool(np.allclose(one.hidden, other.hidden, atol=tolerance * scale))
