"""Particles and guided best-of-n, against every text that a small environment can generate."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
import toys
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.baselines.guided import GuidedBestOfNAgent
from agents.baselines.particles import ParticlesAgent, systematic
from agents.runs.optimum import TextTree, best_of_n
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from agents.zoo import Budget, make_agent
from textgen_env import TableModel
from textgen_env.errors import CapacityError, ConfigError, PromptError
from textgen_env.prompts import Prompt
from textgen_env.rewards import Reward
from textgen_env.vector_env import TextGenVectorEnv

BETA = 0.5
KEYS = ("tokens", "length", "budget", "candidates", "logprobs", "action_mask")


class AtTheEnd(Reward):
    """``toys.worth``, for finished texts only; notes the texts that it is asked about."""

    name = "at_the_end"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, generations):
        self.asked += [g.completion for g in generations]
        return np.array([toys.worth(g.completion) for g in generations])


def open_env(reward=None, rows=3, model=None, **settings):
    settings = {"top_k": 3, "max_new_tokens": 3, "max_prompt_tokens": 4, "observation": KEYS, **settings}
    return TextGenVectorEnv(rows, model or toys.letters(), toys.PROMPTS, reward or AtTheEnd(), **settings)


class Planted:
    """Q of every prefix after "a" from a table: the exact one, plus noise."""

    needs = ("tokens", "length")

    def __init__(self, tree, noise=0.0):
        exact = tree.soft_values(BETA)[1]
        self.table = np.where(np.isfinite(exact), exact, 0.0)
        self.table = self.table + noise * np.random.default_rng(0).normal(size=exact.shape)
        self.place = {prefix: node for node, prefix in enumerate(tree.prefixes)}

    def q(self, observation):
        rows = zip(observation["tokens"], observation["length"][:, 0], strict=True)
        return self.table[[self.place[tuple(ids[1:length].tolist())] for ids, length in rows]]


@pytest.fixture(scope="module")
def tree():
    return TextTree(open_env(), "a")


@pytest.fixture(scope="module")
def texts(tree):
    """(ids, mu, reward) of every text after "a"."""
    found = []

    def below(node, ids, mu, reward):
        for action in np.flatnonzero(np.isfinite(tree.log_mu[node])):
            token = int(tree.observations["candidates"][node, action])
            here = ((*ids, token), mu * np.exp(tree.log_mu[node, action]), reward + tree.rewards[node, action])
            child = tree.child[node, action]
            if child >= 0:
                below(child, *here)
            else:
                found.append(here)

    below(0, (), 1.0, 0.0)
    ids, mu, rewards = zip(*found, strict=True)
    assert sum(mu) == pytest.approx(1)
    return list(ids), np.array(mu), np.array(rewards)


def values_of(name, tree):
    planted = {"perfect": 0.0, "wrong": 0.5, "very wrong": 2.0}
    return Planted(tree, planted[name]) if name in planted else name


def law_of(found, ids):
    """The law of the text that is drawn, (texts,): weights in place of draws, which have the same mean."""
    law = dict.fromkeys(ids, 0.0)
    for text in found:
        for completion, weight in zip(text.ids, text.weights, strict=True):
            law[completion] += weight / len(found)
    return np.array(list(law.values()))


def value_of(law, mu, rewards):
    """J = E[R] - beta KL of a law over texts."""
    return law @ rewards - BETA * np.sum(law * np.log(np.where(law > 0, law / mu, 1.0)))


def test_systematic_draws_round_n_weight_up_or_down_and_are_right_on_average():
    weights = np.array([0.5, 0.0, 0.3, 0.2])
    draws = np.array([systematic(weights, u) for u in (np.arange(1000) + 0.5) / 1000])
    assert (draws.sum(-1) == 4).all()
    assert (draws >= np.floor(4 * weights)).all()
    assert (draws <= np.ceil(4 * weights)).all()
    np.testing.assert_allclose(draws.mean(0), 4 * weights, atol=1e-2)


def test_texts_go_on_from_what_is_there_and_a_perfect_q_knows_what_that_is_worth(tree, texts):
    ids, mu, rewards = texts
    begun = [
        prefix for prefix in dict.fromkeys(text[:length] for text in ids for length in (1, 2)) if prefix not in ids
    ]
    agent = ParticlesAgent(open_env(), seed=0, n=4, values=Planted(tree), beta=BETA)
    for prefix, found in zip(begun, agent.write(["a"] * len(begun), begun), strict=True):
        here = np.array([text[: len(prefix)] == prefix for text in ids])
        worth = mu[here] / mu[here].sum() @ np.exp(rewards[here] / BETA)
        assert found.log_z == pytest.approx(np.log(worth), abs=1e-5)
        assert {text[: len(prefix)] for text in found.ids} == {prefix}
    with pytest.raises(ConfigError, match="a text for each of 2 prompts, got 1"):
        agent.write(["a", "a"], [()])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrong", "zero"])
def test_the_law_of_the_text_approaches_the_optimum_at_rate_one_over_n(name, tree, texts):
    ids, mu, rewards = texts
    best = mu * np.exp(rewards / BETA)
    best /= best.sum()
    distance = {}
    for n, count in {1: 1500, 4: 600, 16: 250, 64: 120}.items():
        agent = ParticlesAgent(open_env(), seed=n, n=n, values=values_of(name, tree), beta=BETA, rows=4096)
        found = agent.write(["a"] * count)
        distance[n] = np.abs(law_of(found, ids) - best).sum() / 2
        drawn = np.array([text.reward for text in found])
        expected = np.array([text.rewards @ text.weights for text in found])
        assert drawn.mean() == pytest.approx(expected.mean(), abs=4 * drawn.std() / count**0.5)
    noise = 0.5 * np.sqrt(best * (1 - best)).sum()  # of ``distance`` with one draw from the optimum, at most
    assert distance[1] > 0.15
    for n, count in {4: 600, 16: 250, 64: 120}.items():
        assert distance[n] < 3 * distance[1] / n + noise / (n * count) ** 0.5


@pytest.mark.parametrize("name", ["perfect", "lookahead"])
def test_with_a_perfect_q_weights_stay_equal_and_nothing_is_resampled(name):
    length = {"perfect": 3, "lookahead": 1}[name]  # a single token is all that lookahead is right about
    reward = AtTheEnd() if name == "perfect" else toys.Worth()
    tree = TextTree(open_env(reward, max_new_tokens=length), "a")
    env = open_env(reward, max_new_tokens=length)
    agent = ParticlesAgent(env, seed=0, n=8, values=values_of(name, tree), beta=BETA, threshold=1.0)
    for found in agent.write(["a"] * 20):
        np.testing.assert_allclose(found.weights, 1 / 8, rtol=1e-5)
        assert found.resamplings == 0
        assert found.value_at_least == pytest.approx(tree.soft_values(BETA)[0][0], abs=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("name", ["wrong", "zero", "lookahead"])
def test_the_estimate_of_the_normaliser_is_unbiased(name, threshold, tree, texts):
    _, mu, rewards = texts
    reward = toys.Worth() if name == "lookahead" else AtTheEnd()
    values = values_of(name, tree)
    agent = ParticlesAgent(open_env(reward), seed=1, n=4, values=values, beta=BETA, threshold=threshold, rows=1024)
    found = agent.write(["a"] * 500)
    ratio = np.exp([text.log_z for text in found]) / (mu @ np.exp(rewards / BETA))
    assert ratio.mean() == pytest.approx(1, abs=4 * ratio.std() / 500**0.5)
    if name == "wrong" and threshold == 1.0:
        assert all(text.resamplings for text in found)


@pytest.mark.parametrize("name", ["perfect", "wrong", "very wrong", "zero"])
def test_beta_log_z_is_a_lower_bound_of_the_value_and_equal_to_it_with_one_row(name, tree, texts):
    ids, mu, rewards = texts
    for n, count in {1: 1000, 2: 600, 8: 150}.items():
        agent = ParticlesAgent(open_env(), seed=n, n=n, values=values_of(name, tree), beta=BETA, rows=4096)
        found = agent.write(["a"] * count)
        bound = np.array([text.value_at_least for text in found])
        error = 4 * bound.std() / count**0.5 + BETA * len(ids) / (n * count)  # luck, and the bias of the plug-in KL
        value = value_of(law_of(found, ids), mu, rewards)
        assert bound.mean() < value + error
        if n == 1:
            assert bound.mean() == pytest.approx(value, abs=error)


def law_of_best(n, pi, weights):
    """The law of the text with the largest weight among n independent ones, (texts,), equal ones sharing."""
    at_most = np.array([pi[weights <= weight].sum() for weight in weights])
    below = np.array([pi[weights < weight].sum() for weight in weights])
    return pi * (at_most**n - below**n) / (at_most - below)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrong", "very wrong", "zero"])
def test_the_best_of_independent_rows_is_one_of_n_and_its_value_is_no_more_than_is_certified(name, tree, texts):
    ids, mu, rewards = texts
    values = values_of(name, tree)
    tilted = tree.log_mu + (0.0 if name == "zero" else values.table) / BETA
    policy = np.exp(tilted - np.logaddexp.reduce(tilted, axis=-1, keepdims=True))
    pi = np.ones(len(ids))
    for i, text in enumerate(ids):
        for t, token in enumerate(text):
            node = tree.prefixes.index(text[:t])
            pi[i] *= policy[node, tree.observations["candidates"][node].tolist().index(token)]
    for n, count in {1: 1000, 2: 1000, 8: 400}.items():
        agent = ParticlesAgent(open_env(), seed=n, n=n, values=values, beta=BETA, pick="best", rows=4096)
        found = agent.write(["a"] * count)
        law = law_of_best(n, pi, np.round(rewards / BETA - np.log(pi / mu), 9))
        picked = np.bincount([ids.index(text.ids[text.chosen]) for text in found], minlength=len(ids)) / count
        assert np.abs(picked - law).sum() / 2 < np.sqrt(law * (1 - law) / count).sum()
        bound, value = np.array([text.value_at_least for text in found]), value_of(law, mu, rewards)
        error = 4 * bound.std() / count**0.5
        assert value - 0.5 * BETA < bound.mean() < value + error
        if n == 1:
            assert bound.mean() == pytest.approx(value, abs=error)
        assert not any(text.resamplings for text in found)


def trained_agent(env):
    """A TextDQN whose Q depends on everything."""
    agent = TextDQN("CandidatePolicy", env, beta=0.3, seed=0)
    torch.manual_seed(0)
    for head in agent.q_net_target.heads:
        torch.nn.init.normal_(head.value.weight, std=0.3)
    return agent


@pytest.mark.parametrize("scores", [(), ("score", "candidate_scores")])
def test_one_row_is_the_agent_itself(scores):
    env = open_env(toys.Worth(), rows=1, max_new_tokens=5, observation=NEEDED_KEYS + scores)
    agent = trained_agent(env)
    particles = ParticlesAgent(env, seed=4, n=1, values=agent)
    assert particles.beta == 0.3
    agent.beta = 0.2  # it acts at another temperature than it was trained for
    for found, stream in zip(particles.write(toys.PROMPTS), np.random.default_rng(4).spawn(4), strict=True):
        agent.learner.rng = stream
        observation, _ = env.reset(options={"prompt": found.prompt})
        completion, done, log_ratio = None, False, 0.0
        while not done:
            log_mu, _ = env.episodes.log_prior(np.array([0]))
            policy = agent.probabilities(observation)
            actions, _ = agent.predict(observation)
            log_ratio += np.log(policy[0, actions[0]]) - log_mu[0, actions[0]]
            observation, reward, ended, _, infos = env.step(actions)
            done = ended[0]
        completion = infos["final_info"]["completion"][0]
        assert found.completion == completion
        assert found.reward == pytest.approx(reward[0])
        assert found.logprobs[0] == pytest.approx(infos["final_info"]["logprob"][0])
        assert found.value_at_least == pytest.approx(reward[0] - 0.3 * log_ratio, abs=1e-5)


@pytest.mark.parametrize("vector", [True, False])
def test_an_agent_writes_with_particles_in_its_environment_and_without(vector, tmp_path):
    env = open_env("length", observation=NEEDED_KEYS, max_new_tokens=4, stop=("b",))
    made = env if vector else DummyVecEnv([lambda: gym.make("TextGen-v0", **settings_like(env))])
    agent = trained_agent(made)
    agent.beta = 0.4
    found = agent.write(toys.PROMPTS, particles=4, seed=3, threshold=0.9)
    expected = ParticlesAgent(env, 3, n=4, values=agent, threshold=0.9, pick="best").write(toys.PROMPTS)
    assert [text.ids for text in found] == [text.ids for text in expected]
    assert all("b" not in text.completion[:-2] for text in found)  # "ab" is one token
    assert [text.value_at_least for text in found] == [text.value_at_least for text in expected]
    agent.save_pretrained(tmp_path)
    loaded = TextDQN.from_pretrained(tmp_path, model=env.language_model)
    assert [text.ids for text in loaded.write(toys.PROMPTS, 4, seed=3, threshold=0.9)] == [t.ids for t in expected]
    assert loaded.write(["a"], 4)[0].value_at_least is not None
    judged = loaded.write(["a"], 4, reward=lambda text: 5.0)[0]
    np.testing.assert_array_equal(judged.rewards, 5.0)
    with pytest.raises(PromptError, match=r"got one text: give \['ab'\]"):
        loaded.write("ab")


def test_an_agent_picks_by_the_number_of_rows_unless_told_or_unjudged():
    """As ``best`` of few rows and drawn from many; by weight also where nobody judges."""
    env = open_env(observation=NEEDED_KEYS)
    agent = trained_agent(env)
    for given, settings in (
        ({"particles": 2}, {"n": 2, "pick": "best"}),
        ({"particles": 5}, {"n": 5, "pick": "weight"}),
        ({"particles": 4, "pick": "weight"}, {"n": 4, "pick": "weight"}),
        ({"particles": 1}, {"n": 1, "pick": "best"}),
        ({"particles": 4, "judge": False}, {"n": 4, "pick": "weight", "judge": False}),
    ):
        expected = ParticlesAgent(env, 3, values=agent, **settings).write(toys.PROMPTS)
        found = agent.write(toys.PROMPTS, seed=3, **given)
        assert [text.ids for text in found] == [text.ids for text in expected]
        assert [text.chosen for text in found] == [text.chosen for text in expected]


def settings_like(env):
    config = env.episodes.config
    names = ("top_k", "max_new_tokens", "max_prompt_tokens", "observation", "stop")
    parts = {"model": env.language_model, "prompts": toys.PROMPTS, "reward": env.episodes.reward}
    return parts | {name: getattr(config, name) for name in names}


def test_an_agent_that_acts_as_the_language_model_leaves_weighted_best_of_n():
    """Its temperature says how far it is trusted; what is aimed at stays the trade that it was trained for."""
    env = open_env(observation=NEEDED_KEYS)
    agent = trained_agent(env)
    agent.beta = 1e6
    found = ParticlesAgent(env, seed=0, n=4, values=agent).write(["a"] * 5)
    expected = ParticlesAgent(env, seed=0, n=4, values="zero", beta=0.3).write(["a"] * 5)
    for text, other in zip(found, expected, strict=True):
        assert text.ids == other.ids
        np.testing.assert_allclose(text.weights, other.weights, atol=1e-4)


def test_values_of_an_agent_count_its_learned_scores_in():
    """The network's values start at the learned score of the prefix; a text is worth both together."""

    class Scores(torch.nn.Module):
        def forward(self, tokens, steps, candidates, folds=None):
            return 0.7 + 0.0 * candidates[..., :1].float(), 0.7 + 0.1 * candidates.float()

    env = open_env(observation=NEEDED_KEYS)
    agent = trained_agent(env)
    agent.q_net_target.scorer = Scores()
    observation, _ = env.reset(seed=0)
    q = agent.learner.q(observation)
    with torch.no_grad():
        beyond = agent.q_net_target({key: torch.as_tensor(value) for key, value in observation.items()})
    np.testing.assert_allclose(q, beyond.numpy() + 0.7, atol=1e-6)
    assert np.ptp(q, axis=-1).min() > 0
    log_mu, _ = env.episodes.log_prior(np.arange(3))
    tilted = np.exp(log_mu + q / agent.beta)
    np.testing.assert_allclose(tilted / tilted.sum(-1, keepdims=True), agent.probabilities(observation), atol=1e-6)


