"""The games: optima against brute force in the environment itself, worked cases, and agents that play."""

from __future__ import annotations

import runpy
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import textgen_env
from agents.baselines.one_step import SampleAgent
from agents.benchmark.cells import run_cell
from agents.benchmark.config import BenchmarkConfig, Cell, task_ids
from textgen_env import make_task
from textgen_env.errors import ConfigError
from textgen_env.evaluation import evaluate
from textgen_env.prompts import Prompt
from textgen_env.tasks import OptimalAgent
from textgen_env.tasks.conversation.numbers import GuessNumber
from textgen_env.tasks.conversation.questions import ANIMALS, QUESTIONS
from textgen_env.tasks.conversation.words import WORD_LIST, marks
from textgen_env.tasks.exact import Process, expected_reward
from textgen_env.testing import check_vector_env

EXAMPLES = Path(__file__).parents[2] / "examples"

SMALL = [
    ("GuessNumber", {"numbers": 4, "turns": 3}),
    ("GuessNumber", {"numbers": 5, "turns": 2, "seed": 1}),
    ("GuessNumber", {"numbers": 11, "turns": 2}),
    ("Wordle", {"words": 4, "turns": 2}),
    ("TwentyQuestions", {"animals": 3, "turns": 2}),
    ("TwentyQuestions", {"animals": 2, "turns": 3, "naming": 0.3, "seed": 2}),
    ("AskAhead", {"doors": 3, "delay": 2}),
    ("AskAhead", {"doors": 2, "delay": 0, "asking": 0.5, "seed": 1}),
]


@pytest.fixture(params=textgen_env.CONVERSATION_TASKS)
def task(request):
    return make_task(f"TextGen/{request.param}-v0")


class GameTree:
    """All that can be said to the partners of all secrets, tried out in environments, one a secret.

    A player sees the text alone. So games that look alike are played alike, and they part where answers differ.
    """

    def __init__(self, task):
        envs = [(task.make_env(observation="full"), prompt) for prompt in task.test_prompts]
        self.games = [(env, env.reset(options={"prompt": prompt})[0]) for env, prompt in envs]

    def value(self, best):
        return self._of(self.games, best) / len(self.games)

    def _of(self, games, best):
        """Return the sum of the rewards still to come of games that look alike."""
        shown = games[0][1]
        saved = [env.snapshot() for env, _ in games]
        values = []
        legal = np.flatnonzero(shown["action_mask"])
        for action in legal:
            total, going = 0.0, defaultdict(list)
            for env, _ in games:
                observation, reward, ended, _, _ = env.step(action)
                total += reward
                if not ended:
                    going[observation["tokens"].tobytes()].append((env, observation))
            # One branch at a time: going down moves its environments, and coming back restores them.
            total += sum(self._of(branch, best) for branch in going.values())
            values.append(total)
            for (env, _), snapshot in zip(games, saved, strict=True):
                env.restore(snapshot)
        mu = np.exp(shown["logprobs"][legal].astype(float))
        return max(values) if best else float(np.array(values) @ mu / mu.sum())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), SMALL)
def test_bounds_equal_brute_force_over_all_that_can_be_said(name, sizes):
    task = make_task(f"TextGen/{name}-v0", **sizes)
    bounds = task.bounds()
    assert bounds.best == pytest.approx(GameTree(task).value(best=True), abs=1e-9)
    assert bounds.language_model == pytest.approx(GameTree(task).value(best=False), abs=1e-6)


@pytest.mark.parametrize(("numbers", "turns"), [(7, 3), (8, 3), (12, 4), (10, 2)])
def test_the_best_guess_halves_what_is_left(numbers, turns):
    """A tree of guesses of depth ``turns`` holds 2 ** turns - 1 numbers."""
    best = make_task("TextGen/GuessNumber-v0", numbers=numbers, turns=turns).bounds().best
    assert best == pytest.approx(min(1, (2**turns - 1) / numbers))


@pytest.mark.slow
@pytest.mark.parametrize(("numbers", "turns"), [(100, 3), (1000, 16)])
def test_bounds_of_many_numbers_follow_no_guess(numbers, turns, monkeypatch):
    """All guesses after all others are some millions: a formula knows what they come to."""
    task = make_task("TextGen/GuessNumber-v0", numbers=numbers, turns=turns)
    monkeypatch.setattr(GuessNumber, "follow", lambda *arguments: pytest.fail("goes through the guesses"))
    bounds = task.bounds()
    monkeypatch.undo()
    assert bounds.best == pytest.approx(min(1, (2**turns - 1) / numbers))
    if turns == 3:  # long games take their time
        sampled = evaluate(SampleAgent(), task.make_vec(64), 1000, 0, task.test_prompts)
        error = sampled.rewards.std() / len(sampled.rewards) ** 0.5
        assert abs(sampled.reward - bounds.language_model) < 4 * error


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize(("numbers", "turns"), [(2, 2), (7, 3), (12, 3), (23, 2)])
def test_the_formula_of_guessing_equals_dynamic_programming(numbers, turns, best, monkeypatch):
    process = GuessNumber(numbers, turns, seed=3)
    found = expected_reward(process, best)
    monkeypatch.setattr(GuessNumber, "value", Process.value)
    assert expected_reward(process, best) == pytest.approx(found, abs=1e-12)


