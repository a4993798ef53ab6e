"""The engine against the model's own uncached forward.

``UncachedSlots`` keeps token ids and runs the whole text through the model each time. Whatever is
done to rows of the engine is done to rows of it, and both must propose the same.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from gymnasium.utils.env_match import check_environments_match
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import textgen_env
from textgen_env.errors import CapacityError, ConfigError, ModelError, PromptError, ResetNeeded
from textgen_env.models import hf as hf_module
from textgen_env.models import llama as llama_module
from textgen_env.models.base import Proposals, Slots
from textgen_env.models.candidates import top_candidates
from textgen_env.models.device import NARROW, numpy_blas, one_blas_thread, pick_dtype
from textgen_env.models.generic import GenericDecoder
from textgen_env.models.hf import HFModel
from textgen_env.models.llama import LlamaDecoder
from textgen_env.models.one_row import OneRow
from textgen_env.models.products import multiply
from textgen_env.models.projections import (
    ACTIVATIONS,
    ColumnProjection,
    PackedProjection,
    Projection,
    RMSNorm,
    can_pack,
)
from textgen_env.models.slots import LRUCache
from textgen_env.models.stateful import StatefulDecoder

VOCAB = 99
SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 48}
GROUPED = {**SIZE, **IDS, "intermediate_size": 48, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3 = {"head_dim": 8, "sliding_window": 40, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 4}
GEMMA3 |= {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {  # far apart, as the kinds of layers turn
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    },
}

LEAN = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "llama with biases": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "llama with heads cut": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**GROUPED, "num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=8)
    ),
    "llama with scaled positions": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=LLAMA3)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=40)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **GROUPED, head_dim=8, sliding_window=40, final_logit_softcapping=2.0, attn_logit_softcapping=0.5
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, **GEMMA3)),
}
PLAIN = [name for name in LEAN if name != "qwen3" and not name.startswith("gemma")]  # no norms of their own
GENERIC = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=48, bos_token_id=1, eos_token_id=1)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZE, **IDS, intermediate_size=48)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SIZE, **IDS, ffn_dim=48, word_embed_proj_dim=32)),
    "gemma3 with a setting that it does not heed": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**GROUPED, **GEMMA3, attn_logit_softcapping=0.5)
    ),
    "cohere with scaled logits": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED, logit_scale=0.25)),
    "llama with a layer of its own": lambda: with_own_layer(hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))),
}
FAMILIES = LEAN | GENERIC


def with_own_layer(model: torch.nn.Module) -> torch.nn.Module:
    """A Llama whose attention is not quite Llama's: only its own forward knows."""
    model.model.layers[1].self_attn.register_forward_hook(lambda _, __, found: (found[0] * 0.5, *found[1:]))
    return model


def family(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A random model far from uniform: every weight, norms and biases too, is moved."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().to(dtype)


def word_tokenizer() -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")


def engine(name: str = "llama", memo_bytes: int = 1 << 20, dtype: torch.dtype = torch.float32) -> HFModel:
    return HFModel(family(name, dtype), word_tokenizer(), name=name, memo_bytes=memo_bytes)


class UncachedSlots(Slots):
    """The oracle: token ids, and a whole forward for each proposal."""

    def __init__(self, model: HFModel, rows: int, length: int, k: int | None) -> None:
        super().__init__(model, rows, length, k)
        self.ids: list[list[int]] = [[] for _ in range(rows)]  # kept apart from those of ``Slots``

    def start(self, rows, prompts):
        super().start(rows, prompts)
        for row, prompt in zip(rows, prompts, strict=True):
            self.ids[row] = list(prompt)

    def advance(self, rows, tokens):
        super().advance(rows, tokens)
        for row, token in zip(rows, tokens, strict=True):
            self.ids[row].append(int(token))

    def fork(self, src, dst):
        super().fork(src, dst)
        for row, ids in zip(dst, [list(self.ids[row]) for row in src], strict=True):
            self.ids[row] = ids

    def propose(self, rows, block_end):
        found = []
        for row, block in zip(rows, block_end, strict=True):
            with torch.inference_mode():
                out = self.model.model(input_ids=torch.tensor([self.ids[row]]), output_hidden_states=True)
            ids, logprobs = top_candidates(out.logits[:, -1], self.k, self.model.end_ids, np.array([block]))
            found.append((ids[0], logprobs[0], out.hidden_states[-1][0, -1].float().numpy()))
        return Proposals(*(np.stack(part) for part in zip(*found, strict=True)))

    def save(self, row):
        return super().save(row), list(self.ids[row])

    def load(self, row, saved):
        super().load(row, saved[0])
        self.ids[row] = list(saved[1])


def same(found: Proposals, expected: Proposals, atol: float = 1e-4) -> None:
    """Equal to rounding. Candidates may change places where they tie to rounding."""
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=atol)
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=atol * 10)
    clear = np.diff(expected.logprobs, axis=-1) < -2 * atol
    clear = np.pad(clear, ((0, 0), (1, 0)), constant_values=True) & np.pad(clear, ((0, 0), (0, 1)))
    assert clear.any()
    assert np.array_equal(found.candidates[clear], expected.candidates[clear])