def test_a_reward_that_was_not_stored_leaves_texts_unjudged_and_scores_are_asked_for(tmp_path):
    trained_agent(open_env(lambda text: 1.0, observation=NEEDED_KEYS)).save_pretrained(tmp_path / "end")
    agent = TextDQN.from_pretrained(tmp_path / "end", model=toys.letters())
    assert agent.write(["a"], 2)[0].value_at_least is None
    keys = (*NEEDED_KEYS, "score", "candidate_scores")
    trained_agent(open_env(toys.Worth(), observation=keys)).save_pretrained(tmp_path / "scores")
    agent = TextDQN.from_pretrained(tmp_path / "scores", model=toys.letters())
    with pytest.raises(ConfigError, match=r"sees running scores of reward 'worth'.*give it again"):
        agent.write(["a"], 2)
    assert agent.write(["a"], 2, reward=toys.Worth())[0].reward > -5
    agent.task = None
    with pytest.raises(ConfigError, match="does not know its task"):
        agent.write(["a"])


def test_a_seed_repeats_the_texts_whatever_else_is_written_beside_them():
    env, one, many = open_env(), [], []
    for prompts, rows in ((["a", "ab"], 4), (["a", "ab", "b a", ". b"], 64)):
        agent = ParticlesAgent(env, seed=3, n=4, beta=BETA, rows=rows)
        (one if rows == 4 else many).extend(agent.write(prompts))
    for first, second in zip(one, many, strict=False):
        assert (first.ids, first.chosen, first.tokens) == (second.ids, second.chosen, second.tokens)
        np.testing.assert_array_equal(first.weights, second.weights)
    other = ParticlesAgent(env, seed=4, n=4, beta=BETA).write(["a", "ab"])
    assert [text.ids for text in other] != [text.ids for text in one]


