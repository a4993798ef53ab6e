"""Rewards that count words: keywords, length, repetition, variety, readability and metre.

A word is a run of letters and digits of any script, combining marks and apostrophes inside it
included, in lower case. Words never span whitespace, so all of these have running scores that cost
only the open tail.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from textgen_env.config import check_at_least
from textgen_env.errors import ConfigError, RewardError
from textgen_env.rewards.base import REWARDS, shorten
from textgen_env.rewards.incremental import IncrementalReward, IncrementalScore

_ASCII_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def split_words(text: str) -> list[str]:
    """Return the words of ``text`` in lower case."""
    lower = text.lower()
    return _ASCII_WORD.findall(lower) if lower.isascii() else _word_of_any_script().findall(lower)


def distinct_share(texts: Sequence[str], n: int) -> float:
    """Return different word n-grams over all of them, in all texts together; 0 without any."""
    words = map(split_words, texts)
    ngrams = Counter(gram for text in words for gram in zip(*(text[i:] for i in range(n)), strict=False))
    return len(ngrams) / ngrams.total() if ngrams else 0.0


@cache
def _word_of_any_script() -> re.Pattern[str]:
    """Return the pattern of a word: vowel signs, accents and joiners of a script do not end it, as ``\\w`` has it."""
    planes = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))
    marks = "".join(c for c in map(chr, planes) if unicodedata.category(c)[0] == "M")
    part = f"(?:[^\\W_]|[{marks}\u200c\u200d])"
    return re.compile(f"[^\\W_]{part}*(?:['’]{part}+)*")


@REWARDS.register("keywords")
@dataclass(frozen=True)
class Keywords(IncrementalReward):
    """The share of given words that the completion contains, as whole words, in any case.

    Range: 0 to 1, in steps of one over the number of different keywords.
    Running score: yes.
    How it is gamed: by listing the words. Mix it with ``fluency`` or subtract ``repetition``.

    Args:
        words: The keywords. Without them, each prompt brings its own as ``metadata["keywords"]``.
    """

    words: Sequence[str] | None = None

    name = "keywords"

    def __post_init__(self) -> None:
        if self.words is not None:
            _keywords(self.words, ConfigError)
            object.__setattr__(self, "words", tuple(self.words))

    def running(self) -> IncrementalScore[Any]:
        return _KeywordScore(self.words)


class _Found(NamedTuple):
    wanted: frozenset[str]
    found: frozenset[str]


class _KeywordScore(IncrementalScore[_Found]):
    def __init__(self, words: Sequence[str] | None) -> None:
        self._words = words

    def begin(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> _Found:
        words = self._words if self._words is not None else metadata.get("keywords")
        if words is None:
            raise RewardError(
                f"reward 'keywords' was given no words, and the prompt {shorten(prompt)} has no "
                '"keywords" in its metadata; give either'
            )
        return _Found(_keywords(words, RewardError), frozenset())

    def settle(self, acc: _Found, text: str) -> _Found:
        return _Found(acc.wanted, acc.found | acc.wanted.intersection(split_words(text)))

    def value(self, acc: _Found, tail: str) -> float:
        return len(acc.found | acc.wanted.intersection(split_words(tail))) / len(acc.wanted)


def _keywords(words: Any, error: type[ConfigError] | type[RewardError]) -> frozenset[str]:
    if isinstance(words, str) or not isinstance(words, Sequence) or not words:
        raise error(f"keywords must be a list of words, got {words!r}")
    for word in words:
        if not isinstance(word, str) or split_words(word) != [word.lower()]:
            raise error(f"a keyword must be one word of letters, digits and inner apostrophes, got {word!r}")
    return frozenset(word.lower() for word in words)


@REWARDS.register("length")
@dataclass(frozen=True)
class Length(IncrementalReward):
    """How close the completion's length is to ``target`` words: 1 - |words - target| / target.

    Range: 0 (nothing, or twice the target and more) to 1 (the target).
    Running score: yes.
    How it is gamed: any words will do.

    Args:
        target: Words, at least 1.
    """

    target: int = 20

    name = "length"

    def __post_init__(self) -> None:
        check_at_least("target", self.target, 1)
        object.__setattr__(self, "target", int(self.target))

    def running(self) -> IncrementalScore[Any]:
        return _LengthScore(self.target)


class _LengthScore(IncrementalScore[int]):
    def __init__(self, target: int) -> None:
        self._target = target

    def begin(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> int:
        return 0

    def settle(self, acc: int, text: str) -> int:
        return acc + len(split_words(text))

    def value(self, acc: int, tail: str) -> float:
        return max(0.0, 1 - abs(self.settle(acc, tail) - self._target) / self._target)


@REWARDS.register("repetition")
@dataclass(frozen=True)
class RepetitionReward(IncrementalReward):
    """The share of the completion's n-grams of words that have occurred in it before. Subtract it.

    Range: 0 (no n-gram twice, or fewer than n words) to below 1 (one word over and over).
    Running score: yes.
    How it is gamed: as a penalty, by stopping early.

    Args:
        n: Words in an n-gram, at least 1.

    Source: rep-n, Welleck et al. 2020, arXiv:1908.04319.
    """

    n: int = 3

    name = "repetition"

    def __post_init__(self) -> None:
        check_at_least("n", self.n, 1)
        object.__setattr__(self, "n", int(self.n))

    def running(self) -> IncrementalScore[Any]:
        return _RepetitionScore(self.n)


@REWARDS.register("distinct")
@dataclass(frozen=True)
class DistinctReward(IncrementalReward):
    """Distinct-n: different n-grams of words over all n-grams of the completion.

    Range: 0 (fewer than n words), else above 0 to 1 (none occurs twice).
    Running score: yes.
    How it is gamed: by stopping early, and by rare words.

    Args:
        n: Words in an n-gram, at least 1.

    Source: Li et al. 2016, arXiv:1510.03055.
    """

    n: int = 2

    name = "distinct"

    def __post_init__(self) -> None:
        check_at_least("n", self.n, 1)
        object.__setattr__(self, "n", int(self.n))

    def running(self) -> IncrementalScore[Any]:
        return _DistinctScore(self.n)


class _NGrams(NamedTuple):
    last: tuple[str, ...]  # n - 1 words
    total: int
    different: frozenset[tuple[str, ...]]


class _NGramScore(IncrementalScore[_NGrams]):
    def __init__(self, n: int) -> None:
        self._n = n

    def begin(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> _NGrams:
        return _NGrams((), 0, frozenset())

    def settle(self, acc: _NGrams, text: str) -> _NGrams:
        words = [*acc.last, *split_words(text)]
        ngrams = list(self._ngrams(words))
        last = tuple(words[len(words) - self._n + 1 :] if len(words) >= self._n else words)
        return _NGrams(last, acc.total + len(ngrams), acc.different.union(ngrams))

    def counts(self, acc: _NGrams, tail: str) -> tuple[int, int]:
        """Return how many n-grams there are, and how many different ones."""
        ngrams = list(self._ngrams([*acc.last, *split_words(tail)]))
        return acc.total + len(ngrams), len(acc.different) + len(set(ngrams) - acc.different)

    def _ngrams(self, words: Sequence[str]) -> Iterator[tuple[str, ...]]:
        return zip(*(words[i:] for i in range(self._n)), strict=False)


class _RepetitionScore(_NGramScore):
    def value(self, acc: _NGrams, tail: str) -> float:
        total, different = self.counts(acc, tail)
        return 1 - different / total if total else 0.0


class _DistinctScore(_NGramScore):
    def value(self, acc: _NGrams, tail: str) -> float:
        total, different = self.counts(acc, tail)
        return different / total if total else 0.0


@REWARDS.register("readability")
@dataclass(frozen=True)
class Readability(IncrementalReward):
    """How close the completion is to a Flesch-Kincaid grade: 1 - |grade - target| / tolerance.

    The grade is 0.39 words a sentence + 11.8 syllables a word - 15.59, that is, years of (American)
    school. Syllables are counted by spelling; a sentence ends with ".", "!" or "?".

    Range: 0 (``tolerance`` grades away, or no words) to 1 (the target grade).
    Running score: yes.
    How it is gamed: by long words in fragments, or short words without a full stop; it knows
    nothing of sense.

    Args:
        target: The grade wanted, in school years.
        tolerance: Grades off at which the reward reaches 0; above 0.

    Source: Kincaid et al. 1975, "Derivation of new readability formulas".
    """

    target: float = 6.0
    tolerance: float = 10.0

    name = "readability"

    def __post_init__(self) -> None:
        if not math.isfinite(self.target) or not math.isfinite(self.tolerance) or self.tolerance <= 0:
            raise ConfigError(
                f"readability wants a finite target and a tolerance above 0, got {self.target!r} and {self.tolerance!r}"
            )

    def running(self) -> IncrementalScore[Any]:
        return _ReadabilityScore(self.target, self.tolerance)


@REWARDS.register("metre")
@dataclass(frozen=True)
class Metre(IncrementalReward):
    """How close the completion's first line is to a number of syllables: 1 - |count - syllables| / syllables.

    Syllables are counted by spelling; where the stress falls is not looked at.

    Range: 0 (no word, or twice as many and more) to 1 (as many as wanted).
    Running score: yes.
    How it is gamed: any words will do.

    Args:
        syllables: Wanted, at least 1.
    """

    syllables: int = 8

    name = "metre"

    def __post_init__(self) -> None:
        check_at_least("syllables", self.syllables, 1)
        object.__setattr__(self, "syllables", int(self.syllables))

    def running(self) -> IncrementalScore[Any]:
        return _MetreScore(self.syllables)


class _Line(NamedTuple):
    syllables: int = 0
    over: bool = False  # a newline was seen


class _MetreScore(IncrementalScore[_Line]):
    def __init__(self, target: int) -> None:
        self._target = target

    def begin(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> _Line:
        return _Line()

    def settle(self, acc: _Line, text: str) -> _Line:
        if acc.over:
            return acc
        line, newline, _ = text.partition("\n")
        return _Line(acc.syllables + sum(map(count_syllables, split_words(line))), bool(newline))

    def value(self, acc: _Line, tail: str) -> float:
        return max(0.0, 1 - abs(self.settle(acc, tail).syllables - self._target) / self._target)


class _Prose(NamedTuple):
    words: int = 0
    syllables: int = 0
    sentences: int = 0  # finished ones
    is_open: bool = False  # words after the last of them


class _ReadabilityScore(IncrementalScore[_Prose]):
    def __init__(self, target: float, tolerance: float) -> None:
        self._target = target
        self._tolerance = tolerance

    def begin(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> _Prose:
        return _Prose()

    def settle(self, acc: _Prose, text: str) -> _Prose:
        words, syllables, sentences, is_open = acc
        for chunk in text.split():
            found = split_words(chunk)
            words += len(found)
            syllables += sum(map(count_syllables, found))
            is_open = is_open or bool(found)
            if is_open and _SENTENCE_END.search(chunk):
                sentences, is_open = sentences + 1, False
        return _Prose(words, syllables, sentences, is_open)

    def value(self, acc: _Prose, tail: str) -> float:
        prose = self.settle(acc, tail)
        if not prose.words:
            return 0.0
        return max(0.0, 1 - abs(_grade(prose) - self._target) / self._tolerance)


_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*$")
_VOWELS = re.compile(r"[aeiouyàáâäãåæèéêëìíîïòóôöõøœùúûüýÿ]+")
_SILENT_END = re.compile(r"(?<=[^aeiouy])(?:e|es|ed)$")
_SOUNDED_END = re.compile(r"(?:[^aeiouylr]l|[^aeiouylr]r)e[sd]?$|[td]ed$|(?:[sxzcg]|[cs]h)es$")
_SOUNDED_APART = re.compile(
    r"[^cgstx]ia|[^cgst]io(?<!llio)|[^ct]ie(?:t|n[tc])|[^q]ua[lt]|[^qg]uel|[^qg]ui[nd]"
    r"|e[ao]$|eum|oe[mt]|ao|creat(?!u)|(?:[aeiou]|[^q]u|y)ing$|thm$|[^aeiouy]n['’]t$"
)


def count_syllables(word: str) -> int:
    """Return about how many syllables an English word has, by its spelling; at least 1.

    Counts groups of vowels, takes off a silent end, and adds one where neighbours sound apart.
    """
    word = word.lower()
    count = len(_VOWELS.findall(word)) + len(_SOUNDED_APART.findall(word))
    if _SILENT_END.search(word) and not _SOUNDED_END.search(word):
        count -= 1
    return max(1, count)


def _grade(prose: _Prose) -> float:
    sentences = prose.sentences + prose.is_open
    return 0.39 * prose.words / sentences + 11.8 * prose.syllables / prose.words - 15.59


def flesch_kincaid_grade(text: str) -> float:
    """Return the Flesch-Kincaid grade of ``text``, in school years; NaN if it has no words."""
    prose = _ReadabilityScore(0.0, 1.0).settle(_Prose(), text)
    return _grade(prose) if prose.words else math.nan
