"""A training that is stopped, killed or out of disk goes on as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import signal
import time
import zipfile
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from forked import Forked, textgen
from safetensors.torch import save_file
from toys import PROMPTS, Worth, letters
from typer.testing import CliRunner
from weather import CONFIG as WEATHER
from weather import read_csv, weather

from agents.cli.app import app
from agents.runs.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from agents.runs.run import load_run, resume, train
from agents.runs.signals import Stopped, stop_signals
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from textgen_env.errors import ConfigError, ModelError, RewardError, RunFolderError

pytestmark = pytest.mark.usefixtures("blank_pictures")
SCORES = ("score", "candidate_scores")


def make(model=None, keys=NEEDED_KEYS + SCORES, num_envs=4, **settings):
    settings = {"prompts": PROMPTS, "reward": Worth(), "top_k": 4, "max_new_tokens": 4} | settings
    return gym.make_vec("TextGen-v0", num_envs=num_envs, model=model or letters(), observation=keys, **settings)


def agent_in(env, **settings) -> TextDQN:
    settings = {"learning_starts": 0, "steps_per_update": 8, "batch_size": 8, "buffer_size": 400, "seed": 3} | settings
    return TextDQN("CandidatePolicy", env, **settings)


def assert_same(first, second):
    """The whole state of two agents, to the last bit."""
    for name, tensor in first.policy.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), second.policy.state_dict()[name].numpy(), err_msg=name)
    assert first.learner.rng.bit_generator.state == second.learner.rng.bit_generator.state
    assert first.replay_buffer.rng.bit_generator.state == second.replay_buffer.rng.bit_generator.state
    for key, array in first._last_obs.items():
        np.testing.assert_array_equal(array, second._last_obs[key], err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["table", "llama"])
def test_resume_goes_on_as_the_run_that_passed_the_same_checkpoint(tmp_path, tiny_lm, of):
    settings = {"model": tiny_lm, "prompts": ["the film", "good and"], "top_p": 0.9} if of == "llama" else {}
    agent = agent_in(make(**settings)).learn(100)  # in the middle of texts
    path = save_checkpoint(tmp_path, agent, {"mine": [1.5]})
    noise = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    agent.learn(100, reset_num_timesteps=False)

    other = agent_in(make(**settings), seed=99)
    assert load_checkpoint(path, other) == {"mine": [1.5]}
    again = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    other.learn(100, reset_num_timesteps=False)

    assert (other.num_timesteps, other._n_updates) == (200, agent._n_updates) == (200, 25)
    assert noise == again
    assert_same(agent, other)


def test_without_the_barrier_the_cached_forward_would_differ_in_its_last_bits(tmp_path, tiny_lm):
    """What makes the test above sharp: the running process really does forget."""
    env = make(model=tiny_lm, prompts=["the film"])
    agent = agent_in(env).learn(60)
    slots = env.episodes.slots
    assert slots.cached.any()
    save_checkpoint(tmp_path, agent, {})
    assert not slots.cached.any()
    assert slots.cache.reach == 0


def test_a_checkpoint_holds_no_pickle_and_replaces_the_one_before(tmp_path):
    agent = agent_in(make()).learn(40)
    first = save_checkpoint(tmp_path, agent, {})
    assert save_checkpoint(tmp_path, agent, {}) == first  # nothing has happened since
    second = save_checkpoint(tmp_path, agent.learn(40, reset_num_timesteps=False), {})
    assert [path.name for path in tmp_path.iterdir()] == [second.name] == ["000000000080"]
    assert {path.name for path in second.iterdir()} == {"state.safetensors", "replay.safetensors", "state.json"}
    assert newest_checkpoint(tmp_path) == second
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    agent = agent_in(make()).learn(40)
    first = save_checkpoint(tmp_path, agent, {"n": 1})
    agent.learn(40, reset_num_timesteps=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(RunFolderError, match="no checkpoint could be written"):
            save_checkpoint(tmp_path, agent, {"n": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [first]
    assert load_checkpoint(first, agent_in(make())) == {"n": 1}


def test_a_checkpoint_of_something_else_is_refused(tmp_path, tiny_lm):
    path = save_checkpoint(tmp_path, agent_in(make()).learn(40), {})
    with pytest.raises(ModelError, match="another vocabulary"):
        load_checkpoint(path, agent_in(make(model=tiny_lm, prompts=["the film"])))
    with pytest.raises(ConfigError, match="another environment: tokens is"):
        load_checkpoint(path, agent_in(make(num_envs=2)))
    with pytest.raises(RunFolderError, match="damaged, or of another agent"):
        load_checkpoint(path, agent_in(make(keys=NEEDED_KEYS)))
    with pytest.raises(ConfigError, match="same buffer_size"):
        load_checkpoint(path, agent_in(make(), buffer_size=200))
    with pytest.raises(RunFolderError, match="damaged"):
        load_checkpoint(tmp_path / "nowhere", agent_in(make()))


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "replay.safetensors"])
def test_security_damaged_or_pickled_parts_of_a_checkpoint_are_refused_and_do_not_run(tmp_path, name):
    path = save_checkpoint(tmp_path, agent_in(make()).learn(40), {})
    whole = (path / name).read_bytes()
    for content in (pickle.dumps(Bomb(tmp_path / "exploded")), whole[:100], b"", b"[]", b"{}"):
        (path / name).write_bytes(content)
        with pytest.raises((RunFolderError, ConfigError), match=r"damaged|no replay"):
            load_checkpoint(path, agent_in(make()))
    save_file({"x": torch.zeros(1)}, path / name)
    with pytest.raises((RunFolderError, ConfigError), match=r"damaged|no replay"):
        load_checkpoint(path, agent_in(make()))
    assert not (tmp_path / "exploded").exists()


# --- whole runs

SMALL_NETWORK = {"width": 16, "memory": 8}
CONFIG = replace(
    WEATHER,
    agent_settings={**WEATHER.agent_settings, "buffer_size": 4000, "policy_kwargs": {"q_net_kwargs": SMALL_NETWORK}},
    steps=400,
    eval_texts=8,
    eval_samples=4,
    checkpoint_every=150,
)


def metrics(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(folder / "metrics.csv")]


def agent_of(folder):
    """What is in the file of the agent, to the bit: settings, counters, weights, moments of the optimiser."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value

    with zipfile.ZipFile(folder / "agent.zip") as file:
        found = {name: file.read(name) for name in file.namelist()}
    weights = {name for name in found if name.endswith(".pth")}
    return found | {name: plain(torch.load(io.BytesIO(found[name]), weights_only=True)) for name in weights}