def test_tokens_and_judge_calls_are_counted(tree):
    reward = AtTheEnd()
    agent = ParticlesAgent(open_env(reward, max_new_tokens=4), seed=0, n=5, values="zero", beta=BETA)
    found = agent.write(["a", "ab", "a"])
    assert [text.tokens for text in found] == [sum(map(len, text.ids)) for text in found]  # nothing was resampled
    assert sum(text.tokens for text in found) == agent.tokens_used
    assert sum(text.judge_calls for text in found) == len(reward.asked) == 15
    reward.asked.clear()
    forked = ParticlesAgent(open_env(reward, min_new_tokens=3), seed=0, n=4, values=Planted(tree, 2.0), beta=BETA)
    forked = forked.write(["a"] * 10)
    assert sum(text.resamplings for text in forked) > 0
    assert [(text.tokens, text.judge_calls) for text in forked] == [(12, 4)] * 10
    assert len(reward.asked) == 40


def test_the_texts_of_all_prompts_share_a_forward():
    model = toys.CountingModel()
    agent = ParticlesAgent(open_env(model=model, min_new_tokens=3), seed=0, n=4, beta=BETA)
    agent.write(["a", "ab", "b a"])
    assert model.forwards == [3, 12, 12]  # a prefix is computed once, then forked; the last token needs none


