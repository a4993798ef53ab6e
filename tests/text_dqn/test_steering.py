"""The trained Q inside ``model.generate`` does what it does in the environment."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import WORDS
from toys import Worth
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from textgen_env.errors import ConfigError, ModelError
from textgen_env.models.device import forward_lock

SCORES = ("score", "candidate_scores")
TEXTS = ["the film was long and", "good", "bad . the", "long film ."]


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_lm):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.6,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval(), tiny_lm[1]


@pytest.fixture(params=["tiny_lm", "tiny_gpt2"])
def pair(request):
    return request.getfixturevalue(request.param)


def vector_env(pair, keys=NEEDED_KEYS, **settings):
    settings = {"top_k": 4, "max_new_tokens": 6, "max_prompt_tokens": 8, "reward": Worth()} | settings
    return gym.make_vec("TextGen-v0", num_envs=len(TEXTS), model=pair, prompts=TEXTS, observation=keys, **settings)


def trained(env, beta=0.3):
    """An agent whose values depend on everything it sees."""
    agent = TextDQN("CandidatePolicy", env, beta=beta, buffer_size=64, seed=0)
    torch.manual_seed(0)
    for head in agent.q_net_target.heads:
        torch.nn.init.normal_(head.value.weight, std=0.5)
    return agent


def padding(tokenizer):
    """Return a copy that pads with the token that ends a text: tests share the tokenizer."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def batch(tokenizer):
    """The prompts, padded on the left with the very token that ends a text."""
    tokenizer = padding(tokenizer)
    return dict(tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False))


def steered(agent, pair, reward=None, **settings):
    model, tokenizer = pair
    inputs = batch(tokenizer)
    with agent.logits_processor(model, reward=reward) as steer:
        found = model.generate(
            **inputs,
            logits_processor=[steer],
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **(steer.settings | settings),
        )
    return found.sequences[:, inputs["input_ids"].shape[1] :].numpy(), [s.softmax(-1).numpy() for s in found.scores]


def until_end(ids):
    ids = ids.tolist()
    return ids[: ids.index(0) + 1] if 0 in ids else ids


CASES = [
    {},
    {"min_new_tokens": 3, "top_p": 0.8},
    {"keys": NEEDED_KEYS + SCORES, "min_new_tokens": 2},
    {"keys": (*NEEDED_KEYS, "score")},
]


@pytest.mark.parametrize("case", CASES, ids=["plain", "nucleus", "scores", "score"])
def test_greedy_generation_writes_the_environment_s_tokens(pair, case):
    env = vector_env(pair, **case)
    agent = trained(env)
    observation, _ = env.reset(options={"prompt": TEXTS})
    expected, live = [[] for _ in TEXTS], np.ones(len(TEXTS), bool)
    while live.any():
        actions, _ = agent.predict(observation, deterministic=True)
        for row in np.flatnonzero(live):
            expected[row].append(int(observation["candidates"][row, actions[row]]))
        observation, _, ended, *_ = env.step(actions)
        live &= ~ended

    ids, _ = steered(agent, pair, env.episodes.reward, do_sample=False)

    assert [until_end(row) for row in ids] == expected
    assert len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize("case", CASES, ids=["plain", "nucleus", "scores", "score"])
def test_sampling_has_the_environment_s_probabilities(pair, case):
    env = vector_env(pair, **case)
    agent = trained(env)
    torch.manual_seed(3)
    ids, found = steered(agent, pair, env.episodes.reward)
    observation, _ = env.reset(options={"prompt": TEXTS})
    live, compared = np.ones(len(TEXTS), bool), 0
    for step, row_probabilities in enumerate(found):
        expected = np.zeros_like(row_probabilities)
        np.put_along_axis(expected, observation["candidates"].astype(int), agent.probabilities(observation), -1)
        np.testing.assert_allclose(row_probabilities[live], expected[live], atol=1e-4)
        compared += live.sum()
        actions = (observation["candidates"] == ids[:, step, None]).argmax(-1)
        observation, _, ended, *_ = env.step(np.where(live, actions, env.action_masks().argmax(-1)))
        live &= ~ended
    assert compared >= 8


def test_the_agent_makes_a_difference_and_beta_says_how_much(tiny_lm):
    agent = trained(vector_env(tiny_lm))
    texts = []
    for beta in (100.0, 0.05):
        agent.beta = beta
        texts.append(steered(agent, tiny_lm, do_sample=False)[0].tolist())
    assert texts[0] != texts[1]


def test_a_second_generation_in_the_same_block_starts_afresh(tiny_lm):
    model, tokenizer = tiny_lm
    agent = trained(vector_env(tiny_lm, keys=NEEDED_KEYS + SCORES))
    once = steered(agent, tiny_lm, Worth(), do_sample=False)[0]
    with agent.logits_processor(model, reward=Worth()) as steer:
        settings = steer.settings | {"do_sample": False, "pad_token_id": 0, "logits_processor": [steer]}
        for _ in range(2):
            inputs = batch(tokenizer)
            ids = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
            np.testing.assert_array_equal(ids.numpy(), once)


