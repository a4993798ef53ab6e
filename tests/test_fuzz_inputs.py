"""Stored runs, lines with half surrogates, bounds of spaces, command lines: a documented error or a result."""

from __future__ import annotations

import copy
import json
import math

import pytest
from fuzzing import examples, no_hang, tried
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_readers import JSON, damaged_bytes, damaged_json, open_env, outcome
from typer.testing import CliRunner

from agents.cli.app import app
from agents.runs import run as runs
from agents.runs.config import RunConfig
from agents.runs.log import RunLog
from agents.text_dqn.agent import TextDQN
from textgen_env.errors import ConfigError
from textgen_env.prompts import make_prompts
from textgen_env.terminal import printable

TEXT = st.text(st.characters(codec=None) | st.characters(categories=["Cs", "Cc", "Mn", "Zl"]), max_size=8)
TREE = st.recursive(TEXT | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


def test_lines_of_any_text_are_refused_when_they_are_opened_or_can_be_written(folder):
    line = st.fixed_dictionaries(
        {"prompt": TEXT}, optional={"reference": TEXT | st.none(), "metadata": TREE, "x\ud800": TREE}
    )

    @examples(100, 2_000)
    @given(st.lists(line, min_size=1, max_size=3))
    def check(rows):
        path = folder / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        source = outcome(lambda: make_prompts(str(path)), True)
        if source is not None:
            for prompt, row in zip(source, rows, strict=True):
                assert prompt.text == row["prompt"]
                (
                    prompt.text + (prompt.reference or "") + json.dumps(dict(prompt.metadata), ensure_ascii=False)
                ).encode()

    check()


@examples(300, 5_000)
@given(st.text(st.characters(codec=None)))
def test_what_is_shown_can_be_written_and_holds_no_control_character(text):
    tried["inputs"] += 1
    shown = printable(text, one_line=True)
    shown.encode()
    assert not any((ord(c) < 32 and c != "\t") or 127 <= ord(c) < 160 for c in shown)


# --- stored runs

SUMMARY = {"finished": False, "steps": 10, "episodes": 2, "report": None, "versions": {"python": "3.11"}}
LOG = {
    "rows": [{"steps": 16.0, "seconds": 0.5}],
    "steps": 16,
    "seconds": 0.5,
    "next_row": 20,
    "next_checkpoint": 40,
    "logged": {"name_to_value": {"run/reward": 0.5}, "name_to_count": {}, "name_to_excluded": {}},
    "episodes": 2,
    "latest": [[0.5, 4.0]],
    "parts": [{"length": 1.0}],
}


@pytest.mark.slow
def test_damaged_files_of_a_run_are_refused_or_lead_to_its_opening(folder, monkeypatch):
    def opened(*_, **__):
        raise ConfigError("as far as this")

    monkeypatch.setattr(runs, "open_run", opened)
    config = json.loads(RunConfig().to_json())

    summaries = damaged_json(SUMMARY).map(lambda d: json.dumps(d).encode())

    @examples(100, 1_500)
    @given(damaged_json(config), summaries | damaged_bytes(json.dumps(SUMMARY).encode()))
    def check(settings, summary):
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "summary.json").write_bytes(summary)
        for read in (runs.resume, runs.load_run):
            assert outcome(lambda read=read: read(folder), True) is None

    check()


@pytest.mark.slow
def test_a_damaged_log_of_a_checkpoint_is_refused_or_restored(folder):
    from rich.console import Console

    @examples(150, 2_000)
    @given(damaged_json(LOG))
    def check(log):
        def read():
            found = RunLog(folder, RunConfig(), Console(quiet=True))
            found.restore(copy.deepcopy(log))
            return found

        found = outcome(read, True)
        if found is not None:
            assert found.steps == int(log["steps"])
            found.rows.append({})

    check()


# --- spaces of an agent


def test_damaged_bounds_of_an_agent_s_spaces_are_refused_or_kept(folder):
    env = open_env()
    TextDQN("CandidatePolicy", env, buffer_size=100).save_pretrained(folder / "agent")
    start = json.loads((folder / "agent" / "agent.json").read_text())
    observation, _ = env.reset(seed=0)
    sizes = st.sampled_from([0, 1, -1, 4, 10**6, 10**12, 2**63, 1.5, math.inf, math.nan, None, "4", [4], True])
    key = st.sampled_from(sorted(start["observation_space"]))

    @examples(40, 500)
    @given(key, st.sampled_from(["low", "high", "shape", "dtype"]), st.lists(sizes, max_size=3) | sizes | JSON)
    def check(name, part, value):
        document = copy.deepcopy(start)
        document["observation_space"][name][part] = value
        (folder / "agent" / "agent.json").write_text(json.dumps(document))
        loaded = outcome(lambda: TextDQN.from_pretrained(folder / "agent", env), True)
        if loaded is not None:
            loaded.predict(observation)

    check()


# --- command lines

NOWHERE = {  # each ends before a model loads
    "train": ["--model", "/nowhere/model"],
    "generate": ["--model", "/nowhere/model"],
    "evaluate": ["/nowhere/run"],
    "record": ["--model", "/nowhere/model", "--out", "/nowhere/data"],
    "prune": ["/nowhere/model", "--out", "/nowhere/out"],
    "benchmark": ["--tasks", "Nowhere"],
    "list": ["nowhere"],
}
NAMES = """
steps envs seed seeds beta top-k max-new-tokens min-new-tokens texts samples prompts prompt reward agent agents prune
config resume num engine address actors episodes amount method cuts heal text json greedy trust quick workers compare
candidate-scores checkpoint-every nothing
"""
OPTIONS = [f"--{name}" for name in NAMES.split()]
NUMBERS = ["-1", "0", "1", "1e99", "nan", "inf", "9" * 5000]
VALUES = [*NUMBERS, "", " ", "{", "[" * 2000, '{"name": 1}', "a:b", "é\ud800", "\x1b[2J"]
OPTION = st.tuples(st.sampled_from(OPTIONS), st.sampled_from(VALUES) | TEXT) | st.tuples(st.sampled_from(OPTIONS))


@pytest.mark.slow
@examples(120, 1_500)
@given(st.sampled_from(sorted(NOWHERE)), st.lists(OPTION, max_size=4))
def test_a_damaged_command_line_ends_in_an_error_and_not_in_a_traceback(command, options):
    tried["malformed inputs"] += 1
    arguments = [command, *NOWHERE[command], *(part for option in options for part in option)]
    with no_hang():
        result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code == 2, (arguments, result.output)
    assert "\x1b[2J" not in result.output
