"""The yardstick, against enumeration, brute force and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from agents.baselines.one_step import GreedyAgent, LookaheadAgent, SampleAgent
from agents.runs.optimum import TextTree, best_of_n, estimated_optimum, share_of_optimal_gain
from textgen_env.errors import CapacityError, ConfigError
from textgen_env.evaluation import evaluate
from textgen_env.models.table import TableModel
from textgen_env.vector_env import TextGenVectorEnv

TABLE = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.3, 0.3, 0.2, 0.2], [0.25] * 4])
LETTERS = "abc"


def worth(text):
    return text.count("b") / 3 - text.count("aa") + (text == "cab")


def make_env(rows=1, reward=worth, **settings):
    model = TableModel([*LETTERS, "<end>"], TABLE)
    return TextGenVectorEnv(rows, model, ["a"], reward, **{"top_k": 3, "max_new_tokens": 3, **settings})


def all_texts(k=4):
    """Every text after "a" of up to 3 tokens out of the k likeliest, with mu_k and reward."""
    texts = []

    def grow(text, last, log_mu):
        order = sorted(range(4), key=lambda t: (-TABLE[last, t], t))[:k]
        for token in order:
            log_p = log_mu + math.log(TABLE[last, token] / TABLE[last, order].sum())
            if token == 3:
                texts.append((text, log_p))
            elif len(text) == 2:
                texts.append((text + LETTERS[token], log_p))
            else:
                grow(text + LETTERS[token], token, log_p)

    grow("", 0, 0.0)
    log_mu = np.array([log_p for _, log_p in texts])
    return log_mu, np.array([worth(text) for text, _ in texts])


@pytest.mark.parametrize("top_k", [2, 3, None])
@pytest.mark.parametrize("beta", [0.03, 0.5, 5.0])
def test_the_tree_optimum_equals_the_sum_over_all_texts(top_k, beta):
    log_mu, rewards = all_texts(top_k or 4)
    weights = np.exp(log_mu + rewards / beta)
    best = weights / weights.sum()

    optimum = TextTree(make_env(top_k=top_k), "a").optimum(beta)

    assert optimum.value[0] == pytest.approx(beta * math.log(weights.sum()), rel=1e-6)
    assert optimum.reward[0] == pytest.approx(best @ rewards, rel=1e-6)
    assert optimum.kl[0] == pytest.approx(best @ (np.log(best) - log_mu), rel=1e-5)


def test_the_tree_of_the_language_model_gives_its_mean_reward_and_no_kl():
    log_mu, rewards = all_texts(3)
    tree = TextTree(make_env(), "a")
    point = tree.point(SampleAgent().probabilities(tree.observations))
    assert point.reward == pytest.approx(np.exp(log_mu) @ rewards, rel=1e-6)
    assert point.kl == pytest.approx(0, abs=1e-9)


def test_the_optimal_policy_is_where_the_optimum_says_and_none_is_better():
    tree, beta = TextTree(make_env(), "a"), 0.3
    optimum, policy = tree.optimum(beta), tree.optimal_policy(beta)
    assert tree.point(policy) == pytest.approx(optimum.point, rel=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(200):
        other = policy * np.exp(rng.normal(scale=rng.choice([0.01, 1.0]), size=policy.shape))
        point = tree.point(other / other.sum(-1, keepdims=True))
        assert point.reward - beta * point.kl <= optimum.value[0] + 1e-9


def test_step_rewards_have_the_same_optimum():
    reward = {"name": "length", "target": 2}
    terminal = TextTree(make_env(reward=reward), "a").optimum(0.2)
    stepwise = TextTree(make_env(reward=reward, reward_at="step"), "a").optimum(0.2)
    assert stepwise.value[0] == pytest.approx(terminal.value[0], rel=1e-5)


def test_the_tree_agrees_with_rollouts():
    tree = TextTree(make_env(), "a")
    policy = tree.optimal_policy(0.3)
    index = {prefix: node for node, prefix in enumerate(tree.prefixes)}

    class Tabled:
        def probabilities(self, observation):
            prefixes = [
                tuple(ids[1:length].tolist())
                for ids, length in zip(observation["tokens"], observation["length"][:, 0], strict=True)
            ]
            return policy[[index[prefix] for prefix in prefixes]]

    result = evaluate(Tabled(), make_env(rows=64), episodes=4000, seed=0)
    exact = tree.point(policy)
    assert result.reward == pytest.approx(exact.reward, abs=4 * result.rewards.std() / math.sqrt(4000))
    assert result.mean_kl == pytest.approx(exact.kl, abs=4 * result.kl.std() / math.sqrt(4000))


def test_a_tree_that_grows_too_large_says_so():
    with pytest.raises(CapacityError, match="more than 5 prefixes"):
        TextTree(make_env(), "a", limit=5)


@pytest.mark.slow
def test_samples_lead_to_the_exact_optimum():
    samples = evaluate(SampleAgent(), make_env(rows=64), episodes=20_000, seed=0)
    exact = TextTree(make_env(), "a").optimum(0.3)
    estimate = estimated_optimum(samples.by_prompt(samples.rewards), 0.3)
    assert estimate.value[0] == pytest.approx(exact.value[0], abs=0.02)
    assert estimate.point == pytest.approx(exact.point, abs=0.05)


def test_the_jackknife_by_brute_force():
    rewards, beta = np.random.default_rng(0).normal(size=(2, 7)), 0.2

    def plain(values):
        weights = np.exp(values / beta)
        return beta * math.log(weights.mean()), weights @ values / weights.sum()

    optimum = estimated_optimum(rewards, beta)
    for row, value, reward in zip(rewards, optimum.value, optimum.reward, strict=True):
        without = np.array([plain(np.delete(row, i)) for i in range(7)])
        expected = 7 * np.array(plain(row)) - 6 * without.mean(0)
        assert (value, reward) == pytest.approx(tuple(expected))


def test_the_best_policy_has_a_reward_that_there_is_and_a_kl_that_there_can_be():
    """Rewards are 0 and 1, and 2 of 100 samples have 1: an estimate with the jackknife exceeds 1."""
    beyond = 0
    for seed in range(60):
        rewards = np.random.default_rng(seed).binomial(1, 0.02, (32, 64)).astype(float)
        optimum = estimated_optimum(rewards, 0.1)
        beyond += optimum.reward.mean() > 1
        assert 0 <= optimum.point.reward <= 1
        assert optimum.point.kl >= 0
    assert beyond
    for beta in (0.01, 0.1):  # one sample in 64: J* itself is estimated above 1
        assert estimated_optimum(np.eye(1, 64), beta).point == (1.0, 0.0)


@pytest.mark.parametrize("beta", [0.02, 0.1, 0.5])
def test_no_prompt_is_worth_more_than_the_largest_reward(beta):
    """One sample in 64 has all there is: taken alone the jackknife's estimate is up to 1.8 at a beta of 0.02."""
    assert estimated_optimum(np.eye(1, 64), beta).value[0] <= 1.0


