"""Planning agents, against every text that a small environment can generate."""

from __future__ import annotations

import numpy as np
import pytest
import toys

from agents.baselines import guided, particles  # noqa: F401  (registers their agents)
from agents.baselines.one_step import RandomAgent
from agents.baselines.planning import PLANNING_AGENTS, BeamAgent, BestOfNAgent, MCTSAgent
from agents.runs.optimum import TextTree
from textgen_env.errors import ConfigError
from textgen_env.evaluation import evaluate, roll_out
from textgen_env.prompts import Prompt
from textgen_env.rewards import Reward
from textgen_env.vector_env import TextGenVectorEnv


class AtTheEnd(Reward):
    """``toys.worth``, for finished texts only."""

    name = "at_the_end"

    def __call__(self, generations):
        return np.array([toys.worth(g.completion) for g in generations])


def open_env(rows=3, reward=None, **settings):
    settings = {"top_k": 3, "max_new_tokens": 4, "max_prompt_tokens": 4, **settings}
    return TextGenVectorEnv(rows, toys.letters(), toys.PROMPTS, reward or toys.Worth(), **settings)


def every_text(env, prompt):
    """(log mu, reward) of each text that can be written after ``prompt``."""
    tree = TextTree(env, prompt)

    def below(node, logprob, reward):
        for action in np.flatnonzero(np.isfinite(tree.log_mu[node])):
            here = (logprob + tree.log_mu[node, action], reward + tree.rewards[node, action])
            child = tree.child[node, action]
            if child >= 0:
                yield from below(child, *here)
            else:
                yield here

    return np.array(list(below(0, 0.0, 0.0))).T


def prompts_of(env):
    return [Prompt(text) for text in toys.PROMPTS]


def test_random_takes_all_legal_candidates_alike():
    observation = {"logprobs": np.array([[-1.0, -1e4, -2.0]]), "action_mask": np.array([[1, 0, 1]])}
    np.testing.assert_array_equal(RandomAgent().probabilities(observation), [[0.5, 0, 0.5]])


@pytest.mark.parametrize("reward", [toys.Worth(), AtTheEnd()], ids=["running", "end"])
def test_a_wide_beam_finds_the_best_text_there_is(reward):
    env = open_env(reward=reward)
    agent = BeamAgent(env, width=200, beta=0.1)
    for prompt in toys.PROMPTS:
        found = roll_out(agent, env, [Prompt(prompt)], seed=0, deterministic=True)
        logprobs, rewards = every_text(env, prompt)
        assert found.rewards[0] - 0.1 * found.kl[0] == pytest.approx((rewards + 0.1 * logprobs).max())


@pytest.mark.slow
def test_the_best_of_n_is_as_good_as_theory_says():
    env = open_env(rows=16)
    for n in (1, 4):
        agent = BestOfNAgent(env, seed=1, n=n)
        found = evaluate(agent, env, 400, seed=0, prompts=[Prompt("a")])
        logprobs, rewards = every_text(open_env(), "a")
        order = np.argsort(rewards)
        reached = np.cumsum(np.exp(logprobs[order])) ** n  # P(the best of n is at most this one)
        expected = np.sum(rewards[order] * np.diff(reached, prepend=0.0))
        assert found.reward == pytest.approx(expected, abs=4 * found.rewards.std() / 20)
        assert found.kl is None


@pytest.mark.slow
def test_tree_search_with_many_simulations_writes_a_best_text():
    env = open_env()
    agent = MCTSAgent(env, seed=0, simulations=400)
    found = roll_out(agent, env, prompts_of(env), seed=0, deterministic=True)
    best = [every_text(env, prompt)[1].max() for prompt in toys.PROMPTS]
    np.testing.assert_allclose(found.rewards, best)


def test_tree_search_has_probabilities_of_what_is_legal():
    env = open_env(top_p=0.6)
    observation, _ = env.reset(seed=0)
    agent = MCTSAgent(env, seed=0, simulations=8)
    policy = agent.probabilities(observation)
    np.testing.assert_allclose(policy.sum(-1), 1)
    assert not policy[observation["action_mask"] == 0].any()
    assert not (policy * 8 % 1).any()  # shares of 8 simulations
    assert roll_out(agent, env, prompts_of(env), seed=0).kl is not None