class Counted:
    """A decoder that notes the tokens of each forward."""

    def __init__(self, decoder) -> None:
        self._decoder = decoder
        self.forwards: list[int] = []

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def __call__(self, batch, cache):
        self.forwards.append(len(batch.ids))
        return self._decoder(batch, cache)


def counted(model: HFModel) -> list[int]:
    model.decoder = Counted(model.decoder)
    return model.decoder.forwards


def every(slots: Slots) -> np.ndarray:
    return np.arange(slots.rows)


def proposed(slots: Slots, rows: np.ndarray | None = None) -> Proposals:
    rows = every(slots) if rows is None else rows
    return slots.propose(rows, np.zeros(len(rows), bool))


# --- what the model itself would say


@pytest.mark.parametrize("name", LEAN)
def test_the_llama_family_takes_the_lean_path(name):
    assert isinstance(engine(name).decoder, LlamaDecoder)


@pytest.mark.parametrize("name", GENERIC)
def test_other_families_take_the_generic_path(name):
    assert isinstance(engine(name).decoder, GenericDecoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_any_course_of_rows_equals_the_uncached_forward(name):
    """Ragged starts, restarts, forks, saved rows, rows left behind, up to a full row; with a memo and without."""
    models, rng = [engine(name, memo_bytes) for memo_bytes in (0, 1 << 20)], np.random.default_rng(0)
    length, prompts = 36, [[5, 6, 7], [8], rng.integers(2, VOCAB, 33).tolist()]
    oracle = UncachedSlots(models[0], 6, length, 12)
    together = [*(model.slots(6, length, 12) for model in models), oracle]
    saved: list = []

    def do(action, *args):
        return [getattr(slots, action)(*args) for slots in together]

    def propose(*args):
        *found, expected = do("propose", *args)
        for proposals in found:
            same(proposals, expected)

    do("start", np.arange(6), [prompts[i % 3] for i in range(6)])
    for step in range(40):
        rows = rng.permutation(6)[: rng.integers(1, 7)] if step % 3 else np.arange(6)
        kind = rng.choice(["advance", "advance", "advance", "start", "fork", "save", "load", "rebuild"])
        if kind == "advance":
            room = np.array([row for row in rows if len(oracle.ids[row]) < length], np.int64)
            # Few tokens to choose from, so that prefixes come back.
            do("advance", room, rng.integers(2, 5, len(room)))
        elif kind == "start":
            do("start", rows, [prompts[rng.integers(3)] for _ in rows])
        elif kind == "fork":
            do("fork", rng.integers(0, 6, len(rows)), rows)
        elif kind == "save":
            saved = do("save", int(rows[0]))
        elif kind == "load" and saved:
            for slots, kept in zip(together, saved, strict=True):
                slots.load(int(rows[0]), kept)
        elif kind == "rebuild":
            do("rebuild")
        if step % 4:
            propose(rows, rng.random(len(rows)) < 0.3)
    propose(np.arange(6), np.zeros(6, bool))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_can_be_filled_to_the_last_position(name):
    model = engine(name)
    slots, oracle = model.slots(2, model.max_context, 5), UncachedSlots(model, 2, model.max_context, 5)
    ids = np.random.default_rng(0).integers(2, VOCAB, model.max_context).tolist()
    for rows in (slots, oracle):
        rows.start(every(rows), [ids[:1], ids])
    for token in ids[1:]:
        slots.advance(np.array([0]), np.array([token]))
        proposed(slots, np.array([0]))
    oracle.start(np.array([0]), [ids])
    same(proposed(slots), proposed(oracle))
    with pytest.raises(CapacityError, match="row 0 is full"):
        slots.advance(np.array([0]), np.array([2]))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_vocabulary_in_id_order_equals_the_uncached_forward(name):
    model = engine(name)
    pair = model.slots(3, 8, None), UncachedSlots(model, 3, 8, None)
    for slots in pair:
        slots.start(every(slots), [[4], [5, 6, 7], [8, 9]])
    found, expected = (slots.propose(every(slots), np.array([True, False, True])) for slots in pair)
    assert np.array_equal(found.candidates, np.tile(np.arange(VOCAB), (3, 1)))
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_does_not_depend_on_its_neighbours(name):
    model, rng = engine(name, memo_bytes=0), np.random.default_rng(1)
    prompts = [rng.integers(2, VOCAB, n).tolist() for n in (3, 30, 1, 7)]
    tokens = rng.integers(2, VOCAB, (5, 4))
    crowd = model.slots(4, 40, None)
    crowd.start(every(crowd), prompts)
    for row, prompt in enumerate(prompts):
        alone = model.slots(1, 40, None)
        alone.start(every(alone), [prompt])
        crowd.start(np.array([row]), [prompt])
        for step in tokens:
            np.testing.assert_allclose(proposed(alone).logprobs[0], proposed(crowd).logprobs[row], atol=1e-4)
            alone.advance(every(alone), step[row : row + 1])
            crowd.advance(np.array([row]), step[row : row + 1])


@pytest.mark.parametrize("name", PLAIN)
def test_a_single_token_of_a_single_row_equals_the_forward_of_many(name):
    model, ids = engine(name, memo_bytes=0), np.random.default_rng(2).integers(2, VOCAB, 30)
    assert model.decoder.alone
    pair = model.slots(1, 40, None), model.slots(1, 40, None)
    pair[1].decoder = LlamaDecoder(model.model)
    pair[1].decoder.alone = False
    for slots in pair:
        slots.start(every(slots), [ids[:3]])
    for token in ids[3:]:
        found, expected = (proposed(slots) for slots in pair)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
        np.testing.assert_allclose(found.hidden, expected.hidden, atol=1e-4)
        for slots in pair:
            slots.advance(every(slots), np.array([token]))


def test_half_precision_stays_near_the_uncached_forward():
    for name in ("llama", "gpt2", "gemma3"):
        model = engine(name, dtype=torch.bfloat16)
        pair = model.slots(3, 40, None), UncachedSlots(model, 3, 40, None)
        for slots in pair:
            slots.start(every(slots), [[4], list(range(40)), [8, 9]])
        found, expected = (np.exp(proposed(slots).logprobs.astype(np.float64)) for slots in pair)
        assert np.abs(found - expected).sum(-1).max() < 0.1  # twice the total variation


@pytest.mark.slow
def test_environments_with_and_without_a_cache_match():
    class Uncached(HFModel):
        def slots(self, rows, length, k):
            return UncachedSlots(self, rows, length, k)

    cached = engine()
    uncached = Uncached(cached.model, cached.tokenizer)
    settings = {
        "prompts": ["w3 w4", "w5"],
        "reward": "length",
        "top_k": 8,
        "max_new_tokens": 6,
        "max_prompt_tokens": 8,
        "observation": "tokens",
    }
    envs = [textgen_env.TextGenEnv(model=model, **settings) for model in (cached, uncached)]
    check_environments_match(*envs, num_steps=40, seed=3, info_comparison="keys-equivalence")


# --- what is not computed twice


def test_a_proposal_is_one_forward_of_the_tokens_without_cache():
    for name in ("llama", "gpt2"):
        model = engine(name, memo_bytes=0)
        forwards = counted(model)
        slots = model.slots(4, 16, 3)
        slots.start(every(slots), [[4], [5, 6, 7], [8, 9], [4, 3]])
        proposed(slots)
        slots.advance(np.array([0, 2]), np.array([5, 5]))
        slots.start(np.array([1]), [[7, 7]])
        proposed(slots, np.arange(3))
        proposed(slots)  # nothing new: the last token of each row again
        assert forwards == [8, 4, 4]


def test_equal_starts_are_computed_once():
    model = engine(memo_bytes=0)
    forwards = counted(model)
    slots = model.slots(5, 8, 3)
    slots.start(every(slots), [[4, 5, 6], [7], [4, 5, 6], [4, 5, 6], [7]])
    found = slots.propose(every(slots), np.array([False, False, True, False, False]))
    assert forwards == [4]
    assert np.array_equal(found.logprobs[0], found.logprobs[3])
    assert not np.array_equal(found.logprobs[0], found.logprobs[2])  # the end is blocked in one of them
    slots.advance(every(slots), np.array([2, 2, 3, 2, 2]))
    proposed(slots)
    assert forwards == [4, 5]


def test_a_prompt_seen_before_needs_no_forward_and_its_next_token_only_one():
    model = engine()
    forwards = counted(model)
    slots = model.slots(2, 8, 3)
    slots.start(np.array([0]), [[4, 5, 6]])
    first = proposed(slots, np.array([0]))
    slots.start(np.array([1]), [[4, 5, 6]])
    again = proposed(slots, np.array([1]))
    slots.advance(np.array([1]), np.array([9]))
    proposed(slots, np.array([1]))
    assert forwards == [3, 1]
    assert np.array_equal(first.logprobs, again.logprobs)


def test_a_known_path_needs_no_forward_and_is_caught_up_in_one_chunk():
    for name in ("llama", "gpt2"):
        model = engine(name)
        forwards = counted(model)
        slots, oracle = model.slots(2, 12, 5), UncachedSlots(model, 2, 12, 5)
        row = np.array([0])
        for _ in range(2):
            slots.start(row, [[4, 5]])
            proposed(slots, row)
            for token in (7, 8, 9):
                slots.advance(row, np.array([token]))
                proposed(slots, row)
        assert forwards == [2, 1, 1, 1]
        slots.advance(row, np.array([3]))
        oracle.start(row, [[4, 5, 7, 8, 9, 3]])
        same(proposed(slots, row), proposed(oracle, row))
        assert forwards[4:] == [4]


def test_a_few_known_rows_ride_along():
    model = engine()
    forwards = counted(model)
    slots = model.slots(4, 8, 3)
    slots.start(every(slots), [[4], [5], [6], [7]])
    for token in (8, 9):
        proposed(slots)
        slots.advance(every(slots), np.full(4, token))
    slots.start(every(slots), [[4], [5], [6], [7]])
    proposed(slots)
    slots.advance(every(slots), np.array([8, 3, 3, 3]))
    proposed(slots)  # row 0 is known: one of four, no use to split
    slots.start(every(slots), [[4], [5], [6], [7]])
    proposed(slots)
    slots.advance(every(slots), np.array([8, 8, 3, 2]))
    proposed(slots)  # three of four are known
    assert forwards == [4, 4, 4, 1]


def test_rebuild_computes_everything_again_to_the_same_result():
    model = engine()
    forwards = counted(model)
    slots = model.slots(2, 8, 3)
    slots.start(every(slots), [[4, 5, 6], [7]])
    before = proposed(slots)
    slots.rebuild()
    after = proposed(slots)
    assert forwards == [4, 4]
    assert all(np.array_equal(a, b) for a, b in zip(vars(before).values(), vars(after).values(), strict=True))


def test_the_memo_stays_within_its_bytes():
    store: LRUCache[str] = LRUCache(100)
    for i in range(4):
        store.put(bytes([i]), f"value {i}", 30)
    assert store.size == 90
    assert [store.get(bytes([i])) for i in range(4)] == [None, "value 1", "value 2", "value 3"]
    store.get(b"\1")  # used last, so kept longest
    store.put(b"\4", "large", 60)
    assert [store.get(bytes([i])) for i in range(5)] == [None, "value 1", None, None, "large"]
    store.put(b"\5", "larger than all", 101)
    assert store.get(b"\5") is None
    assert store.size <= 100


# --- rows that travel


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_row_is_put_back_as_if_nothing_had_happened(name):
    model = engine(name, memo_bytes=0)
    forwards = counted(model)
    slots, others = model.slots(2, 40, 5), model.slots(3, 36, 5)
    slots.start(every(slots), [list(range(2, 37)), [7]])
    expected = proposed(slots)
    saved = slots.save(0)
    slots.start(np.array([0]), [[9, 9]])
    proposed(slots)
    slots.load(0, saved)
    others.load(2, saved)
    forwards.clear()
    for found in (proposed(slots, np.array([0])), proposed(others, np.array([2]))):
        np.testing.assert_allclose(found.logprobs[0], expected.logprobs[0], atol=1e-4)
    assert forwards == [1, 1]


def test_a_fork_swaps_rows_at_once():
    model = engine()
    slots = model.slots(3, 8, None)
    slots.start(every(slots), [[4, 5, 6], [7], [8, 9]])
    before = proposed(slots)
    slots.fork(np.array([1, 0]), np.array([0, 1]))
    np.testing.assert_allclose(proposed(slots).logprobs, before.logprobs[[1, 0, 2]], atol=1e-4)


def test_a_fork_of_no_rows_changes_nothing():
    slots = engine().slots(2, 8, None)
    slots.start(every(slots), [[4, 5, 6], [7]])
    nobody = np.zeros(0, np.int64)
    slots.fork(nobody, nobody)
    assert [slots.ids_of(row) for row in (0, 1)] == [[4, 5, 6], [7]]


def test_rows_of_other_models_and_impossible_rows_are_refused():
    model = engine()
    slots = model.slots(2, 4, 3)
    slots.start(np.array([0]), [[4, 5]])
    with pytest.raises(ModelError, match="not saved from slots of this very model"):
        engine("gpt2").slots(2, 4, 3).load(0, slots.save(0))
    with pytest.raises(ModelError, match="of a dict"):
        slots.load(0, {})
    with pytest.raises(CapacityError, match="at most 1 tokens, the saved one holds 2"):
        model.slots(1, 1, 3).load(0, slots.save(0))
    for dst in (2, -1):
        with pytest.raises(ConfigError, match=r"rows must be in 0\.\.1"):
            slots.fork(np.array([0]), np.array([dst]))
    with pytest.raises(ResetNeeded, match=r"rows \[1\] hold no text"):
        proposed(slots)
    with pytest.raises(PromptError, match="at least one token"):
        slots.start(np.array([1]), [[]])
    with pytest.raises(CapacityError, match="at most 4 tokens, got a prompt of 5"):
        slots.start(np.array([1]), [[2] * 5])
    for token in (-1, VOCAB):
        with pytest.raises(ModelError, match=r"0\.\.98"):
            slots.advance(np.array([0]), np.array([token]))


# --- memory


def test_the_memory_of_slots_equals_the_formula():
    model = engine(memo_bytes=1000)
    layers, heads, head_size, float32 = 3, 2, 8, 4
    cache = 6 * 48 * layers * heads * (head_size + head_size) * float32  # 43 tokens are rounded up to 48

    assert model.slots(6, 43, 3).cache.nbytes == cache
    assert model.slots_bytes(6, 43) == cache + 6 * VOCAB * float32 + (8 << 20) + 1000


def test_more_rows_than_memory_holds_are_refused_with_the_bytes():
    model = engine()
    with pytest.raises(CapacityError, match=f"{model.slots_bytes(10**9, 40):,} bytes"):
        model.slots(10**9, 40, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 49, 3), r"1\.\.48 tokens"),
        ((2, 0, 3), r"1\.\.48"),
        ((0, 4, 3), "rows"),
        ((2, 4, 0), "top_k"),
        ((2, 4, 99), "top_k"),
    ],
)
def test_slots_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        engine().slots(*arguments)


