"""Every file and setting that is read, damaged in every way: a documented error or a result.

Valid content is the start, and a strategy damages it: bytes of a file are cut, overwritten, doubled;
values of a JSON document are exchanged for others anywhere in the tree. Never a crash, a hang, or a
default in place of what was asked for, so a result is compared with what the content says.
"""

from __future__ import annotations

import copy
import json
import math
import zipfile
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from fuzzing import LARGE, examples, no_hang, tried
from hypothesis import given
from hypothesis import strategies as st
from toys import PROMPTS, TABLE, Worth, letters

from agents.baselines.one_step import SampleAgent
from agents.pruning.healing import read_state, write_state
from agents.pruning.methods import parse_pruning
from agents.runs.checkpoint import load_checkpoint, save_checkpoint
from agents.runs.config import RunConfig
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from agents.text_dqn.offline import fill_replay, open_dataset, record
from agents.text_dqn.replay import EpisodeReplay
from textgen_env import TableModel, TextGenVectorEnv, make_prompts, make_reward
from textgen_env.config import EnvConfig
from textgen_env.errors import TextGenError
from textgen_env.prompts import Prompt
from textgen_env.rewards import REWARDS, Generation, reward_spec
from textgen_env.rewards.linear import WordClassifier

LOADS_A_MODEL = {"transformers", "similarity", "fluency", "pipeline"}
TEXTS = [Generation("Once", text, reference="upon a time") for text in ("", "the sea, the sun", '{"a": [1, 2]}')]

