"""What all tests share: no network, and one tiny pretrained-like model."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # silences a warning in tests that fork
import pytest

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads

WORDS = ("<end>", "<unk>", "the", "film", "was", "good", "bad", "and", "long", ".")


@pytest.fixture(scope="session")
def tiny_lm():
    """A random Llama of 3,000 parameters with a tokenizer of ten words: ``(model, tokenizer)``."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,  # distributions far from uniform
        bos_token_id=None,
        eos_token_id=0,
        dtype="float32",
        architectures=["LlamaForCausalLM"],  # as save_pretrained notes it
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def state_of(model, tokenizer):
    """What a test could leave changed in a model and a tokenizer that all tests share."""
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    learns = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    return weights, learns, modes, model.config.to_dict(), tokenizer.special_tokens_map, tokenizer.padding_side


@pytest.fixture(autouse=True)
def shared_model_stays(request):
    """A test that changes ``tiny_lm`` fails itself, not one that comes after it in some order."""
    shared = request.getfixturevalue("tiny_lm") if "tiny_lm" in request.fixturenames else None
    before = shared and state_of(*shared)
    yield
    assert shared is None or state_of(*shared) == before, "the test changed tiny_lm: change a copy"


@pytest.fixture
def closing_event_loops(monkeypatch):
    """Event loops that are left open, as gradio leaves one for each lock of a page, are closed after the test."""
    made, new_event_loop = [], asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: made.append(new_event_loop()) or made[-1])
    yield
    asyncio.set_event_loop(None)
    for loop in made:
        loop.close()


@pytest.fixture
def launched(closing_event_loops, monkeypatch):
    """Pages that were launched, and how: ``[(page, settings)]``. Nothing is served."""
    gradio = pytest.importorskip("gradio", reason="the page needs textgen-env[play]")
    calls = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **settings: calls.append((page, settings)))
    return calls


@pytest.fixture(scope="module")
def blank_pictures():
    """Runs leave pictures without a stroke: drawing two takes most of the time of a short run."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **settings: path.write_bytes(b"\x89PNG"))
        yield


LONGEST = (
    "test_ray.py",
    "test_any_model.py",
    "test_text_dqn.py",
    "test_benchmark.py",
    "test_checkpoint.py",
    "test_engine.py",
    "test_pruning.py",
    "test_adapters.py",
)
"""Files that take half a minute or more, the longest first."""


def pytest_collection_modifyitems(items):
    """Put long files first: with ``--dist loadfile`` one that begins at the end holds up all.

    After those of ``LONGEST`` come those with the most slow tests.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.name, len(place)), -slow[item.path]))


def pytest_terminal_summary(terminalreporter):
    from fuzzing import tried

    if tried:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(tried.items()))
        terminalreporter.write_line(f"fuzzed: {counts}")