def test_a_sliding_window_bounds_the_lean_path_and_not_the_context():
    model = engine("mistral")
    assert model.max_context == engine("llama").max_context == 48
    assert isinstance(model.decoder_for(40), LlamaDecoder)
    assert isinstance(model.decoder_for(41), StatefulDecoder)


def test_a_row_moves_between_slots_of_short_and_of_long_texts():
    model = engine("mistral")
    near, far, oracle = model.slots(1, 40, 5), model.slots(1, 48, 5), UncachedSlots(model, 1, 48, 5)
    for slots in (near, oracle):
        slots.start(every(slots), [[4, 5, 6]])
    proposed(near)
    far.load(0, near.save(0))
    same(proposed(far), proposed(oracle))
    near.load(0, far.save(0))
    same(proposed(near), proposed(oracle))


# --- which models


def test_models_with_states_and_with_biased_attention_run_on_their_own_cache():
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1))
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    for model in (mamba, bloom):
        assert HFModel(model.eval(), word_tokenizer()).decoder.name.startswith("own cache")


def test_a_model_that_sees_later_tokens_runs_without_a_cache():
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = hf.BertLMHeadModel(hf.BertConfig(**sizes, intermediate_size=16, is_decoder=False))
    assert HFModel(bert.eval(), word_tokenizer()).decoder.name == "uncached"


