"""What a running score is worth: the lines are those of laws with known values, and no optimum moves."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from toys import PROMPTS, Worth, letters

from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from agents.text_dqn.score_value import ScoredTexts, ScoreValue, soft_line
from agents.text_dqn.scorer import LEAST_TEXTS
from agents.text_dqn.scores import scored_batch

BETA, TOKENS, DEVIATION = 0.5, 6, 0.3
KEPT = 0.5  # what a unit of score is worth at the end


def walks(count=20_000, drift=0.0, seed=0):
    """Scores that grow by normal increments; the reward is ``KEPT`` of the last one.

    Under the language model increments are N(0, DEVIATION^2). Those of mean ``drift`` have
    log b / mu = (drift x - drift^2 / 2) / DEVIATION^2.
    """
    increments = np.random.default_rng(seed).normal(drift, DEVIATION, (count, TOKENS))
    scores = np.pad(increments.cumsum(1), ((0, 0), (1, 0)))
    log_ratio = (drift * increments - drift**2 / 2) / DEVIATION**2
    return ScoredTexts(scores[:, :-1], KEPT * scores[:, -1], log_ratio, np.ones_like(log_ratio, bool))


EXACT = KEPT**2 * DEVIATION**2 * (TOKENS - np.arange(TOKENS)) / (2 * BETA)  # beta log E exp(N(0, variance) / beta)


def fitted(texts, beta=BETA):
    value = ScoreValue(TOKENS)
    value.fit(texts, beta)
    return value


def test_texts_of_the_language_model_show_the_soft_value():
    value = fitted(walks())
    np.testing.assert_allclose(value.intercept[:-1], EXACT, atol=0.02)
    np.testing.assert_allclose(value.slope[1:-1], KEPT, atol=0.03)


def test_texts_of_the_best_possible_policy_show_it_without_error():
    value = fitted(walks(drift=KEPT * DEVIATION**2 / BETA))
    np.testing.assert_allclose(value.intercept[:-1], EXACT, atol=0.001)
    np.testing.assert_allclose(value.slope[1:-1], KEPT, atol=0.005)  # the prior counts as ten texts


def test_where_all_have_the_same_score_it_is_worth_the_mean():
    value = fitted(walks())
    assert (value.slope[0], value.intercept[0]) == (1.0, pytest.approx(EXACT[0], abs=0.02))


def test_a_score_of_a_finished_text_is_the_reward():
    assert fitted(walks())(torch.tensor([0.3, -2.0]), torch.tensor(TOKENS)).tolist() == pytest.approx([0.3, -2.0])


@pytest.mark.parametrize("spoiled", ["few", "not acted"])
def test_without_evidence_a_score_is_worth_itself(spoiled):
    texts = walks(count=LEAST_TEXTS - 1 if spoiled == "few" else 500)
    if spoiled == "not acted":
        texts = texts._replace(acted=np.zeros_like(texts.acted))
    value = fitted(texts)
    assert value.slope.tolist() == [1.0] * (TOKENS + 1)
    assert value.intercept.tolist() == [0.0] * (TOKENS + 1)


def test_padding_counts_for_nothing():
    texts = walks(count=1_000)
    padded = texts._replace(
        acted=texts.acted & (np.arange(TOKENS) < 3),
        log_ratio=np.where(np.arange(TOKENS) < 3, texts.log_ratio, np.nan),
    )
    cut = ScoredTexts(texts.scores[:, :3], texts.rewards, texts.log_ratio[:, :3], texts.acted[:, :3])
    np.testing.assert_array_equal(fitted(padded).slope, fitted(cut).slope)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e9])
def test_rewards_of_any_size_have_a_finite_line(scale):
    texts = walks(count=500)
    intercept, slope = soft_line(texts.scores[:, 4] * scale, texts.rewards * scale, np.zeros(500), BETA)
    assert np.isfinite(intercept)
    assert KEPT - 0.2 < slope < 1.001  # where rewards are far above beta, few texts count, and the prior holds


# --- in an agent


def make(keys=(*NEEDED_KEYS, "score", "candidate_scores"), **settings):
    settings = {"model": letters(), "prompts": PROMPTS, "reward": Worth(), "top_k": 4, "max_new_tokens": 4} | settings
    return gym.make_vec("textgen_env:TextGen-v0", num_envs=8, observation=keys, **settings)


def agent_in(env, **settings):
    return TextDQN(env=env, **{"learning_starts": 10_000, "buffer_size": 4_000, "seed": 0, "beta": 0.3} | settings)


def with_lines(agent):
    for network in (agent.q_net, agent.q_net_target):
        network.score_value.intercept.copy_(torch.tensor([0.5, 0.4, 0.3, 0.2, 0.0]))
        network.score_value.slope.copy_(torch.tensor([1.0, 0.6, 0.7, 0.8, 1.0]))
    return agent


def test_q_is_what_a_candidate_adds_to_the_value_and_an_ending_adds_to_the_score():
    env = make(top_k=5)
    agent = with_lines(agent_in(env))
    env.reset(seed=0)
    observation, *_ = env.step(np.ones(8, np.int64))  # one token is written
    after = 0.3 + 0.7 * observation["candidate_scores"]
    ends = np.isin(observation["candidates"], env.unwrapped.episodes.model.end_ids)
    assert 0 < ends.mean() < 1  # both kinds are tried
    expected = np.where(ends, observation["candidate_scores"], after) - observation["score"]
    np.testing.assert_allclose(agent.learner.q(observation), expected, atol=1e-6)


@pytest.mark.parametrize("length", [2, 4, 6])
def test_lines_hold_for_so_many_tokens_left(length):
    """Steering may write shorter and longer texts than training: the last token is worth what it adds to the score."""
    agent = with_lines(agent_in(make()))
    network = agent.q_net
    network.max_new_tokens = length
    for left, intercept, slope in ((1, 0.0, 1.0), (2, 0.2, 0.8)):
        scores = {"score": torch.tensor([[0.5]]), "candidate_scores": torch.tensor([[2.0]])}
        given = {**scores, "candidates": torch.tensor([[1]])}
        valued = network.valued(given, torch.tensor([[length - left]]))
        np.testing.assert_allclose(valued["candidate_scores"], [[intercept + slope * 2.0]], atol=1e-6)


def test_values_are_a_potential_in_the_rewards_of_whole_texts():
    env = make()
    agent = with_lines(agent_in(env))
    agent.learn(400)
    batch = agent.replay_buffer.sample(64)
    paid = (batch.rewards * batch.acted).sum(-1)
    shaped = scored_batch(agent.q_net, batch)
    np.testing.assert_allclose((shaped.rewards * shaped.acted).sum(-1), paid - 0.5, atol=1e-5)
    cut = replace(
        batch, ended=torch.zeros_like(batch.ended), acted=batch.acted & (torch.arange(batch.acted.shape[1]) < 1)
    )
    first = (cut.rewards * cut.acted).sum(-1) + (0.4 - 0.4 * batch.observations["score"][:, 1, 0]) - 0.5
    long = batch.acted[:, 1]
    assert long.any()
    shaped = scored_batch(agent.q_net, cut)
    np.testing.assert_allclose((shaped.rewards * shaped.acted).sum(-1)[long], first[long], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [("score", "candidate_scores"), ("score",)])
def test_an_agent_fits_the_lines_and_keeps_them(keys, tmp_path):
    env = make(keys=NEEDED_KEYS + keys)
    agent = agent_in(env, learning_starts=40, steps_per_update=20)
    agent.learn(800)
    lines = agent.q_net.score_value
    assert (lines.slope != 1).any()
    assert all(
        torch.equal(a, b) for a, b in zip(lines.buffers(), agent.q_net_target.score_value.buffers(), strict=True)
    )
    agent.save(tmp_path / "agent")
    again = TextDQN.load(tmp_path / "agent", env=env)
    assert torch.equal(again.q_net.score_value.slope, lines.slope)
    observation, _ = env.reset(seed=1)
    np.testing.assert_array_equal(again.probabilities(observation), agent.probabilities(observation))


def test_an_agent_that_is_given_no_scores_has_no_lines():
    assert agent_in(make(keys=NEEDED_KEYS)).q_net.score_value is None
    assert agent_in(make(), score="learned").q_net.score_value is None
