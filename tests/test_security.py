"""What is read from others, a file, a pattern, a schema, runs no code, hangs nothing, and writes nowhere else.

Agents (zip, folder, replay) have their malicious pickles in ``test_portable``.
"""

from __future__ import annotations

import ast
import json
import pickle
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.pruning.healing import read_state
from agents.runs.config import RunConfig
from agents.runs.files import CONFIG_FILE
from agents.runs.run import load_run, train
from textgen_env.config import EnvConfig
from textgen_env.errors import ConfigError, ModelError, PromptError, RunFolderError, TextGenError
from textgen_env.models import load_language_model
from textgen_env.prompts import make_prompts
from textgen_env.rewards import Generation, make_reward
from textgen_env.rewards.linear import WordClassifier

ROOT = Path(__file__).parents[1]
FOLDERS = ("textgen_env", "agents", "benchmarks", "examples", "scripts")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


class Bomb:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """What a bomb leaves behind; the test fails if it is there at the end."""
    path = tmp_path / "the bomb went off"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists()  # it does go off
    path.unlink()
    yield path
    assert not path.exists()


# --- malicious files


@pytest.mark.parametrize("write", [partial(pickle.dump, protocol=2), torch.save], ids=["pickle", "torch"])
def test_security_a_pickle_in_a_checkpoint_of_distillation_does_not_run(tmp_path, mark, write):
    path = tmp_path / "distil.pt"
    with path.open("wb") as file:
        write({"settings": {}, "losses": Bomb(mark)}, file)
    with pytest.raises(RunFolderError, match="damaged"):
        read_state(path)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "classifier.json", "config.json", "model.gguf"])
def test_security_a_pickle_in_place_of_a_text_file_does_not_run(tmp_path, mark, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb(mark)))
    readers = {
        "prompts.txt": make_prompts,
        "prompts.jsonl": make_prompts,
        "classifier.json": WordClassifier.load,
        "config.json": lambda path: RunConfig.from_json(Path(path).read_text("latin-1")),
        "model.gguf": load_language_model,
    }
    with pytest.raises((ConfigError, PromptError, ModelError)):
        readers[name](str(path))


def test_security_a_pickle_in_a_model_folder_does_not_run(tmp_path, mark, tiny_lm):
    model, tokenizer = tiny_lm
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(mark)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could be loaded"):
        load_language_model(str(tmp_path / "model"))


def test_security_code_in_a_model_folder_does_not_run(tmp_path, mark, tiny_lm):
    model, tokenizer = tiny_lm
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Own: ...\n")
    with pytest.raises(ModelError):
        load_language_model(str(folder))


