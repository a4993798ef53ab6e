"""What every registered reward promises, what may be given as a reward, and which errors say what."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from textgen_env.errors import ConfigError, RewardError, TextGenError, UnknownName
from textgen_env.rewards import (
    REWARDS,
    EvaluateReward,
    FunctionReward,
    Generation,
    Mix,
    Reward,
    RunningScore,
    Shaped,
    batch_reward,
    make_reward,
    reward_spec,
)
from textgen_env.rewards.adapters import PipelineReward
from textgen_env.rewards.linear import WordClassifier

GENERATIONS = [
    Generation(
        prompt=f"Roses are {n}\n",
        completion=completion,
        ids=(1, 2),
        logprobs=(-0.5 * n, -1.5),
        reference="the cat is not bad",
        metadata={"keywords": ["cat", "sun"]},
    )
    for n, completion in enumerate(
        [
            "",
            " ",
            "The cat sat on the mat and the cat sat on the hat.",
            "VERY good, but not great!!! 💘",
            '{"a": [1, 2]}',
            "naïve café Straße\u2028ἈΣ line\nCAT",
            "x" * 3000,
            "and so I go\nto see the cat\nthat wore a hat",
        ]
    )
]

RANGES = {
    "sentiment": (-1, 1),
    "keywords": (0, 1),
    "length": (0, 1),
    "repetition": (0, 1),
    "distinct": (0, 1),
    "readability": (0, 1),
    "metre": (0, 1),
    "regex": (0, 1),
    "json": (0, 1),
    "rhyme": (0, 1),
    "bleu": (0, 1),
    "chrf": (0, 1),
    "rouge": (0, 1),
    "classifier": (0, 1),
    "similarity": (-1.000001, 1.000001),
    "fluency": (-math.inf, 0),
    "transformers": (0, 1),
    "shaped": (0, 1),
}

NEEDS_A_NETWORK = {"similarity", "transformers"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A word classifier and a tiny random sequence classifier."""
    folder = tmp_path_factory.mktemp("rewards")
    weights = {"good": 1.25, "bad": -1.5, "not bad": 2.0, "the cat": 0.1, "cat": 0.3}
    WordClassifier("positive", -0.25, weights).save(folder / "words.json")
    save_tiny_classifier(folder / "tiny")
    return {"words": str(folder / "words.json"), "tiny": str(folder / "tiny")}


def save_tiny_classifier(folder):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "the": 2, "cat": 3, "not": 4, "great": 5}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        id2label={0: "negative", 1: "positive"},
    )
    model = BertForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=5.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def needed(name, files):
    """Return the settings that the reward of that name cannot do without."""
    settings = {
        "regex": {"pattern": "[ct]at"},
        "classifier": {"file": files["words"]},
        "transformers": {"model": files["tiny"]},
        "shaped": {"reward": "json", "potential": "length"},
    }
    return settings.get(name, {})


def make(name, files) -> Reward:
    return make_reward({"name": name, **needed(name, files)})


# --- every registered reward


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_a_batch_is_scored_like_its_texts_one_by_one(name, files):
    reward = make(name, files)

    together = reward.scored(GENERATIONS).total

    assert together.shape == (len(GENERATIONS),)
    apart = [reward.scored([generation]).total[0] for generation in GENERATIONS]
    np.testing.assert_allclose(together, apart, atol=1e-5 if name in NEEDS_A_NETWORK else 0)


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_permuting_a_batch_permutes_its_scores(name, files):
    reward = make(name, files)
    order = np.random.default_rng(0).permutation(len(GENERATIONS))

    permuted = reward([GENERATIONS[i] for i in order])

    np.testing.assert_allclose(permuted, reward(GENERATIONS)[order], atol=1e-5 if name in NEEDS_A_NETWORK else 0)


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_texts_differ_in_reward(name, files):
    """Guards the tests around it: a constant would pass them all."""
    assert len(set(make(name, files)(GENERATIONS))) > 1