@pytest.mark.slow
def test_the_planted_optimal_policy_scores_1_and_the_language_model_0(task):
    vec, bounds = task.make_vec(8), task.bounds()
    planted = evaluate(OptimalAgent(task), vec, len(task.test_prompts), 0, task.test_prompts, deterministic=True)
    assert bounds.normalise(planted.reward) == pytest.approx(1.0, abs=1e-12)
    sampled = evaluate(SampleAgent(), vec, 1200, 0, task.test_prompts)
    error = sampled.rewards.std() / len(sampled.rewards) ** 0.5
    assert abs(sampled.reward - bounds.language_model) < 4 * error


def test_features_determine_the_value_of_a_state(task):
    """Two prefixes with the same features and as many tokens left are worth the same under the best policy."""
    process, known = task.reward.process, {}
    agent = OptimalAgent(task)
    vec = task.make_vec(16, observation="full")
    observation, _ = vec.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        for ids, length, hidden in zip(
            observation["tokens"], observation["length"], observation["hidden"], strict=True
        ):
            prefix = tuple(ids[: length[0]].tolist())
            state = agent._state(prefix)
            left = process.left(state, prefix)
            value = agent._values.of_state(state, left)
            assert known.setdefault((left, hidden.tobytes()), value) == pytest.approx(value, abs=1e-9)
        mask = observation["action_mask"] * rng.random(observation["action_mask"].shape)
        observation, *_ = vec.step(mask.argmax(-1))
    assert len(known) > 20


@pytest.mark.slow
def test_the_contract_of_environments_holds(task):
    vec = task.make_vec(3, observation="full")
    check_vector_env(vec, lambda: task.make_env(observation="full"), tolerance=0.0)


# --- worked cases


def played(name, secret, *said, **sizes):
    """Say each turn to the partner that has ``secret``; return the text and the reward."""
    task = make_task(f"TextGen/{name}-v0", **sizes)
    env = task.make_env()
    begun = task.test_prompts[0].text
    observation, _ = env.reset(options={"prompt": Prompt(begun, metadata={"secret": secret})})
    tokens, total = list(env.language_model.tokens), 0.0
    for turn in said:
        for token in [turn] if turn in tokens else turn:
            action = observation["candidates"].tolist().index(tokens.index(token))
            observation, reward, ended, _, info = env.step(action)
            total += reward
    return begun + env.episodes.text_of(0), total, info.get("finish_reason") if ended else None


def test_a_worked_game_of_numbers():
    text, reward, reason = played("GuessNumber", 9, "05", "11", "09", numbers=12, turns=4)
    assert text == "Guess: 05 higher. 11 lower. 09 right."
    assert (reward, reason) == (1.0, "partner")
    text, reward, reason = played("GuessNumber", 9, "05", "11", "10", "08", numbers=12, turns=4)
    assert (text, reward, reason) == ("Guess: 05 higher. 11 lower. 10 lower. 08 higher. ", 0.0, "length")


def test_a_worked_game_of_words():
    text, reward, reason = played("Wordle", WORD_LIST.index("cave"), "lone", "care", "cave")
    assert (text, reward, reason) == ("> lone:---+ care:++-+ cave:++++ ", 1.0, "partner")


def test_a_worked_game_of_questions():
    text, reward, reason = played(
        "TwentyQuestions", list(ANIMALS).index("owl"), "Does it fly? ", "the duck! ", "the owl! "
    )
    assert text == "Ask: Does it fly? yes. the duck! no. the owl! right."
    assert (reward, reason) == (1.0, "partner")


def test_a_worked_game_of_doors():
    asked = ("Which one? ", "Well. ", "So. ")
    text, reward, reason = played("AskAhead", 1, *asked, "Door B! ", doors=2, delay=2)
    assert text == "Ask: Which one? It is B. Well. Hm. So. Hm. Door B! Right."
    assert (reward, reason) == (1.0, "partner")
    greeted = ("Nice day. ", "Oh. ", "Oh. ")
    text, reward, reason = played("AskAhead", 1, *greeted, "Door A! ", doors=2, delay=2)
    assert text == "Ask: Nice day. Hm. Oh. Hm. Oh. Hm. Door A! Hm. "
    assert (reward, reason) == (0.0, "length")