def assert_same_run(first, second):
    assert metrics(first) == metrics(second)
    assert agent_of(first) == agent_of(second)
    reports = [json.loads((folder / "summary.json").read_text()) for folder in (first, second)]
    assert reports[0]["report"] == reports[1]["report"]
    assert reports[0]["finished"]


def breaking_after(calls):
    """A reward of the words' own that breaks once, like a process that dies."""
    left = [calls]

    def reward(completion):
        left[0] -= 1
        if left[0] == 0:
            raise OSError("gone")
        return float("sun" in completion)

    return reward


@pytest.mark.slow
def test_a_broken_run_resumes_to_the_same_end_without_gaps_or_doubles(tmp_path):
    whole = train(CONFIG, tmp_path / "whole", model=weather(), reward=breaking_after(-1))
    assert whole.finished
    assert not (tmp_path / "whole" / "checkpoints").exists()
    with pytest.raises(RewardError, match="gone"):
        train(CONFIG, tmp_path / "broken", model=weather(), reward=breaking_after(125))
    checkpoint = newest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert checkpoint is not None
    assert int(checkpoint.name) < int(float(metrics(tmp_path / "broken")[-1]["steps"])) < 400  # rows to be taken back

    result = resume(tmp_path / "broken", model=weather(), reward=breaking_after(-1))

    assert result.finished
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert not (tmp_path / "broken" / "checkpoints").exists()


def test_a_signal_keeps_its_name_where_a_library_makes_a_plain_interrupt_of_it():
    def library():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Stopped) as stop, stop_signals(lambda signum: False):
        library()
    assert (stop.value.signum, stop.value.name) == (signal.SIGTERM, "SIGTERM")


@pytest.mark.slow
def test_what_cannot_be_resumed_says_why(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no config\.json"):
        resume(tmp_path)
    folder = tmp_path / "run"
    with pytest.raises(RewardError):
        train(CONFIG, folder, model=weather(), reward=breaking_after(20))
    assert newest_checkpoint(folder / "checkpoints") is None
    assert resume(folder, model=weather(), reward=len).finished  # from the start
    broken = tmp_path / "broken"
    with pytest.raises(RewardError):
        train(CONFIG, broken, model=weather(), reward=breaking_after(125))
    (broken / "agent.zip").unlink()  # a kill would not have left one
    with pytest.raises(RunFolderError, match="was cut off; go on with textgen train --resume"):
        load_run(broken, model=weather(), reward=len)
    with pytest.raises(ConfigError, match="Python objects"):
        resume(broken)
    with pytest.raises(ModelError, match="another vocabulary"):
        resume(broken, model=letters(), reward=len, prompts=["a"])
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"steps": 500}))
    with pytest.raises(ConfigError, match=r"changed since the checkpoint: steps \(500, was 400\)"):
        resume(broken, model=weather(), reward=len)
    (broken / "config.json").write_text(json.dumps(config | {"agent": "dqn"}))
    with pytest.raises(ConfigError, match="only text_dqn can be resumed"):
        resume(broken, model=weather(), reward=len)