@pytest.mark.slow
def test_tempering_ignores_values_that_are_worthless_and_keeps_good_ones(tree):
    settings = {"n": 8, "beta": BETA, "rows": 512}
    agent = ParticlesAgent(open_env(), seed=0, values=Planted(tree, 8.0), **settings)
    tried = agent.temper(["a"] * 10)
    assert agent.trust <= 0.2
    assert (agent.pick, agent.trust, agent.threshold) == (tried[0].pick, tried[0].trust, tried[0].threshold)
    assert {found.pick for found in tried} == {"weight", "best"}
    zero = ParticlesAgent(open_env(), seed=0, values="zero", **settings).write(["a"] * 60)
    error = 4 * BETA * np.std([text.log_z for text in zero]) / 60**0.5
    tempered = np.mean([text.value_at_least for text in agent.write(["a"] * 60)])
    assert tempered > np.mean([text.value_at_least for text in zero]) - error
    good = ParticlesAgent(open_env(), seed=0, values=Planted(tree), **settings)
    assert good.temper(["a"] * 5)[0].trust == 1


def test_without_a_judge_the_last_weight_is_left_out(tree):
    reward = AtTheEnd()
    agent = ParticlesAgent(open_env(reward), seed=0, n=4, values=Planted(tree, 0.5), beta=BETA, judge=False)
    with_judge = ParticlesAgent(open_env(), seed=0, n=4, values=Planted(tree, 0.5), beta=BETA)
    for found, judged in zip(agent.write(["a"] * 5), with_judge.write(["a"] * 5), strict=True):
        assert found.ids == judged.ids
        assert np.isnan(found.rewards).all()
        assert np.isnan(found.reward)
        assert found.value_at_least is None
        assert found.judge_calls == 0
        assert not np.allclose(found.weights, judged.weights)
    assert not reward.asked
    with pytest.raises(ConfigError, match="needs judge=True"):
        agent.temper(["a"])


