"""Models of every kind against their own uncached forward, and what an encoder-decoder adds to environments.

``benchmarks.models`` builds each class small and drives it; ``docs/models.md`` is its whole table.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import textgen_env
from benchmarks.models import (
    CAUSAL,
    QUICK_STEPS,
    SEQ2SEQ,
    SMALL,
    SPECIAL,
    Course,
    Line,
    build,
    measured,
    shrunken,
    words,
    wrapped,
)
from textgen_env.errors import CapacityError, ModelError, PromptError
from textgen_env.models.hf import HFModel
from textgen_env.models.own_cache import Axes, growing_axes, joined
from textgen_env.models.seq2seq import Seq2SeqModel
from textgen_env.models.stateful import StatefulDecoder
from textgen_env.testing import check_language_model

QUICK = [
    "afmoe",
    "apertus",
    "arcee",
    "bert",
    "bloom",
    "biogpt",
    "bitnet",
    "camembert",
    "cohere",
    "cohere2",
    "ctrl",
    "cwm",
    "deepseek_v3",
    "diffllama",
    "doge",
    "dots1",
    "electra",
    "ernie4_5",
    "exaone4",
    "falcon",
    "falcon_mamba",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "helium",
    "internlm3",
    "jamba",
    "jetmoe",
    "lfm2",
    "llama",
    "llama4_text",
    "mamba",
    "mamba2",
    "marian",
    "minicpm3",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "mpt",
    "nanochat",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "openai-gpt",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "roberta",
    "rwkv",
    "smollm3",
    "stablelm",
    "starcoder2",
    "xglm",
]
LONGER = {
    "afmoe",
    "camembert",
    "cohere2",
    "cwm",
    "deepseek_v3",
    "diffllama",
    "doge",
    "dots1",
    "exaone4",
    "falcon_mamba",
    "gemma2",
    "gemma4_text",
    "gpt_neo",
    "gpt_oss",
    "granite_swa",
    "jamba",
    "llama4_text",
    "mamba2",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "nanochat",
    "olmo3",
    "qwen3_5_text",
    "qwen3_next",
    "roberta",
    "rwkv",
    "smollm3",
}
"""Of these, the ones that take more than 0.35 s each."""
QUICK_SEQ2SEQ = [
    "bart",
    "blenderbot",
    "encoder-decoder",
    "m2m_100",
    "marian",
    "mbart",
    "mt5",
    "mvp",
    "pegasus",
    "plbart",
    "t5",
    "umt5",
]


STEPS = 10
"""Of a course: each row passes a window of 8 tokens, and goes on after the caches were rebuilt in step 6."""


@pytest.fixture(autouse=True)
def one_uncached_forward_a_text(monkeypatch):
    """Run a model's uncached forward over a text once, however many ways of running are compared with it."""

    def once(uncached):
        known = {}

        def remembered(model, prompt, ids):
            text = (model, tuple(prompt), tuple(ids))
            if text not in known:
                known[text] = uncached(model, prompt, ids)
            return known[text]

        return remembered

    for kind in (HFModel, Seq2SeqModel):
        monkeypatch.setattr(kind, "uncached", once(kind.uncached))


DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
PLAIN = (bool, int, float, str, type(None))


def kind_of(layer: torch.nn.Module) -> list:
    """What tells layers of different kinds apart: classes, shapes and plain settings of all parts, but no numbering."""
    found = []
    for name, part in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(part).items()
            if isinstance(value, PLAIN) and not key.endswith(("idx", "index", "layer_id", "layer_number"))
        }
        shapes = [(key, tuple(weight.shape)) for key, weight in part.named_parameters(recurse=False)]
        found.append((name, type(part).__name__, settings, shapes))
    return found


def says_layers_differ(config: transformers.PreTrainedConfig) -> bool:
    """Whether any list of a configuration, or of its parts, has different entries for its layers."""
    values = list(vars(config).values())
    lists = [value for value in values if isinstance(value, list | tuple) and len(value) > 1]
    parts = [value for value in values if isinstance(value, transformers.PreTrainedConfig)]
    return any(value != type(value)([value[0]]) * len(value) for value in lists) or any(map(says_layers_differ, parts))


