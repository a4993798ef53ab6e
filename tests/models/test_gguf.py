"""GGUF files: read in their own precision, converted once, also by two processes, and after a kill."""

from __future__ import annotations

import signal
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from forked import Forked, program
from gguf import MODEL_ARCH, GGMLQuantizationType

import textgen_env.models.hub
from textgen_env import load_language_model
from textgen_env.errors import ModelError
from textgen_env.models import model_folder

TOKENS = ["<end>", *map(chr, range(97, 97 + 26)), "Ġ", ".", "he", "Ġt", "Ġthe"]
SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path, architecture, tensors, quantized=(), **settings):
    """Write a file with ``TOKENS`` as its vocabulary; settings are those of the format, without the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in settings.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["h e", "Ġ t", "Ġt he"])
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    for name, tensor in tensors.items():
        if name in quantized:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of_llama(width=32, inner=48):
    """Return tensors of a Llama of one layer, by their names in the format; thirds have no short binary form."""
    shapes = {
        "token_embd": (32, width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (16, width),
        "blk.0.attn_v": (16, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.integers(-8, 8, shape).astype(np.float32) / 3 for name, shape in shapes.items()}
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        tensors[f"{name}.weight"] = np.ones(width, np.float32)
    return tensors


LLAMA = {
    "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 48,
    "attention__head_count": 2, "attention__head_count_kv": 1, "attention__layer_norm_rms_epsilon": 1e-5,
    "rope__dimension_count": 16, "vocab_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A Llama of one layer in GGUF form, and the token embeddings written into it."""
    tensors = tensors_of_llama()
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", tensors, **LLAMA)
    return path, tensors["token_embd.weight"]


# --- what is in a file


def test_a_gguf_file_becomes_a_folder_with_its_weights_and_tokenizer(gguf_file, cache):
    path, embeddings = gguf_file
    model = load_language_model(path, dtype="float32")
    np.testing.assert_array_equal(model.embed(np.arange(32)), embeddings)
    assert model.end_ids == (0,)
    assert model.encode("a the.") == [1, 31, 28]
    assert model.decode([1, 31, 28, 0]) == "a the."
    (made,) = cache.glob("tiny-*")
    assert model_folder(str(path)) == str(made)
    assert not list(cache.glob("*half-made"))


def test_quantized_weights_are_kept_in_bfloat16(cache, tmp_path):
    tensors = tensors_of_llama()
    name = "token_embd.weight"
    path = write_gguf(tmp_path / "small.gguf", "llama", tensors, quantized=(name,), **LLAMA)
    kind = GGMLQuantizationType.Q8_0
    dequantized = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind))
    found = load_language_model(path, dtype="float32").embed(np.arange(32))
    np.testing.assert_array_equal(found, dequantized.bfloat16().float().numpy())


def qwen3():
    from transformers import Qwen3Config

    return Qwen3Config(**SIZES, head_dim=128), MODEL_ARCH.QWEN3, {}


def gemma3():
    from transformers import Gemma3TextConfig

    settings = {"attention__key_length": 256, "attention__sliding_window": 16}
    return Gemma3TextConfig(**SIZES, head_dim=256, sliding_window=16), MODEL_ARCH.GEMMA3, settings


def lfm2():
    from transformers import Lfm2Config

    config = Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)
    return config, MODEL_ARCH.LFM2, {"attention__head_count_kv": [0, 1, 0], "shortconv__l_cache": config.conv_L_cache}


def in_the_format(architecture, name, tensor):
    """Return a tensor as the format has it: Gemma's norms with their 1, convolutions without their single channel."""
    if architecture == "gemma3" and "norm" in name:
        return tensor + 1
    return tensor.squeeze(1) if "shortconv.conv" in name else tensor


@pytest.mark.parametrize("family", [qwen3, gemma3, lfm2])
def test_other_families_are_read_exactly(family, cache, tmp_path):
    from transformers import AutoModelForCausalLM

    config, kind, settings = family()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    names, tensors = gguf.get_tensor_name_map(kind, config.num_hidden_layers), {}
    for name, weight in model.state_dict().items():
        place = names.get_name(name, try_suffixes=(".weight",))
        if name != "lm_head.weight":  # the embeddings
            tensors[place] = in_the_format(gguf.MODEL_ARCH_NAMES[kind], place, weight.numpy())
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    common = {
        "context_length": 64, "embedding_length": 32, "block_count": 3, "feed_forward_length": 48, "vocab_size": 32,
        "attention__head_count": 2, "attention__head_count_kv": 1, "rope__freq_base": rope["rope_theta"],
        "attention__layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None) or config.norm_eps,
    }  # fmt: skip
    path = write_gguf(tmp_path / "model.gguf", gguf.MODEL_ARCH_NAMES[kind], tensors, **(common | settings))

    read = load_language_model(path, dtype="float32")
    ids = torch.tensor([[5, 8, 27, 13, 30, *range(1, 21)]])  # longer than Gemma's window
    with torch.inference_mode():
        np.testing.assert_allclose(read.model(ids).logits, model(ids).logits, atol=1e-6)
    assert read.max_context == 64


def test_an_architecture_that_cannot_be_read_is_named(cache, tmp_path):
    path = write_gguf(tmp_path / "other.gguf", "olmo2", tensors_of_llama(), **LLAMA)
    with pytest.raises(ModelError, match=r"architecture olmo2 is not supported yet.*a folder in Hugging Face form"):
        load_language_model(path)


# --- the conversion


def test_a_changed_gguf_file_is_converted_again(gguf_file, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(textgen_env.models.hub, "_convert_gguf", lambda gguf, to: (to / "config.json").write_text("{}"))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    first = model_folder(str(path))
    assert model_folder(str(path)) == first
    path.write_bytes(b"another")
    assert model_folder(str(path)) != first


@pytest.mark.parametrize("keep", [0, 8, 2000])
def test_a_broken_gguf_file_is_named_and_leaves_nothing(gguf_file, cache, tmp_path, keep):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file[0].read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"broken.gguf' could not be read as a GGUF causal LM"):
        load_language_model(broken)
    assert not [path for path in cache.iterdir() if path.is_dir()]


CONVERT = "import sys; from textgen_env.models import model_folder; print(model_folder(sys.argv[1]))"
KILLED = f"""
import os, signal, transformers
transformers.PreTrainedModel.save_pretrained = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
{CONVERT}
"""


def run(source, path, folder):
    return Forked(folder, program, source, path)


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished(gguf_file, cache, tmp_path):
    killed = run(KILLED, gguf_file[0], tmp_path)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in cache.glob("*half-made/*")] != []  # it was in the middle
    assert not list(cache.glob("tiny-*"))

    again = model_folder(str(gguf_file[0]))
    assert Path(again, "config.json").is_file()
    assert not list(cache.glob("*half-made"))


@pytest.mark.slow
def test_two_processes_at_once_make_one_folder(gguf_file, cache, tmp_path):
    both = [run(CONVERT, gguf_file[0], tmp_path) for _ in range(2)]
    printed = [process.communicate().splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    (made,) = (path for path in cache.iterdir() if path.is_dir())
    assert printed == [str(made)] * 2
