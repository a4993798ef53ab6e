"""Rewards on long texts, slow patterns, large lists, and scripts other than Latin."""

from __future__ import annotations

import gc
import itertools
import json
import random
import time

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from textgen_env.errors import ConfigError, RewardError
from textgen_env.metrics import METRICS
from textgen_env.rewards import Generation, make_reward
from textgen_env.rewards.lexical import split_words

SENTENCES = {  # of three words each
    "Hindi": "हिन्दी भाषा अच्छी",
    "Tamil": "தமிழ் மொழி நல்லது",
    "Arabic": "اللُّغَةُ العَرَبِيَّةُ جَمِيلَةٌ",
    "Persian": "می\u200cخواهم کتاب بخوانم",
    "Hebrew": "שָׁלוֹם לָכֶם חֲבֵרִים",
    "Thai": "ภาษา ไทย ดี",
    "Russian": "Фильм был хороший",
    "Korean": "영화가 아주 좋았다",
    "decomposed": "cafe\u0301 nai\u0308ve cre\u0300me",
    "English": "the film's good",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_words_of_every_script_are_those_between_spaces(language):
    text = SENTENCES[language]
    assert split_words(f"«{text}!»") == text.lower().split()
    first, second, third = text.split()
    assert make_reward({"name": "keywords", "words": [first, third]})([Generation("", text)]) == [1.0]
    assert make_reward({"name": "keywords", "words": [second]})([Generation("", f"{first} {third}")]) == [0.0]
    assert make_reward({"name": "length", "target": 3})([Generation("", text)]) == [1.0]
    assert make_reward({"name": "repetition", "n": 1})([Generation("", f"{text} {text}")]) == [0.5]
    assert make_reward("rouge")([Generation("", text, reference=text)]) == [1.0]
    assert METRICS["distinct"]().compute(predictions=[text])["distinct_1"] == 1.0


def test_words_of_ascii_are_those_of_the_plain_pattern():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab_9' -\n’é") for _ in range(30))
        assert split_words(text.replace("é", "e").replace("’", "'")) == [
            word.replace("’", "'").replace("é", "e") for word in split_words(text)
        ]


# --- long texts


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_a_classifier_whose_tokenizer_has_no_maximal_length_reads_the_beginning_of_a_long_text(kind, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "good", "bad"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    assert tokenizer.model_max_length > 10**9
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    positions = {"bert": 12, "roberta": 13, "gpt2": 12}[kind]  # roberta's begin behind the padding
    config = AutoConfig.for_model(
        kind, **sizes, vocab_size=4, max_position_embeddings=positions, pad_token_id=0, num_labels=2
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = make_reward({"name": "transformers", "model": str(tmp_path)})
    beginning, long = "good bad " * 6, "good bad " * 6 + "bad " * 500
    values = reward([Generation("", long), Generation("", beginning), Generation("", "bad")])
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert values[0] != pytest.approx(values[2], abs=1e-6)


# --- time limits


def test_a_pattern_that_takes_long_to_compile_is_refused_by_its_length():
    long = "|".join(f"a{i}" for i in range(20_000))
    for spec in (
        {"name": "regex", "pattern": long},
        {"name": "json", "schema": {"pattern": long}},
        {"name": "json", "schema": {"allOf": [{"patternProperties": {long: True}}]}},
    ):
        with pytest.raises(ConfigError, match="at most 4,000 characters"):
            make_reward(spec)
    with pytest.raises(ConfigError):
        make_reward({"name": "json", "schema": {"pattern": "a{99999999999}"}})


VALUES = (0, 1, 1.0, True, False, None, "1", [1], [True], [1.0], {"a": 1}, {"a": 1.0}, {"a": True}, {}, [], [[]], [{}])


def test_unique_items_agrees_with_jsonschema_on_all_pairs():
    plain, reward = (
        Draft202012Validator({"uniqueItems": True}),
        make_reward({"name": "json", "schema": {"uniqueItems": True}}),
    )
    for pair in itertools.product(VALUES, VALUES):
        expected = 1.0 if plain.is_valid(list(pair)) else 0.5
        assert reward([Generation("", json.dumps(list(pair)))]) == [expected], pair


def test_unique_items_obeys_the_time_limit(monkeypatch):
    reward = make_reward({"name": "json", "schema": {"uniqueItems": True}, "timeout": 0.5})
    many = Generation("", json.dumps([[i] for i in range(20_000)]))  # 2e8 comparisons in jsonschema's own way
    # A machine that stalls, other threads and the garbage of other tests cost no time of ours.
    monkeypatch.setattr(time, "monotonic", time.thread_time)
    gc.disable()
    try:
        assert reward([many]) == [1.0]
    finally:
        gc.enable()
    now = time.monotonic()
    clock = itertools.chain([now] * 3, itertools.repeat(now + 1))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(RewardError, match=r"took more than 0\.5 s"):
        reward([many])


def test_fluency_of_a_text_beyond_the_context_is_refused_by_name(tiny_lm):
    from textgen_env.rewards.neural import log_likelihoods

    model, tokenizer = tiny_lm
    with pytest.raises(RewardError, match="a text of 202 tokens is longer than the 128"):
        log_likelihoods(model, tokenizer, [("the film", "good " * 200)])
    totals, counts = log_likelihoods(model, tokenizer, [("the film", "good " * 100)])
    assert counts.tolist() == [100]
    assert np.isfinite(totals).all()