def course(kind: str, seq2seq: bool, steps: int) -> Line:
    """Run a course on two layers where all four are of one kind, else on all of them."""
    names = (SEQ2SEQ if seq2seq else CAUSAL)[kind]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    alike = False
    with contextlib.suppress(Exception), torch.device("meta"):  # what cannot be built is for ``measured`` to say
        config = shrunken(model_class.config_class or CONFIG_MAPPING[kind], kind)
        stacks = [part for part in model_class(config).modules() if isinstance(part, torch.nn.ModuleList)]
        alike = not says_layers_differ(config) and all(
            kind_of(layer) == kind_of(stack[0]) for stack in stacks for layer in stack
        )
    with patch.dict(SMALL, dict.fromkeys(DEPTHS, 2) if alike else {}):
        return measured(kind, seq2seq, steps)


def exact(kind: str, seq2seq: bool, steps: int) -> None:
    line = course(kind, seq2seq, steps)
    assert line.result == "exact", line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in LONGER else kind for kind in QUICK]
)
def test_a_causal_model_equals_its_uncached_forward(kind):
    exact(kind, seq2seq=False, steps=QUICK_STEPS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUICK_SEQ2SEQ)
def test_an_encoder_decoder_equals_its_uncached_forward(kind):
    exact(kind, seq2seq=True, steps=STEPS)


PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
STATED = defaultdict(set)
for name, result in re.findall(r"^\| `(\w+)` \| ([a-z ]+?) \|", PAGE, re.MULTILINE):
    STATED[name].add(result)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "seq2seq"),
    [(kind, False) for kind in CAUSAL if kind not in QUICK]
    + [(kind, True) for kind in SEQ2SEQ if kind not in QUICK_SEQ2SEQ],
)
def test_any_other_class_is_what_the_page_says(kind, seq2seq):
    line = course(kind, seq2seq, STEPS)
    assert line.result in STATED.get(line.name, {"exact", "refused", "not built"}), line
    assert line.result == "exact" or line.note


# --- what rows of a model's own cache keep


@pytest.mark.filterwarnings("ignore")
def test_rows_whose_state_has_more_parts_after_some_tokens_are_forked_and_saved():
    with patch.dict(SPECIAL, {"deepseek_v4": {"index_topk": 512}}):  # below that, a longer text is not cached
        model = build("deepseek_v4")
    assert Course(wrapped(model)).run(QUICK_STEPS) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_positions_that_a_model_counts_itself_are_right_in_half_precision():
    model = build("blenderbot-small")
    expected = wrapped(model).decoder.name
    assert wrapped(model.to(torch.bfloat16)).decoder.name == expected == "own cache, equal lengths"


@pytest.mark.filterwarnings("ignore")
def test_a_forbidden_token_is_not_proposed_by_an_encoder_decoder():
    model = build("marian", seq2seq=True)
    model.generation_config.bad_words_ids = [[model.config.pad_token_id]]
    with torch.no_grad():
        model.final_logits_bias[0, model.config.pad_token_id] = 50.0  # by far the likeliest, were it not forbidden
    settings = {"prompts": ["w5 w6 w7"], "reward": len, "top_k": None, "max_prompt_tokens": 8, "max_new_tokens": 6}
    env = gym.make("TextGen-v0", model=(model, words()), min_new_tokens=0, **settings)
    observation, _ = env.reset(seed=0)
    assert np.flatnonzero(observation["action_mask"] == 0).tolist() == [model.config.pad_token_id]
    model.generation_config.bad_words_ids = [[5, 6]]
    with pytest.raises(ModelError, match=r"bad_words_ids=\[\[5, 6\]\].* does not follow"):
        gym.make("TextGen-v0", model=(model, words()), **settings)


