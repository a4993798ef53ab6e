"""Texts that nobody judges: whole but for their ends, they cost no reward and carry back what is still to come."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from toys import PROMPTS, Worth, letters, worth

from agents.runs.checkpoint import load_checkpoint, save_checkpoint
from agents.runs.optimum import TextTree
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from agents.text_dqn.unjudged import UNJUDGED_ROWS, UnjudgedTexts
from textgen_env import TableModel, TextGenVectorEnv
from textgen_env.errors import CapacityError

LENGTH = 4


def make(num_envs=8, **settings):
    given = {"model": letters(), "prompts": PROMPTS, "reward": worth, "top_k": 4, "max_new_tokens": LENGTH}
    return gym.make_vec(
        "textgen_env:TextGen-v0", num_envs=num_envs, **{"observation": NEEDED_KEYS, **given, **settings}
    )


def agent_in(env, **settings):
    small = {"q_net_kwargs": {"heads": 1, "width": 32}}
    given = {"learning_starts": 0, "steps_per_update": 16, "buffer_size": 4_000, "batch_size": 16, "seed": 0}
    return TextDQN(env=env, **{"policy_kwargs": small, **given, **settings})


class CountedWorth(Worth):
    texts = 0

    def __call__(self, generations):
        self.texts += len(generations)
        return super().__call__(generations)

    def running(self):
        return None


@pytest.mark.slow
def test_the_reward_is_asked_about_judged_texts_alone():
    reward = CountedWorth()
    agent = agent_in(make(reward=reward), unjudged=3.0)
    agent.learn(800)
    learner = agent.learner
    assert learner.judge_calls == reward.texts == agent.replay_buffer.episodes_seen
    assert learner.steps == agent.num_timesteps == 800
    begun = 50 * LENGTH  # before so many texts nothing is learned from them
    assert 3 * (800 - begun) - UNJUDGED_ROWS * LENGTH * 2 < learner.unjudged_steps <= 3 * (800 - begun)


@pytest.mark.slow
def test_each_text_is_one_of_the_environment_without_its_last_action():
    env = make(4, stop=("b",))
    learner = agent_in(make()).learn(400).learner
    texts = UnjudgedTexts(env.unwrapped, "cpu")
    texts.write(learner, 1.0)
    assert texts.steps == 4 * LENGTH
    batch = texts.sample(64)
    assert not batch.ended.any()
    lengths = set()
    for i in range(64):
        acted = batch.acted[i].tolist()
        length = sum(acted)
        assert acted == [True] * length + [False] * (len(acted) - length)
        lengths.add(length)
        budget = batch.observations["budget"][i, : length + 1, 0]
        np.testing.assert_allclose(
            budget, 1 - np.arange(length + 1) / LENGTH
        )  # the state without action is stored, too
        taken = batch.observations["candidates"][i].gather(-1, batch.actions[i][:, None])[:, 0]
        assert taken[:length].tolist() == batch.tokens[i, :length].tolist()
    assert len(lengths) > 1  # stop strings, and texts begun after them


def test_what_is_written_depends_on_the_learner_alone():
    """A resumed run writes what the killed one would have written, whatever that one's caches held."""
    env = TextGenVectorEnv(8, "tiny", ["I am", "Good and bad"], worth, observation=NEEDED_KEYS, max_new_tokens=12)
    learner = agent_in(env).learner
    texts = UnjudgedTexts(env, "cpu")
    before = learner.rng.bit_generator.state
    written = []
    for _ in range(2):
        learner.rng.bit_generator.state = before
        texts.write(learner, 0.5)
        written.append(texts.sample(16))
        texts.write(learner, 0.5)
    first, second = written
    assert torch.equal(first.tokens, second.tokens)
    for key, value in first.observations.items():
        assert torch.equal(value, second.observations[key]), key


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_one_that_went_on(tmp_path):
    agent = agent_in(make()).learn(300)
    assert agent.learner.unjudged_steps > 0
    path = save_checkpoint(tmp_path, agent, {})
    agent.learn(200, reset_num_timesteps=False)
    other = agent_in(make(), seed=9)
    load_checkpoint(path, other)
    other.learn(200, reset_num_timesteps=False)
    assert agent.learner.counters() == other.learner.counters()
    for name, tensor in agent.policy.state_dict().items():
        assert torch.equal(tensor, other.policy.state_dict()[name]), name


