"""Trackers get the figures of a run under the tags of Stable-Baselines3."""

from __future__ import annotations

import csv
import json
import sys
import types

import pytest
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.logger import KVWriter, Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import PROMPTS, Worth, letters

from agents.runs.config import RunConfig
from agents.runs.run import train
from agents.runs.tracking import TrackerWriter, check_tracker
from textgen_env import TextGenEnv
from textgen_env.errors import ConfigError

pytestmark = pytest.mark.usefixtures("blank_pictures")
SETTINGS = {"top_k": 4, "max_new_tokens": 4, "min_new_tokens": 0}


@pytest.fixture
def tracker(monkeypatch):
    """Stand in for the package ``trackio``: the parts that it shares with ``wandb``, recorded."""
    module = types.ModuleType("trackio")
    module.calls = []
    module.init = lambda project, name=None, config=None: module.calls.append(("init", project, name, config))
    module.log = lambda metrics, step=None: module.calls.append(("log", metrics, step))
    module.finish = lambda: module.calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


class Recorded(KVWriter):
    """Note the tags that SB3's own agents write."""

    def __init__(self):
        self.tags = set()

    def write(self, key_values, key_excluded, step=0):
        self.tags |= set(key_values)


@pytest.mark.slow
def test_a_run_sends_its_figures_under_the_tags_of_sb3(tracker, tmp_path):
    config = RunConfig(steps=128, envs=4, eval_prompts=2, eval_texts=4, eval_samples=2, env=SETTINGS)
    train(config, tmp_path / "mine", model=letters(), prompts=PROMPTS, reward=Worth(), track="trackio")
    (_, project, name, stored), *logged, last = tracker.calls
    assert (project, name, stored["steps"], last) == ("textgen-env", "mine", 128, ("finish",))
    (_, measured, after) = logged.pop()
    (_, figures, step) = logged[-1]
    assert step == 128 == figures["time/total_timesteps"]
    with (tmp_path / "mine" / "metrics.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert figures["rollout/ep_rew_mean"] == pytest.approx(float(row["reward"]), rel=1e-4)
    assert figures["rollout/ep_len_mean"] == pytest.approx(float(row["length"]), rel=1e-4)
    assert figures["time/fps"] == pytest.approx(128 / float(row["seconds"]), rel=1e-3)
    assert "ep_rew_mean" not in row  # the table has it once
    events = EventAccumulator(str(tmp_path / "mine" / "tensorboard"))
    events.Reload()
    assert events.Scalars("rollout/ep_rew_mean")[-1].value == pytest.approx(figures["rollout/ep_rew_mean"])

    assert after == 128
    rows = json.loads((tmp_path / "mine" / "summary.json").read_text())["report"]["rows"]
    trained = next(row for row in rows if row["name"] == "text_dqn, trained")
    expected = {"mean_reward": trained["reward"], "mean_ep_length": trained["details"]["length"], "kl": trained["kl"]}
    expected |= {"value": trained["reward"] - config.beta * trained["kl"]}
    assert {name: measured[f"eval/{name}"] for name in expected} == pytest.approx(expected)
    assert all(name.startswith("eval/") for name in measured)
    assert events.Scalars("eval/mean_reward")[-1].step == 128

    env = TextGenEnv(letters(), PROMPTS, Worth(), observation="hidden", on_illegal="last_legal", **SETTINGS)
    agent, recorded = DQN("MlpPolicy", env, buffer_size=100), Recorded()
    agent.set_logger(Logger(None, [recorded]))
    agent.learn(64, log_interval=1)
    evaluated = Recorded()
    callback = EvalCallback(env, n_eval_episodes=2, eval_freq=32, verbose=0, warn=False)
    agent.set_logger(Logger(None, [evaluated]))
    agent.learn(64, callback)
    evaluated.write(agent.logger.name_to_value, {})
    assert {"eval/mean_reward", "eval/mean_ep_length"} <= evaluated.tags & set(measured)
    assert {name for name in figures if name.startswith(("rollout/ep_", "time/"))} <= recorded.tags


def test_only_what_sb3_shows_tensorboard_is_sent_and_only_numbers(tracker):
    writer = TrackerWriter("trackio", "mine", {})
    excluded = {"train/loss": None, "train/n_updates": ("tensorboard",), "note": None}
    writer.write({"train/loss": 0.5, "train/n_updates": 3, "note": "text"}, excluded, 7)
    assert tracker.calls[1:] == [("log", {"train/loss": 0.5}, 7)]


def test_a_tracker_that_does_not_start_says_why(tracker):
    def init(**settings):
        raise OSError("no account")

    tracker.init = init
    with pytest.raises(ConfigError, match="trackio cannot start: OSError: no account"):
        TrackerWriter("trackio", "mine", {})


def test_an_unknown_tracker_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="must be one of tensorboard, wandb, trackio, got 'mlflow'"):
        train(RunConfig(model="no such model"), tmp_path / "run", track="mlflow")
    assert not (tmp_path / "run").exists()
    check_tracker(None)