def test_the_jackknife_removes_most_of_the_bias():
    beta, chance = 0.5, 0.1
    truth = beta * math.log(1 - chance + chance * math.exp(1 / beta))
    draws = (np.random.default_rng(0).random((4000, 20)) < chance).astype(float)
    plain = (beta * np.log(np.exp(draws / beta).mean(-1))).mean() - truth
    corrected = estimated_optimum(draws, beta).value.mean() - truth
    assert plain < -0.008
    assert abs(corrected) < abs(plain) / 3


@pytest.mark.parametrize("beta", [1e-3, 1.0])
def test_effective_samples_of_extreme_cases(beta):
    same = estimated_optimum(np.full((1, 9), -0.7), beta)
    assert same.effective_samples[0] == pytest.approx(9)
    assert (same.value[0], same.reward[0]) == pytest.approx((-0.7, -0.7))
    one = estimated_optimum(np.array([[1.0, *[-1000.0] * 8]]), beta)
    assert one.effective_samples[0] == pytest.approx(1)
    assert np.isfinite([one.value[0], one.reward[0]]).all()


def test_best_of_n_equals_the_mean_over_all_choices():
    rewards = np.array([[0.3, -1.0, 2.0, 0.5, 0.5, 7.0], [1.0, 1.0, 0.0, -2.0, 3.0, 0.1]])
    for n in range(1, 7):
        choices = [max(chosen) for row in rewards for chosen in itertools.combinations(row, n)]
        assert best_of_n(rewards, n).reward == pytest.approx(np.mean(choices))


def test_best_of_n_kl_bounds_are_the_published_ones():
    rewards = np.zeros((1, 64))
    assert best_of_n(rewards, 1).kl == 0
    for n, nats in [(4, 0.64), (16, 1.84), (64, 3.17)]:
        assert best_of_n(rewards, n).kl == pytest.approx(nats, abs=5e-3)


@pytest.mark.parametrize("n", [0, 5])
def test_best_of_more_than_there_are_is_refused(n):
    with pytest.raises(ConfigError, match=r"1\.\.4"):
        best_of_n(np.zeros((1, 4)), n)


