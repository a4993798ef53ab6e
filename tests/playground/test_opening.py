"""What ``textgen play`` takes, where it serves, and a folder that is a Space."""

from __future__ import annotations

import gc
import json
import re
import runpy
import socket
import sys

import gymnasium as gym
import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from agents import TextDQN
from agents.cli.app import app
from agents.playground.opening import open_shared_desk
from agents.zoo import OBSERVATION

WRITERS = ["text-language-model", "text-text_dqn"]


def textgen(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def new_agent(**settings):
    env = gym.make_vec("TextGen-v0", num_envs=2, observation=OBSERVATION, top_k=4, max_new_tokens=5, **settings)
    return TextDQN(env=env, beta=0.3, buffer_size=100, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An agent that ``save_pretrained`` wrote, as a Space."""
    folder = tmp_path_factory.mktemp("shared") / "agent"
    new_agent().save_pretrained(folder, space=True)
    return folder


def writers(page):
    return [block.elem_id for block in page.blocks.values() if type(block).__name__ == "HighlightedText"]


# --- what it takes


def test_play_takes_a_folder_that_save_pretrained_wrote(folder, launched):
    done = textgen("play", folder, "--port", 7999)
    assert done.exit_code == 0, done.output
    ((page, settings),) = launched
    assert writers(page) == WRITERS
    assert (settings["server_name"], settings["server_port"]) == ("127.0.0.1", 7999)
    assert settings["share"] is False


def test_the_agent_of_a_folder_writes_on_the_page_what_generate_writes(folder):
    wrote = textgen("generate", folder, "--greedy", "--num", 1, "--json")
    (text,) = json.loads(wrote.stdout)
    desk, unscored = open_shared_desk(folder)
    sheet = desk.start(text["prompt"])
    desk.write(sheet, desk.writers, "greedy")
    view = desk.view(sheet, "text_dqn")
    assert not unscored
    assert "".join(token for _, token in view.tokens) == text["prompt"] + text["completion"]
    assert view.score == pytest.approx(text["reward"])
    desk.go(sheet, "text_dqn", view.tokens[2][0])
    desk.write(sheet, ["text_dqn"], "particles", 0.3)
    again = desk.view(sheet, "text_dqn")
    assert again.tokens[:3] == view.tokens[:3]
    assert again.ended


@pytest.mark.slow
def test_the_reward_that_was_not_stored_is_said_and_can_be_given(launched, tmp_path, monkeypatch):
    new_agent(reward=len).save_pretrained(tmp_path / "agent")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def score(completion):\n    return 7.0\n")
    done = textgen("play", "agent", "--port", 7999)
    assert done.exit_code == 0, done.output
    assert "not scored: the agent's reward was not stored" in done.stderr
    done = textgen("play", "agent", "--port", 7999, "--reward", "mine.py:score")
    assert done.exit_code == 0, done.output
    assert not done.stderr
    choices = [
        [value for _, value in block.choices]
        for page, _ in launched
        for block in page.blocks.values()
        if type(block).__name__ == "Radio"
    ]
    assert choices == [["sample", "greedy"], ["sample", "greedy", "particles"]]


def test_a_folder_of_neither_kind_is_named(tmp_path):
    pytest.importorskip("gradio")
    done = textgen("play", tmp_path, "--port", 7999)
    assert done.exit_code == 2
    assert "holds no config.json" in done.stderr


# --- where it serves


@pytest.fixture
def taken():
    """A port that another server has."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_taken_port_is_one_line_that_names_the_option_before_a_model_is_loaded(taken, launched):
    done = textgen("play", "--model", "no such model", "--port", taken)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        f"error: the page cannot be served on 127.0.0.1, port {taken}: Address already in use"
    )
    assert "Choose another --port" in done.stderr
    assert not launched


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_a_port_that_is_taken_meanwhile_is_one_line_too(taken, closing_event_loops, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs textgen-env[play]")
    monkeypatch.setattr("agents.cli.play._check_free", lambda host, port: None)
    done = textgen("play", "--model", "tiny", "--port", taken)  # gradio itself finds it taken
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert f"cannot be served on 127.0.0.1, port {taken}: " in done.stderr
    assert "Choose another --port" in done.stderr
    del done  # its traceback holds the socket that gradio tried, and does not close
    gc.collect()


# --- a Space


def test_a_space_opens_the_playground_of_its_folder(folder, closing_event_loops, monkeypatch, tmp_path):
    pytest.importorskip("gradio", reason="the page needs textgen-env[play]")
    monkeypatch.chdir(tmp_path)  # wherever it is started
    page = runpy.run_path(str(folder / "app.py"))["demo"]
    assert writers(page) == WRITERS


def test_the_card_of_a_space_has_its_metadata_and_says_what_the_agent_is(folder, tmp_path):
    _, header, page = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["sdk"] == "gradio"
    assert (folder / metadata["app_file"]).is_file()
    assert metadata["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert re.fullmatch(r"\d+(\.\d+)*", metadata.get("sdk_version", "6"))
    new_agent().save_pretrained(tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    assert page.startswith(card)
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"README.md", "agent.json", "model.safetensors"}
    lines = (folder / "requirements.txt").read_text().splitlines()
    (own,) = [Requirement(line) for line in lines if not line.startswith("--")]
    assert (own.name, "play" in own.extras) == ("textgen-env", True)


def test_a_space_is_an_agent_like_any_other_folder(folder):
    assert TextDQN.from_pretrained(folder).beta == 0.3