@pytest.mark.parametrize("name", sorted(PLANNING_AGENTS))
def test_planning_leaves_the_environment_alone_and_repeats_itself(name):
    env = open_env(observation="full")
    observation, _ = env.reset(seed=0)
    held = {key: value.copy() for key, value in observation.items()}
    first, second = (PLANNING_AGENTS[name](env, seed=3).predict(observation)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    after, *_ = env.step(first)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(first)[0]["tokens"], after["tokens"])
    for key, value in held.items():
        np.testing.assert_array_equal(observation[key], value)


@pytest.mark.parametrize("name", sorted(PLANNING_AGENTS))
def test_a_text_begun_by_another_is_taken_up_where_it_stands(name):
    env = open_env()
    agent = PLANNING_AGENTS[name](env, seed=0)
    observation, _ = env.reset(seed=0)
    agent.predict(observation)
    off_plan, *_ = env.step(np.array([2, 2, 2]))  # hardly what was planned
    actions, state = agent.predict(off_plan)
    assert actions.shape == (3,)
    assert state is None
    single = {key: value[0] for key, value in off_plan.items()}
    assert agent.predict(single)[0].shape == ()


@pytest.mark.parametrize("keys", [(), ("score", "candidate_scores")])
def test_a_text_with_a_token_that_is_not_proposed_is_planned_from_as_it_stands(keys):
    """Near-ties of half precision: the list of candidates depends on the rows beside a text."""
    env = open_env(top_k=2)
    agent = PLANNING_AGENTS["best_of_n"](env, seed=0)
    episodes, row = agent._open(1, *keys), np.array([0])
    prompt = Prompt(toys.PROMPTS[0])
    episodes.begin(row, [prompt])
    listed = episodes.proposals(row).candidates[0].tolist()
    other = next(token for token in range(len(toys.TOKENS)) if token not in (*listed, *toys.letters().end_ids))
    text = (other, listed[0])
    agent._stand(episodes, row, [(prompt, text)])
    assert episodes.ids_of(0)[1] == list(text)
    assert episodes.text_of(0) == toys.letters().decode(list(text))


@pytest.mark.parametrize("name", sorted(PLANNING_AGENTS))
def test_the_whole_vocabulary_can_be_searched(name):
    env = open_env(top_k=None)
    agent = PLANNING_AGENTS[name](env, seed=0)
    greedy = roll_out(agent, env, prompts_of(env), seed=0, deterministic=True)
    assert greedy.reward > 1.5  # the language model's is 0.9


def test_the_tokens_of_a_search_are_counted():
    env = open_env(min_new_tokens=4)
    agent = BestOfNAgent(env, seed=0, n=5)
    evaluate(agent, env, 8, seed=0)
    assert agent.tokens_used == 8 * 5 * 4
    beam = BeamAgent(env, width=2)
    roll_out(beam, env, [Prompt("a")], seed=0)
    assert beam.tokens_used == 2 * 4


def test_references_of_the_prompts_reach_the_search():
    class Wanted(Reward):
        name = "wanted"

        def __call__(self, generations):
            return np.array([float(g.completion.startswith(g.reference)) for g in generations])

    env = open_env(reward=Wanted(), rows=2, min_new_tokens=4)
    prompts = [Prompt("a", reference="b"), Prompt("b", reference="ab")]
    assert roll_out(BestOfNAgent(env, seed=0, n=32), env, prompts, seed=0).reward == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda env: BestOfNAgent(env, n=0), "n must be a whole number of at least 1, got 0"),
        (lambda env: BeamAgent(env, width=0), "width must be"),
        (lambda env: BeamAgent(env, beta=0), "beta must be above 0"),
        (lambda env: MCTSAgent(env, simulations=0), "simulations must be"),
        (lambda env: MCTSAgent(env, exploration=0), "exploration must be above 0"),
        (lambda env: BeamAgent(env).predict({"tokens": 0}), "needs the observation key 'length'"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make(open_env())


def test_a_prompt_that_cannot_be_told_from_its_text_is_refused():
    env = open_env()
    observation, _ = env.reset(seed=0)
    observation["tokens"][0, :2], observation["length"][0] = [0, 1], 2  # "a", "b": the text "ab" is one token
    with pytest.raises(ConfigError, match="does not give the same tokens"):
        BestOfNAgent(env, n=2).predict(observation)