@pytest.mark.parametrize("asking", [0.1, 0.7])
def test_who_does_not_remember_names_one_door_of_all(asking):
    """By hand: each door is as likely, so a name that has nothing to do with it is right once in so many."""
    bounds = make_task("TextGen/AskAhead-v0", doors=5, delay=7, asking=asking).bounds()
    assert (bounds.language_model, bounds.best) == (pytest.approx(1 / 5), 1.0)


@pytest.mark.parametrize(
    ("guess", "secret", "expected"),
    [
        ("lone", "love", "++-+"),
        ("care", "rice", "~-~+"),
        ("noon", "none", "++-~"),  # the second o is one too many
        ("eeee", "lace", "---+"),
        ("rare", "care", "-+++"),  # the first r is one too many: the other is in its place
        ("abba", "bbaa", "~+~+"),
    ],
)
def test_letters_are_marked_as_often_as_the_word_has_them(guess, secret, expected):
    assert marks(guess, secret) == expected


def test_secrets_can_be_told_apart():
    assert len(set(WORD_LIST)) == len(WORD_LIST)
    assert {len(word) for word in WORD_LIST} == {4}
    assert len(set(ANIMALS.values())) == len(ANIMALS)
    assert {len(answers) for answers in ANIMALS.values()} == {len(QUESTIONS)}


@pytest.mark.parametrize(
    ("name", "sizes", "says"),
    [
        ("GuessNumber", {"numbers": 1}, "numbers must be a whole number of at least 2, got 1"),
        ("GuessNumber", {"turns": 17}, "turns must be a whole number in 2..16, got 17"),
        ("Wordle", {"words": 25}, "words must be a whole number in 2..24, got 25"),
        ("Wordle", {"seed": -1}, "seed"),
        ("TwentyQuestions", {"turns": 1}, "turns must be a whole number of at least 2, got 1"),
        ("TwentyQuestions", {"animals": 17}, "animals must be a whole number in 2..16"),
        ("TwentyQuestions", {"naming": 0.0}, "naming must be a number in"),
        ("AskAhead", {"doors": 17}, "doors must be a whole number in 2..16, got 17"),
        ("AskAhead", {"delay": 65}, "delay must be a whole number in 0..64, got 65"),
        ("AskAhead", {"asking": 0}, "asking must be a number in"),
    ],
)
def test_a_size_out_of_range_says_what_is_allowed(name, sizes, says):
    with pytest.raises(ConfigError, match=says):
        make_task(f"TextGen/{name}-v0", **sizes)


# --- agents


def test_the_group_conversation_names_the_games():
    assert task_ids("conversation") == tuple(f"TextGen/{name}-v0" for name in textgen_env.CONVERSATION_TASKS)
    assert set(task_ids("all")) >= set(task_ids("conversation"))
    assert not set(task_ids("language")) & set(task_ids("conversation"))


@pytest.mark.parametrize(("agent", "status"), [("sample", "ok"), ("dqn", "ok"), ("best_of_n", "inapplicable")])
def test_the_benchmark_lets_agents_play_that_do_not_ask_in_advance(agent, status):
    task = "TextGen/GuessNumber-v0:numbers=4"
    config = BenchmarkConfig((task,), (agent,), (0,), steps=64, envs=4, evaluations=2, texts=8)
    result = run_cell(config, Cell(task, agent, 0))
    assert (result.status, result.traceback if result.status == "failed" else "") == (status, "")


@pytest.mark.slow
def test_text_dqn_learns_to_halve():
    task = "TextGen/GuessNumber-v0:numbers=3:turns=2"
    config = BenchmarkConfig((task,), ("text_dqn",), (0,), steps=3_000, envs=16, evaluations=2, texts=60)
    before, after = (row["normalised"] for row in run_cell(config, Cell(task, "text_dqn", 0)).rows)
    assert before < 0.2
    assert after > 0.9


@pytest.mark.slow
def test_the_example_plays_from_blind_guesses_on(capsys):
    blind, learned = runpy.run_path(str(EXAMPLES / "guess_the_number.py"))["main"](400)
    # A blind guess is right with 1/7: 4 of them, each wrong one at -0.25.
    wrong = [(6 / 7) ** n for n in range(1, 5)]
    assert blind == pytest.approx(1 - wrong[-1] - 0.25 * sum(wrong), abs=0.1)
    assert -1 <= learned <= 1
    assert "guesses" in capsys.readouterr().out