def test_a_source_longer_than_the_encoder_s_positions_is_refused():
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = [{**sizes, "intermediate_size": 16, "max_position_embeddings": count} for count in (32, 128)]
    decoder = transformers.BertConfig(**parts[1], is_decoder=True, add_cross_attention=True)
    ends = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    encoder = transformers.BertConfig(**parts[0])
    config = transformers.EncoderDecoderConfig(encoder=encoder.to_dict(), decoder=decoder.to_dict(), **ends)
    model = Seq2SeqModel(transformers.EncoderDecoderModel(config).eval(), words())
    slots = model.slots(1, 8, 4)
    slots.start(np.array([0]), [[5] * 32])
    with pytest.raises(CapacityError, match="the encoder reads at most 32 tokens, got a prompt of 33"):
        slots.start(np.array([0]), [[5] * 33])


@pytest.mark.parametrize("kind", ["lfm2", "mamba", "bloom"])
def test_a_model_on_its_own_cache_keeps_the_contract(kind):
    model = wrapped(build(kind))
    assert isinstance(model.decoder, StatefulDecoder)
    check_language_model(model, ["w5 w6 w7", "w8"])


def test_the_axes_of_a_cache_are_found_by_their_growth():
    def cache(rows: int, tokens: int, source: int) -> dict[str, torch.Tensor]:
        state, bias = torch.zeros(rows, 7), torch.zeros(4)
        return {"keys": torch.zeros(5, rows, tokens), "state": state, "read": torch.zeros(rows, source), "bias": bias}

    found = growing_axes(cache(2, 2, 2), cache(3, 2, 2), cache(2, 3, 2), cache(2, 2, 3))
    assert found == {
        ("keys",): Axes(1, 2, None),
        ("state",): Axes(0, None, None),
        ("read",): Axes(0, None, 1),
        ("bias",): Axes(None, None, None),
    }


def test_rows_that_go_on_together_are_not_copied():
    model = wrapped(build("lfm2"))
    slots, rows = model.slots(3, 12, 5), np.arange(3)
    slots.start(rows, [[5, 6], [7, 8], [9, 10]])
    slots.propose(rows, np.zeros(3, bool))
    batch = slots.cache.together([0, 1, 2])
    for token in (4, 5):
        slots.advance(rows, np.full(3, token))
        slots.propose(rows, np.zeros(3, bool))
    assert slots.cache.together([2, 0, 1]) is batch
    assert joined([(batch, [1])], slots.cache.axes) is not batch


def test_memory_of_an_own_cache_is_within_the_bound():
    model = wrapped(build("lfm2"))
    slots, rows = model.slots(4, 20, 5), np.arange(4)
    slots.start(rows, [[5] * 3, [6] * 3, [7] * 9, [8]])
    for token in range(8):
        slots.propose(rows, np.zeros(4, bool))
        slots.advance(rows, np.full(4, 10 + token))
    assert slots.cache.nbytes <= model.slots_bytes(4, 20)


def test_tokens_that_the_generation_settings_suppress_are_not_proposed():
    module = build("llama")
    module.generation_config.suppress_tokens, module.generation_config.begin_suppress_tokens = [5, 6], [7]
    model = wrapped(module)
    slots, rows = model.slots(2, 8, None), np.arange(2)
    slots.start(rows, [[3, 4], [9]])
    slots.propose(rows, np.zeros(2, bool))
    slots.advance(rows[:1], np.array([8]))
    found = slots.propose(rows, np.zeros(2, bool)).logprobs
    for row, (ids, blocked) in enumerate([([3, 4, 8], [5, 6]), ([9], [5, 6, 7])]):
        with torch.inference_mode():
            logits = module(input_ids=torch.tensor([ids])).logits[0, -1]
            logits[blocked] = -torch.inf
        expected = logits.log_softmax(-1).numpy()
        np.testing.assert_allclose(found[row], np.maximum(expected, -1e4), atol=1e-4)


# --- encoder-decoders


@pytest.fixture(scope="module")
def t5():
    module = build("t5", seq2seq=True)
    module.generation_config.decoder_start_token_id = 0
    return module, words()


