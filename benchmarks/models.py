"""Every class that transformers generates text with, against its own uncached forward.

    python -m benchmarks.models --quick              # one short course a class: prints the table
    python -m benchmarks.models --out docs/models.md # writes the page

Each class is built small, from a shrunken configuration and random weights, with windows of 8 tokens. The engine then
writes ragged rows beyond these windows, with restarts, forks, saved rows and rebuilt caches; each proposal is compared
with the model's forward over the whole text. What cannot be built is counted, with its reason.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers.models.auto import configuration_auto, modeling_auto

from textgen_env.errors import TextGenError
from textgen_env.models.hf import HFModel
from textgen_env.models.seq2seq import Seq2SeqModel

VOCAB, LENGTH, ROWS = 99, 30, 4
TOLERANCE = 1e-4  # nats
QUICK_STEPS = 8
MOST_PARAMETERS = 20_000_000
CAUSAL: Mapping[str, str] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SEQ2SEQ: Mapping[str, str] = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

SMALL: dict[str, Any] = {
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "embed_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_dim", "lru_width", "decoder_hidden_size", "dim_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "dim_ff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_intermediate", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim", "d_kv"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    "linear_head_dim": 8,
    "d_inner": 64,
    # layers and heads
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "num_encoder_attention_heads"), 4),
    "linear_num_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_decoder_attention_heads"), 2),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "num_expert_group"), 1),
    # states
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "time_step_rank", "mamba_dt_rank", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "mamba_d_ssm": 64,
    # how far, and which tokens
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "num_kv_shared_layers": 0,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_token", "src_vocab_size", "tgt_vocab_size"), VOCAB),
    **dict.fromkeys(("decoder_vocab_size", "n_words"), VOCAB),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
}
"""Sizes by the names that configurations have for them."""

LATENT = {"num_key_value_heads": 4}
ROTARY = {"rotary_dim": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "kimi_linear", "dots3_note_text"), LATENT),
    "bailing_hybrid": LATENT | {"layer_group_size": 2, "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": ROTARY,
    "gptj": ROTARY,
    "falcon": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "openai-gpt": {"n_positions": 64},
    "prophetnet": {"num_hidden_layers": None},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"] * 2},
    "xlstm": {"v_head_dim": None, "num_blocks": None},
    "xlnet": {"max_position_embeddings": None, "d_head": 8, "d_inner": 48},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a configuration needs besides, or does not take (None)."""


def shrunken(config_class: Any, kind: str = "") -> Any:
    """Return a small configuration of a class, its parts made small too."""
    default = config_class()
    renamed = getattr(config_class, "attribute_map", None) or {}
    sizes = {name: size for name, size in SMALL.items() if name in vars(default) and name not in renamed}
    if "is_decoder" in vars(default) and not default.is_encoder_decoder:
        sizes["is_decoder"] = True
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            sizes[name] = shrunken(type(part)).to_dict()
    if isinstance(sizes.get("encoder"), dict) and isinstance(sizes.get("decoder"), dict):
        sizes["encoder"]["is_decoder"] = False
        sizes["decoder"] |= {"is_decoder": True, "add_cross_attention": True}
    sizes |= SPECIAL.get(config_class.model_type, {}) | SPECIAL.get(kind, {})
    return config_class(**{name: size for name, size in sizes.items() if size is not None})


def build(kind: str, seq2seq: bool = False) -> Any:
    """Return a small model of ``kind`` with random weights far from uniform, norms and biases too.

    Raises:
        Exception: whatever the library says; or it stays above ``MOST_PARAMETERS``.
    """
    names = (SEQ2SEQ if seq2seq else CAUSAL)[kind]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    config = shrunken(model_class.config_class or configuration_auto.CONFIG_MAPPING[kind], kind)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise MemoryError(f"{count:,} parameters: the configuration does not become small")
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if not model.config.is_encoder_decoder and model.generation_config is not None:
        model.generation_config.forced_eos_token_id = None  # of the translation models whose decoders these are
    return model.eval()


