"""One model with several owners: threads, forks, somebody who trains it, a folder that is saved again."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from textgen_env.models import load_language_model
from textgen_env.models.hf import HFModel

PROMPTS = ["the film", "the long film was", "good"]
SIZES = {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.6}


def gpt2(seed=0, **settings):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SIZES, **settings)).eval()


def make(model, **settings):
    settings = {"prompts": PROMPTS, "reward": len, "top_k": 5, "max_new_tokens": 12, "max_prompt_tokens": 8} | settings
    return gym.make("textgen_env:TextGen-v0", model=model, **settings)


def course(model, seed, steps=40):
    """The log-probabilities that one environment shows along random actions."""
    env, rng = make(model), np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    seen = [observation["logprobs"]]
    for _ in range(steps):
        observation, _, ended, _, _ = env.step(int(rng.integers(5)))
        if ended:
            observation, _ = env.reset()
        seen.append(observation["logprobs"])
    return np.array(seen)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", ["once", "by each thread"])
def test_two_threads_on_one_model_see_what_each_sees_alone(tiny_lm, wrapped):
    pair = (gpt2(), tiny_lm[1])  # a hook on its head hands the hidden states over
    shared = load_language_model(pair) if wrapped == "once" else pair
    alone = [course(shared, seed) for seed in (0, 1)]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda seed: course(shared, seed), (0, 1)))
        for seed in (0, 1):
            np.testing.assert_allclose(found[seed], alone[seed], atol=1e-4)


def test_an_owner_who_trains_the_model_changes_no_environment_and_keeps_the_mode(tiny_lm):
    model = gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    language_model = load_language_model((model, tiny_lm[1]))
    before = course(language_model, 0)
    model.train()
    model.transformer.h[0].eval()  # a frozen part
    np.testing.assert_array_equal(course(language_model, 0), before)
    assert model.training
    assert model.transformer.h[1].training
    assert not model.transformer.h[0].training


@pytest.mark.slow
def test_weights_that_change_while_their_owner_trains_are_checked_without_dropout(tiny_lm):
    model = gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    language_model = load_language_model((model, tiny_lm[1]))
    course(language_model, 0)
    model.train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    found = course(language_model, 0)
    assert model.training
    np.testing.assert_array_equal(found, course(load_language_model((model.eval(), tiny_lm[1])), 0))


FORK = """
import gymnasium as gym, numpy as np, torch
torch.set_num_threads(2)
env = gym.make_vec("textgen_env:TextGen-v0", num_envs=64, max_new_tokens=4)
env.reset(seed=0)
torch.randn(512, 512) @ torch.randn(512, 512)  # the pool of threads is up
make = lambda: gym.make("textgen_env:TextGen-v0", max_new_tokens=4)
forked = gym.vector.AsyncVectorEnv([make] * 2, context="fork")
observation, _ = forked.reset(seed=0)
for _ in range(3):
    forked.step(np.zeros(2, int))
forked.close()
print(observation["tokens"].shape[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_workers_step_after_a_forward_in_their_parent():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "2", run.stderr


def test_a_folder_that_is_saved_again_and_a_relative_name_elsewhere_are_other_models(tiny_lm, tmp_path, monkeypatch):
    def saved(folder: Path, seed: int) -> None:
        gpt2(seed).save_pretrained(folder)
        tiny_lm[1].save_pretrained(folder)

    saved(tmp_path / "m", 1)
    first = load_language_model(str(tmp_path / "m"))
    assert load_language_model(tmp_path / "m") is first
    saved(tmp_path / "m", 2)
    again = load_language_model(str(tmp_path / "m"))
    assert not np.allclose(first.embed(np.arange(10)), again.embed(np.arange(10)))
    saved(tmp_path / "elsewhere" / "m", 3)
    monkeypatch.chdir(tmp_path)
    assert load_language_model("m") is again
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert not np.allclose(load_language_model("m").embed(np.arange(10)), again.embed(np.arange(10)))


def test_an_end_token_that_the_tokenizer_appends_does_not_end_the_prompt(tiny_lm):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_lm[1].backend_tokenizer, eos_token="<end>")
    plain = HFModel(gpt2(), tokenizer).encode("the film")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    assert tokenizer("the film")["input_ids"] == [*plain, 0]
    assert HFModel(gpt2(), tokenizer).encode("the film") == plain
    tokenizer.backend_tokenizer.post_processor = None


def test_special_tokens_without_a_name_are_not_written():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(text, special=True) for text in ("<|end|>", "<|header|>")])
    plain.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>")
    header, tool = tokenizer.convert_tokens_to_ids(["<|header|>", "<tool>"])
    model = HFModel(GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)), tokenizer)
    ids = model.encode("ab")
    assert header not in tokenizer.all_special_ids
    assert model.continuations([], ids, [header, tool]) == ["ab", "ab<tool>"]
    assert [model.decode([*ids, token]) for token in (header, tool)] == ["ab", "ab<tool>"]
    assert model.extended("ab", header) == "ab"


def local_attention():
    """Layers that see 8 tokens, under a name of their own."""
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 8, "max_position_embeddings": 64}
    layers = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(GPTNeoConfig(attention_types=layers, intermediate_size=32, **sizes, **SIZES)).eval()


def long_rope():
    """Positions whose factors change for the whole text at its ninth token, so that cached keys are no longer right."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    limits = {"original_max_position_embeddings": 8, "max_position_embeddings": 64}
    rope |= {"original_max_position_embeddings": 8}
    return Phi3ForCausalLM(Phi3Config(rope_parameters=rope, pad_token_id=0, **limits, **sizes, **SIZES)).eval()


def long_rope_by_kind():
    """The same in layers of one kind."""
    long = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    long |= {"original_max_position_embeddings": 8, "factor": 8.0}
    rope = {"full_attention": long, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "intermediate_size": 32, "max_position_embeddings": 64}
    kinds = {"rope_parameters": rope, "layer_types": ["full_attention"] * 2, "sliding_window": 60}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **kinds, **SIZES)).eval()


def picked_tokens():
    """Layers that pick 8 of the earlier tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 32, "keep_window_size": 8, "max_position_embeddings": 64}
    return DogeForCausalLM(DogeConfig(**sizes, **SIZES)).eval()


def a_window_of_its_cache():
    """A cache that forgets what is 70 tokens back, and a mask that does not."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "head_dim": 8}
    limits = {"sliding_window": 70, "max_position_embeddings": 128}
    return MoshiForCausalLM(MoshiConfig(**sizes, **limits, **SIZES)).eval()


@pytest.mark.parametrize(
    ("build", "words"),
    [(local_attention, 2), (long_rope, 2), (long_rope_by_kind, 2), (picked_tokens, 2), (a_window_of_its_cache, 66)],
)
def test_a_model_is_exact_beyond_where_its_attention_changes(tiny_lm, build, words):
    torch.manual_seed(0)
    model, prompts = build(), [" ".join(["the", "film"] * (words // 2))]
    env = make((model, tiny_lm[1]), max_new_tokens=16, min_new_tokens=16, max_prompt_tokens=words, prompts=prompts)
    observation, _ = env.reset(seed=0)
    for _ in range(14):
        observation, *_ = env.step(0)
        ids = observation["tokens"][: int(observation["length"][0])].astype(int).tolist()
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
        expected[0] = -torch.inf  # the end token is blocked
        expected = expected.log_softmax(-1).numpy()[observation["candidates"]]
        np.testing.assert_allclose(observation["logprobs"], expected, atol=1e-4)
