"""Metrics as ``evaluate`` modules: published figures, combination, and errors that say what to do."""

from __future__ import annotations

import evaluate
import numpy as np
import pytest

from textgen_env.errors import ConfigError
from textgen_env.metrics import (
    METRICS,
    Bleu,
    Chrf,
    Distinct,
    Perplexity,
    Repetition,
    RewardStatistics,
    Rouge,
    SelfBleu,
)
from textgen_env.rewards import make_reward
from textgen_env.rewards.base import Generation

# The example of sacrebleu's README, which gives BLEU = 48.530827009929865 and chrF2 = 59.73.
PREDICTIONS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_and_chrf_of_sacrebleus_readme():
    assert Bleu().compute(predictions=PREDICTIONS, references=REFERENCES)["bleu"] == pytest.approx(48.530827009929865)
    assert Chrf().compute(predictions=PREDICTIONS, references=REFERENCES)["chrf"] == pytest.approx(59.73, abs=0.005)


def test_predictions_may_have_different_numbers_of_references():
    from sacrebleu import corpus_bleu

    references = [["a b c d", "a b c e"], ["f g h i"]]
    expected = corpus_bleu(["a b c d", "f g h j"], [["a b c d", "f g h i"], ["a b c e", None]]).score
    assert Bleu().compute(predictions=["a b c d", "f g h j"], references=references)["bleu"] == expected


def test_rouge_of_rouge_scores_own_tests():
    # from rouge_scorer_test.py of rouge-score: f-measures 0.5 (one of three words) and 0.8 (two of three)
    figures = Rouge().compute(predictions=["testing", "testing two"], references=["testing one two", "testing one two"])
    assert figures["rouge1"] == pytest.approx((0.5 + 0.8) / 2)
    assert figures["rougeL"] == pytest.approx((0.5 + 0.8) / 2)
    assert figures["rouge2"] == 0


def test_distinct_by_hand():
    figures = Distinct().compute(predictions=["a b a b", "A b", "c"])
    # words: a b a b a b c; pairs: ab ba ab ab; triples: aba bab
    assert figures == {"distinct_1": 3 / 7, "distinct_2": 2 / 4, "distinct_3": 1.0}
    assert Distinct().compute(predictions=[""]) == {"distinct_1": 0.0, "distinct_2": 0.0, "distinct_3": 0.0}


def test_repetition_is_the_mean_of_the_reward_of_that_name():
    texts = ["a b a b", "no word twice here"]
    expected = make_reward({"name": "repetition", "n": 2})([Generation("", text) for text in texts]).mean()
    assert expected == pytest.approx((1 / 3 + 0) / 2)  # ab ba ab, and three pairs that differ
    assert Repetition(n=2).compute(predictions=texts)["repetition"] == expected


def test_self_bleu_is_100_for_copies_and_small_for_strangers():
    from sacrebleu import sentence_bleu

    assert SelfBleu().compute(predictions=["the cat sat on the mat"] * 3)["self_bleu"] == pytest.approx(100)
    texts = ["the cat sat on the mat", "the cat ran", "prices rose again today"]
    expected = [
        sentence_bleu(text, [other for other in texts if other != text], use_effective_order=True).score
        for text in texts
    ]
    assert SelfBleu().compute(predictions=texts)["self_bleu"] == pytest.approx(np.mean(expected))
    assert SelfBleu(sample=2).compute(predictions=["a", "b", "a"])["self_bleu"] == pytest.approx(100)
    assert SelfBleu().compute(predictions=["alone"])["self_bleu"] == 0


def test_perplexity_is_the_exponential_of_the_models_own_loss(tiny_lm, tmp_path):
    import torch

    model, tokenizer = tiny_lm
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("the film was good and long", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[0, :2] = -100  # Hugging Face's mark for tokens that are not predicted
    with torch.no_grad():
        loss = model(ids, labels=labels).loss.item()

    figures = Perplexity(model=str(tmp_path)).compute(predictions=["was good and long"], prompts=["the film"])

    assert figures["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)


def test_reward_statistics_by_hand():
    figures = RewardStatistics().compute(rewards=[0.0, 1.0, 2.0, 3.0, 4.0])
    assert figures["reward_mean"] == 2.0
    assert figures["reward_std"] == pytest.approx(np.sqrt(2))
    assert [figures[f"reward_p{q}"] for q in (0, 10, 50, 90, 100)] == pytest.approx([0, 0.4, 2, 3.6, 4])


def test_metrics_combine_and_each_takes_its_columns():
    together = evaluate.combine([Bleu(), Rouge(), Distinct(), RewardStatistics()])
    references = [references[0] for references in REFERENCES]

    figures = together.compute(predictions=PREDICTIONS, references=references, rewards=[1.0, 2.0, 3.0])

    assert {"bleu", "rouge1", "rougeL", "distinct_1", "reward_mean"} <= set(figures)
    assert figures["bleu"] == Bleu().compute(predictions=PREDICTIONS, references=references)["bleu"]


def test_metrics_collect_batches():
    collecting = Bleu()
    for prediction, references in zip(PREDICTIONS, REFERENCES, strict=True):
        collecting.add_batch(predictions=[prediction], references=[references])
    assert collecting.compute() == Bleu().compute(predictions=PREDICTIONS, references=REFERENCES)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_answers_numbers_and_describes_itself(name, tiny_lm, tmp_path):
    settings = {}
    if name == "perplexity":
        for part in tiny_lm:
            part.save_pretrained(tmp_path)
        settings["model"] = str(tmp_path)
    metric = METRICS[name](**settings)
    columns = {"predictions": ["the film", "the film was"], "references": ["the film", "good"]}

    figures = metric.compute(**columns, prompts=["the", "the"], rewards=[0.0, 1.0])

    assert metric.name == ("reward_statistics" if name == "reward" else name)
    assert metric.description
    assert figures
    assert all(isinstance(figure, float) and np.isfinite(figure) for figure in figures.values())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"predictions": ["a"]}, "needs the column 'references'; got predictions"),
        ({"predictions": ["a"], "references": []}, "one length from 1, got .*'references': 0"),
        ({"predictions": ["a", "b"], "references": ["a"]}, "'predictions': 2, 'references': 1"),
        ({"prediction": ["a"]}, "knows no column 'prediction'; columns: predictions, references, prompts, rewards"),
        ({}, "needs the column 'predictions'; got none"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(columns, message):
    with pytest.raises(ConfigError, match=message):
        Bleu().compute(**columns)