def words() -> Any:
    """Return a tokenizer of ``VOCAB`` words."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0")


def wrapped(model: Any, memo_bytes: int = 0) -> HFModel:
    """Return the model on our engine."""
    kind = Seq2SeqModel if model.config.is_encoder_decoder else HFModel
    return kind(model, words(), memo_bytes=memo_bytes)


# --- a course of rows


@dataclass
class Written:
    """A row as it should be: the prompt that an encoder reads, if there is one, and the ids of the text."""

    source: list[int]
    ids: list[int]


class Course:
    """Ragged rows that are started again, forked, saved, loaded and rebuilt, beside what each should hold."""

    def __init__(self, model: HFModel, seed: int = 0) -> None:
        self.model, self.rng = model, np.random.default_rng(seed)
        self.length = min(LENGTH, model.max_context)
        self.slots = model.slots(ROWS, self.length, None)
        self.rows = [Written([], []) for _ in range(ROWS)]
        self.gap = 0.0
        for row, length in enumerate((3, 1, 12, 7)):
            self.start(row, length)

    def start(self, row: int, length: int) -> None:
        prompt = self.rng.integers(3, VOCAB, length).tolist()
        self.slots.start(np.array([row]), [prompt])
        begin = list(self.model.begin)
        self.rows[row] = Written(prompt, begin) if begin else Written([], prompt)

    def fork(self, src: int, dst: int) -> None:
        self.slots.fork(np.array([src]), np.array([dst]))
        self.rows[dst] = Written(self.rows[src].source, list(self.rows[src].ids))

    def check(self, rows: Any) -> None:
        found = self.slots.propose(rows, np.zeros(len(rows), bool)).logprobs
        for place, row in enumerate(rows):
            gap = np.abs(found[place] - self.expected(self.rows[row])).max()
            self.gap = max(self.gap, float(gap) if np.isfinite(gap) else np.inf)

    def expected(self, row: Written) -> Any:
        return self.model.uncached(row.source, row.ids).float().log_softmax(-1).numpy()

    def advance(self, rows: Any) -> None:
        room = np.array([row for row in rows if len(self.rows[row].ids) < self.length])
        tokens = self.rng.integers(3, VOCAB, len(room))
        self.slots.advance(room, tokens)
        for row, token in zip(room, tokens, strict=True):
            self.rows[row].ids.append(int(token))

    def run(self, steps: int) -> float:
        """Return the largest difference of a log-probability in so many steps, nats."""
        saved: Any = None
        for step in range(steps):
            rows = np.arange(ROWS) if step % 3 else self.rng.permutation(ROWS)[: self.rng.integers(1, ROWS + 1)]
            self.check(rows)
            if step == 1:
                self.fork(0, 1)
            elif step == 2:
                saved = self.slots.save(2), Written(self.rows[2].source, list(self.rows[2].ids))
            elif step == 3:
                self.start(3, 5)
            elif step == 5:
                self.slots.load(1, saved[0])
                self.rows[1] = saved[1]
            elif step == 6:
                self.slots.rebuild()
            self.advance(rows)
        return self.gap


# --- the table


@dataclass
class Line:
    """One class of the table."""

    kind: str
    name: str
    result: str  # exact, approximate, refused, crashed, not built
    way: str = ""
    far: str = ""  # how it runs beyond its windows
    note: str = ""
    seconds: float = field(default=0.0, compare=False)


def measured(kind: str, seq2seq: bool, steps: int) -> Line:
    """Build a class, run it, and say how it went."""
    names = (SEQ2SEQ if seq2seq else CAUSAL)[kind]
    line = Line(kind, names if isinstance(names, str) else names[0], "not built")
    began = time.perf_counter()
    try:
        module = build(kind, seq2seq)
    except Exception as error:  # the libraries raise dozens of kinds
        line.note = _first_line(error)
        return line
    try:
        model = wrapped(module)
        course = Course(model)
        line.way, line.far = model.decoder.name, model.decoder_for(course.length).name
        gap = course.run(steps)
        line.result, line.note = ("exact" if gap <= TOLERANCE else "approximate"), f"{gap:.0e}"
    except TextGenError as error:
        line.result, line.note = "refused", str(error).rsplit(";", 1)[-1].strip()
    except Exception as error:  # a fault of ours: the table goes on and shows it
        line.result, line.note = "crashed", f"{type(error).__name__}: {_first_line(error)}"
    line.seconds = time.perf_counter() - began
    return line


def _first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[-1].strip() or type(error).__name__
    return text[:120].replace("|", "/")


def lines(kinds: list[str], steps: int) -> Iterator[Line]:
    """Yield the lines of the table, one a class."""
    for seq2seq, names in ((False, CAUSAL), (True, SEQ2SEQ)):
        for kind in names:
            if not kinds or kind in kinds:
                yield measured(kind, seq2seq, steps)


def page(found: list[Line]) -> str:
    """Return the page of the documentation."""
    counts = Counter(line.result for line in found)
    built = sum(counts.values()) - counts["not built"]
    rows = [
        f"| `{x.name}` | {x.result} | {x.way}{f'; {x.far}' if x.far != x.way else ''} | {x.note} |"
        for x in sorted(found, key=lambda line: (line.result == "not built", line.name.lower()))
    ]
    return HEAD.format(
        version=transformers.__version__,
        total=len(found),
        built=built,
        share=counts["exact"] / max(1, built),
        **{name: counts[name] for name in ("exact", "approximate", "refused")},
        unbuilt=counts["not built"],
        table="\n".join(rows),
    )


HEAD = """# Models

