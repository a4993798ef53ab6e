"""How generated text is described: ``evaluate`` metrics that need no hub.

Each is an ``evaluate.Metric`` backed by sacrebleu, rouge-score, numpy or a language model, and they
combine: ``evaluate.combine([Bleu(), Distinct()]).compute(predictions=..., references=...)``. Columns
are ``predictions`` (completions), ``references``, ``prompts`` and ``rewards``; a metric takes those
that it reads and leaves the rest, so one call serves a combination.

Importing this module imports ``evaluate``, which takes seconds; the package itself does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from textgen_env.errors import ConfigError
from textgen_env.extras import require
from textgen_env.registry import Registry
from textgen_env.rewards.base import Generation
from textgen_env.rewards.lexical import RepetitionReward, distinct_share
from textgen_env.rewards.references import ROUGE_KINDS, UnicodeWords

METRIC_INPUTS = {
    "predictions": datasets.Value("string"),
    "references": datasets.Value("string"),
    "prompts": datasets.Value("string"),
    "rewards": datasets.Value("float64"),
}
"""Every column that a metric here may read."""

METRICS: Registry[type[TextMetric]] = Registry("metric")
"""Metrics by name; those with settings have defaults for all of them."""


class TextMetric(evaluate.Metric):
    """An ``evaluate.Metric`` in memory that takes the columns it reads and ignores the other known ones."""

    columns: tuple[str, ...] = ("predictions",)
    many_references = False  # a prediction may have a list of references

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **options})

    def compute(self, **columns: Any) -> dict[str, float]:
        """Return the metric's figures for these columns, or for those that ``add_batch`` has collected.

        Raises:
            ConfigError: a column is unknown, missing, empty, or of another length.
        """
        unknown = [name for name in columns if name not in METRIC_INPUTS]
        if unknown:
            raise ConfigError(
                f"metric {self.name!r} knows no column {unknown[0]!r}; columns: {', '.join(METRIC_INPUTS)}"
            )
        given = {name: column for name, column in columns.items() if column is not None}
        if not given and self.writer is not None:
            collected: dict[str, float] = super().compute()
            return collected
        missing = [name for name in self.columns if name not in given]
        if missing:
            raise ConfigError(f"metric {self.name!r} needs the column {missing[0]!r}; got {', '.join(given) or 'none'}")
        read = {name: list(given[name]) for name in self.columns}
        lengths = {name: len(column) for name, column in read.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ConfigError(f"metric {self.name!r} needs columns of one length from 1, got {lengths}")
        figures: dict[str, float] = super().compute(**read)
        return figures

    def _info(self) -> evaluate.MetricInfo:
        features = [datasets.Features({name: METRIC_INPUTS[name] for name in self.columns})]
        if self.many_references:
            lists = {"references": datasets.Sequence(METRIC_INPUTS["references"])}
            features.append(datasets.Features({**features[0], **lists}))
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=f"Columns: {', '.join(self.columns)}.",
            features=features if self.many_references else features[0],
        )


@METRICS.register("bleu")
class Bleu(TextMetric):
    """Corpus BLEU, 0 to 100, as sacrebleu computes it (13a tokens, exponential smoothing).

    A prediction has one reference or a list of them.
    """

    columns = ("predictions", "references")
    many_references = True

    def _compute(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
        require("sacrebleu", extra="references", for_="metric 'bleu'")
        from sacrebleu import corpus_bleu

        return {"bleu": corpus_bleu(predictions, _streams(references)).score}


@METRICS.register("chrf")
class Chrf(TextMetric):
    """Corpus chrF2, 0 to 100, as sacrebleu computes it. One reference or a list of them a prediction."""

    columns = ("predictions", "references")
    many_references = True

    def _compute(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
        require("sacrebleu", extra="references", for_="metric 'chrf'")
        from sacrebleu import corpus_chrf

        return {"chrf": corpus_chrf(predictions, _streams(references)).score}


@METRICS.register("rouge")
class Rouge(TextMetric):
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F1, 0 to 1, as rouge-score computes them without a stemmer."""

    columns = ("predictions", "references")

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        require("rouge_score", extra="references", for_="metric 'rouge'")
        from rouge_score.rouge_scorer import RougeScorer

        score = RougeScorer(list(ROUGE_KINDS), use_stemmer=False, tokenizer=UnicodeWords()).score
        pairs = list(zip(references, predictions, strict=True))
        scores = [score(reference, prediction) for reference, prediction in pairs]
        return {kind: float(np.mean([one[kind].fmeasure for one in scores])) for kind in ROUGE_KINDS}