@pytest.mark.parametrize("name", sorted(set(REWARDS) - NEEDS_A_NETWORK))
def test_any_unicode_text_gets_a_number_in_the_range(name, files):
    reward = make(name, files)
    low, high = RANGES[name]

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=120), st.text(max_size=40))
    def check(completion, prompt):
        generation = Generation(prompt, completion, logprobs=(-1.0,), reference="a b", metadata={"keywords": ["a"]})
        [value] = reward.scored([generation]).total
        assert low <= value <= high

    check()


@pytest.mark.parametrize("name", sorted(NEEDS_A_NETWORK))
def test_networks_answer_within_the_range(name, files):
    low, high = RANGES[name]
    values = make(name, files)(GENERATIONS)
    assert low <= values.min()
    assert values.max() <= high


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_a_named_reward_goes_to_json_and_back(name, files):
    reward = make(name, files)

    spec = json.loads(json.dumps(reward_spec(reward)))

    assert make_reward(spec) == reward
    np.testing.assert_array_equal(make_reward(spec)(GENERATIONS[:3]), reward(GENERATIONS[:3]))


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_documentation_gives_range_running_score_and_gaming(name):
    for part in ("Range:", "Running score:", "How it is gamed:"):
        assert part in REWARDS[name].__doc__


# --- running scores

WORDS = """
good great bad horrible kind of kiss death no not never without doubt least at very so this only but BUT or nor
hardly barely kinda sort love LOVE Sad SUX uber VERY isn't don't bomb shit the a I ass bad badass bus stop yeah
right to die for beating heart cat sun cats lol :) :( :-D <3 kind-of uh-uh fed up screwed can't stand x
"""
PIECES = st.one_of(
    st.sampled_from(WORDS.split()).map(lambda word: " " + word),
    st.sampled_from(WORDS.split()),
    st.sampled_from(
        ["!", "?", "!!!", ".", ",", "\n", " ", "  ", "'", "n't", "s", "ing", "-", '"', "💘", "😁", "🔛", "🆙"]
    ),
    st.sampled_from(WORDS.split()).map(lambda word: " " + word.upper()),
    st.text(max_size=3),
)


def running_rewards(files) -> dict[str, Reward]:
    rewards = {name: make(name, files) for name in REWARDS if name not in ("shaped", "transformers")}
    rewards["mix"] = make_reward([["sentiment", 1.0], ["repetition", -0.5], ["length", 2]])
    rewards["trigrams"] = make_reward({"name": "distinct", "n": 3})
    rewards["unigrams"] = make_reward({"name": "repetition", "n": 1})
    return {name: reward for name, reward in rewards.items() if reward.running() is not None}


def test_these_rewards_have_running_scores(files):
    assert set(running_rewards(files)) >= {
        "sentiment", "keywords", "length", "repetition", "distinct", "readability", "metre", "rouge", "classifier",
        "mix",
    }  # fmt: skip


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, max_size=14), candidates=st.lists(PIECES, min_size=1, max_size=4))
def test_running_scores_equal_the_rewards_of_every_prefix_and_continuation(files, pieces, candidates):
    prompt, reference, metadata = "Roses", "the cat is not at all bad, but a good cat", {"keywords": ["cat", "good"]}

    def score(reward, completion):
        return reward([Generation(prompt, completion, reference=reference, metadata=metadata)])[0]

    for name, reward in running_rewards(files).items():
        running = reward.running()
        assert isinstance(running, RunningScore)
        state = running.start(prompt, reference, metadata)
        completion = ""
        assert state.value == score(reward, ""), name
        for piece in pieces:
            completion += piece
            state = running.extend(state, completion)
            assert state.value == pytest.approx(score(reward, completion), abs=1e-12), (name, completion)
        texts = [completion + candidate for candidate in candidates]
        ahead = running.lookahead(state, texts)
        assert ahead.dtype == np.float32
        np.testing.assert_allclose(ahead, [score(reward, text) for text in texts], atol=1e-6, err_msg=name)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=20))
def test_running_sentiment_is_exactly_vader(pieces):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    vader = test_running_sentiment_is_exactly_vader.__dict__.setdefault("vader", SentimentIntensityAnalyzer())
    running = REWARDS["sentiment"]().running()
    state = running.start("", None, {})
    completion = ""
    for piece in pieces:
        ahead = running.lookahead(state, [completion + piece])
        completion += piece
        state = running.extend(state, completion)
        expected = vader.polarity_scores(completion)["compound"]
        assert state.value == expected
        assert ahead[0] == np.float32(expected)


