"""The report beside policies whose place on the plane is known."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console
from toys import Worth

from agents.runs.report import Yardstick, acting_betas, evaluate_agent, table
from agents.text_dqn.validation import LANGUAGE_MODEL
from textgen_env.models.table import TableModel
from textgen_env.rewards.base import Reward
from textgen_env.vector_env import TextGenVectorEnv

LETTERS = list("abcdefgh")
BEST = "best possible policy"


def make_env(reward):
    model = TableModel(LETTERS, np.ones(8) / 8, end=None)
    sizes = {"top_k": 8, "max_new_tokens": 3, "max_prompt_tokens": 4}
    seen = "full" if isinstance(reward, Reward) else "default"
    return TextGenVectorEnv(64, model, ["a"], reward, observation=seen, **sizes)


def report_of(reward, beta, samples=1024, agent=None, betas=()):
    env = make_env(reward)
    settings = {"prompts": env.episodes.prompts, "seed": 0}
    yardstick = Yardstick.measure(env, **settings, beta=beta, texts=64, samples=samples)
    return yardstick.report("agent", evaluate_agent(agent, env, **settings, texts=64) if agent else [], betas=betas)


@pytest.mark.parametrize("scale", [1.0, 600.0, 0.006])
def test_the_curve_of_the_best_policies_is_the_same_in_other_units(scale):
    """At beta 0.1 it has the temperatures 1 to 0.05, and rewards in other units are those times the units."""

    def reward(text, unit=1.0):
        return unit * (text.count("a") - 0.3 * text.count("b") + 0.1 * text.count("c"))

    first = np.array(report_of(reward, 0.1).curves[BEST])
    other = np.array(report_of(lambda text: reward(text, scale), 0.1 * scale).curves[BEST])
    np.testing.assert_allclose(other * [1, 1 / scale], first, rtol=1e-6, atol=1e-9)
    assert len(first) == 15  # the language model, thirteen temperatures and the run's own


def test_the_curve_reaches_where_the_agent_acts():
    """Each token is worth its reward, so the policy mu exp(reward / beta) is the best one of its temperature."""

    class Best:
        beta = 0.02

        def probabilities(self, observation):
            policy = np.exp((observation["candidates"] == 0) / self.beta)
            return policy / policy.sum(-1, keepdims=True)

    report = report_of(lambda text: float(text.count("a")), 0.1, agent=Best(), betas=[0.02, 0.01, 0.04])
    furthest = max(kl for kl, _ in report.curves["agent"])
    assert max(kl for kl, _ in report.curves[BEST]) == pytest.approx(furthest, rel=0.2)


def test_an_agent_that_acts_as_the_language_model_is_measured_at_no_other_temperature():
    class Cautious:
        beta = LANGUAGE_MODEL

        def probabilities(self, observation):
            return np.full((len(observation["candidates"]), 8), 1 / 8)

    report = report_of(lambda text: float(text.count("a")), 0.1, agent=Cautious(), betas=acting_betas(Cautious()))
    assert report.betas["agent"] == [LANGUAGE_MODEL]
    ((kl, _),) = report.curves["agent"]
    assert kl == pytest.approx(0)


def test_the_best_policy_has_all_of_the_optimal_gain_where_its_reward_is_the_largest():
    report = report_of(lambda text: float(text.startswith("ab") and text[2] in "ab"), 0.05, samples=256)
    line = next(row for row in report.rows if row.name == BEST)
    assert line.reward <= 1
    assert line.kl >= 0
    assert line.share in (None, pytest.approx(1))
    assert line.value == pytest.approx(report.rows[0].reward + report.gain)


def shown_of(report):
    """The cells of the table by policy."""
    columns = [list(column.cells) for column in table(report).columns]
    return {str(row[0]): [str(cell) for cell in row[1:]] for row in zip(*columns, strict=True)}


def test_a_constant_reward_is_said_to_be_one():
    """Equal numbers such as 0.1 have a standard deviation of 1e-17, which is no beta to advise."""
    notes = report_of(lambda text: 0.1, 0.1, samples=33).notes
    assert any("have the same reward" in note for note in notes)
    assert not any("e-" in note for note in notes)


def test_shares_of_a_gain_within_three_of_its_errors_are_not_shown():
    report = report_of(lambda text: 0.1, 0.1, samples=33)
    assert "is within 3 of its standard errors, so no shares of it are shown" in report.notes[0]
    shown = shown_of(report)
    assert "best of 16 samples" in shown
    assert {cells[-1] for cells in shown.values()} == {"–"}


def test_small_rewards_are_shown_with_three_digits_and_others_with_two_decimals():
    usual, small = (
        report_of(lambda text, unit=unit: unit * text.count("a"), 0.1 * unit, samples=1024) for unit in (1.0, 1e-4)
    )
    reward, _, _, _, value, share = shown_of(usual)[BEST]
    assert re.fullmatch(r"\d\.\d\d", reward)
    assert re.fullmatch(r"\d\.\d\d", value)
    reward, _, _, _, value, same_share = shown_of(small)[BEST]
    assert re.fullmatch(r"0\.000\d\d\d", reward)
    assert re.fullmatch(r"0\.000\d\d\d", value)
    assert (share, same_share) == ("100%", "100%")
    gain = re.search(r"optimal gain \(([^ ]*)", small.notes[0])[1]
    assert float(gain) == pytest.approx(small.gain, rel=0.01)
    assert f"({usual.gain:.3f} ± {2 * usual.gain_error:.3f})" in usual.notes[0]


class Leaning:
    """It raises the odds of the letter that is worth something: e to the ``power`` times."""

    beta = 0.1

    def __init__(self, power):
        self.power = power

    def probabilities(self, observation):
        policy = np.exp(self.power * (observation["candidates"] == 0))
        return policy / policy.sum(-1, keepdims=True)


@pytest.mark.parametrize(("power", "ahead"), [(0.0, True), (10.0, False)])
def test_lookahead_that_is_ahead_is_said_to_be(power, ahead):
    """An a is worth 1 or more: at 0.1 a nat its best odds are at least e^10 times the language model's."""
    report = report_of(Worth(), 0.1, agent=Leaning(power))
    assert any("is ahead of agent: let it learn for longer" in note for note in report.notes) == ahead


def test_a_share_far_below_the_language_model_s_is_shown_as_such():
    """Three tokens cost log 8 nats each, at 5 a nat."""
    report = report_of(Worth(), 5.0, agent=Leaning(50.0))
    line = next(row for row in report.rows if row.name == "agent")
    assert line.kl == pytest.approx(3 * np.log(8))
    assert line.share < -1
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(report))
    shown = next(row for row in console.export_text().splitlines() if row.startswith(" agent"))
    assert shown.rstrip().endswith(" < -100%")