@METRICS.register("perplexity")
class Perplexity(TextMetric):
    """Perplexity of the predictions after their prompts: exp of the mean negative log-probability a token.

    All tokens weigh the same. Without a prompt, give "".

    Args:
        model: A causal LM by name, folder, hub id or ``.gguf`` file.
    """

    columns = ("predictions", "prompts")

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        self._model = model
        super().__init__(**options)

    def _compute(self, predictions: Sequence[str], prompts: Sequence[str]) -> dict[str, float]:
        from textgen_env.rewards.neural import causal_lm, log_likelihoods

        pairs = list(zip(prompts, predictions, strict=True))
        totals, counts = log_likelihoods(*causal_lm(self._model), pairs)
        return {"perplexity": float(np.exp(-totals.sum() / max(1, counts.sum())))}


@METRICS.register("distinct")
class Distinct(TextMetric):
    """Distinct-1, 2 and 3 of all predictions together: different n-grams of words over all of them."""

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        return {f"distinct_{n}": distinct_share(predictions, n) for n in (1, 2, 3)}


@METRICS.register("repetition")
class Repetition(TextMetric):
    """Mean share of a prediction's n-grams of words that it has used before.

    Args:
        n: Words in an n-gram.
    """

    def __init__(self, n: int = 3, **options: Any) -> None:
        self._n = n
        super().__init__(**options)

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        shares = RepetitionReward(self._n)([Generation("", text) for text in predictions])
        return {"repetition": float(shares.mean())}


@METRICS.register("self_bleu")
class SelfBleu(TextMetric):
    """Mean BLEU, 0 to 100, of each prediction against the others: high where they are all alike.

    The cost grows with the square of the number of texts, so at most ``sample`` of them, evenly
    spaced, are compared. One text alone gets 0.

    Source: Zhu et al. 2018, arXiv:1802.01886.
    """

    def __init__(self, sample: int = 100, **options: Any) -> None:
        self._sample = sample
        super().__init__(**options)

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        require("sacrebleu", extra="references", for_="metric 'self_bleu'")
        from sacrebleu.metrics.bleu import BLEU

        count = min(len(predictions), self._sample)
        texts = [predictions[i] for i in np.linspace(0, len(predictions) - 1, count).round().astype(int)]
        if count < 2:
            return {"self_bleu": 0.0}
        score = BLEU(effective_order=True).sentence_score
        return {
            "self_bleu": float(
                np.mean([score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)])
            )
        }


@METRICS.register("reward")
class RewardStatistics(TextMetric):
    """Mean, standard deviation, and the 0, 10, 50, 90 and 100% quantiles of the rewards."""

    columns = ("rewards",)

    def _compute(self, rewards: Sequence[float]) -> dict[str, float]:
        values = np.asarray(rewards, np.float64)
        figures = {"reward_mean": float(values.mean()), "reward_std": float(values.std())}
        for percent in (0, 10, 50, 90, 100):
            figures[f"reward_p{percent}"] = float(np.percentile(values, percent))
        return figures


def _streams(references: Sequence[str | Sequence[str]]) -> Any:
    """Return references as sacrebleu wants them: the first of every prediction, the second, ...; None for none."""
    lists = [[given] if isinstance(given, str) else list(given) for given in references]
    most = max(map(len, lists))
    return [[one[i] if i < len(one) else None for one in lists] for i in range(most)]