def test_a_forward_that_disagrees_with_the_model_is_not_used(monkeypatch):
    model = family("llama")
    monkeypatch.setattr(LlamaDecoder, "fits", lambda model: True)
    assert isinstance(HFModel(family("llama with a layer of its own"), word_tokenizer()).decoder, GenericDecoder)

    class Wrong(LlamaDecoder):
        def __call__(self, batch, cache):
            logits, hidden = super().__call__(batch, cache)
            return 2 * logits, hidden

    monkeypatch.setattr(hf_module, "GenericDecoder", Wrong)
    monkeypatch.setattr(LlamaDecoder, "fits", lambda model: False)
    assert isinstance(HFModel(model, word_tokenizer()).decoder, StatefulDecoder)
    monkeypatch.setattr(hf_module, "WAYS", ())
    with pytest.raises(ModelError, match="no way to run it agrees with its own uncached forward"):
        HFModel(model, word_tokenizer())


def test_a_forward_of_single_rows_that_disagrees_with_the_model_is_not_used(monkeypatch):
    assert engine("llama", memo_bytes=0).decoder.alone
    right = OneRow.__call__

    def wrong(self, *args):
        logits, hidden = right(self, *args)
        return 2 * logits, hidden

    monkeypatch.setattr(OneRow, "__call__", wrong)
    assert isinstance(engine("llama", memo_bytes=0).decoder, GenericDecoder)