Every class of `AutoModelForCausalLM` and `AutoModelForSeq2SeqLM` in transformers {version}, built small with random
weights and run in float32 against its own uncached forward: ragged rows, forks, restarts, saved and loaded rows,
rebuilt caches, windows of 8 tokens passed. `python -m benchmarks.models --out docs/models.md` makes this page;
`--quick` is a shorter course.

Of {total} classes {built} could be built small: {exact} are exact to 1e-4 nats ({share:.0%}), {approximate} approximate
and {refused} refused. {unbuilt} could not be built from a shrunken configuration alone; they are named at the end. The
engine checks every model once at loading, so a class that is not in the table is run exactly or refused.

A GGUF file is read by transformers: of GPT-2, Llama, Mistral, Qwen 2 and 3, Gemma 2, 3 and 4, LFM2, Phi-3, Falcon,
Bloom, StableLM, StarCoder2, Nemotron, Mamba and a few others; it says which it does not know. The file is converted
once. Plain weights (F32, F16) keep their precision, quantized ones become bfloat16.

The ways to run a model, fastest first; the first that agrees with the model's own uncached forward is taken:

| way | how it runs |
|---|---|
| lean | our own forward of Llama and its relatives |
| packed | the model's forward over our cache of keys and values: ragged rows without padding |
| own cache | the cache that the model makes for itself, rows of different lengths in one forward |
| own cache, equal lengths | the same, rows of equal length share a forward |
| own cache, row by row | for models whose rows change each other |
| uncached | the whole text again for each token: exact, and slow |

Two ways in a line: the first for texts within the smallest window, the second beyond it. The last column is the largest
difference of a log-probability in nats, or the reason.

| class | result | way | difference or reason |
|---|---|---|---|
{table}
"""


def main() -> int:
    """Print the table, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all unless said")
    parser.add_argument("--quick", action="store_true", help=f"a course of {QUICK_STEPS} steps instead of 20")
    parser.add_argument("--out", type=Path, help="write the page there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    found = []
    for line in lines(arguments.kinds, QUICK_STEPS if arguments.quick else 20):
        found.append(line)
        print(f"{line.result:12} {line.kind:24} {line.way} / {line.far} {line.note} {line.seconds:.1f}s", flush=True)
    print(Counter(line.result for line in found))
    if arguments.out:
        arguments.out.write_text(page(found), encoding="utf-8")
    return int(any(line.result in ("approximate", "crashed") for line in found))


if __name__ == "__main__":
    sys.exit(main())
