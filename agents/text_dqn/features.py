"""What the learned scorer knows of texts: sparse features of their tokens, sums over them, lengths in characters.

    JudgedTexts, KnownTokens  ->  design_of  ->  Design (n, features)

Source: hashed features, Weinberger et al. 2009, arXiv:0902.2206.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from agents.text_dqn.ridge import Design
from agents.text_dqn.spelling import CLASSES, CLASSINGS, COUNTED, LETTERED, TRAITS, last_word, spelling
from textgen_env.models.base import LanguageModel
from textgen_env.policies import Floats

FOLDS = 5
"""Parts of the texts. Weights of a part have never seen it; one more set, the last, is the mean of all."""

PAIRS = 2**17
"""Pairs of tokens are hashed to so many numbers."""

RESIDUES = 4096
"""A token counts as seen where one of the same residue has occurred: exact for vocabularies up to this."""

DIRECTIONS = 256
"""Principal directions of the token embeddings that the regression sees."""

LATE_DIRECTIONS = 64
"""The largest of them, which it sees once more in the second half of a text."""

MARKS = np.linspace(-2.5, 2.5, 11)
"""Lengths in characters that have a weight, in standard deviations from the mean; linear in between."""

LONGEST = 15
"""Tokens that the prompt has, too, have a weight by their length in characters, up to this: short ones are common."""

OCCURRENCES = 64
"""Each kind of what is counted has weights for the first, the second, and so on up to this; later ones are alike."""

NUMBERED = 32
"""Words, the first, the second, and so on, that have weights by their initials; later ones are alike."""

Indices = npt.NDArray[np.int64]


class JudgedTexts(NamedTuple):
    """n texts with their rewards."""

    tokens: Indices  # (n, T) generated ids, padded at the end
    lengths: Indices  # (n,) at least 1
    rewards: Floats  # (n,)
    folds: Indices  # (n,) in 0..FOLDS - 1
    finished: npt.NDArray[np.bool_]  # (n,) False for prefixes that were judged as they stood
    echoes: npt.NDArray[np.bool_]  # (n, T) the token occurs in the prompt

    def rows(self, chosen: Any) -> JudgedTexts:
        return JudgedTexts(*(values[chosen] for values in self))


class KnownTokens(NamedTuple):
    """Numbers of V tokens, which add up over a text."""

    vectors: Floats  # (V, at most ``DIRECTIONS``); see ``directions``
    spelling: Floats  # (V, e); see ``spelling``, over first occurrences as well

    @property
    def late_vectors(self) -> Floats:
        return self.vectors[:, -LATE_DIRECTIONS:]

    @property
    def traits(self) -> Floats:
        return self.spelling[:, :TRAITS]


class TokenKinds(NamedTuple):
    """Of which kinds V tokens are."""

    classes: torch.Tensor  # (3, V); see ``spelling.classes``
    counted: torch.Tensor  # (V, COUNTED + LETTERED); see ``spelling.counted``
    folded: torch.Tensor  # (V,); see ``spelling.folded``


class Past(NamedTuple):
    """What texts had before each place."""

    first: torch.Tensor  # (B, RESIDUES); see ``first_occurrences``
    words: torch.Tensor  # (3, B, T + 1) classes of the last word, 0 for none
    counts: torch.Tensor  # (B, T + 1, COUNTED + LETTERED) up to OCCURRENCES - 1
    pairs: torch.Tensor  # (B, RESIDUES) where each residue of pairs occurs first, by the first token

    @classmethod
    def of(cls, tokens: torch.Tensor, of_tokens: TokenKinds) -> Past:
        """Return it for tokens (B, T)."""
        classes, counted, folded = of_tokens
        words, counts = last_word(tokens, classes), counted[tokens].cumsum(1).clamp(max=OCCURRENCES - 1).to(torch.int16)
        return cls(
            first_occurrences(tokens),
            functional.pad(words, (1, 0)),
            functional.pad(counts, (0, 0, 1, 0)),
            first_occurrences(pair_index(folded[tokens[:, :-1]], folded[tokens[:, 1:]])),
        )


def design_of(
    texts: JudgedTexts, known: KnownTokens, characters: Floats, kinds: TokenKinds, middle: int
) -> tuple[Design, tuple[float, float]]:
    """Return the features of texts, and mean and deviation of their lengths in characters.

    Args:
        texts: n of them.
        known: Of the tokens.
        characters: (V,) of the tokens.
        kinds: Of the tokens.
        middle: Tokens behind so many others are late.
    """
    begin, padding = layout(len(characters))
    tokens, places = texts.tokens, np.arange(texts.tokens.shape[1])
    inside = places < texts.lengths[:, None]
    late = inside & (places >= middle)
    past = Past.of(torch.from_numpy(tokens), kinds)
    fresh = inside & (past.first.gather(1, torch.from_numpy(tokens % RESIDUES)).numpy() == places)
    folded = kinds.folded[torch.from_numpy(tokens)]
    pairs = pair_index(folded[:, :-1], folded[:, 1:])
    repeated = inside[:, 1:] & (past.pairs.gather(1, pairs % RESIDUES).numpy() < places[:-1])
    echo = begin["echo"] + np.minimum(characters[tokens], LONGEST).astype(np.int64)
    echoes = np.concatenate([echo, echo + LONGEST + 1], 1)
    last = np.take_along_axis(tokens, texts.lengths[:, None] - 1, 1)
    sparse = {
        "token": np.where(inside, tokens, padding),
        "first": np.where(fresh, begin["first"] + tokens, padding),
        "late": np.where(late, begin["late"] + tokens, padding),
        "opening": begin["opening"] + tokens[:, :1],
        "last": np.where(texts.finished[:, None], begin["last"] + last, padding),
        "pair": np.where(inside[:, 1:], begin["pair"] + pairs.numpy(), padding),
        "repeat": np.where(repeated, begin["repeat"], padding),
        "echo": np.where(np.concatenate([inside, fresh], 1) & np.tile(texts.echoes, 2), echoes, padding),
    }
    words, alike = kinds.classes.numpy()[:, tokens], []
    for number, (kind, word) in enumerate(zip(CLASSINGS, words, strict=True)):
        before, begun = past.words[number, :, :-1].numpy(), inside & (word > 0)
        sparse[kind] = np.where(begun, begin[kind] + before * CLASSES + word, padding)
        alike.append(np.where(begun & (word == before), begin["alike"] + number, padding))
    sparse["alike"] = np.concatenate(alike, 1)
    counts, counted = past.counts[:, :-1].numpy(), kinds.counted.numpy() > 0
    for kind, part in (("count", slice(COUNTED)), ("letter", slice(COUNTED, None))):
        which, has = _those_that_are(counted[:, part])
        numbers = begin[kind] + which[tokens] * OCCURRENCES + np.take_along_axis(counts[:, :, part], which[tokens], 2)
        numbers = np.where(has[tokens] & inside[:, :, None], numbers, padding)
        sparse[kind] = numbers.reshape(len(tokens), -1)
    place = np.minimum(counts[:, :, 0], NUMBERED - 1).astype(np.int64)
    sparse["acrostic"] = np.where(inside & (words[0] > 0), begin["acrostic"] + place * CLASSES + words[0], padding)
    length = (characters[tokens] * inside).sum(1)
    marks = (float(length.mean()), float(length.std()) + 1e-6)
    dense = {
        "vector": _sums(known.vectors, tokens, inside),
        "spelling": _sums(known.spelling, tokens, inside),
        "first_spelling": _sums(known.spelling, tokens, fresh),
        "late_vector": _sums(known.late_vectors, tokens, late),
        "late_spelling": _sums(known.traits, tokens, late),
        "length": hats(length, marks),
    }
    return Design.of(sparse, dense, padding), marks


def _those_that_are(flags: npt.NDArray[np.bool_]) -> tuple[Indices, npt.NDArray[np.bool_]]:
    """Return where flags (V, c) are set in each row, (V, the most that are in one), and False behind the last one."""
    most = int(flags.sum(1).max())
    places = np.argsort(~flags, axis=1, kind="stable")[:, :most]
    return places, np.take_along_axis(flags, places, 1)


def layout(vocabulary: int) -> tuple[dict[str, int], int]:
    """Return where the numbers of each kind of sparse feature begin, and the number behind the last, for none."""
    sizes = dict.fromkeys(("token", "first", "late", "opening", "last"), vocabulary)
    sizes |= {"pair": PAIRS, "repeat": 1, "echo": 2 * (LONGEST + 1), **dict.fromkeys(CLASSINGS, CLASSES**2)}
    sizes |= {"alike": len(CLASSINGS), "count": COUNTED * OCCURRENCES, "letter": LETTERED * OCCURRENCES}
    sizes |= {"acrostic": NUMBERED * CLASSES}
    *begin, end = itertools.accumulate(sizes.values(), initial=0)
    return dict(zip(sizes, begin, strict=True)), end


def _sums(values: Floats, tokens: Indices, counted: npt.NDArray[np.bool_]) -> Floats:
    """Return the sums of values (V, d) over the tokens (n, T) of each text that count, (n, d)."""
    sums = np.zeros((len(tokens), values.shape[1]))
    for place in range(tokens.shape[1]):  # one after the other: all at once are large
        sums += values[tokens[:, place]] * counted[:, place, None]
    return sums


def known_tokens(language_model: LanguageModel) -> KnownTokens:
    """Return what is known of the tokens of a language model."""
    return KnownTokens(directions(language_model), spelling(texts_of_tokens(language_model)))


def texts_of_tokens(language_model: LanguageModel) -> list[str]:
    """Return the text that each token adds to a longer one, (V,): at the beginning some tokenizers strip a blank."""
    ids = range(language_model.vocab_size)
    before = next(([token] for token in ids if language_model.decode([token]).strip()), [])
    return language_model.continuations(before, [], ids)


def directions(language_model: LanguageModel) -> Floats:
    """Return the principal directions of the token embeddings, (V, at most ``DIRECTIONS``), of mean size 1."""
    vectors = language_model.embed(np.arange(language_model.vocab_size)).astype(np.float32)
    vectors -= vectors.mean(0)
    if vectors.shape[1] > DIRECTIONS:
        _, axes = np.linalg.eigh(vectors.T @ vectors)
        vectors = vectors @ axes[:, -DIRECTIONS:]
    size = float(np.linalg.norm(vectors, axis=1).mean())
    return np.asarray(vectors / (size or 1.0), np.float32)


def pair_index(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the number in 0..PAIRS - 1 of each pair of tokens, by their numbers in ``spelling.folded``."""
    return ((first * 0x9E3779B1 + second * 0x85EBCA77) >> 7) % PAIRS


def first_occurrences(tokens: torch.Tensor) -> torch.Tensor:
    """Return where each residue of ids occurs first in tokens (B, T): (B, RESIDUES), T where it does not."""
    length, dtype = tokens.shape[1], torch.int16 if tokens.shape[1] < 2**15 else torch.int32  # there are many
    places = torch.arange(length, device=tokens.device, dtype=dtype).expand(tokens.shape)
    found = torch.full((len(tokens), RESIDUES), length, device=tokens.device, dtype=dtype)
    return found.scatter_reduce(1, tokens % RESIDUES, places, "amin")


def hats(length: Floats, marks: tuple[float, float]) -> Floats:
    """Return (..., marks) weights of the marks next to each length, which sum to 1."""
    mean, deviation = marks
    place = np.clip((length - mean) / deviation, MARKS[0], MARKS[-1])
    return np.asarray(np.maximum(0.0, 1 - np.abs(place[..., None] - MARKS) / (MARKS[1] - MARKS[0])))