JUNK = st.sampled_from(
    [None, True, False, 0, 1, -1, 3, 10**30, 0.5, -0.5, math.nan, math.inf, 1e308, "", " ", "a", "é\ud800", "\0", "1",
     "(a+)+$", "../../x", "/etc/passwd", [], [[]], {}, {"": None}, ["a"], [0], {"name": "length"}]
)  # fmt: skip
JSON = st.recursive(
    JUNK, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def places(tree, path=()):
    """The path of every value in a JSON document."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def damaged_json(draw, *starts):
    """A valid document with up to three values exchanged, left out, or added."""
    document = {"": copy.deepcopy(draw(st.sampled_from(starts)))}
    for _ in range(draw(st.integers(0, 3))):
        *path, last = draw(st.sampled_from([place for place in places(document) if place]))
        holder = document
        for key in path:
            holder = holder[key]
        match draw(st.sampled_from(["exchange", "exchange", "leave out", "add"])):
            case "leave out" if path:
                del holder[last]
            case "add" if isinstance(holder[last], dict):
                holder[last][draw(st.text(max_size=6))] = copy.deepcopy(draw(JSON))  # a drawn list is one list
            case _:
                holder[last] = copy.deepcopy(draw(JSON))
    return document[""]


@st.composite
def damaged_bytes(draw, content):
    """Bytes with up to three places cut off, overwritten, doubled, or removed."""
    content = bytes(content)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        until = min(at + draw(st.sampled_from([1, 1, 4, 64, len(content)])), len(content))
        new = draw(
            st.sampled_from([b"", content[at:until] * 2, b"\0", b"\xff", b"\n", b"[" * 5_000, b"9" * 5_000])
            | st.binary(max_size=8)
        )
        content = content[:at] + new + content[until:]
    return content


def outcome(read, kind, *content):
    """What ``read`` returns, or None after a documented error. Anything else fails the test."""
    tried["malformed inputs" if kind else "inputs"] += 1
    try:
        with no_hang():
            return read(*content)
    except TextGenError as error:
        return None if str(error).strip() else pytest.fail("an error without a message")


@pytest.fixture(scope="module")
def folder():
    with TemporaryDirectory() as path:
        yield Path(path)


# --- prompts


LINES = "Once upon a time\nThe film was\r\n\ufeffé \U0001f600\n".encode()
ROWS = b'{"prompt": "Once", "reference": "upon"}\n{"prompt": "The film", "topic": ["a", 1]}\n'


@pytest.mark.parametrize(("suffix", "start"), [("txt", LINES), ("jsonl", ROWS)])
def test_a_damaged_prompt_file_is_refused_or_read_whole(folder, suffix, start):
    path = folder / f"prompts.{suffix}"

    @examples(80, 1_500)
    @given(damaged_bytes(start) | st.binary(max_size=60))
    def check(content):
        path.write_bytes(content)
        source = outcome(make_prompts, True, str(path))
        if source is not None:
            lines = content.decode("utf-8-sig").split("\n")
            lines = lines[:-1] if lines[-1] == "" else lines
            expected = [json.loads(line)["prompt"] if suffix == "jsonl" else line.rstrip("\r") for line in lines]
            assert [prompt.text for prompt in source] == [source[i].text for i in range(len(source))] == expected

    check()


# --- settings


RUN = {**json.loads(RunConfig().to_json()), "model": "tiny"}
ENV = {field.name: field.default for field in fields(EnvConfig)}


@pytest.mark.slow
@examples(150, 2_000)
@given(damaged_json(RUN, RUN, {"agent": "dqn", "env": {"top_k": 4}}))
def test_a_damaged_run_configuration_is_refused_or_kept(document):
    text = json.dumps(document)
    config = outcome(RunConfig.from_json, True, text)
    if config is not None:
        assert RunConfig.from_json(config.to_json()) == config
        kept = json.loads(config.to_json())
        assert all(
            json.dumps(kept["env"][name]) == json.dumps(value) for name, value in document.get("env", {}).items()
        )
        assert all(json.dumps(kept[name]) == json.dumps(value) for name, value in document.items() if name != "env")


@examples(60, 600)
@given(damaged_bytes(RunConfig().to_json().encode()))
def test_a_run_configuration_of_damaged_bytes_is_refused_or_kept(content):
    config = outcome(RunConfig.from_json, True, content.decode("utf-8", "replace"))
    if config is not None:
        assert RunConfig.from_json(config.to_json()) == config


@examples(80, 1_000)
@given(damaged_json(ENV, {"top_k": None, "observation": ["tokens", "length"], "stop": ["."]}))
def test_damaged_environment_settings_are_refused_or_kept(document):
    if isinstance(document, dict) and all(isinstance(name, str) for name in document):
        config = outcome(EnvConfig.from_settings, True, document)
        if config is not None and "top_k" in document:
            assert config.top_k == document["top_k"]


@examples(60, 800)
@given(
    st.text("layersfn:+.0129-e_ ", max_size=12)
    | damaged_bytes(b"layers:0.1+ffn:0.23").map(lambda b: b.decode("latin-1"))
)
def test_a_damaged_pruning_is_refused_or_within_range(text):
    cuts = outcome(parse_pruning, True, text)
    assert cuts is None or all(0 <= amount < 1 for _, amount in cuts)


# --- rewards


SCHEMA = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/list"}},
    "required": ["a"],
    "additionalProperties": False,
    "patternProperties": {"^b+$": {"pattern": "(x+)+y", "minLength": 1}},
    "$defs": {"list": {"type": "array", "items": {"multipleOf": 0.5}}},
}
SPECS = [
    *({"name": name} for name in sorted(set(REWARDS) - LOADS_A_MODEL)),
    {"sentiment": 1.0, "repetition": -0.5},
    [["sentiment", 1], [{"name": "keywords", "words": ["sun", "sea"]}, 0.5]],
    {"name": "regex", "pattern": "(a+)+$", "full": True, "part": "text", "timeout": 0.2},
    {"name": "json", "schema": SCHEMA, "part": "completion", "timeout": 0.2},
    {"name": "shaped", "reward": "sentiment", "potential": {"name": "length", "target": 3}, "weight": 0.5},
    {"name": "classifier", "file": "/nowhere.json"},
    {"name": "similarity", "to": "prompt"},
]


@pytest.mark.slow
@examples(150, 2_000)
@given(damaged_json(*SPECS) | JSON)
def test_a_damaged_reward_is_refused_or_scores_every_text(document):
    reward = outcome(make_reward, True, document)
    if reward is None:
        return
    spec = reward_spec(reward)
    assert reward_spec(make_reward(json.loads(json.dumps(spec)))) == spec
    if not LOADS_A_MODEL & set(json.dumps(document).split('"')):
        scored = outcome(reward.scored, False, TEXTS)
        assert scored is None or np.isfinite(scored.total).all()


CLASSIFIER = {
    "format": "textgen-env word classifier 1",
    "label": "good",
    "bias": 0.1,
    "weights": {"sun": 1.5, "the sea": -2},
}


@examples(60, 800)
@given(damaged_json(CLASSIFIER).map(lambda d: json.dumps(d).encode()) | damaged_bytes(json.dumps(CLASSIFIER).encode()))
def test_a_damaged_classifier_is_refused_or_scores(content):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "classifier.json"
        path.write_bytes(content)
        classifier = outcome(WordClassifier.load, True, path)
        if classifier is not None:
            scored = outcome(make_reward({"name": "classifier", "file": str(path)}).scored, False, TEXTS)
            assert ((0 <= scored.total) & (scored.total <= 1)).all()


# --- what is said of a model


@examples(60, 600)
@given(damaged_json(TABLE.tolist(), [0.5, 0.5, 0, 0, 0, 0]), damaged_json(["a", "b", "ab", " ", ".", "<end>"]))
def test_a_damaged_table_is_refused_or_proposes_probabilities(table, tokens):
    model = outcome(TableModel, True, tokens, table)
    if model is not None:
        assert model.probabilities([0]).sum() == pytest.approx(1.0)


# --- agents


def open_env():
    return TextGenVectorEnv(2, letters(), PROMPTS, Worth(), top_k=4, max_new_tokens=4, observation=NEEDED_KEYS)


@pytest.fixture(scope="module")
def stored(folder):
    agent = TextDQN("CandidatePolicy", open_env(), learning_starts=0, steps_per_update=16, buffer_size=100, seed=3)
    agent.learn(40)
    agent.save(folder / "agent.zip")
    agent.save_pretrained(folder / "agent")
    agent.save_replay_buffer(folder / "replay.safetensors")
    write_state({"settings": {}, "losses": [1.0], "masters": [torch.zeros(2)]}, folder / "distil.pt")
    return folder, agent


@pytest.mark.slow
def test_a_damaged_agent_zip_is_refused_or_acts(stored):
    folder, _agent = stored
    with zipfile.ZipFile(folder / "agent.zip") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    settings, env = json.loads(parts["data"]), open_env()
    observation, _ = env.reset(seed=0)

    @examples(15, 200)
    @given(
        damaged_json(settings).map(lambda d: json.dumps(d).encode()) | damaged_bytes(parts["data"]),
        st.sampled_from(sorted(parts)),
        st.data(),
    )
    def check(data, name, draw):
        damaged = {**parts, "data": data} if name == "data" else {**parts, name: draw.draw(damaged_bytes(parts[name]))}
        path = folder / "damaged.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for part, content in damaged.items():
                archive.writestr(part, content)
        loaded = outcome(lambda: TextDQN.load(path, env=env), True)
        if loaded is not None:
            loaded.predict(observation)

    check()


@pytest.mark.slow
def test_a_damaged_agent_folder_is_refused_or_acts(stored):
    folder, _agent = stored
    settings, env = json.loads((folder / "agent" / "agent.json").read_text()), open_env()
    weights = (folder / "agent" / "model.safetensors").read_bytes()
    observation, _ = env.reset(seed=0)

    @examples(15, 200)
    @given(damaged_json(settings), damaged_bytes(weights[:2_000]).map(lambda head: head + weights[2_000:]))
    def check(document, content):
        (folder / "agent" / "agent.json").write_text(json.dumps(document))
        (folder / "agent" / "model.safetensors").write_bytes(content)
        loaded = outcome(lambda: TextDQN.from_pretrained(folder / "agent", env), True)
        if loaded is not None:
            loaded.predict(observation)

    check()


@pytest.mark.slow
def test_any_setting_of_an_agent_may_be_anything(stored):
    folder, _agent = stored
    agent, env = folder / "agent", open_env()
    start = (agent / "agent.json").read_text()
    observation, _ = env.reset(seed=0)
    junk = [None, -1, "x", True, 10**30, math.inf, math.nan, [[1]], {"a": 1}]
    for *path, last in filter(None, places(json.loads(start))):
        for value in junk if LARGE else junk[:2]:
            holder = document = json.loads(start)
            for key in path:
                holder = holder[key]
            holder[last] = value
            (agent / "agent.json").write_text(json.dumps(document))
            loaded = outcome(lambda: TextDQN.from_pretrained(agent, env), True)
            if loaded is not None:
                loaded.predict(observation)
    (agent / "agent.json").write_text(start)


def test_a_damaged_replay_is_refused_or_sampled(stored):
    folder, agent = stored
    content = (folder / "replay.safetensors").read_bytes()

    @examples(40, 300)
    @given(damaged_bytes(content) | damaged_bytes(content[:600]).map(lambda head: head + content[600:]))
    def check(damaged):
        (folder / "damaged.safetensors").write_bytes(damaged)
        outcome(agent.load_replay_buffer, True, folder / "damaged.safetensors")

    check()


def test_a_damaged_checkpoint_of_distillation_is_refused_or_read(stored):
    folder, _ = stored
    content = (folder / "distil.pt").read_bytes()

    @examples(40, 300)
    @given(damaged_bytes(content))
    def check(damaged):
        (folder / "damaged.pt").write_bytes(damaged)
        outcome(read_state, True, folder / "damaged.pt")

    check()


def test_a_damaged_checkpoint_of_training_is_refused_or_restored(stored):
    folder, agent = stored
    path = save_checkpoint(folder / "checkpoints", agent, {})
    parts = {part.name: part.read_bytes() for part in path.iterdir()}

    @examples(15, 200)
    @given(st.sampled_from(sorted(parts)), st.data())
    def check(name, draw):
        start = parts[name]
        if name == "state.json":
            damaged = json.dumps(draw.draw(damaged_json(json.loads(start)))).encode()
        else:
            damaged = draw.draw(damaged_bytes(start[:2_000])) + start[2_000:]
        (path / name).write_bytes(damaged)
        outcome(load_checkpoint, True, path, agent)
        (path / name).write_bytes(start)

    check()


# --- recorded texts


def test_a_damaged_minari_dataset_is_refused_or_fills_the_replay(folder):
    pytest.importorskip("minari")
    record(SampleAgent(), open_env(), [Prompt("a")] * 4, folder / "letters-v0", seed=0)
    files = sorted(path for path in (folder / "letters-v0").rglob("*") if path.is_file())
    start = {path: path.read_bytes() for path in files}
    env = open_env()
    replay = EpisodeReplay(100, env.single_observation_space, device="cpu", n_envs=2)

    @examples(15, 200)
    @given(st.sampled_from(files), st.data())
    def check(path, draw):
        if path.suffix == ".json":
            damaged = json.dumps(draw.draw(damaged_json(json.loads(start[path])))).encode()
        else:
            at = draw.draw(st.integers(0, len(start[path])))
            damaged = start[path][:at] + draw.draw(damaged_bytes(start[path][at : at + 200])) + start[path][at + 200 :]
        path.write_bytes(damaged)
        outcome(lambda: fill_replay(replay, open_dataset(folder / "letters-v0")), True)
        path.write_bytes(start[path])

    check()
