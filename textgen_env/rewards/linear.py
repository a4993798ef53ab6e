"""A small text classifier as a reward: which words and pairs of words occur, weighted and summed.

Train one with ``python -m textgen_env.rewards.classifier``. The file is JSON (no pickle, so a
stranger's file runs no code), scoring needs no scikit-learn, and since the score is a sum over
words it has an exact running score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from textgen_env.errors import ConfigError
from textgen_env.files import write_file
from textgen_env.rewards.base import REWARDS
from textgen_env.rewards.incremental import IncrementalReward, IncrementalScore
from textgen_env.rewards.lexical import split_words

FORMAT = "textgen-env word classifier 1"


@dataclass(frozen=True)
class WordClassifier:
    """Logistic regression on the presence of words and pairs of neighbouring words.

    The probability of ``label`` is the sigmoid of ``bias`` plus the weights of the features present.
    """

    label: str
    bias: float
    weights: Mapping[str, float]

    def save(self, file: str | Path) -> None:
        """Write the classifier as JSON."""
        content = {"format": FORMAT, "label": self.label, "bias": self.bias, "weights": dict(self.weights)}
        write_file(file, json.dumps(content, ensure_ascii=False))

    @classmethod
    def load(cls, file: str | Path) -> WordClassifier:
        """Read the file of ``save``.

        Raises:
            ConfigError: no such file, or one of another kind.
        """
        advice = "train one with: python -m textgen_env.rewards.classifier LABELLED --out FILE"
        try:
            content = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"no classifier at {str(file)!r} ({error.strerror}); {advice}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{str(file)!r} is no classifier ({error}); {advice}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ConfigError(f"{str(file)!r} is no classifier of the format {FORMAT!r}; {advice}")
        bias: Any = content.get("bias")
        label, weights = content.get("label"), content.get("weights")
        if (
            not isinstance(label, str)
            or not isinstance(weights, dict)
            or not all(map(_is_weight, (bias, *weights.values())))
        ):
            raise ConfigError(f"{str(file)!r} lacks a label, or a finite bias and weights: it is damaged; {advice}")
        return cls(label, bias, weights)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def word_features(words: Sequence[str]) -> Iterator[str]:
    """Yield each word, and each pair of neighbours with a space between them."""
    previous = None
    for word in words:
        yield word
        if previous is not None:
            yield f"{previous} {word}"
        previous = word


@REWARDS.register("classifier")
@dataclass(frozen=True)
class Classifier(IncrementalReward):
    """The probability of its label that a trained ``WordClassifier`` gives to the completion.

    Range: 0 to 1; an empty completion has the training data's share of the label, roughly.
    Running score: yes, exact.
    How it is gamed: by the words with the largest weights, in any order. Each counts once, so
    repeating one does not help.

    Args:
        file: Written by ``train_classifier``.
    """

    file: str

    name = "classifier"

    def __post_init__(self) -> None:
        _ = self._classifier

    def running(self) -> IncrementalScore[Any]:
        return _LogitScore(self._classifier)

    @cached_property
    def _classifier(self) -> WordClassifier:
        return WordClassifier.load(self.file)


class _Evidence(NamedTuple):
    logit: float
    present: frozenset[str]  # of the features that have weights
    last: str | None


class _LogitScore(IncrementalScore[_Evidence]):
    def __init__(self, classifier: WordClassifier) -> None:
        self._bias = classifier.bias
        self._weights = classifier.weights

    def begin(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> _Evidence:
        return _Evidence(self._bias, frozenset(), None)

    def settle(self, acc: _Evidence, text: str) -> _Evidence:
        words = split_words(text)
        logit, new = self._add(acc, words)
        return _Evidence(logit, acc.present.union(new), words[-1] if words else acc.last)

    def value(self, acc: _Evidence, tail: str) -> float:
        logit, _ = self._add(acc, split_words(tail))
        return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0

    def _add(self, acc: _Evidence, words: Sequence[str]) -> tuple[float, set[str]]:
        """Return the logit with ``words`` added, and the features that are new with them."""
        logit = acc.logit
        new: set[str] = set()
        features = word_features(words if acc.last is None else [acc.last, *words])
        for feature in features:
            weight = self._weights.get(feature)
            if weight is not None and feature not in acc.present and feature not in new:
                new.add(feature)
                logit += weight
        return logit, new