def test_a_model_needs_a_tokenizer_and_an_end_of_text():
    with pytest.raises(ModelError, match="no tokenizer"):
        HFModel(family("llama"), None)
    model, tokenizer = family("llama"), word_tokenizer()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"no end-of-text token: set tokenizer\.eos_token"):
        HFModel(model, tokenizer)


def test_all_ends_of_text_are_found():
    model, tokenizer = family("llama"), word_tokenizer()
    model.config.eos_token_id = 2
    model.generation_config.eos_token_id = [3, 4]
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    assert HFModel(model, tokenizer).end_ids == (1, 2, 3, 4)


KINDS = [
    (Projection, torch.float32),
    (Projection, torch.bfloat16),
    (ColumnProjection, torch.float32),
    *((PackedProjection, dtype) for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.zeros(1, dtype=dtype))),
]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_projection_of_each_kind_equals_the_layers_behind_the_norm(rows, bias, kind, dtype):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, n, bias=bias, dtype=torch.float64) for n in (96, 32, 200)]
    norm = LlamaRMSNorm(64, eps=1e-3).to(dtype)
    norm.weight.data.uniform_(0.5, 2.0)
    x, other = torch.randn(rows, 64, dtype=dtype), torch.randn(rows, 328, dtype=dtype)
    with torch.inference_mode():
        normed = torch.nn.functional.rms_norm(x.double(), (64,), norm.weight.double(), 1e-3)
        expected = torch.cat([layer(normed) for layer in layers], -1)
        projection = kind([layer.to(dtype) for layer in layers], RMSNorm.of(norm))
        read = projection.normed(x)
        for found, wanted in [
            (projection(read), expected),
            (projection.activated(read, ACTIVATIONS["silu"]), torch.nn.functional.silu(expected)),
            (
                projection.activated(read, ACTIVATIONS["gelu_pytorch_tanh"]),
                torch.nn.functional.gelu(expected, approximate="tanh"),
            ),
            (projection.multiplied(read, other.clone()), expected * other),
            (projection.added_to(other, read), expected + other),
        ]:
            atol = 1e-5 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(found.double(), wanted.double(), atol=atol, rtol=1e-2)


