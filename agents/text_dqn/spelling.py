"""How tokens are written: what judges of the surface look at, and what rare tokens share with common ones.

    texts of the tokens  ->  spelling  ->  numbers of each, which add up over a text
    texts of the tokens  ->  classes   ->  the class of each, where it begins a word, by initial, by ending and by size
    tokens of texts      ->  last_word ->  the classes of the word that began last
    texts of the tokens  ->  folded    ->  which of them are the same but for case and blanks
    texts of the tokens  ->  counted   ->  what each has of what can be counted: a word, a capital, a comma, an e

Source: subwords as features, Bojanowski et al. 2017, arXiv:1607.04606.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from textgen_env.policies import Floats

CLASSINGS = ("initials", "endings", "sizes")
"""Pairs of words have weights by these: order and alliteration, rhyme, rhythm."""

CLASSES = 32
"""By each of them: 0 of tokens that begin no word, then ``ALPHABET + OTHERS`` of letters, or sizes up to the last."""

SIGNS = (",", ".!?", "?", "!", ":;", "'’", '"“”', "()[]", "-–—", "\n")
"""Tokens with any of these are counted, beside words, capitals and digits."""

ALPHABET = 26
OTHERS = 4
"""Classes of characters that are none of a to z."""

COUNTED = 3 + len(SIGNS)
LETTERED = 2 * ALPHABET
"""Kinds of tokens that are counted: by signs and the like; and by the letters that they have, or begin a word with."""

TRAITS = 6 + ALPHABET + OTHERS
"""So many numbers of ``spelling`` say how a token is written, those behind them in what order."""

GRAMS = 128
"""Sequences of two and of three characters are hashed to so many numbers, with signs."""

GRAMS_COUNT = 0.5
"""So much beside characters."""

RAREST = 0.05
"""Deviation of a number over the vocabulary below which it counts as if it were so much."""


def spelling(texts: Sequence[str]) -> Floats:
    """Return (V, e): one, number of characters, with blank, capital, digit or sign, which ones, in what order."""
    words = [text.strip().lower() for text in texts]
    traits = np.array(
        [
            (
                len(word),
                text[:1].isspace(),
                any(c.isupper() for c in text),
                any(c.isdigit() for c in text),
                any(not c.isalnum() for c in word),
            )
            for text, word in zip(texts, words, strict=True)
        ],
        np.float32,
    )
    characters = np.zeros((len(texts), ALPHABET + OTHERS), np.float32)
    grams = np.zeros((len(texts), GRAMS), np.float32)
    for token, (text, word) in enumerate(zip(texts, words, strict=True)):
        for character in word:
            characters[token, _class_of(character)] += 1
        edged = f"{text[:1] if text[:1].isspace() else ''}{word} "
        for size in (2, 3):
            for start in range(len(edged) - size + 1):
                code = zlib.crc32(edged[start : start + size].encode("utf-8", "replace"))
                grams[token, code % GRAMS] += 1 if code & 2**20 else -1
    traits, characters, grams = (of / np.maximum(of.std(0), RAREST) for of in (traits, characters, grams))
    return np.concatenate([np.ones((len(texts), 1), np.float32), traits, characters, GRAMS_COUNT * grams], 1)


def classes(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the class of each token by each of ``CLASSINGS``, (3, V) in 0..CLASSES - 1.

    What has a letter or digit behind a blank begins a word, whatever signs stand around it; in a vocabulary without
    blanks each token is one. Endings are those of the token: a longer word may go on.
    """
    words = [_word_in(text.lower()) for text in texts]
    blanks = [text[:1] == " " and word != "" for text, word in zip(texts, words, strict=True)]
    begins = blanks if any(blanks) else [word != "" for word in words]
    found = np.zeros((len(CLASSINGS), len(texts)), np.int64)
    for token in np.flatnonzero(begins):
        word = words[token]
        found[:, token] = 1 + _class_of(word[0]), 1 + _class_of(word[-1]), min(len(word), CLASSES - 1)
    return found


def counted(texts: Sequence[str], initials: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return (V, COUNTED + LETTERED): the token begins a word, has a capital, a digit, one of each sign; letters.

    Args:
        texts: Of V tokens.
        initials: (V,) of the words that they begin; see ``classes``.
    """
    kinds = [initials > 0, *(np.array([any(map(of, text)) for text in texts]) for of in (str.isupper, str.isdigit))]
    kinds += [np.array([not signs.isdisjoint(text) for text in texts]) for signs in map(set, SIGNS)]
    letters = [chr(ord("a") + place) for place in range(ALPHABET)]
    lower = [text.lower() for text in texts]
    kinds += [np.array([letter in text for text in lower]) for letter in letters]
    return np.stack([*kinds, *(initials == 1 + _class_of(letter) for letter in letters)], 1)


def folded(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return a number for each of V tokens, (V,): the same for those that differ in case and blanks alone."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text.strip().lower() or text, len(numbers)) for text in texts])


def last_word(tokens: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return the classes of the last word that has begun at each place of tokens (B, T): (3, B, T), 0 for none."""
    of = classes[:, tokens]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return of.gather(2, torch.where(of[0] > 0, places, 0).cummax(1).values.expand(of.shape))


def _word_in(text: str) -> str:
    """Return what stands from the first letter or digit to the last one."""
    places = [place for place, character in enumerate(text) if character.isalnum()]
    return text[places[0] : places[-1] + 1] if places else ""


def _class_of(character: str) -> int:
    """Return a number in 0..ALPHABET + OTHERS - 1."""
    return ord(character) - ord("a") if "a" <= character <= "z" else ALPHABET + ord(character) % OTHERS
