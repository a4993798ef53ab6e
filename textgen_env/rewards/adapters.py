"""Rewards from other libraries: ``evaluate`` modules and ``transformers`` text classifiers.

Neither library is imported here; an object is recognised by the modules its classes come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError, RewardError
from textgen_env.rewards.base import REWARDS, Generation, Reward, shorten

if TYPE_CHECKING:
    from evaluate import EvaluationModule
    from transformers import TextClassificationPipeline


NO_LIMIT = 10**9
"""From here on a tokenizer's maximal length means that it has none."""


def comes_from(thing: Any, package: str) -> bool:
    """Return True if a class of ``thing`` is defined in ``package``."""
    return any(f"{cls.__module__}.".startswith(f"{package}.") for cls in type(thing).__mro__)


class EvaluateReward(Reward):
    """One figure of an ``evaluate`` module, computed text by text.

    Predictions are completions and references are the prompts' references, where the module takes
    any. Cost: 2.5 to 4 ms a text, most of it ``evaluate``'s own; the rewards in the box call the
    same backends directly.

    Args:
        module: An ``evaluate.EvaluationModule``.
        key: Which figure of the module's answer; not needed where there is only one number, or
            one that has the module's name.
    """

    def __init__(self, module: EvaluationModule, key: str | None = None) -> None:
        self.module = module
        self.key = key
        self.name = str(module.name)

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return np.array([self._one(generation) for generation in generations], np.float64)

    def _one(self, generation: Generation) -> float:
        inputs: dict[str, Any] = {"predictions": [generation.completion]}
        features = self.module.features
        names = set().union(*features) if isinstance(features, list) else set(features)
        if "references" in names:
            inputs["references"] = [reference_of(generation, self.name)]
        answer = self.module.compute(**inputs)
        figures = {key: value for key, value in answer.items() if np.ndim(value) == 0}
        if self.key is not None:
            wanted = self.key
        elif len(figures) == 1:
            wanted = next(iter(figures))
        else:
            wanted = self.name
        if wanted not in figures:
            raise RewardError(
                f"the evaluate module {self.name!r} has no single number {wanted!r} in its answer; "
                f"choose one with EvaluateReward(module, key=...): {', '.join(sorted(figures))}"
            )
        return float(figures[wanted])


def reference_of(generation: Generation, reward: str) -> str:
    """Return the reference of ``generation``.

    Raises:
        RewardError: there is none.
    """
    if generation.reference is None:
        raise RewardError(
            f"reward {reward!r} needs a reference, and the prompt {shorten(generation.prompt)} has none; "
            'give prompts as {"prompt": ..., "reference": ...}'
        )
    return generation.reference


class PipelineReward(Reward):
    """The probability that a ``transformers`` text-classification pipeline gives to one label.

    Range: 0 to 1, softmax over the labels (sigmoid for models with several labels at a time); what a regression
    (``problem_type="regression"``) answers is taken as it is, without bounds. A blank completion gets 0.
    Cost: one batched forward of the classifier.
    Running score: no.
    How it is gamed: classifiers are brittle off their training data; keep a second one to look with.

    Args:
        pipeline: A ``TextClassificationPipeline``.
        label: The label whose probability is the reward; without it, the last one (that is
            "positive" for the usual two-label sentiment models).
        batch_size: Texts in one forward.
    """

    name = "pipeline"

    def __init__(self, pipeline: TextClassificationPipeline, label: str | None = None, batch_size: int = 32) -> None:
        if pipeline.task != "text-classification":
            raise ConfigError(f"the pipeline must be one for text-classification, got one for {pipeline.task!r}")
        labels = list((pipeline.model.config.id2label or {}).values())
        if label is not None and label not in labels:
            raise ConfigError(f"the classifier has no label {label!r}; it has {', '.join(labels)}")
        self.pipeline = pipeline
        self.label = label if label is not None else labels[-1]
        self.batch_size = batch_size

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        values = np.zeros(len(generations))
        # Tokenizers without special tokens make no tokens of a blank text, and models choke on none.
        written = [i for i, generation in enumerate(generations) if generation.completion.strip()]
        if not written:
            return values
        texts = [generations[i].completion for i in written]
        limit = most_tokens(self.pipeline.model, self.pipeline.tokenizer)
        cut = {} if limit is None else {"max_length": limit}
        answers: Any = self.pipeline(texts, top_k=None, truncation=True, batch_size=self.batch_size, **cut)
        for i, scores in zip(written, answers, strict=True):
            values[i] = next(score["score"] for score in scores if score["label"] == self.label)
        return values


def most_tokens(model: Any, tokenizer: Any) -> int | None:
    """Return how many tokens of a text ``model`` can read, or None where nothing says so.

    A tokenizer may know no maximum, and then truncates nothing. Positions start behind the padding
    index in models like RoBERTa.
    """
    from torch.nn import Embedding

    positions = getattr(model.config, "max_position_embeddings", None)
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padding = next((m.padding_idx for m in tables if isinstance(m, Embedding)), None)
    if isinstance(positions, int) and padding is not None:
        positions -= padding + 1
    limits = [n for n in (positions, tokenizer.model_max_length) if isinstance(n, int) and 0 < n < NO_LIMIT]
    return min(limits, default=None)


@REWARDS.register("transformers")
@dataclass(frozen=True)
class TransformersClassifier(Reward):
    """The probability of a label under a ``transformers`` sequence classifier, from a folder or the hub.

    Range: 0 to 1. A blank completion gets 0.
    Cost: one batched forward of the classifier, which loads with the first batch, once a process.
    Running score: no.
    How it is gamed: classifiers are brittle off their training data; keep a second one to look with.

    Args:
        model: A folder in Hugging Face form, or a hub id.
        label: As in ``PipelineReward``.
        batch_size: Texts in one forward.
    """

    model: str
    label: str | None = None
    batch_size: int = 32

    name = "transformers"

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return PipelineReward(_pipeline(self.model), self.label, self.batch_size)(generations)


@lru_cache(maxsize=4)
def _pipeline(model: str) -> TextClassificationPipeline:
    from transformers import pipeline

    try:
        return pipeline("text-classification", model=str(Path(model).expanduser()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no sequence classifier at {model!r}: {error}; give a folder in Hugging Face form or a hub id"
        ) from error
