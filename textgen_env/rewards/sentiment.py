"""Sentiment of the completion: VADER's compound score, whole or token by token.

VADER rates a word from itself, three words before it and two after it, so a settled text is its
words' valences; only the last two settled words and the open tail are rated again. Three things
are global and cheap: emphasis by capitals (if some but not all words are in them; both versions of
the valences are kept), the first "but" (halves the words before it, raises those after), and the
numbers of ! and ?. The rating itself is VADER's own code, called on a word and its neighbours and
remembered, so the running score equals ``polarity_scores(completion)["compound"]`` exactly.
Neighbours that no rule of VADER's mentions are all the same to it: that makes few contexts of many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from textgen_env.rewards.base import REWARDS, Generation, Reward
from textgen_env.rewards.incremental import IncrementalScore

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@REWARDS.register("sentiment")
@dataclass(frozen=True)
class Sentiment(Reward):
    """How positive the completion sounds: VADER's compound score.

    Range: -1 (negative) to 1 (positive), 0 for neutral or empty text.
    Running score: yes, exact.
    How it is gamed: "great great great" scores 0.95; words count, sense does not. Mix it with
    ``repetition`` or ``fluency``, and look at the KL.

    Source: Hutto and Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis
    of social media text"; the vaderSentiment package.
    """

    name = "sentiment"

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        rate = _analyzer().polarity_scores
        return np.array([rate(g.completion)["compound"] for g in generations], np.float64)

    def running(self) -> SentimentScore:
        return SentimentScore()


class Word(NamedTuple):
    """A chunk as VADER sees it."""

    text: str  # without the punctuation around it
    as_neighbour: str  # a word with the same effect on the words around it
    shouted: bool  # in capitals
    rated: bool  # in the lexicon, and not one of the words that only strengthen or weaken others
    turns: bool  # "but"


class Settled(NamedTuple):
    """The accumulator of a settled text.

    ``calm`` and ``loud`` are the valences other than zero of all words but the last two, without
    and with the emphasis on capitals; a zero among them stands for the first "but".
    """

    last: tuple[Word, ...] = ()  # up to five: the last two are not rated yet, three precede them
    words: int = 0
    shouted: int = 0
    exclamations: int = 0
    questions: int = 0
    calm: tuple[float, ...] = ()
    loud: tuple[float, ...] = ()


class SentimentScore(IncrementalScore[Settled]):
    """VADER's compound score of a growing completion."""

    def begin(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> Settled:
        return Settled()

    def settle(self, acc: Settled, text: str) -> Settled:
        text = _describe_emojis(text)
        words = _words(text)
        window = acc.last + words
        rateable = range(_unrated(acc), len(window) - 2)
        return Settled(
            last=window[-5:],
            words=acc.words + len(words),
            shouted=acc.shouted + sum([word.shouted for word in words]),
            exclamations=acc.exclamations + text.count("!"),
            questions=acc.questions + text.count("?"),
            calm=_rate(window, rateable, False, acc.calm),
            loud=_rate(window, rateable, True, acc.loud),
        )

    def value(self, acc: Settled, tail: str) -> float:
        tail = _describe_emojis(tail)
        words = _words(tail)
        window = acc.last + words
        shouted = acc.shouted + sum([word.shouted for word in words])
        is_loud = 0 < shouted < acc.words + len(words)
        settled = acc.loud if is_loud else acc.calm
        valences = _rate(window, range(_unrated(acc), len(window)), is_loud, settled)
        return _compound(valences, acc.exclamations + tail.count("!"), acc.questions + tail.count("?"))


def _unrated(acc: Settled) -> int:
    """Return the index in ``acc.last`` of the first word that is not rated yet."""
    return max(0, len(acc.last) - 2)


def _rate(
    window: tuple[Word, ...], positions: Iterable[int], is_loud: bool, valences: tuple[float, ...]
) -> tuple[float, ...]:
    """Return ``valences``, then those of the words at ``positions``, as in ``Settled``."""
    for i in positions:
        word = window[i]
        if word.rated:
            first = max(0, i - 3)
            context = tuple([neighbour.as_neighbour for neighbour in window[first : i + 3]])
            valence = _valence(word.text, context, i - first, is_loud)
            if valence:
                valences = (*valences, valence)
        elif word.turns and 0.0 not in valences:
            valences = (*valences, 0.0)
    return valences


@lru_cache(maxsize=1 << 12)
def _compound(rated: tuple[float, ...], exclamations: int, questions: int) -> float:
    """Return VADER's compound score of a text, to its four decimals."""
    valences: Sequence[float] = rated
    if 0.0 in rated:
        # VADER looks for "but" among the words and pairs them with valences by position. Words of
        # valence zero change nothing there, so the others may stand for themselves.
        words = [""] * rated.index(0.0) + ["but"]
        valences = _analyzer()._but_check(words, list(rated))
    total = float(sum(valences))
    if not total:
        return 0.0
    emphasis = _emphasis(min(exclamations, 5), min(questions, 5))
    return _normalise(total + emphasis if total > 0 else total - emphasis)


def _words(text: str) -> tuple[Word, ...]:
    return tuple(map(_word, text.split()))


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@lru_cache(maxsize=1 << 16)
def _word(chunk: str) -> Word:
    from vaderSentiment.vaderSentiment import BOOSTER_DICT, SentiText

    text = SentiText._strip_punc_if_word(chunk)
    lower = text.lower()
    in_lexicon = lower in _analyzer().lexicon
    matters = lower in _neighbours_that_matter() or "n't" in lower
    as_neighbour = text if matters else "good" if in_lexicon else ""
    return Word(text, as_neighbour, text.isupper(), in_lexicon and lower not in BOOSTER_DICT, lower == "but")


@cache
def _neighbours_that_matter() -> frozenset[str]:
    """Return the words that VADER's rules mention, all of them in lower case."""
    from vaderSentiment.vaderSentiment import BOOSTER_DICT, NEGATE, SPECIAL_CASES

    phrases = [*BOOSTER_DICT, *SPECIAL_CASES, *NEGATE, "no or nor least at very never so this without doubt"]
    return frozenset(phrases).union(*(phrase.split() for phrase in phrases))


@lru_cache(maxsize=1 << 16)
def _valence(word: str, neighbours: tuple[str, ...], i: int, is_loud: bool) -> float:
    """Return VADER's valence of ``word`` at position ``i`` of its neighbourhood."""
    if word.lower() == "kind" and i + 1 < len(neighbours) and neighbours[i + 1].lower() == "of":
        return 0.0  # "kind of" weakens the next word, and is not kind
    words = [*neighbours[:i], word, *neighbours[i + 1 :]]
    text = SimpleNamespace(words_and_emoticons=words, is_cap_diff=is_loud)
    return float(_analyzer().sentiment_valence(0, text, word, i, [])[0])


@cache
def _emphasis(exclamations: int, questions: int) -> float:
    """Return the emphasis of the marks; VADER counts at most 4 of each."""
    return float(_analyzer()._punctuation_emphasis("!" * exclamations + "?" * questions))


@lru_cache(maxsize=1 << 16)
def _normalise(total: float) -> float:
    from vaderSentiment.vaderSentiment import normalize

    return round(normalize(total), 4)


def _describe_emojis(text: str) -> str:
    """Return ``text`` with its emojis in words, spaced as VADER does it."""
    if text.isascii():
        return text
    emojis = _analyzer().emojis
    described = []
    spaced = True
    for char in text:
        if char in emojis:
            described.append(emojis[char] if spaced else f" {emojis[char]}")
            spaced = False
        else:
            described.append(char)
            spaced = char == " "
    return "".join(described)