@pytest.mark.parametrize("relayout", [False, True])
def test_a_module_keeps_its_values_and_shares_its_memory_only_where_it_may_be_laid_out_anew(relayout):
    torch.manual_seed(0)
    layers, norm, x = [torch.nn.Linear(64, n) for n in (96, 32)], LlamaRMSNorm(64), torch.randn(3, 64)
    norm.weight.data.uniform_(0.5, 2.0)
    before = [layer.weight.detach().clone() for layer in layers]
    expected = torch.cat([layer(norm(x)) for layer in layers], -1).detach()
    projection = ColumnProjection(layers, RMSNorm.of(norm), relayout)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert layer.weight.is_contiguous() != relayout
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat([layer(norm(x)) for layer in layers], -1), expected)
        torch.testing.assert_close(projection(projection.normed(x)), expected)
        for layer in layers:
            layer.weight.zero_()
        biases = torch.cat([layer.bias for layer in layers])
        assert bool((projection(x) == biases).all()) == relayout  # True: one memory


def test_a_named_model_that_was_laid_out_anew_is_saved_and_writes_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_module, "best_projection", lambda *args: ColumnProjection)
    plain = family("llama")
    ids = torch.tensor([[4, 5, 6]])
    expected = plain(ids).logits.detach()
    language_model = HFModel(plain, word_tokenizer(), relayout=True)
    assert not plain.model.layers[0].self_attn.q_proj.weight.is_contiguous()
    torch.testing.assert_close(plain(ids).logits.detach(), expected)
    language_model.model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits.detach(), expected)