def test_a_running_score_follows_a_completion_that_is_not_an_extension(files):
    for name, reward in running_rewards(files).items():
        running = reward.running()
        arguments = ("", "a good cat", {"keywords": ["cat"]})
        before = running.extend(running.start(*arguments), "a good dog\ufffd")

        after = running.extend(before, "a good dog é cat")

        assert after.value == running.extend(running.start(*arguments), "a good dog é cat").value, name


def test_the_state_of_a_running_score_can_be_copied_and_is_left_untouched(files):
    for name, reward in running_rewards(files).items():
        running = reward.running()
        state = running.extend(running.start("", "a good cat", {"keywords": ["cat"]}), "a not bad cat, but ")
        saved = pickle.dumps(state)

        value = running.extend(state, "a not bad cat, but good").value
        running.lookahead(state, ["a not bad cat, but sad", "nothing"])

        assert pickle.dumps(state) == saved, name
        for twin in (copy.copy(state), copy.deepcopy(state), pickle.loads(saved)):
            assert running.extend(twin, "a not bad cat, but good").value == value


# --- what may be given as a reward


def test_a_function_is_given_the_completion():
    reward = make_reward(len)
    assert reward.name == "len"
    assert reward([Generation("prompt", "four"), Generation("prompt", "")]).tolist() == [4.0, 0.0]


def test_a_function_may_answer_true_or_false():
    assert make_reward(lambda text: "cat" in text).scored(GENERATIONS[1:3]).total.tolist() == [0.0, 1.0]


def test_a_marked_function_is_given_the_batch():
    @batch_reward
    def overlap(generations):
        return [len(g.prompt) + len(g.completion) for g in generations]

    assert make_reward(overlap).scored([Generation("ab", "c"), Generation("", "d")]).total.tolist() == [3.0, 1.0]


def test_an_object_is_itself():
    reward = REWARDS["length"](target=3)
    assert make_reward(reward) is reward


def test_a_name_with_settings():
    assert make_reward({"name": "length", "target": 3}) == REWARDS["length"](target=3)


def test_a_mix_adds_up_weighted_parts_and_reports_them_unweighted():
    generation = Generation("", "good good good good")
    sentiment, repetition = (REWARDS[name]()([generation])[0] for name in ("sentiment", "repetition"))

    scored = make_reward({"sentiment": 1.0, "repetition": -0.5}).scored([generation])

    assert scored.total[0] == sentiment - 0.5 * repetition
    assert {name: part[0] for name, part in scored.parts.items()} == {
        "sentiment": sentiment,
        "repetition": repetition,
    }


def test_a_mix_may_hold_functions_settings_and_mixes():
    mix = make_reward([[len, 2], [{"name": "length", "target": 1}, 1], [{"length": 3}, 0.5], ["length", 0]])
    scored = mix.scored([Generation("", "word")])
    assert list(scored.parts) == ["len", "length", "mix", "length_2"]
    assert scored.total[0] == pytest.approx(2 * 4 + 1 + 0.5 * 3 * (1 / 20))


def test_the_running_score_of_a_mix_is_that_of_the_parts_that_have_one():
    mix = make_reward([["length", 2.0], ["json", 5.0]])
    running = mix.running()
    state = running.extend(running.start("", None, {}), " one two")
    assert state.value == pytest.approx(2.0 * 2 / 20)
    assert make_reward({"json": 1.0}).running() is None


def test_shaped_pays_steps_by_the_potential_and_texts_by_the_reward():
    shaped = Shaped("json", potential="length", weight=0.5)
    running = shaped.running()
    state = running.extend(running.start("", None, {}), "[1, 2]")
    assert state.value == pytest.approx(0.5 * 2 / 20)
    assert shaped.scored([Generation("", "[1, 2]")]).total.tolist() == [1.0]
    assert list(shaped.scored([Generation("", "")]).parts) == ["json"]


