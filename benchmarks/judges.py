"""Judges of finished texts, all black boxes to the agent: what users bring.

Each is a function from texts to numbers. Two are classifiers, trained here on the language model's
own texts, labelled by their sentiment: the upper third against the lower. ``SEALED`` were written
and not run while settings were chosen: they show what an unknown judge would see.

    JUDGES[name](texts of the language model)  ->  judge: [Generation] * B -> (B,) rewards
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from textgen_env.policies import Floats
from textgen_env.registry import Registry
from textgen_env.rewards import Generation, make_reward
from textgen_env.rewards.lexical import split_words
from textgen_env.tasks import make_task

Judge = Callable[[Sequence[Generation]], Floats]

JUDGES: Registry[Callable[[Sequence[str], int], Judge]] = Registry("judge")
"""From some texts of the language model and their length in tokens to a judge."""

SEALED = ("dialogue", "progressive")
"""Judges that were not run before the settings were fixed."""

SENTENCE = "The children laughed and played in the warm sun all day."
"""What texts should be similar to."""

JSON_TASK = "TextGen/Json-v0"


def _of_library(spec: Any) -> Judge:
    reward = make_reward(spec)
    return lambda texts: reward([replace(text, reference=SENTENCE) for text in texts])


def _one_by_one(score: Callable[[str], float]) -> Judge:
    return lambda texts: np.array([score(text.completion) for text in texts], np.float64)


@JUDGES.register("lexicon")
def lexicon(texts: Sequence[str], tokens: int) -> Judge:
    """VADER's compound score: words add up. -1 to 1."""
    return _of_library("sentiment")


@JUDGES.register("pairs")
def pairs(texts: Sequence[str], tokens: int) -> Judge:
    """A logistic regression on pairs of words. 0 to 1."""
    return _classifier(texts, ngram_range=(2, 2), min_df=2, token_pattern=r"(?u)\b\w+\b")


@JUDGES.register("characters")
def characters(texts: Sequence[str], tokens: int) -> Judge:
    """A logistic regression on sequences of two to four characters. 0 to 1."""
    return _classifier(texts, analyzer="char_wb", ngram_range=(2, 4), min_df=5)


def _classifier(texts: Sequence[str], **features: Any) -> Judge:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    sentiment = lexicon(texts, 0)([Generation("", text) for text in texts])
    low, high = np.quantile(sentiment, (1 / 3, 2 / 3))
    clear = (sentiment <= low) | (sentiment >= high)
    model = make_pipeline(CountVectorizer(binary=True, **features), LogisticRegression(max_iter=300))
    model.fit([text for text, kept in zip(texts, clear, strict=True) if kept], sentiment[clear] >= high)
    return lambda judged: np.asarray(model.predict_proba([text.completion for text in judged])[:, 1], np.float64)


@JUDGES.register("sentence")
def sentence(texts: Sequence[str], tokens: int) -> Judge:
    """Cosine of MiniLM's embeddings of the completion and of ``SENTENCE``. -1 to 1."""
    return _of_library("similarity")


@JUDGES.register("relevance")
def relevance(texts: Sequence[str], tokens: int) -> Judge:
    """Cosine of MiniLM's embeddings of the completion and of its prompt. -1 to 1."""
    reward = make_reward("similarity")
    return lambda judged: reward([replace(text, reference=text.prompt) for text in judged])


@JUDGES.register("echo")
def echo(texts: Sequence[str], tokens: int) -> Judge:
    """The share of the prompt's words of four letters or more that the completion has. 0 to 1."""

    def score(text: Generation) -> float:
        asked = {word.lower() for word in split_words(text.prompt) if len(word) >= 4}
        return len(asked & {word.lower() for word in split_words(text.completion)}) / max(1, len(asked))

    return lambda judged: np.array([score(text) for text in judged], np.float64)


@JUDGES.register("sparse")
def sparse(texts: Sequence[str], tokens: int) -> Judge:
    """1 for a text that ends as a sentence does, has a word of six letters and 0.6 words a token; else 0."""

    def score(text: str) -> float:
        words = split_words(text)
        ends = text.rstrip().endswith((".", "!", "?"))
        return float(ends and len(words) >= 0.6 * tokens and max(map(len, words)) >= 6)

    return _one_by_one(score)


@JUDGES.register("distinct")
def distinct(texts: Sequence[str], tokens: int) -> Judge:
    """The share of words that are different. 0 to 1."""

    def score(text: str) -> float:
        words = [word.lower() for word in split_words(text)]
        return len(set(words)) / max(1, len(words))

    return _one_by_one(score)


@JUDGES.register("length")
def length(texts: Sequence[str], tokens: int) -> Judge:
    """1 - |characters - 3.5 a token| / (2 a token), at least 0."""
    return _one_by_one(lambda text: max(0.0, 1 - abs(len(text) - 3.5 * tokens) / (2 * tokens)))


@JUDGES.register("json")
def json(texts: Sequence[str], tokens: int) -> Judge:
    """Whether prompt and completion are a JSON object with three keys: 0, 0.5 for any JSON, 1. See TextGen/Json-v0."""
    return make_task(JSON_TASK).reward


@JUDGES.register("alliteration")
def alliteration(texts: Sequence[str], tokens: int) -> Judge:
    """The share of words that begin as the word before does. 0 to 1."""

    def score(text: str) -> float:
        firsts = [word[0].lower() for word in split_words(text)]
        return sum(a == b for a, b in pairwise(firsts)) / max(1, len(firsts) - 1)

    return _one_by_one(score)


@JUDGES.register("word_length")
def word_length(texts: Sequence[str], tokens: int) -> Judge:
    """1 - |mean letters a word - 5| / 3, at least 0."""

    def score(text: str) -> float:
        words = split_words(text)
        return max(0.0, 1 - abs(float(np.mean([len(word) for word in words] or [0])) - 5) / 3)

    return _one_by_one(score)


@JUDGES.register("dialogue")
def dialogue(texts: Sequence[str], tokens: int) -> Judge:
    """Half for a quotation mark, half for a word of saying. 0 to 1."""

    def score(text: str) -> float:
        says = {"said", "says", "asked", "asks", "replied", "told", "cried", "shouted", "whispered", "answered"}
        return 0.5 * ('"' in text) + 0.5 * bool(says & {word.lower() for word in split_words(text)})

    return _one_by_one(score)


@JUDGES.register("progressive")
def progressive(texts: Sequence[str], tokens: int) -> Judge:
    """The share of words that end in "ing", of which a fifth is enough. 0 to 1."""

    def score(text: str) -> float:
        words = split_words(text)
        return min(1.0, 5 * sum(word.lower().endswith("ing") for word in words) / max(1, len(words)))

    return _one_by_one(score)