@pytest.mark.parametrize("kind", [Projection, PackedProjection, ColumnProjection])
def test_a_decoder_of_each_kind_of_product_agrees_with_the_model(kind, monkeypatch):
    if kind is PackedProjection and not can_pack(torch.zeros(1)):
        pytest.skip("no oneDNN here")
    monkeypatch.setattr(llama_module, "best_projection", lambda *args: kind)
    pair = engine("llama", memo_bytes=0).slots(3, 40, None), UncachedSlots(engine("llama"), 3, 40, None)
    assert isinstance(pair[0].decoder, LlamaDecoder)
    for slots in pair:
        slots.start(every(slots), [[4], list(range(20)), [8, 9]])
    for token in (5, 6):
        found, expected = (proposed(slots) for slots in pair)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
        for slots in pair:
            slots.advance(every(slots), np.full(3, token))


def test_numpy_gets_its_threads_back_after_a_forward():
    if not numpy_blas():
        pytest.skip("NumPy has no OpenBLAS")
    before = [library.get_num_threads() for library in numpy_blas()]
    with one_blas_thread():
        assert {library.get_num_threads() for library in numpy_blas()} == {1}
    assert [library.get_num_threads() for library in numpy_blas()] == before


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(600,), (1, 600), (5, 600)])
def test_a_product_on_some_threads_is_the_product(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rng = np.random.default_rng(0)
    x, columns = (rng.normal(size=size).astype(np.float32) for size in (shape, (600, 1001)))
    found, again = np.full((2, *shape[:-1], 1001), np.nan, np.float32)
    multiply(x, columns, found)
    np.testing.assert_allclose(found, x.astype(np.float64) @ columns, atol=1e-3)
    multiply(x, columns, again)
    assert np.array_equal(found, again)


def test_precision_follows_the_hardware_unless_said(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert pick_dtype("auto", cpu) == pick_dtype(None, cpu) == dtype
        assert pick_dtype("auto", cpu, width=NARROW + 1) == dtype
        assert pick_dtype("auto", cpu, width=NARROW) == torch.float32
    assert pick_dtype("float16", width=8) == torch.float16
    with pytest.raises(ConfigError, match="'int8'"):
        pick_dtype("int8")


# --- text


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token a byte, then an end and an added word: every emoji is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(alphabet[40], alphabet[41])]
    vocab = {text: i for i, text in enumerate([*alphabet, "".join(merges[0])])}
    byte_level = Tokenizer(models.BPE(vocab, merges))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<end>")
    tokenizer.add_tokens(["naïve word"])
    return tokenizer


@pytest.fixture(scope="module")
def byte_model() -> HFModel:
    config = hf.LlamaConfig(**{**GROUPED, "vocab_size": 270})
    return HFModel(hf.LlamaForCausalLM(config), byte_tokenizer())


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=6), ids=st.lists(st.integers(0, 258), max_size=8))
def test_continuations_of_byte_level_tokens_equal_decoding(byte_model, text, ids):
    prefix = [*byte_model.encode(text), *ids]
    candidates = list(range(259))
    expected = [byte_model.decode([*prefix, c]) for c in candidates]
    assert byte_model.continuations([65], prefix, candidates) == expected


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=4), ids=st.lists(st.integers(0, 258), max_size=4), token=st.integers(0, 258))
def test_a_token_extends_a_text_as_decoding_all_of_it_does(byte_model, text, ids, token):
    ids = [*byte_model.encode(text), *ids]
    extended = byte_model.extended(byte_model.decode(ids), token)
    assert extended in (None, byte_model.decode([*ids, token]))
    assert extended is not None or "\ufffd" in byte_model.decode(ids) + byte_model.decode([token])