def test_an_evaluate_module_is_a_reward():
    from textgen_env.metrics import Distinct, Rouge

    assert make_reward(Rouge(keep_in_memory=True)).name == "rouge"
    reward = EvaluateReward(Rouge(), key="rougeL")
    generations = [Generation("", "testing two", reference="testing one two")]
    assert reward.scored(generations).total[0] == pytest.approx(0.8)  # rouge-score's own test of LCS
    assert EvaluateReward(Distinct(), key="distinct_1")([Generation("", "a a")])[0] == 0.5
    with pytest.raises(RewardError, match=r"no single number 'rouge'.*rouge1, rouge2, rougeL"):
        make_reward(Rouge()).scored(generations)


def test_a_pipeline_is_a_reward(files):
    from transformers import pipeline

    classifier = pipeline("text-classification", model=files["tiny"])
    negative, positive = sorted(classifier("the cat", top_k=None), key=lambda score: score["label"])

    reward = make_reward(classifier)

    assert reward.scored([Generation("", "the cat")]).total[0] == pytest.approx(positive["score"])
    other = make_reward({"name": "transformers", "model": files["tiny"], "label": "negative"})
    assert other([Generation("", "the cat")])[0] == pytest.approx(negative["score"])
    with pytest.raises(ConfigError, match="no label 'good'; it has negative, positive"):
        make_reward({"name": "transformers", "model": files["tiny"], "label": "good"})([Generation("", "the cat")])


def test_a_pipeline_for_another_task_is_refused():
    class Other:
        task = "text-generation"

    with pytest.raises(ConfigError, match="must be one for text-classification, got one for 'text-generation'"):
        PipelineReward(Other())


def test_a_method_can_be_marked_as_one_of_generations():
    class Judge:
        def lengths(self, generations):
            return [len(generation.prompt + generation.completion) for generation in generations]

    reward = make_reward(batch_reward(Judge().lengths))
    assert reward([Generation("ab", "cde"), Generation("", "")]).tolist() == [5.0, 0.0]


def test_a_number_too_large_for_an_array_is_shown():
    with pytest.raises(RewardError, match=r"not numbers, for .*got 1000000"):
        make_reward(lambda completion: 10**400).scored([Generation("", "a")])


def test_what_holds_a_function_has_no_json_form():
    assert reward_spec(make_reward(len)) is None
    assert reward_spec(make_reward([["length", 1], [len, 1]])) is None
    assert reward_spec(Shaped(len, potential="length")) is None


def test_a_mix_goes_to_json_and_back():
    mix = make_reward({"sentiment": 1, "repetition": -0.5})
    spec = json.loads(json.dumps(reward_spec(mix)))
    assert spec == [["sentiment", 1.0], ["repetition", -0.5]]
    assert make_reward(spec) == mix


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sentimnt", "Did you mean 'sentiment'"),
        ({"name": "length", "goal": 3}, "'goal'.*it takes target"),
        ({"name": 3}, "name must be a string"),
        ({"name": "readability", "target": "high"}, "reward 'readability'.*it takes target"),
        ({"name": "regex"}, "missing a required argument: 'pattern'"),
        ("regex", "reward 'regex': missing a required argument: 'pattern'; it takes pattern"),
        ("shaped", "reward 'shaped': missing a required argument: 'reward'"),
        ("classifier", "reward 'classifier': missing a required argument: 'file'"),
        ("transformers", "reward 'transformers': missing a required argument: 'model'"),
        ({"regex": 1.0}, "missing a required argument: 'pattern'"),
        ({"name": "rhyme", "scheme": 5}, "rhyme scheme is letters .* got 5"),
        ({"name": "length", "target": True}, "target must be a whole number of at least 1, got True"),
        ({"name": "length", "target": 2.0}, "target must be .* got 2.0"),
        ({"name": "metre", "syllables": 0}, "syllables must be .* at least 1, got 0"),
        ({"name": "repetition", "n": True}, "n must be .* got True"),
        ({"name": "distinct", "n": 1.5}, "n must be .* got 1.5"),
        ({"sentiment": "high"}, "weight of reward 'sentiment' must be a finite number, got 'high'"),
        ({"sentiment": float("nan")}, "finite number, got nan"),
        ({"sentiment": True}, "finite number, got True"),
        ({}, "at least one"),
        ([], "at least one"),
        ([["sentiment", 1, 2]], "list of .reward, weight."),
        (["sentiment"], "list of .reward, weight."),
        (7, "7 is no reward"),
        ({"name": "shaped", "reward": "length", "potential": "json"}, "'json' has no running score"),
    ],
)
def test_what_means_no_reward_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_reward(spec)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int64])
def test_whole_numbers_of_any_kind_are_settings(kind):
    text = Generation("", "a b c " * 43)  # 129 words: more than an int8 holds
    for name, setting, number in [("length", "target", 100), ("metre", "syllables", 100), ("repetition", "n", 2)]:
        given, plain = (make_reward({"name": name, setting: value}) for value in (kind(number), number))
        assert given == plain
        assert given([text]) == plain([text])
        assert json.dumps(reward_spec(given)) == json.dumps(reward_spec(plain))