@pytest.mark.slow
def test_security_no_source_unpickles_or_trusts_remote_code():
    """Each call that could run what a file holds is named with what keeps it from doing so."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"cloudpickle", "dill", "joblib", "marshal", "shelve"}, path
                assert "pickle" not in {alias.name for alias in node.names}, path
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", path
            assert keywords.get("trust_remote_code", "False") != "True", path
            assert keywords.get("allow_pickle", "False") == "False", path
            assert name not in ("eval", "exec", "os.system"), path


def test_security_remote_code_is_off_and_a_file_cannot_switch_it_on(tmp_path):
    assert EnvConfig().trust_remote_code is False
    text = RunConfig(env={"trust_remote_code": True}).to_json()
    with pytest.raises(ConfigError, match="only what you trust"):
        RunConfig.from_json(text)
    assert RunConfig.from_json(text, trust=True).env_config().trust_remote_code
    (tmp_path / CONFIG_FILE).write_text(text)
    (tmp_path / "agent.zip").touch()
    with pytest.raises(ConfigError, match="--trust"):
        load_run(tmp_path)


# --- what a configuration may write


@pytest.mark.slow
def test_security_a_configuration_writes_nowhere_but_in_its_run_folder(tmp_path, tiny_lm, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(ConfigError, match="tensorboard_log"):
        RunConfig(agent="dqn", agent_settings={"tensorboard_log": str(tmp_path / "elsewhere")})
    names = {
        "agent_settings": {"learning_starts": 0},
        "env": {"max_new_tokens": 2, "min_new_tokens": 0, "top_k": 3, "dtype": "float32"},
    }
    config = RunConfig(prune=None, steps=40, envs=4, eval_prompts=1, eval_texts=4, eval_samples=2, **names)
    train(config, tmp_path / "run", model=tiny_lm, prompts=["the film"], reward="length")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "run"]
    assert not [*here.iterdir()]


@pytest.mark.parametrize("field", ["model", "prompts"])
def test_security_a_path_in_a_configuration_is_read_and_never_made(tmp_path, field):
    with pytest.raises(TextGenError):
        train(RunConfig(prune=None, **{field: str(tmp_path / "x" / "y.txt")}), tmp_path / "run")
    assert not [*tmp_path.iterdir()]


# --- patterns that backtrack, schemas that branch

SLOW = "^(a|a)+$"  # 2^n ways to read n times "a"
VICTIM = "a" * 60 + "b"


def branching(levels):
    """A schema of a few lines that asks 2^levels questions."""
    definitions = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)}
    return {
        "$defs": {**definitions, f"d{levels}": {"minLength": 0}},
        "type": "string",
        "allOf": [{"$ref": "#/$defs/d0"}],
    }


SLOW_REWARDS = {
    "regex": ({"name": "regex", "pattern": SLOW}, VICTIM),
    "pattern": ({"name": "json", "schema": {"pattern": SLOW}}, json.dumps(VICTIM)),
    "key": ({"name": "json", "schema": {"patternProperties": {SLOW: False}}}, json.dumps({VICTIM: 1})),
    "other keys": (
        {"name": "json", "schema": {"patternProperties": {SLOW: {}}, "additionalProperties": False}},
        json.dumps({VICTIM: 1}),
    ),
    "inner key": (
        {"name": "json", "schema": {"propertyNames": {"pattern": SLOW}}},
        json.dumps({VICTIM: 1}),
    ),
    "references": ({"name": "json", "schema": branching(40)}, json.dumps("text")),
}


@pytest.mark.parametrize("kind", SLOW_REWARDS)
def test_security_a_pattern_or_schema_given_as_a_reward_cannot_hang(kind):
    spec, text = SLOW_REWARDS[kind]
    started = time.monotonic()
    with pytest.raises(TextGenError, match=r"took more than 0.3 s|cannot be followed"):
        make_reward({**spec, "timeout": 0.3})([Generation("", text)])
    assert time.monotonic() - started < 30  # it would take thousands of years


def test_security_a_schema_whose_patterns_know_no_limit_is_refused():
    with pytest.raises(ConfigError, match="use additionalProperties"):
        make_reward(
            {"name": "json", "schema": {"patternProperties": {"a": {}}, "not": {"unevaluatedProperties": False}}}
        )
    with pytest.raises(ConfigError, match="cannot be followed"):
        make_reward({"name": "json", "schema": {"$ref": "#"}})
    with pytest.raises(ConfigError, match="cannot be followed"):
        make_reward({"name": "json", "schema": {"$ref": "http://127.0.0.1:9/schema"}})
    with pytest.raises(ConfigError, match="not a JSON schema"):
        make_reward({"name": "json", "schema": {"pattern": "("}})


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "^a+$"},
        {"patternProperties": {"^a": {"type": "integer"}}},
        {"properties": {"b": True}, "patternProperties": {"^a": True}, "additionalProperties": False},
        {"properties": {"b": True}, "additionalProperties": {"type": "string"}},
        {"items": {"$ref": "#"}, "maxItems": 2},
    ],
)
@pytest.mark.parametrize(
    "value", ["aa", "ba", 3, [[], [[]]], [1, 2, 3], {"a": 1}, {"ab": "x"}, {"b": 2}, {"c": "s"}, {"c": 1}]
)
def test_the_timed_schema_says_what_jsonschema_says(schema, value):
    from jsonschema import Draft202012Validator

    expected = 1.0 if Draft202012Validator(schema).is_valid(value) else 0.5
    assert make_reward({"name": "json", "schema": schema})([Generation("", json.dumps(value))]) == [expected]


@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, "[" * 100_000, "1" * 5_000, "1e400", "1" + "0" * 400])
def test_security_a_text_that_is_too_deep_or_too_large_is_scored(text):
    schema = {"items": {"$ref": "#"}, "multipleOf": 0.5}
    scores = make_reward({"name": "json", "schema": schema})([Generation("", text)])
    assert np.isin(scores, (0.0, 0.5, 1.0)).all()
