"""Writing by hand beside an agent, on an exact model; the page itself where gradio is installed."""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest

import agents.playground.desk as desk_module
from agents.baselines.one_step import LookaheadAgent
from agents.playground.desk import MODEL_WRITER, Desk, bar, branches
from textgen_env.errors import ConfigError, IllegalAction, PromptError
from textgen_env.models.table import TableModel
from textgen_env.rewards import Keywords
from textgen_env.vector_env import TextGenVectorEnv

TABLE = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.3, 0.3, 0.2, 0.2], [0.25] * 4])
AGENT = "lookahead"


def make_desk(agent=True, **settings):
    model = TableModel([" a", " b", " c", "<end>"], TABLE)
    given = {"top_k": 3, "max_new_tokens": 4, "observation": LookaheadAgent.needs, **settings}
    env = TextGenVectorEnv(2, model, [" a"], Keywords(words=["b"]), **given)
    return Desk(env, LookaheadAgent(beta=0.5) if agent else None, AGENT)


def text(view):
    return "".join(token for _, token in view.tokens)


def test_candidates_show_the_prior_the_policy_and_what_a_token_is_worth():
    desk = make_desk()
    sheet = desk.start(" a")
    mu = np.array([0.4, 0.3, 0.2]) / 0.9
    view = desk.view(sheet, MODEL_WRITER)
    assert [c.text for c in view.candidates] == [" a", " b", " c"]
    np.testing.assert_allclose([c.prior for c in view.candidates], mu, rtol=1e-6)
    np.testing.assert_allclose([c.policy for c in view.candidates], mu, rtol=1e-6)
    assert {c.advantage for c in view.candidates} == {None}
    for beta in (0.5, 2.0):  # the running score is 1 after " b", else 0
        gains = np.array([0.0, 1.0, 0.0])
        value = beta * math.log(mu @ np.exp(gains / beta))
        view = desk.view(sheet, AGENT, beta)
        np.testing.assert_allclose([c.policy for c in view.candidates], mu * np.exp((gains - value) / beta), rtol=1e-5)
        np.testing.assert_allclose([c.advantage for c in view.candidates], gains - value, atol=1e-5)
    assert desk.agent.beta == 0.5  # as it was


def test_one_goes_back_and_branches_and_every_branch_stays():
    desk = make_desk()
    sheet = desk.start(" a")
    for action in (1, 0):
        desk.step(sheet, MODEL_WRITER, action)
    first = desk.view(sheet, MODEL_WRITER)
    desk.go(sheet, MODEL_WRITER, first.tokens[1][0])
    second = desk.view(sheet, MODEL_WRITER)
    assert first.tokens[:2] == second.tokens
    desk.step(sheet, MODEL_WRITER, 2)
    assert len(desk.view(sheet, MODEL_WRITER).branches) == 3  # the common part, and two ends
    assert text(desk.view(sheet, MODEL_WRITER)) != text(first)
    nodes = len(sheet.trees[MODEL_WRITER].nodes)
    desk.go(sheet, MODEL_WRITER, first.tokens[1][0])
    desk.step(sheet, MODEL_WRITER, 0)  # the same token again is the same place
    assert desk.view(sheet, MODEL_WRITER) == replace_branches(first, desk, sheet)
    assert len(sheet.trees[MODEL_WRITER].nodes) == nodes
    assert sheet.trees[AGENT].path() == [0]  # the other column stands where it stood


def replace_branches(view, desk, sheet):
    return type(view)(**{**vars(view), "branches": branches(sheet.trees[MODEL_WRITER])})


@pytest.mark.parametrize("kept", [1, 2, 64])
def test_a_place_without_a_snapshot_is_written_again(monkeypatch, kept):
    views = []
    for most in (64, kept):
        monkeypatch.setattr(desk_module, "KEPT_SNAPSHOTS", most)
        desk = make_desk()
        sheets = [desk.start(" a", seed) for seed in range(3)]  # three visitors in turns
        for action, sheet in itertools.product((1, 2, 0), sheets):
            desk.step(sheet, AGENT, action)
            desk.go(sheet, MODEL_WRITER, 0)
            desk.step(sheet, MODEL_WRITER, action)
        views.append([desk.view(sheet, writer) for sheet in sheets for writer in desk.writers])
    assert views[0] == views[1]


def test_both_writers_have_the_same_luck_and_a_huge_beta_makes_them_one():
    desk = make_desk()
    for seed in range(20):
        sheet = desk.start(" a", seed)
        desk.write(sheet, desk.writers, "sample", beta=1e9)
        mu, agent = (desk.view(sheet, writer) for writer in desk.writers)
        assert text(mu) == text(agent)
        assert agent.kl == pytest.approx(0, abs=1e-9)
        assert mu.ended in ("eos", "length")
        assert not mu.candidates


def test_a_written_text_has_the_reward_of_the_environment_and_the_kl_of_its_steps():
    desk = make_desk()
    sheet = desk.start(" a", 3)
    steps = []
    while not sheet.trees[AGENT].ended:
        candidates = desk.view(sheet, AGENT, 0.3).candidates
        steps.append(sum(c.policy * math.log(c.policy / c.prior) for c in candidates if c.policy))
        desk.step(sheet, AGENT, max(candidates, key=lambda c: c.policy).action, 0.3)
    view = desk.view(sheet, AGENT)
    assert view.score == float("b" in text(view).replace(" a", "", 1))
    assert view.kl == pytest.approx(sum(steps), rel=1e-5)
    other = desk.start(" a", 3)
    desk.write(other, [AGENT], "greedy", 0.3)
    assert text(desk.view(other, AGENT)) == text(view)


