"""A run that fits into so many minutes: its sizes by hand, too little time, and what a reader is told."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from rich.console import Console
from weather import CONFIG, weather

from agents.runs.config import RunConfig
from agents.runs.progress import FirstEstimate, JobProgress, minutes
from agents.runs.run import train
from agents.runs.sizing import AGAIN, LEAST_STEPS, Speed, Work, fit, measured_sizes, measured_speed
from textgen_env.errors import ConfigError
from textgen_env.models import load_language_model
from textgen_env.models.slots import HFSlots
from textgen_env.vector_env import TextGenVectorEnv

pytestmark = pytest.mark.usefixtures("blank_pictures")
SPEED = Speed(score=0.002, write=0.001, learn=0.004)
WORK = Work(prompts=10, tokens=20, texts=400, samples=64, lookahead=True)


def test_with_time_enough_the_usual_texts_are_measured_and_learning_gets_the_rest():
    found = fit(60, 10.0, SPEED, WORK)
    # Yardstick: 640 samples, 10 greedy texts, 400 and twice 200 of lookahead. Agent: 400 and twice 200.
    assert found.yardstick == pytest.approx((640 + 10 + 800) * 20 * 0.002)
    assert found.agent == pytest.approx(800 * 20 * 0.001)
    assert (found.texts, found.samples) == (400, 64)
    rest = 3600 - 10 - 5 - found.yardstick - found.agent
    assert found.steps == int(rest / 0.004) // 100 * 100
    assert found.learning == pytest.approx(rest, abs=0.4)


def test_with_less_time_texts_and_samples_are_halved_until_measuring_is_two_fifths():
    found = fit(2, 15.0, SPEED, WORK)
    assert (found.texts, found.samples) == (200, 32)  # all of them: 74 of 100 seconds; half of them: 37
    assert found.yardstick + found.agent <= 0.4 * 100
    assert found.yardstick + found.agent + found.learning == pytest.approx(100, abs=0.41)


def test_too_few_minutes_are_refused_with_the_number_that_is_enough():
    # 9.6 s to measure, 16 to learn, 8 spent and 5 for the end, and a tenth: 42.5 s.
    with pytest.raises(ConfigError, match=r"--minutes 0\.2 is too short .* needs 0\.8") as refused:
        fit(0.2, 8.0, SPEED, WORK)
    assert f"{LEAST_STEPS:,} steps" in str(refused.value)
    assert fit(0.8, 8.0, SPEED, WORK).steps >= LEAST_STEPS


def test_a_run_that_cannot_be_as_short_as_asked_is_the_smallest_one():
    found = fit(0.5, 8.0, SPEED, WORK)  # of the 0.8 minutes above
    assert (found.steps, found.texts, found.samples) == (LEAST_STEPS, 50, 8)
    slow = fit(
        2.4, 8.0, replace(SPEED, learn=0.03), WORK
    )  # measuring a quarter of the texts would fit, learning does not
    assert (slow.steps, slow.texts, slow.samples) == (LEAST_STEPS, 50, 8)
    assert "the smallest run; longer than asked" in found.estimate()
    assert "smallest" not in fit(60, 8.0, SPEED, WORK).estimate()


@pytest.mark.slow
def test_a_sized_run_says_its_sizes_and_is_the_run_of_its_configuration(tmp_path, monkeypatch):
    timed = []
    sizes = replace(fit(60, 0.0, SPEED, WORK), steps=400, texts=8, samples=4)
    monkeypatch.setattr("agents.runs.sizing.fit", lambda *args: timed.append(args) or sizes)
    shown = Console(file=io.StringIO(), width=200)
    first = train(CONFIG, tmp_path / "a", model=weather(), console=shown, minutes=1)
    minutes_given, spent, speed, work = timed[0]
    assert (minutes_given, work) == (1, Work(prompts=2, tokens=3, texts=64, samples=400, lookahead=True))
    assert spent > 0
    assert 0 < speed.write <= speed.learn
    assert speed.score > 0
    note = next(note for note in first.report.notes if note.startswith("Sized for 1 minutes"))
    assert "400 steps, 8 texts an agent, 4 samples a prompt" in note
    assert "measuring the agent" in shown.file.getvalue()
    again = train(sizes.of(CONFIG), tmp_path / "b", model=weather())
    assert [row.reward for row in first.report.rows] == [row.reward for row in again.report.rows]
    assert [row.kl for row in first.report.rows] == [row.kl for row in again.report.rows]
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_learning_is_expected_to_take_the_time_of_the_steps_that_are_taken(monkeypatch):
    """The first timing is slow, and its few steps have cheaper settings: the run keeps those steps and settings."""
    speeds = iter([Speed(1e-4, 1e-4, 1e-2), *[Speed(1e-4, 1e-4, 2e-3)] * AGAIN])
    monkeypatch.setattr("agents.runs.sizing.measured_speed", lambda *arguments: next(speeds))
    work = Work(prompts=32, tokens=20, texts=512, samples=64, lookahead=True)
    found = measured_sizes(RunConfig(steps=70_000), None, None, work, 4.0, time.perf_counter())
    assert found.steps < 30_000  # what fits at 1e-2 seconds a step
    assert found.learning == pytest.approx(2e-3 * found.steps)


@pytest.mark.slow
def test_a_second_timing_is_not_answered_from_memory(monkeypatch):
    """It writes the same texts, so that as many rows must pass through the model."""
    passed, forward = [], HFSlots._forward
    monkeypatch.setattr(
        HFSlots, "_forward", lambda slots, rows, *rest: passed.append(len(rows)) or forward(slots, rows, *rest)
    )
    model = load_language_model("tiny")
    own, scoring = (
        TextGenVectorEnv(2, model, ["I am"], "sentiment", observation="full", max_new_tokens=4) for _ in range(2)
    )
    rows = []
    for _ in range(2):
        passed.clear()
        measured_speed(replace(CONFIG, envs=2), own, scoring)
        rows.append(sum(passed))
    assert rows[0] == rows[1] > 10


def test_too_few_minutes_leave_no_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"--minutes 0\.001 is too short"):
        train(CONFIG, tmp_path / "a", model=weather(), minutes=0.001)
    assert not (tmp_path / "a").exists()


def test_the_first_estimate_is_of_steps_that_learn_and_comes_once():
    estimate = FirstEstimate(begin=100, ready=150)
    # 10 steps a second before step 100, 5 a second from there on.
    assert [estimate.left(done / 10, done, 1000) for done in (40, 80)] == [None, None]
    found = {done: estimate.left(10 + (done - 100) / 5, done, 1000) for done in range(100, 1001, 10)}
    assert found.pop(150) == pytest.approx(850 / 5)
    assert set(found.values()) == {None}
    late = FirstEstimate(begin=0, ready=1)
    assert late.left(0.0, 0, 100) is late.left(2.9, 10, 100) is None  # too short a time
    assert late.left(4.0, 20, 100) == pytest.approx(16.0)


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["text_dqn", "ppo"])
def test_a_run_says_early_how_long_it_takes_unless_that_is_short(agent, tmp_path, monkeypatch):
    env = {name: value for name, value in CONFIG.env.items() if name != "observation"}  # the agent's own
    settings = CONFIG.agent_settings if agent == "text_dqn" else {}
    config = replace(CONFIG, agent=agent, agent_settings=settings, env=env, steps=400, eval_texts=8, eval_samples=4)
    for least, told in ((0.0, 1), (1e6, 0)):
        monkeypatch.setattr("agents.runs.log.LONG", least)
        monkeypatch.setattr("agents.runs.progress.TIMED", 0.0)
        shown = Console(file=io.StringIO(), width=200)
        train(config, tmp_path / f"run-{told}", model=weather(), reward=len, console=shown)
        lines = [line for line in shown.file.getvalue().splitlines() if line.startswith("about ")]
        assert len(lines) == told
        assert all("from here: learning 0:0" in line and ", measuring the agent 0:0" in line for line in lines)


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    clock = iter([0.0, 10.0, 25.0, 30.0, 50.0, 51.0])
    monkeypatch.setattr("agents.runs.progress.time.monotonic", lambda: next(clock))
    shown = Console(file=io.StringIO(), width=200)
    with JobProgress(shown, "texts") as progress:
        for ended in (0, 20, 50, 60, 100):
            progress.measuring("agent", ended, 200)
        progress.measuring("another", 0, 10)
    assert shown.file.getvalue().splitlines() == [
        "measuring: agent: 50 of 200 texts, 1:15 left",
        "measuring: agent: 100 of 200 texts, 0:50 left",
    ]


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (185, "3:05"), (-3, "0:00")])
def test_minutes_and_seconds(seconds, shown):
    assert minutes(seconds) == shown
