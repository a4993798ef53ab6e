"""The yardstick of the learning benchmark: means, clocks and shares, against hand-worked cases."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import toys

from agents.runs.optimum import estimated_optimum
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from benchmarks import fronts, grpo
from benchmarks.diagnose import diagnose
from benchmarks.grpo import TunedModel
from benchmarks.learning import BETA, Bench, Contestant, Course, _seconds_to, middle, print_table
from benchmarks.suite import Cell, Suite
from textgen_env.models import load_pretrained
from textgen_env.policies import renormalise
from textgen_env.prompts import Prompt
from textgen_env.vector_env import TextGenVectorEnv


def test_the_middle_of_five_leaves_out_the_best_and_the_worst():
    assert middle([100.0, 1.0, 2.0, 3.0, -100.0]) == pytest.approx(2.0)


def test_time_to_the_goal_is_that_of_the_first_look_there_and_needs_every_seed():
    def run(*rewards: float) -> dict:
        rows = [
            {"seconds": 10.0 * i, "steps": i, "reward": r, "kl": 2.0 * i, "distinct_2": 0.5}
            for i, r in enumerate(rewards)
        ]
        return {"course": rows}

    all_there = _seconds_to(0.7, [run(0.2, 0.7, 0.1), run(0.2, 0.3, 0.9), run(0.8)])
    assert all_there == {"reached": "3 of 3", "seconds": 10.0, "steps": 1, "kl": 2.0, "distinct_2": 0.5}
    assert _seconds_to(0.7, [run(0.7), run(0.1)]) == {"reached": "1 of 2", "seconds": None}


def test_the_clock_stops_during_evaluations():
    course = Course(lambda: time.sleep(0.2) or {"reward": 0.0}, looks=[10, 20])
    course.model = SimpleNamespace(train=lambda: None)
    course._on_training_start()
    for step in range(0, 31, 10):
        course.num_timesteps = step
        course._on_step()
    assert [row["steps"] for row in course.rows] == [10, 20]
    assert course.figures()["seconds"] < 0.1


def test_the_best_policy_has_the_whole_share_and_the_language_model_none(tmp_path):
    bench = object.__new__(Bench)
    bench.folder = tmp_path
    rewards = np.random.default_rng(0).uniform(-1, 1, (3, 500))
    np.save(tmp_path / "language_model_sentiment.npy", rewards)
    best = estimated_optimum(rewards, BETA)
    reward, kl = best.point
    assert bench.share({"reward": reward, "kl": kl}, "sentiment") == pytest.approx(1.0)
    assert bench.share({"reward": float(rewards.mean()), "kl": 0.0}, "sentiment") == pytest.approx(0.0)


@pytest.mark.slow
def test_more_tokens_a_text_are_measured_and_summed_up(tmp_path, capsys):
    bench = object.__new__(Bench)
    bench.folder, bench.quick, bench.texts, bench.samples = tmp_path, True, 4, 16
    bench.test = bench.validation = [Prompt(text) for text in toys.PROMPTS]
    rewards = np.random.default_rng(0).uniform(-1, 1, (4, 16))
    np.save(tmp_path / "language_model_sentiment.npy", rewards)
    settings = {"top_k": 3, "max_new_tokens": 4, "max_prompt_tokens": 4, "observation": NEEDED_KEYS}
    env = TextGenVectorEnv(2, toys.letters(), toys.PROMPTS, toys.Worth(), **settings)
    contestant = Contestant("more tokens", 0, counts=(1, 2, 16), acting=(0.1,))

    run = bench._spending(contestant, TextDQN("CandidatePolicy", env, seed=0), env)
    points = {"0.1": {"reward": 0.5, "kl": 1.0}}
    summary = bench._summary(contestant, [{"points": points, "course": [], **run}] * 2)

    ways = ("best of n", "weighted best of n", "guided best of n", "particles")
    assert list(summary["spending"]) == [f"{way}, n = {n}" for n in (1, 2) for way in ways]  # a quick run leaves 16 out
    single = summary["spending"]["best of n, n = 1"]
    assert single["share_at_least"] == pytest.approx(0, abs=1e-6)
    assert single["tokens"] == 20
    assert summary["spending"]["particles, n = 2"]["judge_calls"] == 2
    assert len(summary["spending"]["particles, n = 2"]["trust"]) == 2
    assert (tmp_path / "tokens_sentiment.png").is_file()
    print_table(
        {
            "language_model": {"reward": 0.0},
            "best_possible": {"value": 1.0},
            "contestants": {"particles": summary},
        }
    )
    assert "particles, n = 2" in capsys.readouterr().out
    assert bench._spending(replace(contestant, counts=()), None, env) == {}


@pytest.mark.slow
def test_a_cell_of_the_suite_is_learned_measured_and_kept(tmp_path):
    suite, cell = Suite(tmp_path, samples=16, texts=32), Cell("length", tokens=4, steps=600)
    settings = {"learning_starts": 300, "batch_size": 4, "unjudged": 1.0}
    found = suite.run(cell, **settings)
    assert found["judge_calls"] == pytest.approx(600 / 4, abs=64)
    assert found["own"]["low"] <= found["own"]["share"] <= found["own"]["high"]
    assert suite.run(cell, steps_per_update=0) == found  # from its file: no agent is made with that
    errors = diagnose(suite, cell, states=1, **settings)
    assert errors["rms"] >= 0
    assert errors["held_out"] == found["held_out"]  # the same agent, learned again


@pytest.mark.slow
def test_a_rival_runs_as_long_as_the_agent_learned_with_each_setting(tmp_path, monkeypatch):
    suite, cell = Suite(tmp_path, samples=16, texts=32), Cell("length", tokens=4, steps=320)
    asked = []

    def untrained(problem, seed, updates, is_due, *, seconds, **chosen):
        asked.append(seconds)
        policy = TunedModel(load_pretrained(problem.model, problem.dtype)[0])
        looks = [at for at in np.linspace(0, 1, 33) if is_due(1, at * seconds)]
        assert looks == [(i + 1) / 8 for i in range(8)]
        return [{"seconds": seconds, **problem.measure(policy)}]

    monkeypatch.setattr(grpo, "train", untrained)
    found = fronts.fronts(suite, cell, learning_starts=10**6, unjudged=0.0)
    assert asked == [found["cpu_seconds"]] * 9
    points = [*found["text_dqn"].values(), *(run["course"][0] for run in found["grpo"])]
    for point in points:  # neither has learned anything: the language model, on the same random numbers
        assert point["kl"] == pytest.approx(0, abs=1e-6)
        assert point["reward"] == pytest.approx(points[0]["reward"], abs=1e-6)
    assert fronts.fronts(suite, cell, steps_per_update=0) == found  # from its file


def test_a_front_is_summed_up_by_the_rival_s_best_points():
    point = {"reward": 0.6, "kl": 1.0, "share": 0.5}
    near, far = {"reward": 0.4, "kl": 0.9, "share": 0.2}, {"reward": 0.9, "kl": 8.0, "share": -1.0}
    best = {"reward": 0.55, "kl": 1.1, "share": 0.3}
    runs = [{"course": [near]}, {"course": [best, far]}]
    line = fronts.summary({"cpu_seconds": 3.0, "text_dqn": {"0.1": point, "0.2": near}, "grpo": runs})
    assert (line["share"], line["grpo_share"], line["grpo_kl"]) == (0.5, 0.3, 1.1)
    assert (line["grpo_reward_within_as_many_nats"], line["grpo_highest_reward"]) == (0.4, 0.9)


def test_the_rival_before_training_is_the_language_model_also_from_its_cache(tiny_lm):
    model, _ = tiny_lm
    widths = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, ids: widths.append(ids[0].shape[1]))
    agent, rng = TunedModel(model), np.random.default_rng(0)
    settings = {"top_k": 4, "max_new_tokens": 4, "min_new_tokens": 4, "observation": "full"}
    env = TextGenVectorEnv(3, tiny_lm, ["the film was", "good", "the"], "length", **settings)
    observation, _ = env.reset(seed=0)
    for _ in range(15):  # three texts in each row
        del widths[:]
        policy = agent.probabilities(observation)
        own, _ = renormalise(observation["logprobs"], observation["action_mask"])
        np.testing.assert_allclose(policy, np.exp(own), atol=1e-5)
        assert widths == [1 if observation["budget"][0, 0] < 1 else observation["length"].max()]
        observation, *_ = env.step(rng.integers(4, size=3))
    hook.remove()
