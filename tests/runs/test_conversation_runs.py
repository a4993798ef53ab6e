"""Runs with a partner, from the command line and from Python: learned, stored, gone on with, measured and shown."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from agents.cli.app import app
from agents.runs.checkpoint import newest_checkpoint
from agents.runs.config import RunConfig
from agents.runs.report import BOUND
from agents.runs.run import load_run, open_run, resume, train
from agents.runs.stored import located, portable
from agents.zoo import OBSERVATION
from textgen_env import TableModel, make_task
from textgen_env.config import OF_CONVERSATIONS
from textgen_env.conversation import Conversation, Reply
from textgen_env.errors import ConfigError, PartnerError

pytestmark = pytest.mark.usefixtures("blank_pictures")
GUESS = "TextGen/GuessNumber-v0:numbers=3:turns=2"
SIZES = ("--envs", 4, "--texts", 60, "--samples", 4)
TALK = ("--max-prompt-tokens", 8, "--max-turns", 2, "--max-turn-tokens", 2, "--max-new-tokens", 4, "--top-k", 4)
CRITIC = """
from textgen_env.conversation import Reply

def critic(conversation):
    return Reply("the film", reward=float("good" in conversation.last))

class Critic:
    def reply(self, conversation):
        return critic(conversation)
"""


def textgen(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def done(*arguments):
    result = textgen(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No code that this user has named before."""
    monkeypatch.setenv("TEXTGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


# --- a task of the suite


@pytest.fixture(scope="module")
def guessing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guessing") / "run"
    done("train", "--task", "GuessNumber:numbers=3:turns=2", "--steps", 400, "--beta", 0.02, *SIZES, "--out", folder)
    return folder


@pytest.mark.slow
def test_a_run_in_a_task_has_the_task_s_parts_and_says_its_bounds(guessing):
    config = json.loads((guessing / "config.json").read_text())
    assert config["task"] == GUESS
    assert {config[name] for name in ("model", "prompts", "reward", "partner", "prune")} == {None}
    assert config["env"]["observation"] == "full"
    assert (config["env"]["max_turns"], config["env"]["max_new_tokens"], config["env"]["top_k"]) == (2, 2, 3)
    bounds = make_task("TextGen/GuessNumber-v0", numbers=3, turns=2).bounds()
    report = json.loads((guessing / "summary.json").read_text())["report"]
    assert report["rows"][0]["reward"] == pytest.approx(bounds.language_model, abs=0.2)
    assert any(f"{bounds.language_model:.3f} for the language model and 1.000" in note for note in report["notes"])
    assert "partner:" in (guessing / "samples.md").read_text()


@pytest.mark.slow
def test_generate_shows_who_said_what_and_the_partner_keeps_to_the_rules(guessing):
    texts = json.loads(done("generate", guessing, "--num", 9, "--json"))
    assert {text["prompt"] for text in texts} == {"Guess: "}
    for number, text in enumerate(texts):  # the prompts take turns, and each has its own secret
        secret, turns = number % 3, text["turns"]
        assert [turn["speaker"] for turn in turns] == ["agent", "partner"] * (len(turns) // 2)
        guesses = [int(turn["text"]) for turn in turns[::2]]
        told = [{-1: " higher. ", 0: " right.", 1: " lower. "}[int(np.sign(guess - secret))] for guess in guesses]
        assert [turn["text"] for turn in turns[1::2]] == told
        assert text["reward"] == float(guesses[-1] == secret)
        assert text["completion"] == "".join(turn["text"] for turn in turns)
    shown = done("generate", guessing, "--num", 1, "--prompt", "Guess: ")
    assert re.fullmatch(r"\+[01]\.000  Guess: \|\n(  agent:   \d\n  partner: (higher|lower|right)\.\n){1,2}", shown)


@pytest.mark.slow
def test_evaluate_repeats_the_table_of_a_conversation(guessing):
    rows = json.loads(done("evaluate", guessing, "--json"))["rows"]
    assert rows == json.loads((guessing / "summary.json").read_text())["report"]["rows"]
    assert [row["name"] for row in rows][-1] == BOUND
    assert not any("best of" in row["name"] for row in rows)  # a choice among ended games would know the secret


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "RUN", "--particles", 2), "would ask the partner for its answers in advance"),
        (("evaluate", "RUN", "--particles", 2), "would ask the partner for its answers in advance"),
        (("play", "RUN"), "use textgen generate"),
        (("generate", "RUN", "--prompt", "a"), "no token of model"),
        (("generate", "RUN", "--partner", "a.py:b"), "--partner is that of the run"),
        (("generate", "--model", "tiny", "--partner", "a.py:b"), "--partner is that of a run"),
        (("train", "--task", "Guess", "--out", "OUT"), "Did you mean 'GuessNumber'"),
        (("train", "--task", "GuessNumber:number=3", "--out", "OUT"), "Did you mean 'numbers'"),
        (("train", "--task", "GuessNumber", "--model", "smollm2", "--out", "OUT"), "model is that of the task"),
        (("train", "--task", "GuessNumber", "--partner", "script", "--out", "OUT"), "partner is that of the task"),
        (("train", "--task", "GuessNumber", "--top-k", 3, "--out", "OUT"), "top_k is 7 in the task"),
        (("train", "--task", "GuessNumber", "--min-new-tokens", 1, "--out", "OUT"), "min_new_tokens is 0 in the task"),
        (("train", "--task", "GuessNumber", "--reward", "none", "--out", "OUT"), "reward is that of the task"),
        (("train", "--reward", "none", "--out", "OUT"), "there is no partner"),
        (("train", "--partner", "scrip", "--out", "OUT"), "Did you mean 'script'"),
        (("train", "--partner", "{", "--out", "OUT"), "--partner looks like JSON but is none"),
        (("train", "--max-turns", 3, "--out", "OUT"), "need a partner"),
        (("train", "--config", "RUN/config.json", "--task", "Needle", "--out", "OUT"), "in the task"),
    ],
)
def test_mistakes_are_named_and_leave_no_folder(arguments, message, guessing, tmp_path):
    pytest.importorskip("gradio") if arguments[0] == "play" else None
    places = {"RUN": str(guessing), "OUT": str(tmp_path / "out"), "RUN/config.json": str(guessing / "config.json")}
    refused = textgen(*(places.get(str(argument), argument) for argument in arguments))
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_task_without_a_partner_runs_too(tmp_path):
    done("train", "--task", "Needle:depth=3", "--steps", 64, *SIZES, "--out", tmp_path / "run")
    texts = json.loads(done("generate", tmp_path / "run", "--num", 2, "--json"))
    assert all("turns" not in text for text in texts)
    prompts = [prompt.text for prompt in make_task("TextGen/Needle-v0", depth=3).test_prompts]
    assert [text["prompt"] for text in texts] == [prompts[i % len(prompts)] for i in range(2)]