ODD = [None, 3, -1, 2.5, True, np.int64(3), float("nan"), "x", "", [], ["x"], {}, {"x": 1}, object()]


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_settings_of_any_type_are_taken_or_refused_by_name(name, files):
    for setting in inspect.signature(REWARDS[name]).parameters:
        for value in ODD:
            try:
                reward = make_reward({"name": name, **needed(name, files), setting: value})
            except TextGenError:
                continue
            assert isinstance(reward, Reward), (setting, value)


def test_an_unknown_name_is_an_unknown_name():
    with pytest.raises(UnknownName):
        make_reward({"lenght": 1.0})


# --- what a reward answers


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda batch: [math.nan] * len(batch), "answered nan for the completion 'first'"),
        (lambda batch: [0.0, math.inf], "answered inf for the completion 'second"),
        (lambda batch: [0.0], r"answered shape \(1,\).*expected \(2,\)"),
        (lambda batch: np.zeros((2, 1)), r"answered shape \(2, 1\)"),
        (lambda batch: 0.5, r"answered shape \(\)"),
        (lambda batch: ["a", "b"], "answered dtype <U1, not numbers"),
        (lambda batch: [None, 1.0], r"answered dtype object, not numbers, for .* \(got None\)"),
        (lambda batch: [1j, 1.0], "answered dtype complex128, not numbers"),
        (lambda batch: [[1.0], [1.0, 2.0]], "ValueError"),
    ],
)
def test_a_wrong_answer_names_the_reward_and_the_text(answer, message):
    batch = [Generation("", "first"), Generation("", "second " * 50)]
    with pytest.raises(RewardError, match=message) as raised:
        make_reward(batch_reward(answer)).scored(batch)
    assert "reward 'function'" in str(raised.value)
    assert len(str(raised.value)) < 400


def test_an_error_in_a_function_shows_the_text_and_chains_the_cause():
    def faulty(text):
        return 1 / text.count("a")

    with pytest.raises(RewardError, match=r"reward 'faulty' raised ZeroDivisionError.*'bcd'") as raised:
        make_reward([["length", 1], [faulty, 1]]).scored([Generation("", "a"), Generation("", "bcd")])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_an_error_in_a_batch_function_chains_the_cause():
    @batch_reward
    def faulty(generations):
        raise KeyError("price")

    with pytest.raises(RewardError, match=r"reward 'faulty' raised KeyError.*2 texts, the first of them") as raised:
        make_reward(faulty).scored([Generation("", "a"), Generation("", "b")])
    assert isinstance(raised.value.__cause__, KeyError)


def test_integers_are_numbers_and_no_text_is_no_number():
    counted = FunctionReward(batch_reward(lambda batch: np.arange(len(batch))))
    assert counted.scored([Generation("", "")] * 3).total.tolist() == [0.0, 1.0, 2.0]
    assert make_reward("sentiment").scored([]).total.shape == (0,)


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge", "similarity"])
def test_a_missing_reference_is_named(name):
    with pytest.raises(RewardError, match=rf"{name}.*needs a reference.*'Once upon'"):
        make_reward(name).scored([Generation("Once upon", " a time")])


def test_a_mix_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        Mix.of([])
