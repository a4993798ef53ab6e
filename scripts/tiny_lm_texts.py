"""Texts in two vocabularies: the teacher's distributions, moved onto the student's tokens.

    a shard: tokens, candidates, log-probabilities  ->  Alignment.read  ->  Texts: ids, targets, weights

Both tokenizers are byte-level and cut texts into words alike, so that most of their tokens begin at
the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders

END = "<|endoftext|>"
TEMPERATURE, TOP_P, TEACHER_K = 0.7, 0.95, 32  # how the teacher samples, and how much of it is kept
SAMPLES = 4  # texts an instruction
PIECES = 6  # of a teacher's token that the student's distribution is worked out for
Array = npt.NDArray[Any]


def ends_of(teacher: Any) -> list[int]:
    """Return the tokens that end a text: the teacher's own, and line breaks, after which it explains itself."""
    return sorted({*teacher.end_ids, *(i for i in range(teacher.vocab_size) if "\n" in teacher.decode([i]))})


def sampled_from(logprobs: Array, top_p: float = TOP_P) -> Array:
    """Return the distribution that the teacher writes with: tempered, then cut to its nucleus. (n, k)"""
    probs = np.exp((logprobs - logprobs[:, :1]).astype(np.float64) / TEMPERATURE)
    probs /= probs.sum(-1, keepdims=True)
    probs *= probs.cumsum(-1) - probs < top_p
    return probs / probs.sum(-1, keepdims=True)


@dataclass
class Texts:
    """Texts in the student's tokens, end to end, with the distribution to learn at each token."""

    first: Array  # (texts + 1,) where each text begins
    ids: Array  # (N,)
    written: Array  # (N,) bool: by the teacher, not part of an opening or the first of a text
    targets: Array  # (N, TEACHER_K) tokens, the same one possibly several times
    weights: Array  # (N, TEACHER_K) their probabilities
    nats: float  # -log-probability that the teacher gave to all that is ``written``

    def __len__(self) -> int:
        return len(self.first) - 1

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        starts = np.cumsum([0, *(len(p.ids) for p in parts)])
        first = [p.first[:-1] + start for p, start in zip(parts, starts, strict=False)]
        arrays = [np.concatenate([getattr(p, n) for p in parts]) for n in ("ids", "written", "targets", "weights")]
        return cls(np.concatenate([*first, starts[-1:]]), *arrays, nats=sum(p.nats for p in parts))


class Alignment:
    """Both vocabularies, and which of the student's tokens each of the teacher's consists of."""

    def __init__(self, teacher: Any, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.strings: list[str] = teacher.tokenizer.convert_ids_to_tokens(list(range(teacher.vocab_size)))
        self.ends = set(ends_of(teacher))
        self.end = tokenizer.token_to_id(END)
        # A character of a byte-level token is a byte. An end counts as one, so that all tokens have their place.
        self.width = np.array([1 if i in self.ends else len(text) for i, text in enumerate(self.strings)])
        names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        self.student_width = np.array([1 if name == END else len(name) for name in names])
        self.pieces = np.full((len(self.strings), PIECES), -1)
        for i, text in enumerate(self.strings):
            found = [self.end] if i in self.ends else [piece.id for piece in tokenizer.model.tokenize(text)][:PIECES]
            self.pieces[i, : len(found)] = found

    def read(self, path: Path, texts: slice = slice(None)) -> Texts:
        """Return the texts of a shard, without those that are not valid UTF-8 or shorter than two tokens."""
        with np.load(path) as file:
            data = dict(file)
        ends, starts = data["lengths"].astype(int).cumsum(), np.cumsum([0, *data["opened_lengths"]])
        tokens, step, ids = [], [], []
        for text in range(len(ends))[texts]:
            steps = np.arange(ends[text] - data["lengths"][text], ends[text])
            opening = data["opened"][starts[text // SAMPLES] : starts[text // SAMPLES + 1]]
            whole = np.concatenate([opening, data["tokens"][steps]]).astype(int)
            closed = int(whole[-1]) in self.ends
            strings = [self.strings[i] for i in whole[: len(whole) - closed]]
            found = self.tokenizer.encode(decoders.ByteLevel().decode(strings)).ids + [self.end] * closed
            if len(found) > 1 and self.student_width[found].sum() == self.width[whole].sum():
                tokens.append(whole)
                step.append(np.concatenate([np.full(len(opening), -1), steps]))
                ids.append(np.array(found))
        # Rounded log-probabilities may move the nucleus's edge: no token that was drawn falls out of a wider one.
        probs = sampled_from(data["logprobs"].astype(np.float32), TOP_P + 0.01)
        return self.aligned(tokens, step, ids, data["candidates"].astype(int), probs)

    def aligned(
        self, tokens: list[Array], step: list[Array], ids: list[Array], candidates: Array, probs: Array
    ) -> Texts:
        """Move the teacher's distributions onto the student's tokens.

        Where a token of the student begins inside one of the teacher's, j tokens after its start,
        the candidates that agree with these j go on with their next token. Where the vocabularies
        do not meet, or the text was not written by the teacher, the target is the text itself.
        """
        first = np.cumsum([0, *map(len, ids)])
        text_ids, flat, rows = np.concatenate(ids), np.concatenate(tokens), np.concatenate(step)
        opens = np.zeros(len(flat), bool)
        opens[np.cumsum([0, *map(len, tokens[:-1])])] = True
        begins = self.width[flat].cumsum() - self.width[flat]  # bytes before each of the teacher's tokens
        at = self.student_width[text_ids].cumsum() - self.student_width[text_ids]
        owner = np.searchsorted(begins, at, "right") - 1  # the teacher's token that each of the student's begins in
        place = np.arange(len(at))
        start = np.maximum.accumulate(np.where(begins[owner] == at, place, -1))
        depth = np.where(owner[start] == owner, place - start, PIECES)
        row = rows[owner]
        targets = np.zeros((len(at), TEACHER_K), np.uint16)
        weights = np.zeros((len(at), TEACHER_K), np.float32)
        targets[:, 0], weights[:, 0] = text_ids, 1
        for j in range(PIECES):
            here = np.flatnonzero((depth == j) & (row >= 0))
            pieces = self.pieces[candidates[row[here]]]  # (n, k, PIECES)
            before = text_ids[here[:, None] - np.arange(j, 0, -1)]  # (n, j)
            fits = (pieces[:, :, :j] == before[:, None]).all(-1) & (pieces[:, :, j] >= 0)
            found = probs[row[here]] * fits
            meets = (found * (pieces[:, :, j] == text_ids[here, None])).sum(-1) > 0
            here, pieces, found = here[meets], pieces[meets], found[meets]
            targets[here] = np.maximum(pieces[:, :, j], 0)
            weights[here] = found / found.sum(-1, keepdims=True)
        written = (row >= 0) & ~opens[owner]
        drawn = np.flatnonzero((rows >= 0) & ~opens)
        chosen = (candidates[rows[drawn]] == flat[drawn, None]) * probs[rows[drawn]]
        return Texts(first, text_ids, written, targets, weights, float(-np.log(chosen.sum(-1)).sum()))
