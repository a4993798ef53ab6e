"""Writing by hand beside an agent, on an exact model; the page itself where gradio is installed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import agents.playground.desk as desk_module
import agents.playground.tree as tree_module
from agents.baselines.one_step import LookaheadAgent
from agents.playground.bars import bar, signed_bar
from agents.playground.desk import MODEL_WRITER, Desk
from agents.playground.tree import branches
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
    monkeypatch.setattr(tree_module, "MOST_NODES", 1)
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
    assert (bar(1.0), bar(0.25), bar(0.0)) == ("████████ 100.0%", "██······ 25.0%", "········ 0.0%")
    assert [signed_bar(value, 0.4) for value in (-0.4, 0.2, 0.0)] == [
        "████│···· -0.400",
        "····│██·· +0.200",
        "····│···· +0.000",
    ]
    assert signed_bar(1e-17, 1e-17) == "····│···· +0.000"  # a rounding error fills no bar


def test_the_longest_bar_is_that_of_the_value_farthest_from_that_of_the_prefix():
    from agents.playground.page import candidate_rows

    desk = make_desk()
    rows = candidate_rows(desk.view(desk.start(" a"), AGENT, 0.5))
    gains, mu = np.array([0.0, 1.0, 0.0]), np.array([0.4, 0.3, 0.2]) / 0.9  # as above
    value = 0.5 * math.log(mu @ np.exp(gains / 0.5))  # 0.586: " b" is 0.414 above it, the others 0.586 below
    assert [row[2] for row in rows] == [f"████│···· {-value:+.3f}", f"····│███· {1 - value:+.3f}", rows[0][2]]


# --- particles


def best_share(beta, begun):
    """The share of texts with " b" under the best policy, mu exp(R / beta), by going through all texts of 3 tokens."""
    mu = TABLE[:, :3] / TABLE[:, :3].sum(-1, keepdims=True)
    masses = np.zeros(2)
    for path in itertools.product(range(3), repeat=3):
        before = (begun, *path[:-1])
        masses[int(1 in path)] += np.prod([mu[a, b] for a, b in zip(before, path, strict=True)])
    weights = masses * np.exp(np.array([0.0, 1.0]) / beta)
    return masses[1], weights[1] / weights.sum()


@pytest.mark.slow
def test_particles_go_on_from_the_text_so_far_and_follow_the_best_policy():
    desk, texts = make_desk(), 150
    found = dict.fromkeys(desk.writers, 0)
    for seed in range(texts):
        sheet = desk.start(" a", seed)
        for writer in desk.writers:
            desk.step(sheet, writer, 2)  # " c"
        desk.write(sheet, desk.writers, "particles", 0.5)
        for writer in desk.writers:
            view = desk.view(sheet, writer)
            assert text(view).startswith(" a c")
            assert len(view.tokens) == 5  # the prompt and 4
            assert view.ended == "length"
            assert view.score == float(" b" in text(view))
            found[writer] += " b" in text(view)
    plain, best = best_share(0.5, begun=2)
    error = math.sqrt(best * (1 - best) / texts)
    for count in found.values():
        assert abs(count / texts - best) < 3 * error
        assert count / texts > plain + 3 * error  # which sampling would have


def test_particles_have_the_luck_of_their_place():
    desk = make_desk()
    ends = []
    for seed in (0, 0, 1, 2, 3):
        sheet = desk.start(" a", seed)
        desk.write(sheet, desk.writers, "particles", 1.0)
        ends.append([text(desk.view(sheet, writer)) for writer in desk.writers])
    assert ends[0] == ends[1]
    assert len({tuple(pair) for pair in ends}) > 1
    first = desk.view(sheet, AGENT)
    desk.go(sheet, AGENT, first.tokens[2][0])
    desk.write(sheet, [AGENT], "particles", 1.0)
    assert desk.view(sheet, AGENT).tokens[:3] == first.tokens[:3]


class Drawing:
    """An agent with probabilities, and without Q and beta."""

    def probabilities(self, observation):
        return np.full(observation["logprobs"].shape, 1 / 3)


@pytest.mark.parametrize(
    ("desk", "reason"),
    [
        (lambda env: Desk(env), "there is no agent"),
        (lambda env: Desk(env, LookaheadAgent(), AGENT, scored=False), "the reward is not known"),
        (lambda env: Desk(env, Drawing(), AGENT), "has no Q and beta"),
    ],
)
def test_particles_are_left_out_with_a_reason_where_nothing_guides_or_weighs_them(desk, reason):
    from agents.playground.page import particles_note

    made = desk(make_desk().env)
    assert made.ways == ("sample", "greedy")
    assert reason in particles_note(made)
    sheet = made.start(" a")
    with pytest.raises(ConfigError, match=f"{reason}.*Choose sample or greedy"):
        made.write(sheet, made.writers, "particles")
    assert make_desk().ways == ("sample", "greedy", "particles")


# --- what is not known


@pytest.mark.parametrize("keys", [("logprobs", "action_mask"), LookaheadAgent.needs])
def test_a_text_that_nobody_has_judged_has_no_reward(keys):
    from agents.playground.page import state_line, worth

    desk = make_desk(agent=False, observation=keys) if keys == LookaheadAgent.needs else unseen(keys)
    sheet = desk.start(" a")
    desk.step(sheet, MODEL_WRITER, 0)
    view = desk.view(sheet, MODEL_WRITER)
    runs = keys == LookaheadAgent.needs
    assert state_line(view, True) == ("reward +0.000, KL 0.00 nats" if runs else "reward –, KL 0.00 nats")
    assert [worth(score) for *_, score in view.branches] == ["+0.000" if runs else "–"]
    desk.write(sheet, [MODEL_WRITER])
    view = desk.view(sheet, MODEL_WRITER)
    judged = f"{float(' b' in text(view)):+.3f}"
    assert state_line(view, True).startswith(f"reward {judged}, ")
    assert [worth(score) for *_, score in view.branches] == [judged]


def unseen(keys):
    """A desk with a judge of finished texts only."""
    env = make_desk(agent=False).env
    model, settings = env.language_model, {"top_k": 3, "max_new_tokens": 4, "observation": keys}
    return Desk(TextGenVectorEnv(2, model, [" a"], lambda completion: float(" b" in completion), **settings))


def test_a_page_begins_with_a_prompt_that_the_model_can_read(tiny_lm):
    assert make_desk().first_prompt.text == " a"  # " The" is no token of the table
    settings = {"top_k": 3, "max_new_tokens": 2, "observation": ("logprobs", "action_mask")}
    assert Desk(TextGenVectorEnv(2, tiny_lm, ["the film"], "length", **settings)).first_prompt.text == "The movie was"


# --- the page

HOSTILE = " <img src=x onerror=alert(1)>"


def parts_of(page, kind):
    return [block for block in page.blocks.values() if type(block).__name__ == kind]


@pytest.fixture
def build_page(closing_event_loops):
    pytest.importorskip("gradio", reason="the page needs textgen-env[play]")
    from agents.playground.page import build_page

    return build_page


def test_the_page_has_both_columns_in_one_row_and_a_handler_for_each_click(build_page):
    page = build_page(make_desk())
    texts = parts_of(page, "HighlightedText")
    assert [part.elem_id for part in texts] == ["text-language-model", "text-lookahead"]
    assert not any(part.show_inline_category for part in texts)  # no badge beside each token
    rows = [part.parent.parent for part in texts]  # of their columns
    assert type(rows[0]).__name__ == "Row"
    assert rows[0] is rows[1]
    (ways,) = parts_of(page, "Radio")
    assert [value for _, value in ways.choices] == ["sample", "greedy", "particles"]
    handlers = {event for fn in page.fns.values() for _, event in fn.targets}
    assert {"click", "select", "load", "input"} <= handlers


@pytest.mark.parametrize("beta", [5.0, 0.002, 1e6])
def test_the_slider_of_the_page_takes_the_beta_that_it_shows_and_stays_within_its_limits(build_page, beta):
    agent = LookaheadAgent(beta=beta)
    agent.target_beta = 0.1
    (slider,) = parts_of(build_page(Desk(make_desk().env, agent, AGENT)), "Slider")
    assert slider.preprocess(slider.value) == slider.value
    shown = 0.1 if beta == 1e6 else beta
    assert [slider.preprocess(typed) for typed in (0, 1e9, None)] == pytest.approx([shown / 10, shown * 10, shown])


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