def test_a_finished_run_is_not_resumed(tmp_path):
    train(replace(CONFIG, steps=40), tmp_path / "run", model=weather())
    with pytest.raises(RunFolderError, match="a finished run: there is nothing to resume"):
        resume(tmp_path / "run", model=weather())


@pytest.fixture
def hangups_count():
    """Under nohup a hangup is ignored, and then a run ignores it, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hangups_count")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_there(tmp_path, signum):
    def reward(completion):
        calls.append(1)
        if len(calls) == 100:
            os.kill(os.getpid(), signum)
        return float("sun" in completion)

    calls: list[int] = []
    before = signal.getsignal(signum)
    result = train(replace(CONFIG, checkpoint_every=10_000), tmp_path / "run", model=weather(), reward=reward)
    assert (result.finished, result.signum) == (False, signum)
    assert 0 < result.steps < 400
    assert int(newest_checkpoint(tmp_path / "run" / "checkpoints").name) == result.steps
    assert signal.getsignal(signum) == before
    again = resume(tmp_path / "run", model=weather(), reward=reward)
    assert (again.finished, again.steps) == (True, 400)
    steps = [float(row["steps"]) for row in metrics(tmp_path / "run")]
    assert steps[:-1] == sorted(set(steps[:-1]))
    assert steps[-1] == 400


# --- the command line, killed


def command(folder, *arguments):
    return Forked(folder, textgen, "train", *arguments, COLUMNS="200")


def here(*arguments):
    """The same command in this process."""
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def tiny_run(tiny_lm, tmp_path):
    """Arguments of a run of some seconds on a tiny model."""
    for part in tiny_lm:
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("the film\nthe long film was\ngood and\n")
    config = replace(
        CONFIG,
        model=str(tmp_path / "model"),
        prune=None,
        prompts=str(tmp_path / "prompts.txt"),
        reward={"name": "keywords", "words": ["good"]},
        env={"top_k": 4, "max_new_tokens": 8, "min_new_tokens": 4, "max_prompt_tokens": 8},
        steps=960,
        checkpoint_every=48,
    )
    (tmp_path / "config.json").write_text(config.to_json())
    return tmp_path


@pytest.mark.slow
def test_ten_kills_and_a_resumed_run_ends_like_one_that_was_never_killed(tiny_run):
    whole = command(tiny_run, "--config", tiny_run / "config.json", "--out", tiny_run / "whole")
    said = whole.communicate()  # a process like those that are killed: with as many threads
    assert whole.returncode == 0, said
    rng = random.Random(0)
    killed = tiny_run / "killed"
    process = command(tiny_run, "--config", tiny_run / "config.json", "--out", killed)
    kills, seen, latest = 0, 0, time.monotonic() + 240
    while kills < 10 and time.monotonic() < latest:
        checkpoint = newest_checkpoint(killed / "checkpoints")
        if process.poll() is not None:
            break
        if checkpoint is None or int(checkpoint.name) <= seen:
            time.sleep(0.002)
            continue
        seen = int(checkpoint.name)  # a new one has come: kill at a random moment after it
        time.sleep(rng.uniform(0.0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kills += 1
        process = command(tiny_run, "--resume", killed)
    said = process.communicate()
    assert kills == 10, said
    assert process.returncode == 0, said
    assert_same_run(tiny_run / "whole", killed)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_says_how_to_go_on(tiny_run, signum, code):
    folder = tiny_run / "run"
    process = command(tiny_run, "--config", tiny_run / "config.json", "--out", folder)
    latest = time.monotonic() + 120
    while newest_checkpoint(folder / "checkpoints") is None and process.poll() is None:
        assert time.monotonic() < latest, "no checkpoint in two minutes"
        time.sleep(0.01)
    process.send_signal(signum)
    said = process.communicate()
    assert process.returncode == code, said
    assert f"stopped by {'Ctrl-C' if code == 130 else 'SIGTERM'} after" in said
    assert f"go on with: textgen train --resume {folder}" in said
    refused = here("--resume", folder, "--steps", 10)
    assert refused.exit_code == 2
    assert "leave out --steps" in refused.output
