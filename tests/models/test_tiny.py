"""The model in the box: it is whole, ships with the package, reads any text, and writes English."""

from __future__ import annotations

import configparser
import inspect
import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import textgen_env.models.hub
from agents.runs.config import RunConfig
from textgen_env import TextGenEnv, TextGenVectorEnv, make_prompts
from textgen_env.errors import ModelError
from textgen_env.models import load_language_model
from textgen_env.models.hub import TINY

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in TINY.iterdir())


@pytest.fixture(scope="module")
def tiny():
    return load_language_model("tiny", "float32")


# --- the files


def test_the_folder_is_small_and_every_file_has_a_checksum():
    assert sum((TINY / name).stat().st_size for name in FILES) <= 5 << 20
    assert sorted(json.loads((TINY / "checksums.json").read_text())) == [n for n in FILES if n != "checksums.json"]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the model's folder, which ``"tiny"`` means during the test."""
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    monkeypatch.setattr(textgen_env.models.hub, "TINY", folder)
    monkeypatch.setattr(textgen_env.models.hub, "_loaded", {})
    return folder


@pytest.mark.parametrize("name", [n for n in FILES if n != "checksums.json"])
def test_a_damaged_or_missing_file_is_named_with_its_checksum(copied, name):
    expected = json.loads((copied / "checksums.json").read_text())[name]
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name} is damaged: .* expected {expected}"):
        gym.make("TextGen-v0")
    (copied / name).unlink()
    with pytest.raises(ModelError, match=rf"{name} is missing \(expected SHA-256 {expected}\)"):
        load_language_model("tiny")


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff"])
def test_missing_or_damaged_checksums_are_named(copied, content):
    (copied / "checksums.json").unlink()
    if content is not None:
        (copied / "checksums.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"checksums.json is missing or damaged"):
        load_language_model("tiny")


def test_the_package_ships_the_folder():
    shipped = configparser.ConfigParser()
    shipped.read(ROOT / "setup.cfg")
    patterns = shipped["options.package_data"]["textgen_env"].split()
    package = ROOT / "textgen_env"
    assert {TINY / name for name in FILES} <= {path for pattern in patterns for path in package.glob(pattern)}


# --- the defaults


def test_it_is_the_default_of_everything():
    for entry in (TextGenEnv, TextGenVectorEnv):
        parameters = inspect.signature(entry.__init__).parameters
        defaults = {name: parameters[name].default for name in ("model", "prompts", "reward")}
        assert defaults == {name: getattr(RunConfig(), name) for name in defaults}
    assert RunConfig().model == "tiny"
    assert gym.make("TextGen-v0").unwrapped.language_model.name == "tiny"


def test_the_default_prompts_are_many_and_every_split_has_some():
    parts = [{prompt.text for prompt in make_prompts(f"openings:{part}")} for part in ("train", "validation", "test")]
    assert all(len(part) >= 20 for part in parts)
    assert len(set.union(*parts)) == sum(map(len, parts)) == len(make_prompts(None)) >= 200


# --- what it reads and writes


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = load_language_model("tiny", "float32").tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_transformers_loads_the_folder_as_it_is(tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    assert plain.dtype == torch.float16
    assert 1_000_000 <= plain.num_parameters() <= 2_500_000
    assert tokenizer.eos_token_id == plain.generation_config.eos_token_id == tiny.end_ids[0]
    text = "The soup was cold, and"
    assert tokenizer(text)["input_ids"] == tiny.encode(text)


SENTENCES = (
    "The old man looked at the sea and smiled.",
    "I was so happy to see my sister again.",
    "The soup was cold and the service was slow.",
    "We walked through the forest until it was dark.",
    "My new boss is kind, but the work is hard.",
    "It has been a long time since I felt at home.",
)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_it_prefers_english_to_the_same_words_in_another_order(tiny, sentence):
    rng = np.random.default_rng(0)

    def likelihood(text):
        ids = tiny.encode(text)
        slots = tiny.slots(1, len(ids), None)
        row, total = np.zeros(1, int), 0.0
        slots.start(row, [ids[:1]])
        for token in ids[1:]:
            total += slots.propose(row, np.zeros(1, bool)).logprobs[0, token]
            slots.advance(row, np.array([token]))
        return total

    first, *words = sentence.split()
    shuffled = [" ".join([first, *rng.permutation(words)]) for _ in range(5)]
    assert likelihood(sentence) > max(likelihood(text) for text in shuffled if text != sentence) + 5