# --- a function of one's own


@pytest.fixture(scope="module")
def made_once(tiny_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for part in tiny_lm:
        part.save_pretrained(folder / "model")
    (folder / "critic.py").write_text(CRITIC)
    (folder / "prompts.txt").write_text("the film was\nthe long film was")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TEXTGEN_CACHE", str(folder / "cache"))
        options = ("--model", "model", "--prompts", "prompts.txt", "--reward", "none", "--partner", "critic.py:critic")
        done("train", *options, *TALK, "--max-reply-tokens", 2, "--steps", 64, *SIZES, "--out", "runs/a")
    return folder


@pytest.fixture
def project(made_once, monkeypatch):
    monkeypatch.chdir(made_once)
    return made_once


@pytest.mark.slow
def test_a_function_in_a_file_is_the_partner_of_every_command(project, monkeypatch):
    monkeypatch.setenv("TEXTGEN_CACHE", str(project / "cache"))
    config = json.loads(Path("runs/a/config.json").read_text())
    assert config["partner"] == "../../critic.py:critic"
    digest = hashlib.sha256((project / "critic.py").read_bytes()).hexdigest()
    assert config["code"] == {"../../critic.py:critic": digest}
    for text in json.loads(done("generate", "runs/a", "--num", 6, "--json")):
        assert [turn["text"] for turn in text["turns"][1::2]] == ["the film"] * 2
        goods = [float("good" in turn["text"]) for turn in text["turns"][::2]]
        assert [turn["reward"] for turn in text["turns"][1::2]] == goods
        assert text["reward"] == sum(goods)  # nothing but the partner's
    assert "the film" in done("generate", "runs/a", "--prompt", "good", "--num", 1)
    assert "text_dqn, trained" in done("evaluate", "runs/a")
    before = RunConfig.from_json(Path("runs/a/config.json").read_text())
    assert portable(located(before, Path("runs/a")), Path("runs/a")) == before


@pytest.mark.slow
def test_security_a_stranger_s_partner_answers_only_if_it_is_trusted_or_named_again(project):
    for command in (["generate", "runs/a"], ["evaluate", "runs/a"], ["train", "--config", "runs/a/config.json"]):
        refused = textgen(*command)
        assert refused.exit_code == 2
        assert "never named on this machine" in refused.stderr
    done("evaluate", "runs/a", "--trust")
    done("generate", "runs/a", "--partner", "critic.py:Critic", "--num", 1)
    assert "must be FILE.py:NAME" in textgen("generate", "runs/a", "--partner", "script").stderr


@pytest.mark.slow
def test_a_partner_that_was_changed_since_the_run_does_not_answer(project, monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTGEN_CACHE", str(project / "cache"))
    original = Path("critic.py").read_text()
    try:
        Path("critic.py").write_text(original + "# changed\n")
        assert "critic.py was changed since the run" in textgen("generate", "runs/a").stderr
    finally:
        Path("critic.py").write_text(original)


@pytest.mark.slow
def test_a_named_partner_with_settings_is_plain_data(project, tmp_path):
    script = '{"name": "script", "lines": ["the film", "was"]}'
    options = ("--model", "model", "--prompts", "prompts.txt", "--reward", "length", "--partner", script)
    done("train", *options, *TALK, "--max-reply-tokens", 2, "--steps", 16, *SIZES, "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["partner"] == json.loads(script)
    (text,) = json.loads(done("generate", tmp_path / "run", "--num", 1, "--json"))
    assert [turn["text"] for turn in text["turns"][1::2]] == ["the film", "was"]


# --- an object in Python, and a run that breaks

COIN = ("H", "T", "?", "!", ">", ".")
FIRST, SECOND = [0, 0, 0.3, 0.7, 0, 0], [0.5, 0.5, 0, 0, 0, 0]
PROMPTS = [{"prompt": ">", "secret": secret} for secret in "HT"]
TURNS = {"max_turns": 2, "max_turn_tokens": 1, "max_new_tokens": 2, "max_reply_tokens": 1, "reply_seconds": None}
TOSS = RunConfig(
    agent_settings={"learning_starts": 0, "steps_per_update": 16, "buffer_size": 4_000, "score": None},
    reward="none", objects=("partner",), env={**TURNS, "top_k": 2, "max_prompt_tokens": 1}, steps=400, envs=4,
    checkpoint_every=150, beta=0.5, eval_texts=200, eval_samples=400,
)  # fmt: skip


def coin_model() -> TableModel:
    table = {1: FIRST, 3: SECOND}
    features = {"features": lambda ids: np.bincount(ids, minlength=6), "hidden_size": 6}
    return TableModel(COIN, lambda ids: table.get(len(ids), SECOND), end=None, **features)


class Toss:
    """Keeps a side of a coin; tells it if asked for with "?"; the right one is worth 1. Breaks once, if told to."""

    name = "toss"

    def __init__(self, breaks_after: int = -1) -> None:
        self.left = breaks_after

    def reply(self, conversation: Conversation) -> Reply:
        self.left -= 1
        if self.left == 0:
            raise OSError("gone")
        secret = conversation.metadata["secret"]
        if len(conversation.said) == 1:
            return Reply(secret if conversation.last == "?" else ".")
        return Reply("", reward=float(conversation.last == secret), done=True)


def tossed(folder, partner):
    return train(TOSS, folder, model=coin_model(), prompts=PROMPTS, partner=partner)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toss") / "whole"
    return folder, tossed(folder, Toss())


@pytest.mark.slow
def test_the_last_line_is_the_optimum_of_a_player_who_knows_the_secret(whole):
    """By hand: whoever knows the side needs no question, and has it at even odds; asking costs a player more."""
    report = whole[1].report
    knowing = 0.5 * np.log((np.exp(1 / 0.5) + 1) / 2)
    asking = 0.5 * np.log(0.3 * np.exp(knowing / 0.5) + 0.7 * np.exp(0.5 / 0.5))  # the best of players
    bound = report.rows[-1]
    assert bound.name == BOUND
    assert bound.value == pytest.approx(knowing, abs=0.02)
    assert asking < knowing - 0.1
    assert report.rows[0].reward == pytest.approx(0.5, abs=0.05)  # heads or tails without regard to anything
    assert any("at least so much" in note for note in report.notes)


@pytest.mark.slow
def test_a_run_whose_partner_broke_resumes_to_the_same_end(whole, tmp_path):
    measured = len(PROMPTS) * (TOSS.eval_samples + 1) * 2  # answers while the yardstick is measured
    with pytest.raises(PartnerError, match="gone"):
        tossed(tmp_path / "broken", Toss(measured + 250))
    assert newest_checkpoint(tmp_path / "broken" / "checkpoints") is not None
    with pytest.raises(ConfigError, match=r"model, partner.*--partner FILE.py:NAME"):
        resume(tmp_path / "broken")
    result = resume(tmp_path / "broken", model=coin_model(), partner=Toss())
    assert result.finished
    assert result.report == whole[1].report
    states = []
    for folder in (tmp_path / "broken", whole[0]):
        with zipfile.ZipFile(folder / "agent.zip") as file:
            states.append(torch.load(file.open("policy.pth"), weights_only=True))
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.slow
def test_an_object_must_be_announced_so_that_the_settings_are_those_of_a_conversation(whole, tmp_path):
    given = {"model": coin_model(), "prompts": PROMPTS}
    with pytest.raises(ConfigError, match=r"RunConfig\(objects=\('partner',\)\)"):
        train(RunConfig(), tmp_path / "run", **given, partner=Toss())
    with pytest.raises(ConfigError, match=r"train\(\.\.\., partner=\.\.\.\)"):
        RunConfig(partner=Toss())
    with pytest.raises(ConfigError, match="made with Python objects"):
        load_run(whole[0], model=coin_model())
    assert load_run(whole[0], model=coin_model(), partner=Toss()).env.episodes.partner.name == "toss"
    with pytest.raises(ConfigError, match="partner of the run are those of the task"):
        open_run(RunConfig(task="GuessNumber"), partner=Toss())


def test_settings_unless_said_are_those_of_conversations():
    env = RunConfig(partner="script").env
    assert {env["max_turns"], env["max_turn_tokens"], env["max_new_tokens"], env["max_reply_tokens"]} == {4, 16, 64, 32}
    assert env["min_new_tokens"] == 0
    assert env["observation"] == "full"
    assert Counter(RunConfig(agent="dqn", partner="script").env["observation"]) == Counter(
        (*OBSERVATION, *OF_CONVERSATIONS)
    )
    assert RunConfig(partner="script", env={"max_turns": 9}).env["max_turns"] == 9
    assert "max_turns" not in RunConfig().env