def test_share_of_the_optimal_gain_of_the_notes():
    # Score lookahead at beta 0.2, valued at 0.1: reward 0.62 at 1.3 nats; J(mu) = 0.20, J* = 0.615.
    assert share_of_optimal_gain(0.62 - 0.1 * 1.3, 0.20, 0.615) == pytest.approx(0.70, abs=0.01)
    assert math.isnan(share_of_optimal_gain(0.5, 0.5, 0.5))


@pytest.mark.parametrize(("shape", "beta"), [((3, 1), 0.1), ((3,), 0.1), ((3, 4), 0.0), ((3, 4), math.nan)])
def test_an_estimate_needs_samples_and_a_temperature(shape, beta):
    with pytest.raises(ConfigError):
        estimated_optimum(np.zeros(shape), beta)


# --- agents without learning


def words_env(**settings):
    model = TableModel([" sun", " rain", " fog"], [0.2, 0.5, 0.3], end=None)
    reward = {"name": "keywords", "words": ["sun"]}
    return TextGenVectorEnv(2, model, [" fog"], reward, top_k=3, max_new_tokens=2, **settings)


def test_lookahead_tilts_the_language_model_by_the_gain_in_score():
    observation, _ = words_env(observation="full").reset(seed=0)
    policy = LookaheadAgent(beta=0.5).probabilities(observation)
    weights = np.array([0.5, 0.3, 0.2 * math.exp(1 / 0.5)])  # rain, fog, sun: the likeliest first
    np.testing.assert_allclose(policy, np.tile(weights / weights.sum(), (2, 1)), rtol=1e-6)


def test_lookahead_is_optimal_where_only_the_next_token_counts():
    env = words_env(observation="full", top_p=0.9)
    tree = TextTree(env, " fog")
    last = [node for node, prefix in enumerate(tree.prefixes) if len(prefix) == 1]
    policy = LookaheadAgent(beta=0.4).probabilities(tree.observations)
    np.testing.assert_allclose(policy[last], tree.optimal_policy(0.4)[last], atol=1e-6)


def test_search_agents_predict_like_sb3_with_and_without_a_batch_axis():
    observation, _ = words_env(observation="full").reset(seed=0)
    single = {key: value[0] for key, value in observation.items()}
    for agent in (SampleAgent(seed=0), GreedyAgent(), LookaheadAgent(seed=0)):
        actions, state = agent.predict(observation)
        assert actions.shape == (2,)
        assert state is None
        assert np.shape(agent.predict(single)[0]) == ()
        assert agent.probabilities(single).shape == (3,)
    assert GreedyAgent().predict(single)[0] == 0
    assert LookaheadAgent(beta=0.01).predict(single, deterministic=True)[0] == 2


def test_search_agents_never_choose_a_masked_action():
    observation, _ = words_env(observation="full", top_p=0.4).reset(seed=0)
    for agent in (SampleAgent(), GreedyAgent(), LookaheadAgent(beta=0.01)):
        assert agent.probabilities(observation).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_lookahead_says_which_key_it_needs():
    observation, _ = words_env().reset(seed=0)
    with pytest.raises(ConfigError, match=r"'candidate_scores'.*observation='full'"):
        LookaheadAgent().probabilities(observation)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ConfigError, match="above 0, got 0"):
        LookaheadAgent(beta=0)


def test_the_error_of_the_gain_is_the_spread_of_its_estimates():
    rng, count = np.random.default_rng(0), 64
    draws = rng.choice([0.0, 0.3, 1.0], size=(3000, count), p=[0.5, 0.3, 0.2])
    gains = estimated_optimum(draws, 0.5).value - draws.mean(-1)
    errors = estimated_optimum(draws, 0.5).gain_errors
    assert errors.mean() == pytest.approx(gains.std(), rel=0.1)
    two = estimated_optimum(draws[:2], 0.5)
    assert two.gain_error == pytest.approx(math.hypot(*two.gain_errors) / 2)


def test_two_samples_do_not_make_the_gain_certain():
    """Left out one by one, either leaves one sample, whose gain is 0 whatever it is: the jackknife sees no spread."""
    draws = (np.random.default_rng(0).random((300, 16, 2)) < 0.3).astype(float)
    found = [estimated_optimum(prompts, 0.1) for prompts in draws]
    spread = np.std([optimum.value.mean() - prompts.mean() for optimum, prompts in zip(found, draws, strict=True)])
    assert np.mean([optimum.gain_error for optimum in found]) == pytest.approx(spread, rel=0.3)
