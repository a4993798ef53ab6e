"""Training the extractor's transformer: where it starts, what moves, what stays, what is stored once."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import gymnasium as gym
import pytest
import torch
from stable_baselines3 import DQN, PPO
from toys import Worth
from transformers import GPT2Config, GPT2LMHeadModel

import textgen_env  # noqa: F401  (registers the environment)
from agents.extractor import PrunedTransformerExtractor
from agents.pruning.model import PrunedTransformerModel
from agents.sb3_vec import SB3VecEnv
from textgen_env.errors import ConfigError

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="LoRA needs peft")
LORA = pytest.param("lora", marks=needs_peft)
MODES = (True, LORA, "last_layers")


@pytest.fixture
def backbone(tiny_lm):
    return PrunedTransformerModel(tiny_lm[0], pruning_amount=0.0, tokenizer=tiny_lm[1])


@pytest.fixture
def env(tiny_lm):
    return gym.make_vec(
        "TextGen-v0",
        num_envs=4,
        model=tiny_lm,
        prompts=["the film was", "good"],
        reward=Worth(),
        top_k=4,
        max_new_tokens=4,
        max_prompt_tokens=4,
        observation="full",
        dtype="float32",
    )


def features_of(env, backbone, trainable, **settings):
    """An extractor, and the observation of four prefixes."""
    observation, _ = env.reset(seed=0)
    space = env.single_observation_space
    extractor = PrunedTransformerExtractor(space, "tokens", model=backbone, trainable=trainable, **settings)
    return extractor, {key: torch.from_numpy(value) for key, value in observation.items()}


def agent_of(kind, env, backbone, trainable, **settings):
    kwargs = {
        "features_extractor_class": PrunedTransformerExtractor,
        "features_extractor_kwargs": {
            "source": "tokens",
            "model": backbone,
            "trainable": trainable,
            "last_layers": 1,
        },
    }
    return kind("MultiInputPolicy", SB3VecEnv(env), gamma=1.0, policy_kwargs=kwargs, seed=0, **settings)


def dqn(env, backbone, trainable):
    own = {"learning_starts": 8, "buffer_size": 200, "learning_rate": 1e-2, "target_update_interval": 40}
    return agent_of(DQN, env, backbone, trainable, **own)


def names(extractor):
    return [name.replace("/", ".") for name in extractor.trained]


@pytest.mark.parametrize("trainable", MODES)
def test_training_starts_at_the_frozen_features(env, backbone, trainable):
    frozen, observation = features_of(env, backbone, False)
    trained, _ = features_of(env, backbone, trainable)
    # To rounding: matrix products sum in an order that depends on where in memory their arguments lie.
    torch.testing.assert_close(trained(observation), frozen(observation), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trainable", MODES)
def test_gradients_reach_what_is_trained_and_nothing_else(env, backbone, trainable):
    extractor, observation = features_of(env, backbone, trainable, last_layers=1)
    features = extractor(observation)
    (features * torch.linspace(-1, 1, features.shape[1])).sum().backward()

    reached = {name for name, p in extractor.transformer.named_parameters() if p.grad is not None}
    expected = {
        True: {name for name, _ in backbone.named_parameters() if "lm_head" not in name},
        "lora": {name for name, _ in extractor.transformer.named_parameters() if "lora_" in name},
        "last_layers": {name for name, _ in backbone.named_parameters() if ".layers.1." in name},
    }[trainable]
    assert reached == expected == set(names(extractor))
    assert any(p.grad.abs().max() > 1e-6 for p in extractor.trained.values())
    assert all(p.grad is None and p.requires_grad for p in backbone.parameters())  # as it was given


@pytest.mark.parametrize("trainable", [LORA, "last_layers"])
def test_frozen_weights_are_stored_once_and_stay_as_they_were(env, backbone, trainable):
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    agent = dqn(env, backbone, trainable)
    online, target = (net.features_extractor for net in (agent.q_net, agent.q_net_target))
    start = [p.detach().clone() for p in online.trained.values()]
    agent.learn(100)

    for name, p in backbone.named_parameters():
        assert torch.equal(p, before[name]), name
    given = {p.data_ptr() for p in backbone.parameters()}
    for extractor in (online, target):
        own = [p.data_ptr() for p in extractor.transformer.parameters() if p.data_ptr() not in given]
        assert own == [p.data_ptr() for p in extractor.transformer.parameters() if p.requires_grad]
        assert sorted(own) == sorted(p.data_ptr() for p in extractor.trained.values())
    assert not {p.data_ptr() for p in online.trained.values()} & {p.data_ptr() for p in target.trained.values()}
    assert any(not torch.equal(p, q) for p, q in zip(start, online.trained.values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("trainable", MODES)
def test_the_target_follows_the_trained_weights(env, backbone, trainable):
    agent = dqn(env, backbone, trainable)
    online, target = (net.features_extractor for net in (agent.q_net, agent.q_net_target))
    observation, _ = agent.policy.obs_to_tensor(env.reset(seed=1)[0])
    agent.learn(72)

    assert not torch.equal(online(observation), target(observation))
    agent._n_calls = 40 // 4 - 1  # the next step of the four rows is due for an update
    agent._on_step()
    assert torch.equal(online(observation), target(observation))


@pytest.mark.parametrize("trainable", MODES)
def test_a_saved_agent_brings_its_trained_weights_back(env, backbone, trainable, tmp_path):
    agent = dqn(env, backbone, trainable)
    agent.learn(60)
    observation, _ = agent.policy.obs_to_tensor(env.reset(seed=1)[0])
    agent.save(tmp_path / "agent")
    again = DQN.load(tmp_path / "agent", env=SB3VecEnv(env))

    assert torch.equal(agent.q_net(observation), again.q_net(observation))
    saved = {name for name in agent.policy.state_dict() if "features_extractor" in name}
    assert len(saved) == 2 * len(agent.q_net.features_extractor.trained)  # online and target, nothing frozen


@pytest.mark.parametrize("trainable", MODES)
def test_ppo_does_not_initialise_a_pretrained_transformer_anew(env, backbone, trainable):
    frozen, observation = features_of(env, backbone, False)
    agent = agent_of(PPO, env, backbone, trainable, n_steps=8, batch_size=16, n_epochs=1)
    torch.testing.assert_close(agent.policy.features_extractor(observation), frozen(observation), atol=1e-5, rtol=0)
    agent.learn(32)
    assert not torch.equal(agent.policy.features_extractor(observation), frozen(observation))


@needs_peft
def test_lora_reaches_the_linear_layers_of_gpt2(env):
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=16, n_positions=32)
    gpt2 = PrunedTransformerModel(GPT2LMHeadModel(config).eval(), pruning_amount=0.0)
    extractor, observation = features_of(env, gpt2, "lora", lora_rank=3)
    frozen, _ = features_of(env, gpt2, False)
    torch.testing.assert_close(extractor(observation), frozen(observation), atol=1e-5, rtol=0)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names(extractor) == [
        f"model.transformer.h.{i}.{layer}.lora_{m}.default.weight" for i in range(2) for layer in layers for m in "AB"
    ]
    assert {min(p.shape) for p in extractor.trained.values()} == {3}


def test_what_cannot_be_trained_is_said(env, backbone, monkeypatch):
    with pytest.raises(ConfigError, match=r"last_layers must be at most 2.*got 3"):
        features_of(env, backbone, "last_layers", last_layers=3)
    with pytest.raises(ConfigError, match="lora_rank must be"):
        features_of(env, backbone, "lora", lora_rank=0)
    with pytest.raises(ConfigError, match="trainable must be one of"):
        features_of(env, backbone, "all")
    with pytest.raises(ConfigError, match="needs source='tokens'"):
        PrunedTransformerExtractor(env.single_observation_space, trainable="lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'textgen-env\[lora\]'"):
        features_of(env, backbone, "lora")