def test_there_is_one_forward_a_token_and_the_model_is_left_as_it_was(tiny_lm):
    model, _ = tiny_lm
    agent = trained(vector_env(tiny_lm, min_new_tokens=6))
    forwards = []
    count = model.register_forward_hook(lambda *_: forwards.append(1))
    steered(agent, tiny_lm)
    count.remove()
    assert len(forwards) == 6
    assert "generate" not in model.__dict__
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_another_budget_than_in_training_is_told_to_the_network(tiny_lm):
    """An agent for texts of 3 tokens, made of the same weights, must do the same as one of 6 told of 3."""
    six, three = (trained(vector_env(tiny_lm, max_new_tokens=m)) for m in (6, 3))
    model, tokenizer = tiny_lm
    texts = []
    for agent in (six, three):
        with agent.logits_processor(model, max_new_tokens=3) as steer:
            settings = steer.settings | {"do_sample": False, "pad_token_id": 0}
            texts.append(model.generate(**batch(tokenizer), logits_processor=[steer], **settings).tolist())
    assert texts[0] == texts[1]


def test_texts_may_be_longer_than_in_training_where_scores_are_given(tiny_lm):
    agent = trained(vector_env(tiny_lm, keys=NEEDED_KEYS + SCORES, max_new_tokens=3))
    model, tokenizer = tiny_lm
    with agent.logits_processor(model, max_new_tokens=7, reward=Worth()) as steer:
        settings = steer.settings | {"pad_token_id": 0, "min_new_tokens": 7}
        found = model.generate(**batch(tokenizer), logits_processor=[steer], **settings)
    assert found.shape[1] == batch(tokenizer)["input_ids"].shape[1] + 7


def sliding():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
    config = Gemma3TextConfig(
        vocab_size=len(WORDS), num_key_value_heads=2, head_dim=8, sliding_window=32, **sizes, **ends
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["plain", "sliding"])
def test_a_static_cache_writes_the_same_tokens(tiny_lm, kind):
    pair = tiny_lm if kind == "plain" else (sliding(), tiny_lm[1])
    agent = trained(vector_env(pair))
    static = {"cache_implementation": "static", "disable_compile": True}
    found, expected = (steered(agent, pair, do_sample=False, **cache)[0] for cache in (static, {}))
    np.testing.assert_array_equal(found, expected)


def test_classifier_free_guidance_is_refused(tiny_lm):
    with pytest.raises(ConfigError, match="guidance_scale"):
        steered(trained(vector_env(tiny_lm)), tiny_lm, guidance_scale=2.0)


@pytest.mark.parametrize("how", ["argument", "config", "positional"])
def test_beam_search_is_refused(tiny_lm, how):
    from transformers import GenerationConfig

    model, tokenizer = tiny_lm
    inputs, beams = batch(tokenizer), GenerationConfig(num_beams=2, max_new_tokens=4, eos_token_id=0, pad_token_id=0)
    short = {"num_beams": 2, "max_new_tokens": 4}
    asked = {
        "argument": lambda steer: model.generate(**inputs, logits_processor=[steer], **short),
        "config": lambda steer: model.generate(**inputs, logits_processor=[steer], generation_config=beams),
        "positional": lambda steer: model.generate(inputs["input_ids"], beams, logits_processor=[steer]),
    }
    with trained(vector_env(tiny_lm)).logits_processor(model) as steer:
        with pytest.raises(ConfigError, match="beam search"):
            asked[how](steer)
        with pytest.raises(ConfigError, match="beam search"):
            type(model).generate(model, **inputs, logits_processor=[steer], **short)


@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_generation_is_refused(pair, how):
    model, tokenizer = pair
    one = tokenizer(["the film was the film was the film"], return_tensors="pt", return_token_type_ids=False)
    assisted = {how: model if how == "assistant_model" else 2}
    with trained(vector_env(pair)).logits_processor(model) as steer, pytest.raises(ConfigError, match="assisted"):
        model.generate(**one, logits_processor=[steer], **steer.settings, **assisted, pad_token_id=0)


def test_the_model_s_own_functions_stay_what_they_are(pair):
    model, _ = pair
    before = dict(vars(model))
    with trained(vector_env(pair)).logits_processor(model):
        assert "generate" not in vars(model)
        assert vars(model).keys() == before.keys()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_text_that_goes_on_from_the_last_one_is_a_new_text(pair):
    """By its ids alone it would look like the next step: the caches tell."""
    model, tokenizer = pair
    inputs = batch(tokenizer)
    agent = trained(vector_env(pair))
    with agent.logits_processor(model) as steer:
        greedy = {**steer.settings, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        first = model.generate(**inputs, logits_processor=[steer], **greedy)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(first), 6, dtype=torch.long)], 1)
        again = {"inputs": first, "attention_mask": mask}
        second = model.generate(**again, logits_processor=[steer], **greedy)
    with agent.logits_processor(model) as fresh:
        np.testing.assert_array_equal(second, model.generate(**again, logits_processor=[fresh], **greedy))
    with agent.logits_processor(model) as steer, pytest.raises(ConfigError, match="use_cache=False"):
        model.generate(**inputs, logits_processor=[steer], **greedy, use_cache=False)


