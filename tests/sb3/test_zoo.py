"""Agents by name: all of them on one small environment, and names that mean nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import toys

from agents.baselines.particles import ParticlesAgent
from agents.zoo import AGENTS, MASK_AWARE, Budget, acts_greedily, agent_names, env_settings, find_agent, make_agent
from textgen_env.errors import ConfigError
from textgen_env.evaluation import evaluate
from textgen_env.vector_env import TextGenVectorEnv

BUDGET = Budget(steps=64, envs=4, max_new_tokens=4)


def open_env(**settings):
    size = {"top_k": 4, "top_p": 0.8, "max_new_tokens": 4, "max_prompt_tokens": 4}
    return TextGenVectorEnv(4, toys.letters(), toys.PROMPTS, toys.Worth(), **size, **settings)


@pytest.mark.parametrize("name", [*agent_names(), "my_agents:Likeliest"])
def test_every_agent_learns_if_it_can_and_writes(name):
    if name in ("qrdqn", "maskable_ppo"):
        pytest.importorskip("sb3_contrib")
    env = open_env(**env_settings(name))
    agent = make_agent(name, env, 0, BUDGET)
    assert hasattr(agent, "learn") == (name in (*AGENTS, "text_dqn_particles"))
    if hasattr(agent, "learn"):
        agent.learn(BUDGET.steps)
    texts = evaluate(agent, env, 8, seed=0, deterministic=acts_greedily(name, agent))
    assert len(texts.completions) == 8
    assert (texts.kl is None) == (name in ("best_of_n", "guided_best_of_n", "particles", "text_dqn_particles"))


def test_particles_that_learn_are_particles_with_the_values_of_text_dqn():
    name, settings = "text_dqn_particles", {"n": 2, "beta": 0.2, "learning_starts": 16}
    env = open_env(**env_settings(name))

    def written(agent):
        return evaluate(agent, env, 8, seed=0).completions

    agent = make_agent(name, env, 3, BUDGET, settings)
    assert written(agent) == written(ParticlesAgent(env, 3, n=2, values="zero", beta=0.2))
    agent.learn(BUDGET.steps)
    learner = make_agent("text_dqn", env, 3, replace(BUDGET, beta=0.2), {"learning_starts": 16}).learn(BUDGET.steps)
    assert learner.learner.updates > 0
    spent, texts = agent.tokens_used, written(agent)
    assert texts == written(ParticlesAgent(env, 3, n=2, values=learner, pick="best"))
    assert 8 * 2 <= agent.tokens_used - spent <= 8 * 2 * 4


@pytest.mark.parametrize("name", ["lookahead", "beam", "particles", "text_dqn_particles"])
def test_agents_with_a_price_of_kl_are_told_it(name):
    agent = make_agent(name, open_env(**env_settings(name)), 0, replace(BUDGET, beta=0.3))
    assert agent.beta == 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "maskable_ppo"])
def test_what_an_actor_says_of_its_policy_is_what_is_played(name):
    pytest.importorskip("sb3_contrib")
    env = open_env(**env_settings(name))
    agent = make_agent(name, env, 0, BUDGET)
    observation, _ = env.reset(seed=0)
    policy = agent.probabilities(observation)
    assert not policy[observation["action_mask"] == 0].any()
    played = np.zeros_like(policy)
    draws = 400
    for _ in range(draws):
        actions, _ = agent.predict(observation)
        if name in MASK_AWARE:
            assert observation["action_mask"][np.arange(4), actions].all()
        played[np.arange(4), env.episodes.act(np.arange(4), actions).actions] += 1
        env.reset(seed=0)
    np.testing.assert_allclose(played / draws, policy, atol=0.12)  # 5 standard errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_dqnn", "Did you mean 'text_dqn'"),
        ("nowhere:agent", "names no module that can be imported"),
        ("toys:agent", "unknown name 'agent'"),
        ("toys:TABLE", "must be callable"),
    ],
)
def test_a_name_that_means_no_agent_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_agent(name)


def test_settings_that_an_agent_does_not_have_are_refused():
    with pytest.raises(ConfigError, match=r"'best_of_n' refuses its settings: .*'m'"):
        make_agent("best_of_n", open_env(), 0, BUDGET, {"m": 3})
