"""The examples of OpenEnv and TRL, which are run only where these packages are installed."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest

from textgen_env import make_task

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / name))


# --- OpenEnv as a partner


def haggled(prices, lowest):
    """Return what a buyer gets for these offers, from the rules of the example."""
    paid = 0.0
    for price in prices:
        if price >= lowest:
            return paid + 1 - price / 10
        paid -= 0.1
    return paid


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what other packages warn of is not this project's
def test_an_openenv_environment_on_the_loopback_interface_is_a_partner():
    pytest.importorskip("openenv", reason="OpenEnv is not installed")
    blind, learned = example("openenv_partner.py")["main"](1_000)
    returns = np.array(
        [[haggled(offers, lowest) for lowest in range(1, 6)] for offers in itertools.product(range(1, 6), repeat=3)]
    )
    assert blind == pytest.approx(returns.mean(), abs=0.05)
    assert blind < learned <= returns.mean(axis=1).max() + 0.05


# --- a task in TRL


@pytest.mark.parametrize(
    ("guesses", "secret", "answers", "reward"),
    [
        (["1", "2"], 2, [" higher. ", " right."], 1),
        (["0"], 0, [" right."], 1),
        (["2", "0"], 1, [" lower. ", " higher. "], 0),
        ([], 1, [], 0),
    ],
)
def test_the_tools_of_a_task_answer_and_pay_as_its_environment_does(guesses, secret, answers, reward):
    task = make_task("TextGen/GuessNumber-v0", numbers=3, turns=2)
    module = example("trl_environment.py")
    tools, row = module["TaskTools"](task), module["rows"](task)[secret]
    assert row == {"prompt": [{"role": "user", "content": "Guess: "}], "secret": secret}
    tools.reset(**row)
    assert [tools.say(guess) for guess in guesses] == answers
    assert tools.get_reward() == reward
    if guesses:
        with pytest.raises(ValueError, match="the conversation has ended"):
            tools.say("0")
        env = task.make_env(observation=("candidates",))
        observation, _ = env.reset(options={"prompt": task.train_prompts[secret]})
        for guess in guesses:
            action = observation["candidates"].tolist().index(int(guess))
            observation, paid, *_, info = env.step(action)
        assert paid == reward
        assert [turn.text for turn in info["turns"][1::2]] == answers


def test_the_template_of_the_player_in_trl_is_one_word_a_token():
    module = example("trl_environment.py")
    tokenizer = module["make_tokenizer"]()
    for game in module["random_games"](module["TASK"]):
        text = tokenizer.apply_chat_template(game, tokenize=False)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert 0 not in ids


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what other packages warn of is not this project's
def test_trl_plays_a_task_through_environment_factory():
    pytest.importorskip("trl", reason="TRL is not installed")
    course = example("trl_environment.py")["main"](4)
    assert len(course) == 4
    assert 0.3 < np.mean(course) < 0.8  # two guesses at random win 5 games of 9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_reward_function_trains_with_trl_and_here():
    pytest.importorskip("trl", reason="TRL is not installed")
    module = example("trl_grpo.py")
    assert module["scores"](["an enormous elephant", "a cat"]) == [pytest.approx(2 / 3), 0]
    means = module["main"](128)
    assert means["GRPO"] > means["language model"]
    assert means["TextDQN"] > means["language model, 16 candidates"]
