"""Stable-Baselines3 on the environment: the native vector as a VecEnv, and the features extractor."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from toys import PROMPTS, Worth, letters

import textgen_env  # noqa: F401  (registers the environment)
from agents.extractor import PrunedTransformerExtractor
from agents.pruning.model import PrunedTransformerModel
from agents.sb3_vec import SB3VecEnv
from textgen_env.errors import ConfigError, ModelError

TOY = {"prompts": PROMPTS, "reward": Worth(), "top_k": 4, "max_new_tokens": 4, "observation": "full"}


def test_the_adapter_equals_sb3s_own_list_of_single_environments():
    native = SB3VecEnv(gym.make_vec("TextGen-v0", num_envs=3, model=letters(), **TOY))
    singles = DummyVecEnv([lambda: Monitor(gym.make("TextGen-v0", model=letters(), **TOY)) for _ in range(3)])
    native.seed(5)
    singles.seed(5)
    rng = np.random.default_rng(0)

    def same(one, other):
        assert set(one) == set(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)

    same(native.reset(), singles.reset())
    ended = 0
    for _ in range(40):
        masks = native.action_masks()
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        got, expected = native.step(actions), singles.step(actions)
        same(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])
        np.testing.assert_array_equal(got[2], expected[2])
        for ours, theirs in zip(got[3], expected[3], strict=True):
            if "episode" in theirs:
                ended += 1
                same(ours.pop("terminal_observation"), theirs.pop("terminal_observation"))
                for name in ("r", "l"):
                    assert ours["episode"][name] == pytest.approx(theirs["episode"][name])
                del ours["episode"], theirs["episode"]
                assert ours == theirs
    assert ended > 10


def test_another_way_of_restarting_is_refused():
    env = gym.make_vec("TextGen-v0", num_envs=2, model=letters(), autoreset_mode=AutoresetMode.NEXT_STEP, **TOY)
    with pytest.raises(ConfigError, match="same step"):
        SB3VecEnv(env)


@pytest.mark.parametrize("kind", [DQN, PPO])
def test_sb3_agents_learn_on_the_vector_with_the_extractor(kind):
    env = SB3VecEnv(gym.make_vec("TextGen-v0", num_envs=4, model=letters(), on_illegal="last_legal", **TOY))
    features = {"features_extractor_class": PrunedTransformerExtractor}
    own = {"learning_starts": 16, "buffer_size": 400} if kind is DQN else {"n_steps": 16, "batch_size": 32}
    agent = kind("MultiInputPolicy", env, gamma=1.0, policy_kwargs=features, seed=0, **own)
    agent.learn(128)
    mean, _ = evaluate_policy(agent, env, n_eval_episodes=8)
    assert np.isfinite(mean)


def observations(tiny_lm, **settings):
    model, tokenizer = tiny_lm
    env = gym.make_vec(
        "TextGen-v0",
        num_envs=2,
        model=(model, tokenizer),
        prompts=["the film was", "good"],
        reward=Worth(),
        top_k=4,
        observation="full",
        dtype="float32",
        **settings,
    )
    observation, _ = env.reset(seed=0, options={"prompt": ["the film was", "good"]})
    return env, {key: torch.from_numpy(value) for key, value in observation.items()}


def test_both_sources_see_the_same_hidden_state(tiny_lm):
    """The environment's cached forward and the extractor's own one over the ids agree, padding or not."""
    env, observation = observations(tiny_lm)
    pruned = PrunedTransformerModel(tiny_lm[0], pruning_amount=0.0, tokenizer=tiny_lm[1])
    space = env.single_observation_space
    cached = PrunedTransformerExtractor(space, source="hidden")(observation)
    own = PrunedTransformerExtractor(space, source="tokens", model=pruned)
    np.testing.assert_allclose(own(observation).numpy(), cached.numpy(), atol=1e-4)
    np.testing.assert_array_equal(own(observation).numpy(), own(observation).numpy())  # the second from the memo
    assert own.features_dim == cached.shape[1] == 16 + 4 + 1 + 1


def test_a_frozen_transformer_is_shared_and_not_saved(tiny_lm, tmp_path):
    pruned = PrunedTransformerModel(tiny_lm[0], pruning_amount=0.0, tokenizer=tiny_lm[1])
    env, _ = observations(tiny_lm)
    features = {
        "features_extractor_class": PrunedTransformerExtractor,
        "features_extractor_kwargs": {"source": "tokens", "model": pruned},
    }
    before = [p.clone() for p in pruned.parameters()]
    agent = DQN("MultiInputPolicy", SB3VecEnv(env), buffer_size=200, learning_starts=8, policy_kwargs=features)
    agent.learn(64)

    online, target = (net.features_extractor.transformer for net in (agent.q_net, agent.q_net_target))
    assert online is target is pruned
    assert not any("transformer" in name for name in agent.policy.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(before, pruned.parameters(), strict=True))


def test_the_memo_is_bounded_and_runs_new_prefixes_only(tiny_lm, monkeypatch):
    pruned = PrunedTransformerModel(tiny_lm[0], pruning_amount=0.0, tokenizer=tiny_lm[1])
    env, _ = observations(tiny_lm)
    two_rows = 2 * 4 * 16  # bytes of two hidden states
    extractor = PrunedTransformerExtractor(env.single_observation_space, "tokens", pruned, memo_bytes=two_rows)
    rows = []
    run = extractor._run
    monkeypatch.setattr(extractor, "_run", lambda tokens, length: rows.append(len(tokens)) or run(tokens, length))
    prefixes = torch.arange(4)[:, None].expand(4, 8)
    for chosen in ([0, 1], [1, 0], [1, 2], [0, 2]):  # 0 is forgotten for 2
        extractor._remembered(prefixes[chosen], torch.full((2, 1), 3))
    assert rows == [2, 1, 1]


def test_an_extractor_says_what_it_lacks(tiny_lm):
    env, _ = observations(tiny_lm)
    space = env.single_observation_space
    without = gym.spaces.Dict({key: box for key, box in space.spaces.items() if key != "hidden"})
    with pytest.raises(ConfigError, match=r"hidden.*observation='full'"):
        PrunedTransformerExtractor(without)
    with pytest.raises(ConfigError, match="source must be"):
        PrunedTransformerExtractor(space, source="text")
    wide = gym.spaces.Dict({**space.spaces, "tokens": gym.spaces.Box(0, 10_000, (8,), np.int32)})
    pruned = PrunedTransformerModel(tiny_lm[0], pruning_amount=0.0, tokenizer=tiny_lm[1])
    with pytest.raises(ModelError, match="10001"):
        PrunedTransformerExtractor(wide, source="tokens", model=pruned)


def test_options_are_one_dict_a_row():
    env = SB3VecEnv(gym.make_vec("TextGen-v0", num_envs=3, model=letters(), prompts=["a"], reward=len, top_k=4))

    def prompts():
        env.reset()
        return [prompt.text for prompt in env.env.unwrapped.episodes.prompts_at(np.arange(3))]

    env.set_options([{"prompt": "b"}, {}, {"prompt": "ab"}])
    assert prompts() == ["b", "a", "ab"]
    assert prompts() == ["a", "a", "a"]  # options serve one reset
    env.set_options({"prompt": "b"})
    assert prompts() == ["b", "b", "b"]
    env.set_options({"prompt": ["b", "ab", "a"]})
    assert prompts() == ["b", "ab", "a"]
    env.set_options([{}, {"reset_mask": np.ones(3, bool)}, {}])
    with pytest.raises(ConfigError, match="reset_mask"):
        env.reset()
