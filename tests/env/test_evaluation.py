"""Evaluation: whole episodes, exact KL, and figures that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from textgen_env.errors import ConfigError, PromptError
from textgen_env.evaluation import DISTINCT_TEXTS, bootstrap_interval, choose_prompts, evaluate, roll_out
from textgen_env.models.table import TableModel
from textgen_env.policies import sample
from textgen_env.prompts import ListPrompts, Prompt
from textgen_env.vector_env import TextGenVectorEnv

PROBABILITIES = [0.5, 0.25, 0.15, 0.1]  # of a, b, c, <end>, whatever came before


class Fixed:
    """Always the same probabilities."""

    def __init__(self, policy):
        self.policy = np.asarray(policy, float)

    def probabilities(self, observation):
        return np.tile(self.policy, (len(observation["length"]), 1))

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        assert deterministic, "probabilities must be drawn from by the evaluation"
        return np.full(len(observation["length"]), self.policy.argmax()), None


class Uniform:
    """No probabilities: draws by itself."""

    def __init__(self, k):
        self.rng, self.k = np.random.default_rng(0), k

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return self.rng.integers(self.k, size=len(observation["length"])), None


def make_env(rows=5, prompts=("a", "b", "c"), reward=lambda text: float(len(text)), **settings):
    model = TableModel(["a", "b", "c", "<end>"], PROBABILITIES)
    return TextGenVectorEnv(rows, model, list(prompts), reward, **{"top_k": 3, "max_new_tokens": 6, **settings})


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_results_do_not_depend_on_the_number_of_rows(rows):
    agent = Fixed([0.2, 0.3, 0.5])
    got = evaluate(agent, make_env(rows), episodes=30, seed=3)
    expected = evaluate(agent, make_env(7), episodes=30, seed=3)
    assert got.completions == expected.completions
    assert got.prompts == ("a", "b", "c") * 10
    np.testing.assert_array_equal(got.rewards, expected.rewards)


def test_short_texts_are_not_favoured():
    # The end token is action 3: a text stops with chance 1/2 a step and holds at most 6 tokens.
    env = make_env(rows=16, top_k=None)
    result = evaluate(Fixed([0.5, 0, 0, 0.5]), env, episodes=3000, seed=0)
    tokens = sum(0.5**i for i in range(6))  # token i + 1 is written with chance 2^-i
    assert result.lengths.mean() == pytest.approx(tokens, abs=4 * result.lengths.std() / math.sqrt(3000))
    assert len(result.rewards) == 3000


def test_episodes_are_rounded_up_to_a_whole_number_a_prompt():
    result = evaluate(Fixed([1, 0, 0]), make_env(), episodes=10, seed=0)
    assert [result.prompts.count(p) for p in "abc"] == [4, 4, 4]


def test_with_fewer_episodes_than_prompts_so_many_prompts_are_drawn():
    result = evaluate(Fixed([1, 0, 0]), make_env(), episodes=2, seed=0)
    assert len(set(result.prompts)) == len(result.prompts) == 2


def test_kl_of_a_fixed_policy_is_that_of_a_step_times_the_steps():
    policy = np.array([0.2, 0.3, 0.5])
    mu_k = np.array([0.5, 0.25, 0.15]) / 0.9
    result = evaluate(Fixed(policy), make_env(), episodes=6, seed=0)
    step = float(np.sum(policy * np.log(policy / mu_k)))
    np.testing.assert_allclose(result.kl, 6 * step, rtol=1e-6)
    np.testing.assert_allclose(result.outside, -6 * math.log(0.9), rtol=1e-6)
    full = float(np.sum(policy * np.log(policy / np.array([0.5, 0.25, 0.15]))))
    assert result.figures()["kl_full"] == pytest.approx(6 * full, rel=1e-6)
    np.testing.assert_allclose(result.values(0.1), result.rewards - 0.1 * 6 * step, rtol=1e-6)


def test_the_language_model_has_no_kl_and_its_own_likelihood():
    mu_k = np.array([0.5, 0.25, 0.15]) / 0.9
    result = evaluate(Fixed(mu_k), make_env(), episodes=3, seed=1)
    np.testing.assert_allclose(result.kl, 0, atol=1e-6)
    log_p = {letter: math.log(p) for letter, p in zip("abc", PROBABILITIES, strict=False)}
    expected = [sum(log_p[letter] for letter in text) for text in result.completions]
    np.testing.assert_allclose(result.logprobs, expected, rtol=1e-5)
    assert result.likelihood == pytest.approx(sum(expected) / 18, rel=1e-5)


def test_a_deterministic_agent_has_the_kl_of_a_point_mass():
    result = evaluate(Fixed([0, 0, 1]), make_env(), episodes=3, seed=0, deterministic=True)
    assert set(result.completions) == {"cccccc"}
    np.testing.assert_allclose(result.kl, -6 * math.log(0.15 / 0.9), rtol=1e-6)


def test_an_agent_without_probabilities_has_no_kl():
    result = evaluate(Uniform(3), make_env(), episodes=6, seed=0)
    assert result.kl is None
    assert result.values(0.1) is None
    assert result.figures()["kl"] is None


def test_step_rewards_add_up_to_the_reward_of_the_text():
    env = make_env(reward={"name": "length", "target": 4}, reward_at="step")
    end = make_env(reward={"name": "length", "target": 4})
    agent = Fixed([0.2, 0.3, 0.5])
    np.testing.assert_allclose(
        evaluate(agent, env, 9, seed=0).rewards, evaluate(agent, end, 9, seed=0).rewards, atol=1e-6
    )


def test_references_reach_the_reward_and_parts_are_reported():
    prompts = ListPrompts([Prompt("a", reference="ccc"), Prompt("b", reference="ab")])
    env = make_env(reward={"chrf": 1.0, "length": 0.5})
    result = evaluate(Fixed([0, 0, 1]), env, episodes=2, seed=0, prompts=prompts)
    assert result.rewards[0] > result.rewards[1] + 0.1
    np.testing.assert_allclose(result.rewards, result.parts["chrf"] + 0.5 * result.parts["length"])


@pytest.mark.parametrize(
    ("policy", "what"),
    [([0.5, 0.5, 0.5], "sum to 1"), ([1.5, -0.5, 0], "at least 0"), ([0.5, 0.5], "shape"), ([0, 0, np.nan], "sum")],
)
def test_probabilities_that_are_none_are_refused(policy, what):
    with pytest.raises(ConfigError, match=what):
        evaluate(Fixed(policy), make_env(), episodes=3, seed=0)


def test_probability_on_a_masked_action_is_refused():
    with pytest.raises(ConfigError, match="action_mask is 0"):
        evaluate(Fixed([0.5, 0.4, 0.1]), make_env(top_p=0.4), episodes=3, seed=0)


def test_no_episodes_are_refused():
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        evaluate(Fixed([1, 0, 0]), make_env(), episodes=0, seed=0)


def test_sample_divides_the_unit_interval_in_proportion():
    policy = np.array([0.25, 0.0, 0.5, 0.25])
    numbers = (np.arange(1000) + 0.5) / 1000
    counts = np.bincount(sample(np.tile(policy, (1000, 1)), numbers), minlength=4)
    assert counts.tolist() == [250, 0, 500, 250]
    assert sample(np.array([[0.0, 1.0, 0.0]] * 2), np.array([0.0, 1 - 2**-53])).tolist() == [1, 1]


def test_the_bootstrap_agrees_with_the_normal_interval_within_prompts():
    rng = np.random.default_rng(0)
    offsets = np.array([[-5.0], [0.0], [5.0]])  # prompts differ widely; the interval must not care
    values = offsets + rng.normal(size=(3, 200))
    low, high = bootstrap_interval(values)
    deviation = values.std(axis=1, ddof=1).mean() / math.sqrt(600)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.2 * deviation)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.1)


@pytest.mark.parametrize("count", [2, 3])
def test_few_texts_a_prompt_are_taken_for_few(count):
    """The mean deviates by what statistics says, whose variance divides by one less than there are."""
    values = np.random.default_rng(1).normal(size=(400, count))
    low, high = bootstrap_interval(values)
    deviation = math.sqrt(values.var(axis=1, ddof=1).mean() / values.size)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.1)


def test_with_one_text_a_prompt_the_bootstrap_redraws_prompts():
    low, high = bootstrap_interval(np.arange(100.0)[:, None])
    assert (high - low) / 2 == pytest.approx(1.96 * np.arange(100.0).std() / 10, rel=0.1)


def test_variety_by_hand():
    model = TableModel([" the", " cat", " sat"], [0.4, 0.3, 0.3], end=None)
    env = TextGenVectorEnv(1, model, [" the"], lambda text: 0.0, top_k=3, max_new_tokens=4)
    result = roll_out(Cycle(), env, [Prompt(" the")] * 2, seed=0)
    assert result.completions == (" the cat the cat", " the cat the cat")
    assert result.distinct(1) == pytest.approx(2 / 8)  # the, cat
    assert result.distinct(2) == pytest.approx(2 / 6)  # the cat, cat the
    assert result.distinct(3) == pytest.approx(2 / 4)
    assert result.repetition == pytest.approx(0.0)  # the cat the, cat the cat: neither twice in one text


class Cycle:
    """the, cat, the, cat, ..."""

    def probabilities(self, observation):
        turn = (np.round((1 - observation["budget"][:, 0]) * 4).astype(int)) % 2
        return np.eye(3)[turn]


@pytest.mark.slow
def test_distinct_looks_at_a_fixed_number_of_texts():
    env = make_env(prompts=["a"])
    few = evaluate(Fixed([0.4, 0.3, 0.3]), env, episodes=DISTINCT_TEXTS, seed=0)
    many = evaluate(Fixed([0.4, 0.3, 0.3]), env, episodes=2 * DISTINCT_TEXTS, seed=0)
    assert many.completions[:DISTINCT_TEXTS] == few.completions
    assert many.distinct(1) == few.distinct(1)


@pytest.mark.parametrize("texts", [["a", "b"], [Prompt("a"), {"prompt": "b"}]])
def test_prompts_may_be_texts(texts):
    agent, prompts = Fixed([0.4, 0.3, 0.3]), [Prompt("a"), Prompt("b")]
    expected = evaluate(agent, make_env(prompts=["a"]), episodes=4, seed=0, prompts=prompts)
    found = evaluate(agent, make_env(prompts=["a"]), episodes=4, seed=0, prompts=texts)
    assert (found.prompts, found.completions) == (("a", "b", "a", "b"), expected.completions)
    assert roll_out(agent, make_env(prompts=["a"]), texts, seed=0).prompts == ("a", "b")
    with pytest.raises(PromptError, match="prompt 1: a prompt must be a string, got int"):
        evaluate(agent, make_env(prompts=["a"]), episodes=4, seed=0, prompts=["a", 3])


def test_choose_prompts_keeps_order_and_repeats_none():
    source = ListPrompts([Prompt(str(i)) for i in range(20)])
    numbers = [int(prompt.text) for prompt in choose_prompts(source, 8, seed=1)]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 8
    assert [p.text for p in choose_prompts(source, 20, seed=1)] == [str(i) for i in range(20)]
