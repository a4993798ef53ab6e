"""Rewards against a reference: BLEU, chrF and ROUGE, from the backends that papers use.

The reference comes with the prompt. Scores are those of sacrebleu and rouge-score, divided by 100
where they go to 100. ROUGE-L has a running score: the longest common subsequence is carried along
as one bit vector (Hyyro 2004), so a word costs a few operations on an integer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError
from textgen_env.extras import require
from textgen_env.rewards.adapters import reference_of
from textgen_env.rewards.base import REWARDS, Generation, Reward
from textgen_env.rewards.incremental import IncrementalScore

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.base import Metric

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")


@REWARDS.register("bleu")
@dataclass(frozen=True)
class BleuReward(Reward):
    """Sentence BLEU of the completion against the reference, with effective order.

    Range: 0 to 1. Needs references.
    Running score: no.
    How it is gamed: by common n-grams in any order.

    Source: Papineni et al. 2002; sacrebleu's ``sentence_bleu``, exponential smoothing, 13a tokens.
    """

    name = "bleu"

    def __post_init__(self) -> None:
        require("sacrebleu", extra="references", for_="reward 'bleu'")

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return _sacrebleu_scores("bleu", generations)


@REWARDS.register("chrf")
@dataclass(frozen=True)
class ChrfReward(Reward):
    """chrF2 of the completion against the reference: F-score of character n-grams up to 6.

    Range: 0 to 1. Needs references.
    Running score: no.
    How it is gamed: by fragments of words; recall counts twice, so long texts gain.

    Source: Popovic 2015; sacrebleu's ``sentence_chrf``.
    """

    name = "chrf"

    def __post_init__(self) -> None:
        require("sacrebleu", extra="references", for_="reward 'chrf'")

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return _sacrebleu_scores("chrf", generations)


def _sacrebleu_scores(name: str, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
    metric = _sacrebleu_metric(name)
    scores = [metric.sentence_score(g.completion, [reference_of(g, name)]).score for g in generations]
    return np.array(scores, np.float64) / 100


@cache
def _sacrebleu_metric(name: str) -> Metric:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(effective_order=True) if name == "bleu" else CHRF()


@REWARDS.register("rouge")
@dataclass(frozen=True)
class RougeReward(Reward):
    """ROUGE F1 of the completion against the reference: common words, or the common subsequence.

    Range: 0 to 1. Needs references.
    Running score: for rougeL.
    How it is gamed: by copying the frequent words of the prompt.

    Args:
        kind: ``"rouge1"``, ``"rouge2"`` or ``"rougeL"``.

    Source: Lin 2004; rouge-score without a stemmer.
    """

    kind: str = "rougeL"

    name = "rouge"

    def __post_init__(self) -> None:
        if self.kind not in ROUGE_KINDS:
            raise ConfigError(f"kind must be one of {', '.join(ROUGE_KINDS)}, got {self.kind!r}")
        require("rouge_score", extra="references", for_="reward 'rouge'")

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        score = _rouge_scorer(self.kind).score
        values = [score(reference_of(g, self.name), g.completion)[self.kind].fmeasure for g in generations]
        return np.array(values, np.float64)

    def running(self) -> RougeLScore | None:
        return RougeLScore() if self.kind == "rougeL" else None


@dataclass(frozen=True, slots=True)
class Subsequence:
    """The longest common subsequence of a reference and the words so far.

    Bit j of ``places[word]`` is set where word j of the reference is ``word``. The zeros of ``row``
    are the steps of the dynamic program's last row, so their number is the length.
    """

    places: Mapping[str, int]
    reference_words: int
    words: int
    row: int


class RougeLScore(IncrementalScore[Subsequence]):
    """ROUGE-L F1 of a growing completion."""

    def begin(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> Subsequence:
        words = _rouge_words(reference_of(Generation(prompt, "", reference=reference), "rouge"))
        places: dict[str, int] = {}
        for position, word in enumerate(words):
            places[word] = places.get(word, 0) | 1 << position
        return Subsequence(places, len(words), 0, (1 << len(words)) - 1)

    def settle(self, acc: Subsequence, text: str) -> Subsequence:
        words = _rouge_words(text)
        row, mask = acc.row, (1 << acc.reference_words) - 1
        for word in words:
            hits = row & acc.places.get(word, 0)
            row = (row + hits | row - hits) & mask
        return replace(acc, words=acc.words + len(words), row=row)

    def value(self, acc: Subsequence, tail: str) -> float:
        whole = self.settle(acc, tail) if tail else acc
        common = whole.reference_words - whole.row.bit_count()
        if not common:
            return 0.0
        precision, recall = common / whole.words, common / whole.reference_words
        return 2 * precision * recall / (precision + recall)


def _rouge_words(text: str) -> list[str]:
    return UnicodeWords().tokenize(text)


class UnicodeWords:
    """Lower-case words of letters, digits and combining marks of any script, as rouge-score splits ASCII.

    rouge-score's own tokenizer drops whatever is not a-z or 0-9, so Russian or Hindi texts would have no words.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words of ``text``."""
        kept = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text.lower())
        return "".join(kept).split()


@cache
def _rouge_scorer(kind: str) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=False, tokenizer=UnicodeWords())