def test_guided_best_of_n_in_one_block_is_best_of_n(texts):
    _, mu, rewards = texts
    agent = GuidedBestOfNAgent(open_env(), seed=0, n=4, block=3, values="zero", beta=BETA)
    found = agent.write(["a"] * 400)
    order = np.argsort(rewards)
    reached = np.cumsum(mu[order]) ** 4  # P(the best of four is at most this one)
    expected = np.sum(rewards[order] * np.diff(reached, prepend=0.0))
    got = np.array([text.reward for text in found])
    assert got.mean() == pytest.approx(expected, abs=4 * got.std() / 20)
    bound = best_of_n(np.zeros((1, 4)), 4).kl
    assert [text.kl_at_most for text in found] == pytest.approx([bound] * 400)
    assert all(text.judge_calls == 4 for text in found)
    assert sum(text.tokens for text in found) == agent.tokens_used


@pytest.mark.slow
def test_the_kl_of_guided_best_of_n_is_within_its_bound(tree, texts):
    ids, mu, _ = texts
    agent = GuidedBestOfNAgent(open_env(), seed=0, n=4, block=1, values=Planted(tree, 0.5), beta=BETA)
    found = agent.write(["a"] * 1500)
    law = np.array([sum(text.ids == text_ids for text in found) for text_ids in ids]) / len(found)
    kl = np.sum(law * np.log(np.where(law > 0, law / mu, 1.0)))
    assert kl < np.mean([text.kl_at_most for text in found])
    single = GuidedBestOfNAgent(open_env(), seed=0, n=1, values=Planted(tree), beta=BETA).write(["a"] * 1500)
    best = tree.optimum(BETA).point
    got = np.array([text.reward for text in single])
    assert got.mean() == pytest.approx(best.reward, abs=4 * got.std() / 1500**0.5)
    assert np.mean([text.kl_at_most for text in single]) == pytest.approx(best.kl, abs=0.15)


