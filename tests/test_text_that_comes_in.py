"""Half of a surrogate pair, empty cells, deep and binary JSON: refused where they come in, by name."""

from __future__ import annotations

import json
import zipfile

import datasets
import pytest
from typer.testing import CliRunner

from agents.cli.app import app
from agents.distributed.connection import probe
from agents.runs.config import RunConfig
from agents.text_dqn.portable import read_pretrained, read_zip
from textgen_env.errors import ConfigError, PromptError, TextGenError
from textgen_env.files import MOST_BYTES
from textgen_env.prompts import Prompt, make_prompts
from textgen_env.rewards import make_reward
from textgen_env.tasks import open_task

HALF = "a\ud800b"


@pytest.mark.parametrize(
    "settings",
    [
        {"text": HALF},
        {"text": "a", "reference": HALF},
        {"text": "a", "metadata": {"keywords": ["b", HALF]}},
        {"text": "a", "metadata": {"x": {HALF: 1}}},
    ],
)
def test_half_of_a_surrogate_pair_is_refused_in_every_part_of_a_prompt(settings, tmp_path):
    with pytest.raises(PromptError, match=r"lone surrogate"):
        Prompt(**settings)
    line = {"prompt": settings["text"], "reference": settings.get("reference"), **settings.get("metadata", {})}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "good"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(PromptError, match=r"a\.jsonl, line 2: .* lone surrogate"):
        make_prompts(str(path))


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "keywords", "words": ["a", HALF]},
        [[{"name": "regex", "pattern": HALF}, 1.0]],
        {"name": "json", "schema": {"const": {HALF: 1}}},
        HALF,
    ],
)
def test_half_of_a_surrogate_pair_is_refused_in_the_settings_of_rewards_and_runs(spec):
    with pytest.raises(ConfigError, match="lone surrogate"):
        make_reward(spec)
    with pytest.raises(ConfigError, match="lone surrogate"):
        RunConfig(reward=spec)


@pytest.mark.parametrize(
    "settings", [{"model": HALF}, {"prompts": HALF}, {"env": {"stop": [HALF]}}, {"agent_settings": {HALF: 1}}]
)
def test_half_of_a_surrogate_pair_is_refused_in_a_configuration(settings):
    with pytest.raises(ConfigError, match="lone surrogate"):
        RunConfig(**settings)
    with pytest.raises(ConfigError, match="lone surrogate"):
        RunConfig.from_json(json.dumps(settings))


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "tiny", "--prompt", HALF],
        ["train", "--model", HALF, "--steps", "1", "--out", "x"],
        ["train", "--prompts", HALF, "--out", "x"],
        ["train", "--reward", json.dumps({"name": "keywords", "words": [HALF]}), "--out", "x"],
        ["benchmark", "--tasks", HALF],
        ["benchmark", "--agents", HALF],
        ["list", HALF],
        ["record", "--model", "tiny", "--prompts", HALF, "--out", "x"],
        ["prune", HALF, "--out", "x"],
    ],
)
def test_command_lines_with_bytes_that_are_no_text_end_in_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_empty_cell_of_a_dataset_is_found_when_it_is_opened():
    rows = [{"prompt": "a", "reference": "b"}] * 1500
    full = datasets.Dataset.from_list([*rows, {"prompt": "c", "reference": None}])
    assert make_prompts(full)[1500] == Prompt("c")  # no reference is none
    holed = datasets.Dataset.from_list([*rows, {"prompt": None, "reference": "b"}])
    with pytest.raises(PromptError, match="row 1500 of the dataset: a prompt must be a string, got NoneType"):
        make_prompts(holed)
    with pytest.raises(PromptError, match="row 0 of the dataset: a prompt must be a string, got int"):
        make_prompts(datasets.Dataset.from_list([{"prompt": 1}]))


# --- JSON

DAMAGED = (b"[" * 100_000, b"\xff\xfe\x00", b"1" * 10_000, b"{" * 200 + b"}" * 200, b"", b"\x00")


@pytest.mark.parametrize("content", DAMAGED)
def test_deep_and_binary_json_is_named(content, tmp_path):
    (tmp_path / "agent.json").write_bytes(content)
    with pytest.raises(ConfigError):
        read_pretrained(tmp_path)
    with zipfile.ZipFile(tmp_path / "agent.zip", "w") as archive:
        archive.writestr("data", content)
    with pytest.raises(ConfigError):
        read_zip(tmp_path / "agent.zip")
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(PromptError):
        make_prompts(str(tmp_path / "prompts.jsonl"))
    text = content.decode("latin-1")
    with pytest.raises(ConfigError):
        RunConfig.from_json(text)
    with pytest.raises(TextGenError):
        open_task(f"TextGen/Needle-v0:depth={text}")


@pytest.mark.slow
def test_a_zip_that_unpacks_to_more_than_a_settings_file_may_have_is_not_unpacked(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("data", "w") as file,
    ):
        for _ in range(MOST_BYTES // (1 << 20) + 1):
            file.write(bytes(1 << 20))
    assert (tmp_path / "bomb.zip").stat().st_size < 1 << 20
    with pytest.raises(ConfigError, match="more than"):
        read_zip(tmp_path / "bomb.zip")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 10**30},
        {"steps": 0},
        {"envs": 10**9},
        {"seed": 2**32},
        {"seed": -1},
        {"eval_texts": 10**12},
        {"checkpoint_every": 1e89},
        {"eval_samples": 1},
        {"env": {"max_new_tokens": 10**8}},
        {"env": {"top_k": 10**12}},
    ],
)
def test_numbers_of_a_run_have_ranges(change):
    with pytest.raises(ConfigError, match="whole number"):
        RunConfig.from_json(json.dumps(change))


@pytest.mark.parametrize(
    "address", ["host:0", "host:65536", "host:" + "9" * 5000, "host:-1", "h\ud800:1", ":1", "host:"]
)
def test_an_address_has_a_port(address):
    with pytest.raises(ConfigError, match="port from 1 to 65535"):
        probe(address, 1.0)