def test_what_cannot_be_done_is_said_and_changes_nothing(monkeypatch):
    desk = make_desk()
    with pytest.raises(PromptError):
        desk.start(" ")
    sheet = desk.start(" a")
    for wrong, error in (
        (lambda: desk.step(sheet, AGENT, 7), IllegalAction),
        (lambda: desk.go(sheet, AGENT, 5), ConfigError),
        (lambda: desk.write(sheet, [AGENT], "beam"), ConfigError),
        (lambda: desk.view(sheet, AGENT, -1.0), ConfigError),
    ):
        with pytest.raises(error):
            wrong()
    assert desk.view(sheet, AGENT).tokens == [(0, " a")]
    desk.write(sheet, [AGENT])
    with pytest.raises(ConfigError, match="has ended"):
        desk.step(sheet, AGENT, 0)
    monkeypatch.setattr(desk_module, "MOST_NODES", 1)
    with pytest.raises(ConfigError, match="start again"):
        desk.step(desk.start(" a"), AGENT, 0)
    with pytest.raises(ConfigError, match="two rows"):
        Desk(TextGenVectorEnv(1, desk.env.language_model, [" a"], "length", top_k=3, max_new_tokens=2))
    with pytest.raises(ConfigError, match="no probabilities"):
        Desk(desk.env, object())


def test_a_desk_with_a_partner_is_refused():
    model = TableModel([" a", " b", " c", "<end>"], TABLE)
    sizes = {"top_k": 3, "max_new_tokens": 4, "max_turns": 2, "max_turn_tokens": 2, "max_reply_tokens": 2}
    env = TextGenVectorEnv(2, model, [" a"], "length", partner=lambda conversation: " b", **sizes)
    with pytest.raises(ConfigError, match="without partner="):
        Desk(env)


@pytest.mark.parametrize("beta", [5.0, 0.002, 0.1, 0.025, 1e6])
def test_the_slider_has_the_beta_that_the_page_begins_with(beta):
    """Gradio refuses every click whose slider is not within its limits."""
    from agents.playground.page import slider_range

    agent = LookaheadAgent(beta=beta)
    agent.target_beta = 0.3  # what choose_beta leaves where it chooses the language model, 1e6
    shown = Desk(make_desk().env, agent, AGENT).shown_beta
    assert shown == (0.3 if beta == 1e6 else beta)
    limits = slider_range(shown)
    assert limits["minimum"] < shown < limits["maximum"]
    if beta == 0.1:
        assert limits == pytest.approx({"minimum": 0.01, "maximum": 1.0, "step": 0.01})


def test_an_agent_that_acts_as_the_language_model_says_so_and_shows_no_rounding_errors():
    from agents.playground.page import candidate_rows, language_model_note

    desk = Desk(make_desk().env, LookaheadAgent(beta=1e6), AGENT)
    desk.agent.target_beta = 0.5
    sheet = desk.start(" a")
    assert [row[2] for row in candidate_rows(desk.view(sheet, AGENT))] == ["–"] * 3
    assert "–" not in [row[2] for row in candidate_rows(desk.view(sheet, AGENT, 0.5))]
    assert "acts as the language model" in language_model_note(desk)
    assert not language_model_note(make_desk())


def test_bars():
    assert (bar(1.0), bar(0.0)) == ("█" * 12 + " 100.0%", "·" * 12 + " 0.0%")


# --- the page

HOSTILE = " <img src=x onerror=alert(1)>"


def parts_of(page, kind):
    return [block for block in page.blocks.values() if type(block).__name__ == kind]


@pytest.mark.skipif("PLAYGROUND" not in os.environ, reason="gradio leaves sockets behind: set PLAYGROUND=1")
def test_the_page_goes_from_a_prompt_to_a_finished_text_in_both_columns():
    pytest.importorskip("gradio", reason="the page needs textgen-env[play]")
    from agents.playground.page import build_page

    page = build_page(make_desk())
    assert [part.elem_id for part in parts_of(page, "HighlightedText")] == ["text-language-model", "text-lookahead"]
    handlers = {fn.targets[0][1]: fn for fn in page.fns.values() if fn.targets}
    assert {"click", "select", "load", "release"} <= set(handlers)


@pytest.mark.skipif("PLAYGROUND" not in os.environ, reason="gradio leaves sockets behind: set PLAYGROUND=1")
@pytest.mark.parametrize("beta", [5.0, 0.002, 1e6])
def test_the_slider_of_the_page_takes_the_beta_that_it_shows(beta):
    pytest.importorskip("gradio", reason="the page needs textgen-env[play]")
    from agents.playground.page import build_page

    agent = LookaheadAgent(beta=beta)
    agent.target_beta = 0.1
    (slider,) = parts_of(build_page(Desk(make_desk().env, agent, AGENT)), "Slider")
    assert slider.preprocess(slider.value) == slider.value


def test_an_end_is_shown_as_such_and_text_stays_text():
    from agents.playground.page import candidate_rows, state_line

    model = TableModel([" a", HOSTILE, "<end>"], np.array([[0.2, 0.5, 0.3]] * 3))
    env = TextGenVectorEnv(
        2, model, [" a"], "length", top_k=2, max_new_tokens=2, observation=("logprobs", "action_mask")
    )
    desk = Desk(env, scored=False)
    view = desk.view(desk.start(" a"), MODEL_WRITER)
    assert [row[0] for row in candidate_rows(view)] == [HOSTILE, "(end)"]
    assert state_line(view, desk.scored) == "reward unknown, KL 0.00 nats"
