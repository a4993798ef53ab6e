"""Rhyme by spelling: how well the lines of a text follow a rhyme scheme.

There is no pronouncing dictionary in the box (the common one has a wrapper under the GPL), so a
word's sound from its last full vowel on is guessed from its letters: a silent e lengthens a vowel,
"ai", "ay" and "eigh" are one sound, "ck" is "k", and a hundred and fifty frequent words are listed
because no rule gets them right. It stays a guess;
``docs/rewards.md`` says how often it agrees with a pronouncing dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError
from textgen_env.rewards.base import REWARDS, Generation, Reward
from textgen_env.rewards.lexical import split_words


@REWARDS.register("rhyme")
@dataclass(frozen=True)
class Rhyme(Reward):
    """The share of the lines that the scheme wants to rhyme which do.

    Lines are those of the text (prompt and completion) that hold a word. The scheme repeats down
    the text; a line should rhyme with the last line of its letter in the same round. Only lines
    that end in the completion count; a word does not rhyme with itself.

    Range: 0 (also where no line is due to rhyme yet) to 1.
    Running score: no; a line has no rhyme before its end.
    How it is gamed: by words that look alike, and by lines of one word.

    Args:
        scheme: Letters, such as "AA" (couplets), "ABAB", or "ABCB".
    """

    scheme: str = "AA"

    name = "rhyme"

    def __post_init__(self) -> None:
        letters = isinstance(self.scheme, str) and self.scheme.isalpha()
        if not letters or len(set(self.scheme)) == len(self.scheme):
            raise ConfigError(f'a rhyme scheme is letters of which one occurs twice, like "AA", got {self.scheme!r}')

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return np.array([self._one(generation) for generation in generations], np.float64)

    def _one(self, generation: Generation) -> float:
        before = generation.prompt
        if split_words(generation.completion.partition("\n")[0]):
            before = before.rpartition("\n")[0]  # the prompt's last line ends in the completion
        finished = len(_line_ends(before))
        ends = _line_ends(generation.text)
        due = rhymed = 0
        for line in range(finished, len(ends)):
            place = line % len(self.scheme)
            partner = self.scheme.rfind(self.scheme[place], 0, place)
            if partner >= 0:
                due += 1
                rhymed += rhymes(ends[line], ends[line - place + partner])
        return rhymed / due if due else 0.0


def _line_ends(text: str) -> list[str]:
    """Return the last word of each line that has one."""
    words = (split_words(line) for line in text.split("\n"))
    return [line[-1] for line in words if line]


def rhymes(word: str, other: str) -> bool:
    """Return True if two English words seem to rhyme. No word rhymes with itself."""
    word, other = word.lower(), other.lower()
    return word != other and rime(word) == rime(other) != ""


@lru_cache(maxsize=1 << 14)
def rime(word: str) -> str:
    """Return a guess at the sound of ``word`` from its last full vowel on, "" if it has none.

    Capitals stand for long vowels and diphthongs ("AI" as in "sky"), small letters for themselves.
    """
    word = re.sub("[^a-z]", "", word.lower())
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    word = re.sub("^y(?=[aeiou])", "j", word).replace("qu", "k")  # consonants, as these letters stand there
    if len(word) > 3 and _PLURAL.search(word) and (singular := rime(word[:-1])):
        return singular + "s"
    if (past := _PAST.search(word)) and _VOWEL.search(word[: past.start()]):
        sound = _sound(re.sub("(?<=[^aeiouyw])$", "e", word[: past.start()]))
        return sound + ("t" if sound[-1] in "kpsfh" else "d")
    if (weak := _WEAK_END.search(word)) and _VOWEL.search(word[: weak.start()]):
        # "making", "running": the ending needs the sound before it. A vowel that follows a single
        # consonant lengthens the vowel before it, as a silent e does.
        lengthens = "e" if weak[0][0] in "aeiouy" else ""
        return _sound(word[: weak.start()] + lengthens) + re.sub("ie|ey", "y", weak[0])
    return _sound(word)


def _sound(body: str) -> str:
    """Return the sound of ``body`` from its last vowel on; a final e is silent."""
    match = _BODY.search(body)
    if match is None:
        return ""
    vowel, consonants, silent = match.groups()
    lengthened = not consonants or (silent and _LENGTHENED.fullmatch(consonants))
    if len(vowel) == 1 and lengthened:
        sound = _LONG[vowel]
    elif not consonants and vowel == "ie":
        sound = "AI"  # "pie", against "piece"
    elif consonants.startswith("gh"):
        sound = {"i": "AI", "ei": "EI", "ai": "EI"}.get(vowel, "AO")
        consonants = consonants[2:]
    else:
        sound = _DIGRAPHS.get(vowel, vowel)
        for vowels, following, colour in _COLOURED:
            if vowel in vowels.split() and re.match(following, consonants):
                sound = colour
    if silent:
        consonants = re.sub("g$", "j", re.sub("c$", "s", consonants))
    for spelling, one_sound in _CONSONANTS:
        consonants = re.sub(spelling, one_sound, consonants)
    return sound + consonants


_VOWEL = re.compile("[aeiouy]")
_PLURAL = re.compile("[^suicl]s$|[^p]les$|ies$|[aeiourlcd]ls$")
_PAST = re.compile("(?<=[^tdei])ed$")
_WEAK_END = re.compile(
    r"(?<=[aeiouy])ing$|(?:[tsc]ion|ian|ious|uous|ial|ual)$|(?<=[^aeiou])(?:ings?|ers?|ors?|[ai]ble|al|ous|ics?|ly|"
    r"ness|ie|ey|ity|y|en|et|el|it|is|ent|ence|ance|ant|est|age|ive|on|an|ar|a|ure|"
    r"(?<=[td])ed|(?<=[^aeiouyrw])le)$"
)
_BODY = re.compile(r"(ieu|iew|a[iuyw]|e[aeiyw]|ie|o[aeiouyw]|u[ei](?=[^e]|$)|[aeiouy])([^aeiouy]*)((?<=[^aeiouyw])e)?$")
_LENGTHENED = re.compile("[^aeiouywx]|st|ng|th")
_LONG = {"a": "EI", "e": "II", "i": "AI", "o": "OU", "u": "UU", "y": "AI"}
_DIGRAPHS = {
    "ai": "EI", "ay": "EI", "ei": "EI", "ey": "EI", "ea": "II", "ee": "II", "ie": "II",
    "oa": "OU", "oe": "OU", "oo": "UU", "ue": "UU", "ew": "UU", "ui": "UU", "ieu": "UU", "iew": "UU",
    "au": "AO", "aw": "AO", "ou": "AU", "ow": "AU", "oi": "OI", "oy": "OI", "y": "i",
}  # fmt: skip
_COLOURED = [  # vowels, the letters after them, and the sound of both
    ("i", "nd|ld|gn", "AI"),  # kind, wild, sign
    ("o", "l[dt]|st$|ll", "OU"),  # cold, most, roll
    ("a", "l[ldkt]", "AO"),  # all, bald, walk, salt
    ("e i u", "r", "E"),  # fern, bird, burn
    ("ea", "r[ntlc]", "E"),  # learn, earth
    ("o oa oo ou", "r", "O"),  # for, oar, door, four
]
_CONSONANTS = [
    (r"(.)\1", r"\1"), ("ck", "k"), ("ph", "f"), ("dg", "j"), ("tch", "ch"), ("x", "ks"), ("mb$", "m"),
    ("gn$", "n"), ("c$", "k"), ("lk$", "k"), ("z", "s"), ("sc$", "s"),
]  # fmt: skip

_IRREGULAR = {
    word: sound
    for sound, words in {
        "AI": "i eye buy guy dye bye",
        "AIt": "height",
        "AOt": "caught thought bought brought fought taught ought",
        "EI": "they grey prey obey hey weigh",
        "EIk": "break steak",
        "EIt": "great straight",
        "Er": "were",
        "Erd": "word heard",
        "Erk": "work",
        "Erld": "world",
        "Ers": "worse",
        "Erth": "worth",
        "II": "key",
        "OU": "know snow show slow low grow below though go so no flow blow throw glow crow tomorrow",
        "OUn": "own known grown shown",
        "UU": "you to do who two through too shoe into",
        "UUm": "whom tomb womb",
        "UUv": "move prove",
        "AUr": "our hour flour",
        "EIr": "where there bear wear pear tear their anywhere nowhere everywhere",
        "Ud": "good could would should wood stood",
        "Uk": "book look took cook hook",
        "ad": "sad glad",
        "ar": "are",
        "art": "heart",
        "av": "have",
        "end": "friend",
        "es": "yes guess",
        "ed": "said dead head bread read instead ahead spread",
        "en": "again then",
        "eth": "death breath",
        "elth": "health wealth",
        "iv": "give live forgive",
        "ud": "blood flood mud",
        "uf": "enough rough tough",
        "um": "come some become",
        "un": "one done none won son anyone someone everyone",
        "unt": "front",
        "ung": "young among tongue",
        "uv": "love above glove dove of",
        "us": "was does us bus plus",
    }.items()
    for word in words.split()
}