@pytest.mark.parametrize("name", ["particles", "guided_best_of_n"])
def test_an_agent_of_the_zoo_takes_its_settings(name):
    agent = make_agent(name, open_env(toys.Worth()), 0, Budget(steps=0), {"n": 3, "values": "lookahead", "beta": 0.2})
    assert (agent.n, agent.beta, agent.values.needs) == (3, 0.2, ("score", "candidate_scores"))
    assert agent.write([Prompt("a")])[0].completion
    assert agent.tokens_used <= 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\] .*got 1.5"),
        ({"trust": -1.0}, "trust must be at least 0"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"rows": 0}, "rows must be"),
        ({"values": "nothing"}, "must come from a TextDQN, one of zero, lookahead, .*got 'nothing'"),
        ({"values": object()}, "got 'object'"),
        ({"values": "lookahead"}, "needs a reward that can score a prefix"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ParticlesAgent(open_env(), **settings)


def test_values_that_are_not_finite_are_refused():
    class Broken:
        needs = ("tokens",)

        def q(self, observation):
            return np.full((len(observation["tokens"]), 3), np.nan)

    with pytest.raises(ConfigError, match=r"not finite at beta=0\.5"):
        ParticlesAgent(open_env(), values=Broken(), beta=BETA).write(["a"])


def test_an_agent_of_other_sizes_is_refused():
    agent = trained_agent(open_env(observation=NEEDED_KEYS))
    with pytest.raises(ConfigError, match="trained with top_k=3, the environment has 2"):
        ParticlesAgent(open_env(top_k=2), values=agent)
    with pytest.raises(ConfigError, match="trained with max_new_tokens=3, the environment has 4"):
        ParticlesAgent(open_env(max_new_tokens=4), values=agent)


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(PromptError, match=r"prompts\[1\]"):
        ParticlesAgent(open_env()).write(["a", 7])
    with pytest.raises(PromptError, match="max_prompt_tokens=4"):
        ParticlesAgent(open_env()).write(["aaaaaa"])


def test_more_rows_than_memory_holds_are_refused(tiny_lm):
    env = TextGenVectorEnv(1, tiny_lm, ["the film"], "length", top_k=4, max_new_tokens=4, max_prompt_tokens=8)
    with pytest.raises(CapacityError):
        ParticlesAgent(env, n=10**10)


def test_a_finished_row_pushes_out_no_unfinished_one():
    """With Q = 0 an end is worth its reward, and all other rows nothing yet."""
    env = open_env(max_new_tokens=4, model=toys.letters(toys.TABLE * 0.5 + np.eye(6)[5] * 0.5))
    for found in ParticlesAgent(env, seed=0, n=8, values="zero", beta=0.1, threshold=1.0).write(toys.PROMPTS):
        assert found.resamplings == 0
        assert len(set(found.ids)) > 2


def test_a_model_that_can_only_write_one_thing_needs_no_luck():
    model = TableModel(["a", "b"], [1.0, 0.0], end=None)
    env = TextGenVectorEnv(1, model, ["a"], lambda text: float(len(text)), top_k=2, max_new_tokens=2)
    found = ParticlesAgent(env, n=3, beta=BETA).write(["a"])[0]
    assert found.completions == ("aa",) * 3
    assert found.value_at_least == pytest.approx(2.0)