@pytest.mark.slow
def test_one_steering_in_two_threads_writes_what_it_writes_alone(pair):
    model, tokenizer = pair
    inputs = batch(tokenizer)
    with trained(vector_env(pair)).logits_processor(model) as steer:
        greedy = {**steer.settings, "do_sample": False, "pad_token_id": 0}

        def write(row):
            one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            return model.generate(**one, logits_processor=[steer], **greedy).tolist()

        expected = [write(row) for row in range(len(TEXTS))]
        with ThreadPoolExecutor(4) as threads:
            for _ in range(3):
                assert list(threads.map(write, range(len(TEXTS)))) == expected


def test_a_forward_that_raises_leaves_no_lock(pair):
    model, _ = pair
    with trained(vector_env(pair)).logits_processor(model):
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=torch.tensor([[10**6]]))

        def takes_turns():
            lock = forward_lock(model)
            taken = lock.acquire(timeout=10)
            if taken:
                lock.release()
            return taken

        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(takes_turns).result()


def test_what_cannot_be_steered_is_refused_with_the_way_out(tiny_lm, tiny_gpt2):
    model, tokenizer = tiny_lm
    agent = trained(vector_env(tiny_lm))
    with pytest.raises(ModelError, match="not the agent's language model"):
        agent.logits_processor(tiny_gpt2[0])
    with pytest.raises(ModelError, match="causal language model"):
        agent.logits_processor(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="max_new_tokens must be"):
        agent.logits_processor(model, max_new_tokens=0)
    scoring = TextDQN("CandidatePolicy", vector_env(tiny_lm, reward=len), buffer_size=64)
    scoring.logits_processor(model, max_new_tokens=6)
    with pytest.raises(ConfigError, match=r"max_new_tokens must be at most 6, as in training, got 7"):
        scoring.logits_processor(model, max_new_tokens=7)
    with agent.logits_processor(model) as steer, pytest.raises(ConfigError, match="same max_new_tokens"):
        model.generate(
            **batch(tokenizer),
            logits_processor=[steer],
            min_new_tokens=7,
            max_new_tokens=7,
            do_sample=True,
            pad_token_id=0,
        )
    with pytest.raises(ConfigError, match="not the one given"):
        model.generate(**batch(tokenizer), logits_processor=[steer], max_new_tokens=2, pad_token_id=0)
    scored = trained(vector_env(tiny_lm, keys=NEEDED_KEYS + SCORES))
    with pytest.raises(ConfigError, match=r"logits_processor\(model, reward=\.\.\.\)"):
        scored.logits_processor(model)
    with pytest.raises(ConfigError, match="cannot score a prefix"):
        scored.logits_processor(model, reward=len)


def test_a_reward_by_name_is_known_to_the_agent(tiny_lm):
    agent = trained(vector_env(tiny_lm, keys=NEEDED_KEYS + SCORES, reward="sentiment"))
    stored, given = (steered(agent, tiny_lm, reward, do_sample=False)[0] for reward in (None, "sentiment"))
    np.testing.assert_array_equal(stored, given)


@pytest.mark.slow
def test_smollm2_writes_the_environment_s_tokens():
    """In float32, greedily, with scores seen: 4 prompts, 12 tokens."""
    env = vector_env("smollm2", NEEDED_KEYS + SCORES, reward="sentiment", top_k=16, max_new_tokens=12, dtype="float32")
    model, tokenizer = env.language_model.model, env.language_model.tokenizer
    agent = trained(env, beta=0.5)
    observation, _ = env.reset(options={"prompt": TEXTS})
    expected = []
    for _ in range(12):
        actions, _ = agent.predict(observation, deterministic=True)
        expected.append(observation["candidates"][np.arange(4), actions])
        observation, *_ = env.step(actions)
    tokenizer = padding(tokenizer)
    inputs = tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt")
    with agent.logits_processor(model) as steer:
        ids = model.generate(**inputs, logits_processor=[steer], **(steer.settings | {"do_sample": False}))
    new = ids[:, inputs["input_ids"].shape[1] :].numpy()
    for row, tokens in zip(new, np.stack(expected, 1), strict=True):
        end = next((i + 1 for i, t in enumerate(tokens) if t in env.language_model.end_ids), 12)
        np.testing.assert_array_equal(row[:end], tokens[:end])