def test_an_emoji_appears_with_its_last_byte(byte_model):
    *start, last = byte_model.encode("🦊")
    assert len(start) == 3
    assert byte_model.continuations([], start, [last, start[0]]) == ["🦊", "\ufffd\ufffd"]


def test_other_tokenizers_keep_the_space_after_the_prompt():
    pieces = ["▁hello", "▁world", "ly", "▁", "</s>"]
    words = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    words.decoder = decoders.Metaspace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    model = HFModel(family("llama"), tokenizer)
    assert model.continuations([0], [1], [2, 0, 4]) == [" worldly", " world hello", " world"]
    assert model.decode([1, 2]) == "worldly"  # what a text on its own would be


# --- the model in the box


@pytest.mark.slow
def test_smollm2_equals_its_uncached_forward():
    model = textgen_env.load_language_model("smollm2", "float32")
    assert isinstance(model.decoder, LlamaDecoder)
    ids = model.encode("The film was a slow, careful study of two brothers who inherit a lighthouse.")
    slots, oracle = model.slots(3, 32, 16), UncachedSlots(model, 3, 32, 16)
    for rows in (slots, oracle):
        rows.start(every(rows), [ids[:4], ids, ids[:9]])
    for token in ids[9:12]:
        same(proposed(slots), proposed(oracle), atol=2e-4)
        for rows in (slots, oracle):
            rows.advance(every(rows), np.full(3, token))
