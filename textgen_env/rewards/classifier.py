"""Train a small text classifier from labelled lines, and save it for the ``classifier`` reward.

    python -m textgen_env.rewards.classifier reviews.tsv --out reviews.json

A line is ``label<TAB>text``. A tenth of the lines is held out to measure the accuracy, then the
classifier is fitted on all of them. Logistic regression on the presence of words and pairs of words.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError, TextGenError
from textgen_env.extras import require
from textgen_env.rewards.lexical import split_words
from textgen_env.rewards.linear import WordClassifier, word_features


@dataclass(frozen=True)
class TrainingReport:
    """The trained classifier, and its accuracy on held-out lines."""

    label: str
    lines: int
    held_out: int
    accuracy: float  # on the held-out lines
    majority: float  # accuracy of always answering the more frequent answer

    def __str__(self) -> str:
        return (
            f"{self.lines} lines; {self.label!r} or not: accuracy {self.accuracy:.3f} on {self.held_out} "
            f"held-out lines (always the same answer: {self.majority:.3f})"
        )


def train_classifier(
    examples: Sequence[tuple[str, str]],
    out: str | Path,
    label: str | None = None,
    min_count: int = 2,
    seed: int = 0,
) -> TrainingReport:
    """Train on ``(label, text)`` pairs, write the classifier to ``out``, and report its accuracy.

    Args:
        examples: At least ten, of at least two labels.
        out: Where the JSON goes.
        label: The label whose probability is the reward; the others are "not". Without it, the last
            one in alphabetical order ("positive" of "negative" and "positive", "1" of "0" and "1").
        min_count: Texts that a word or pair must occur in to be used.
        seed: Decides which tenth is held out.

    Raises:
        ConfigError: too few examples or labels, an unknown label, or no word in ``min_count`` texts.
    """
    labels = Counter(name for name, _ in examples)
    if len(examples) < 10 or len(labels) < 2:
        raise ConfigError(f"training needs at least 10 examples of 2 labels, got {len(examples)} of {len(labels)}")
    if label is None:
        label = max(labels)
    if label not in labels:
        raise ConfigError(f"no example has the label {label!r}; there are {', '.join(sorted(labels))}")
    texts = [text for _, text in examples]
    answers = np.array([name == label for name, _ in examples])
    order = np.random.default_rng(seed).permutation(len(examples))
    held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]
    predicted = _fit([texts[i] for i in rest], answers[rest], label, min_count)
    right = [_says_yes(predicted, texts[i]) == answers[i] for i in held_out]
    _fit(texts, answers, label, min_count).save(out)
    share = float(answers[held_out].mean())
    return TrainingReport(label, len(texts), len(held_out), float(np.mean(right)), max(share, 1 - share))


def read_examples(file: str | Path) -> list[tuple[str, str]]:
    """Return the ``(label, text)`` pairs of a file of ``label<TAB>text`` lines.

    Raises:
        ConfigError: no such file, not UTF-8, or a line without a label (says which).
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"no labelled lines at {str(file)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(file)!r} is not UTF-8 ({error.reason} at byte {error.start})") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        label, tab, text = line.rstrip("\r").partition("\t")
        if not line.strip():
            continue
        if not tab or not label.strip() or not text.strip():
            raise ConfigError(f"{file}, line {number}: expected label<TAB>text, got {line[:60]!r}")
        examples.append((label.strip(), text))
    return examples


def _fit(texts: Sequence[str], answers: npt.NDArray[np.bool_], label: str, min_count: int) -> WordClassifier:
    require("sklearn", extra="classifier", for_="training a classifier")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = CountVectorizer(analyzer=_features, binary=True, min_df=min_count)
    try:
        present = counts.fit_transform(texts)
    except ValueError as error:
        raise ConfigError(f"no word occurs in {min_count} of the {len(texts)} texts; lower min_count") from error
    if answers.all() or not answers.any():
        raise ConfigError("all examples left for training have one label; give more of the other")
    model = LogisticRegression(max_iter=1000).fit(present, answers)
    weights = np.round(model.coef_[0], 4)
    features = counts.get_feature_names_out()
    kept = {str(f): float(w) for f, w in zip(features, weights, strict=True) if w}
    return WordClassifier(label, float(model.intercept_[0]), kept)


def _features(text: str) -> list[str]:
    return list(word_features(split_words(text)))


def _says_yes(classifier: WordClassifier, text: str) -> bool:
    return classifier.bias + sum(classifier.weights.get(f, 0.0) for f in set(_features(text))) > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m textgen_env.rewards.classifier", description=__doc__)
    parser.add_argument("lines", help="a file of label<TAB>text lines")
    parser.add_argument("--out", required=True, help="where the classifier goes, as JSON")
    parser.add_argument("--label", help="the label to reward; default: the last in alphabetical order")
    parser.add_argument("--min-count", type=int, default=2, help="texts that a word must occur in")
    chosen = parser.parse_args(arguments)
    try:
        report = train_classifier(read_examples(chosen.lines), chosen.out, chosen.label, min_count=chosen.min_count)
    except (TextGenError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f'{report}\nUse it with reward={{"name": "classifier", "file": "{chosen.out}"}}\n')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