@pytest.mark.slow
def test_texts_of_one_token_leave_the_weights_finite():
    """A stop string may end each of a few texts at once: cut, they have no action left."""
    agent = agent_in(make(stop=("a", "b", " ", ".")), batch_size=1, score="learned")
    agent.learn(400)
    assert agent.learner.unjudged_steps > 0
    assert all(torch.isfinite(weight).all() for weight in agent.q_net.parameters())


@pytest.mark.slow
def test_a_reward_that_is_paid_by_step_is_left_out_too():
    agent = agent_in(make(reward=Worth(), reward_at="step")).learn(600)
    assert agent.learner.unjudged_steps > 0


@pytest.mark.slow
def test_another_environment_brings_its_own_language_model():
    agent = agent_in(make()).learn(300)
    other = make()
    agent.set_env(other)
    agent.learn(100, reset_num_timesteps=False)
    assert agent._unjudged is not None
    assert agent._unjudged._env.language_model is other.unwrapped.language_model


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_update", [16, 80, 400])
def test_updates_are_as_many_as_their_rule_says(steps_per_update):
    steps = 800 + 4 * steps_per_update
    learner = agent_in(make(), steps_per_update=steps_per_update).learn(steps).learner
    rest = steps - learner.unjudged_steps / 4  # steps before there were learned scores, and less than a write
    expected = steps * learner.updates_per_step - rest / steps_per_update
    assert learner.updates == pytest.approx(expected, abs=4)


def positions(ids):
    """Hidden states that tell every text of up to four tokens apart: one-hot by position."""
    hidden = np.zeros((4, 3), np.float32)
    hidden[np.arange(len(ids)) % 4, ids] = 1.0
    return hidden.ravel()


@pytest.mark.slow
def test_they_carry_back_what_the_last_tokens_are_worth():
    """Q of every prefix becomes the soft value of what follows, the last step's as it is: an enumeration says so."""
    model = TableModel(["a", "b", "c"], [0.5, 0.3, 0.2], end=None, features=positions)
    settings = {
        "model": model, "prompts": ["c"], "top_k": 3, "max_new_tokens": 3, "reward": lambda text: float(text == "bca"),
    }  # fmt: skip
    network = {"q_net_kwargs": {"dropout": 0.0, "heads": 1, "width": 64}, "optimizer_kwargs": {"weight_decay": 0.0}}
    agent = agent_in(
        make(32, **settings), beta=0.5, unjudged=0.0, learning_rate=3e-3, tau=0.1, policy_kwargs=network
    ).learn(400)
    learner, texts = agent.learner, UnjudgedTexts(make(32, **settings).unwrapped, "cpu")
    toy = TextTree(make(1, **settings).unwrapped, "c")
    inner = toy.child >= 0

    def gaps():
        q = learner.q(toy.observations)
        values = 0.5 * np.logaddexp.reduce(toy.log_mu + q / 0.5, axis=1)
        return np.abs(q - values[toy.child])[inner].max()

    before = gaps()
    for _ in range(20):
        texts.write(learner, 0.0)
        learner.update(10, offline=True, texts=texts)
    assert gaps() < 0.02 < before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_env", "of_agent"),
    [
        ({}, {"unjudged": 0.0}),
        ({}, {"target": "residual"}),  # it needs whole texts
        ({"prompts": lambda rng: "a"}, {}),  # its prompts may have an order, or an end
        ({"max_new_tokens": 1}, {}),  # nothing is left of one when it is cut
        ({"partner": lambda talk: " b", "max_turns": 2, "max_new_tokens": 2}, {}),
    ],
)
def test_none_are_written_where_they_could_teach_nothing(of_env, of_agent):
    env = make(**({"observation": "full"} | of_env if of_env else {}))
    agent = agent_in(env, score="learned", **of_agent).learn(500)
    assert agent.learner.scorer_r2 > 0
    assert agent.learner.unjudged_steps == 0


@pytest.mark.slow
def test_rows_that_do_not_fit_say_how_to_do_without(monkeypatch):
    agent = agent_in(make())

    def full(*args, **settings):
        raise CapacityError(f"{settings['rows']} rows of 9 tokens need 2 bytes and 1 are free: use fewer rows")

    monkeypatch.setattr("agents.text_dqn.agent.env_to_write_in", full)
    with pytest.raises(CapacityError, match=r"unjudged texts, 64 at a time: 64 rows .* or set unjudged=0"):
        agent.learn(1_000)


def test_none_are_written_beside_scores_that_are_given():
    agent = agent_in(make(reward=Worth(), observation="full")).learn(400)
    assert agent.learner.unjudged_steps == agent.learner.unjudged_owed == 0