def test_an_encoder_reads_a_prompt_once_and_forks_share_it(t5):
    model = Seq2SeqModel(*t5, memo_bytes=0)
    reads: list[int] = []
    hook = (
        t5[0]
        .get_encoder()
        .register_forward_pre_hook(
            lambda module, args, kwargs: reads.append(len(kwargs["input_ids"])), with_kwargs=True
        )
    )
    slots, rows = model.slots(3, 10, 5), np.arange(3)
    slots.start(rows[:2], [[5, 6, 7], [8, 9, 10]])
    slots.propose(rows[:2], np.zeros(2, bool))
    slots.fork(np.array([0]), np.array([2]))
    for token in (11, 12):
        slots.advance(rows, np.full(3, token))
        found = slots.propose(rows, np.zeros(3, bool))
    hook.remove()
    assert reads == [2]
    np.testing.assert_allclose(found.logprobs[0], found.logprobs[2], atol=1e-5)
    assert slots.prompt_of(2) == (5, 6, 7)
    assert slots.ids_of(2) == [0, 11, 12]


@pytest.mark.slow
def test_a_forced_first_token_begins_each_text(t5):
    module = build("mbart", seq2seq=True)
    module.generation_config.forced_bos_token_id = 7
    model = Seq2SeqModel(module, words())
    slots = model.slots(1, 10, 5)
    slots.start(np.array([0]), [[5, 6, 7]])
    assert slots.ids_of(0) == [*model.begin]
    assert model.begin[1:] == (7,)
    check_language_model(model, ["w5 w6 w7", "w8"])


SETTINGS = {"prompts": ["w5 w6 w7", "w8 w9"], "reward": "length", "top_k": 6, "max_new_tokens": 5}
SETTINGS |= {"max_prompt_tokens": 6}


def test_an_environment_shows_the_decoder_s_tokens_and_the_source_where_it_is_named(t5):
    env = gym.make("TextGen-v0", model=t5, observation=("tokens", "length", "source", "candidates"), **SETTINGS)
    observation, _ = env.reset(seed=0, options={"prompt": "w5 w6"})
    assert observation["source"].tolist() == [5, 6, -1, -1, -1, -1]
    assert observation["length"].tolist() == [1]
    ended, written = False, []
    while not ended:
        written.append(int(observation["candidates"][0]))
        observation, _, ended, _, info = env.step(0)
        assert env.observation_space.contains(observation)
    assert info["prompt"] == "w5 w6"
    assert observation["tokens"][1 : len(written) + 1].tolist() == written
    generated = t5[0].generate(
        torch.tensor([[5, 6]]), max_new_tokens=len(written), do_sample=False, num_beams=1, use_cache=False
    )
    assert generated[0, 1:].tolist() == written  # the first candidate is the greedy token


def test_rows_of_an_encoder_decoder_are_stored_and_restored(t5):
    made = [textgen_env.TextGenVectorEnv(num_envs=3, model=t5, observation="full", **SETTINGS) for _ in range(2)]
    first, second = (envs.episodes for envs in made)
    made[0].reset(seed=0)
    made[0].step(np.array([0, 1, 2]))
    second.load_state_dict(*first.state_dict())
    one, other = (episodes.proposals(np.arange(3)) for episodes in (first, second))
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.slow
def test_text_dqn_learns_on_an_encoder_decoder_and_steers_it(t5):
    from agents import TextDQN
    from agents.train import OBSERVATION

    envs = gym.make_vec("TextGen-v0", num_envs=4, model=t5, observation=OBSERVATION, **SETTINGS)
    agent = TextDQN("CandidatePolicy", envs, beta=0.1, learning_starts=20, seed=0)
    agent.learn(120)
    with agent.logits_processor(t5[0]) as steer:
        ids = t5[0].generate(torch.tensor([[5, 6, 7]]), logits_processor=[steer], **steer.settings)
    assert 1 < ids.shape[1] <= 6


def test_sources_that_cannot_be_read_are_refused(t5):
    slots = Seq2SeqModel(*t5).slots(1, 10, 5)
    with pytest.raises(PromptError, match="at least one token"):
        slots.start(np.array([0]), [[]])
