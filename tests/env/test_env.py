"""The single environment: Gymnasium's and SB3's contracts, the rules against a second telling, and misuse."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.utils.env_match import check_environments_match
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from toys import PROMPTS, CountingModel, PlainEpisode, Worth, assert_same, by_sum, letters, worth

from textgen_env import Prompt, TableModel
from textgen_env.config import EnvConfig
from textgen_env.conversation import PARTNERS, FunctionPartner
from textgen_env.env import FIRST_ROW, TextGenEnv
from textgen_env.errors import (
    ConfigError,
    IllegalAction,
    ModelError,
    PromptError,
    ResetNeeded,
    RewardError,
    SpecError,
    UnknownName,
)
from textgen_env.rewards import batch_reward
from textgen_env.spec import wrap_objects

SMALL = {"top_k": 4, "max_new_tokens": 5, "max_prompt_tokens": 4}
OBSERVATIONS = ["default", "full", "hidden", "tokens", ("tokens", "length"), ("candidates", "logprobs", "action_mask")]


def make(**changes):
    return gym.make("TextGen-v0", **({"model": letters(), "prompts": PROMPTS, "reward": Worth(), **SMALL} | changes))


def described(value):
    """The beginning of a value, the same in every process: no addresses."""
    return re.sub(r" at 0x\w+", "", str(value))[:40]


def play(env, seed, steps=40):
    """Everything that ``env`` answers to a seed and to actions drawn with it, over several episodes."""
    rng = np.random.default_rng(seed)
    answers = [env.reset(seed=seed)]
    for _ in range(steps):
        action = rng.choice(np.flatnonzero(env.unwrapped.action_masks()))
        answers.append(env.step(action))
        if answers[-1][2]:
            answers.append(env.reset())
    return answers


# --- the contracts of others


@pytest.mark.parametrize("top_k", [4, None])
@pytest.mark.parametrize("observation", OBSERVATIONS[:-1])
def test_gymnasium_and_sb3_accept_the_registered_environment(observation, top_k):
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    env = make(observation=observation, top_k=top_k, on_illegal="last_legal", render_mode="rgb_array")
    check_env(env.unwrapped)
    sb3_check_env(make(observation=observation, top_k=top_k, on_illegal="last_legal"))


def test_the_keywords_and_defaults_are_the_documented_ones():
    documented = {
        "model": "tiny",
        "prompts": None,
        "reward": "sentiment",
        "partner": None,
        "reward_at": "end",
        "top_k": 16,
        "top_p": 1.0,
        "max_new_tokens": 32,
        "min_new_tokens": 0,
        "max_prompt_tokens": 64,
        "stop": (),
        "max_turns": 1,
        "max_turn_tokens": None,
        "max_reply_tokens": 0,
        "reply_seconds": 60.0,
        "observation": "default",
        "on_illegal": "raise",
        "dtype": "auto",
        "trust_remote_code": False,
        "render_mode": None,
    }
    signature = inspect.signature(TextGenEnv).parameters.values()
    objects = {p.name: p.default for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert objects | {field.name: field.default for field in dataclasses.fields(EnvConfig)} == documented


@pytest.mark.parametrize("name", ["textgen_env:TextGen-v0", "TextGen-v0"])
def test_the_id_is_found_with_the_module_prefix_or_after_the_import(name):
    program = f"""
import gymnasium as gym
{"import textgen_env" if ":" not in name else ""}
env = gym.make({name!r}, model=__import__("textgen_env").TableModel("ab!", [0.5, 0.4, 0.1], end="!"),
               prompts=["a"], reward="length", top_k=2)
assert env.spec.id == "TextGen-v0"
print(sorted(env.reset(seed=0)[0]))
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    keys = ["action_mask", "budget", "candidates", "length", "logprobs", "score", "tokens"]
    assert run.stdout == f"{keys}\n", run.stderr


def test_a_spec_makes_an_equal_environment_and_holds_objects_by_reference():
    model, reward = letters(), Worth()
    env = make(model=model, reward=reward)
    again = gym.make(env.spec)

    assert again.unwrapped.episodes.model is model
    assert again.unwrapped.episodes.reward is reward
    assert again.spec == env.spec
    assert data_equivalence(play(env, 3), play(again, 3))


def test_a_spec_with_objects_is_no_json_and_a_plain_one_round_trips(tmp_path, monkeypatch):
    with pytest.raises(SpecError, match=r"model= was given as an object of type TableModel, .* a folder or a hub id"):
        make().spec.to_json()

    monkeypatch.setattr("textgen_env.env.load_language_model", lambda *args, **kwargs: letters())
    plain = make(model="letters", reward={"length": 2.0}, stop=("ab",), observation=("tokens", "score"))
    again = gym.make(gym.envs.registration.EnvSpec.from_json(plain.spec.to_json()))
    assert data_equivalence(play(plain, 1), play(again, 1))


def clap(text):
    return float("a" in text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward": clap}, "reward= was given as the object clap, .*REWARDS.register"),
        ({"reward": {"length": 1.0, "name": clap}}, "reward= was given as an object of type dict"),
        ({"partner": clap}, "partner= was given as the object clap, .*'script', .*PARTNERS.register"),
        ({"stop": {"b"}}, "stop= was given as an object of type set, .*plain data"),
    ],
)
def test_a_spec_names_the_object_that_is_no_json_and_what_is_allowed(given, message, monkeypatch):
    monkeypatch.setattr("textgen_env.env.load_language_model", lambda *args, **kwargs: letters())
    plain = {"model": "letters", "prompts": PROMPTS, "reward": "length", "top_k": 3}
    turned = {"max_turn_tokens": 2} if "partner" in given else {}
    spec = copy.deepcopy(gym.spec("TextGen-v0"))
    spec.kwargs.update(plain | turned | given)
    for copied in (wrap_objects(spec), copy.deepcopy(wrap_objects(spec))):
        with pytest.raises(SpecError, match=message) as raised:
            copied.to_json()
        assert isinstance(raised.value, TypeError)  # as json itself says it


def test_numbers_of_numpy_go_through_json():
    numbers = {"max_new_tokens": np.int64(4), "top_p": np.float32(0.5), "trust_remote_code": np.False_}
    text = gym.make("TextGen-v0", **numbers).spec.to_json()
    kwargs = json.loads(text)["kwargs"]
    assert {name: kwargs[name] for name in numbers} == {"max_new_tokens": 4, "top_p": 0.5, "trust_remote_code": False}
    assert gym.make(EnvSpec.from_json(text)).unwrapped.max_new_tokens == 4


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), np.random.default_rng(0).integers(3, 4)])
def test_a_numpy_integer_is_a_seed(seed):
    assert data_equivalence(make().reset(seed=seed), make().reset(seed=3), exact=True)


def test_a_registered_partner_goes_through_json(monkeypatch):
    """What the error tells to do: a name in ``PARTNERS``, and in a new process the module that registers it."""
    monkeypatch.setattr("textgen_env.env.load_language_model", lambda *args, **kwargs: letters())
    monkeypatch.setattr(PARTNERS, "_entries", {**PARTNERS._entries})
    PARTNERS.register("clapping")(lambda times=1: FunctionPartner(lambda conversation: "a" * times))
    partner = {"name": "clapping", "times": 2}
    env = gym.make("TextGen-v0", model="letters", prompts=PROMPTS, reward="length", partner=partner, top_k=3)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert data_equivalence(play(env, 1), play(again, 1))


@pytest.mark.parametrize("settings", [{"top_k": np.int64(3)}, {"top_p": np.float32(0.5)}, {"stop": {"ab"}}])
def test_settings_that_json_has_no_word_for_work_in_a_spec(settings):
    env = make(**settings)
    assert data_equivalence(play(env, 0), play(gym.make(env.spec), 0))


# --- determinism


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_the_same_seed_and_actions_replay_bit_for_bit(observation):
    first, second = (play(make(observation=observation), seed=5) for _ in range(2))
    assert data_equivalence(first, second, exact=True)
    assert data_equivalence(first, play(make(observation=observation), seed=5), exact=True)
    assert not data_equivalence(first, play(make(observation=observation), seed=6), exact=True)


def test_two_environments_with_one_model_match_under_gymnasium_s_checker():
    model = letters()
    a, b = (make(model=model, on_illegal="last_legal", render_mode="ansi", observation="full") for _ in range(2))
    check_environments_match(a, b, num_steps=200, seed=1)


def test_a_named_prompt_leaves_the_order_of_the_drawn_ones_alone():
    def prompts_of(env, options):
        env.reset(seed=0)
        env.reset(options=options)
        return [env.unwrapped.episodes.prompts_at(FIRST_ROW)[0].text for _ in range(8) if env.reset()]

    drawn = prompts_of(make(), None)
    named = prompts_of(make(), {"prompt": "b"})
    assert named[:7] != drawn[:7]  # it is not drawn: the draws that follow come one earlier
    assert named[1:] == drawn[:-1]
    assert set(drawn) <= set(PROMPTS)


# --- the rules, against a second telling of them

RULES = [
    {},
    {"top_k": 1},
    {"top_k": 5, "top_p": 0.75},
    {"top_k": None, "top_p": 0.55},
    {"top_k": None, "min_new_tokens": 3},
    {"top_k": 5, "min_new_tokens": 5},
    {"stop": ("ab",), "top_k": 5},
    {"stop": ("b", " ."), "reward_at": "step"},
    {"top_p": 1e-9, "max_new_tokens": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_episodes_follow_the_rules(rules):
    env = make(observation="full", **rules)
    rng = np.random.default_rng(0)
    reasons = set()
    for seed in range(60):
        prompt = PROMPTS[seed % len(PROMPTS)]
        plain = PlainEpisode(prompt, **({"top_k": 4, "max_new_tokens": 5} | rules))
        observation, info = env.reset(seed=seed, options={"prompt": prompt})
        assert info == {}
        total = 0.0
        while True:
            assert_same(observation, plain.observation())
            assert env.observation_space.contains(observation)
            if plain.finish_reason:
                break
            action = rng.choice([i for i, (_, _, allowed) in enumerate(plain.candidates()) if allowed])
            observation, reward, terminated, truncated, info = env.step(action)
            assert reward == plain.step(action)
            assert (terminated, truncated) == (plain.finish_reason is not None, False)
            total += reward
        assert total == worth(plain.text)
        assert info["logprob"] == pytest.approx(plain.logprob, rel=1e-5)
        assert {key: value for key, value in info.items() if key != "logprob"} == {
            "prompt": prompt,
            "completion": plain.text,
            "text": prompt + plain.text,
            "finish_reason": plain.finish_reason,
            "reward_parts": {"worth": worth(plain.text)},
        }
        reasons.add(plain.finish_reason)
    assert "stop" in reasons or not rules.get("stop")


def test_flat_observations_hold_the_arrays_of_the_dict():
    full, hidden, tokens = (make(observation=name) for name in ("full", "hidden", "tokens"))
    for d, h, t in zip(play(full, 2), play(hidden, 2), play(tokens, 2), strict=True):
        d, h, t = d[0], h[0], t[0]
        np.testing.assert_array_equal(h, np.concatenate([d["hidden"], d["logprobs"], d["budget"], d["score"]]))
        length = d["length"][0]
        np.testing.assert_array_equal(t[:2], [length, d["budget"][0]])
        np.testing.assert_array_equal(t[2:], [*d["tokens"][:length], *[-1] * (9 - length)])


def test_the_scores_of_candidates_are_the_scores_after_taking_them():
    env = make(observation="full", top_k=5)
    for action in range(5):
        observation, _ = env.reset(options={"prompt": "b a"})
        promised = observation["candidate_scores"][action]
        after = env.step(action)[0]
        assert after["score"][0] == promised


def test_a_reward_without_a_running_score_shows_zero_and_no_candidate_scores():
    env = make(reward=lambda text: 7.0, observation="full")
    observations = [answer[0] for answer in play(env, 0)]
    assert {float(o["score"][0]) for o in observations} == {0.0}
    assert all("candidate_scores" not in o for o in observations)


def test_only_a_live_prefix_costs_a_forward():
    model = CountingModel()
    env = make(model=model, max_new_tokens=3, min_new_tokens=3)
    env.reset(seed=0)
    for _ in range(3):
        env.step(0)
    assert model.forwards == [1, 1, 1]  # after reset and after two steps; the end is shown without one


# --- going back


def test_snapshot_wander_restore_equals_never_having_left():
    env, steady = (make(model=letters(by_sum), observation="full", reward_at="step") for _ in range(2))
    for e in (env, steady):
        e.reset(seed=1, options={"prompt": "ab"})
        e.step(0)
    snapshot = env.unwrapped.snapshot()
    here = env.step(1)
    for _ in range(2):  # a snapshot serves more than once
        env.reset(options={"prompt": ". b"})
        env.step(2)
        restored = env.unwrapped.restore(snapshot)
        assert data_equivalence(env.step(1), here, exact=True)
    assert restored["length"] == [2]
    assert data_equivalence(steady.step(1), here, exact=True)
    for action in (0, 3, 0):
        assert data_equivalence(env.step(action), steady.step(action), exact=True)


def test_restoring_an_ended_episode_ends_it_again():
    env = make(max_new_tokens=1).unwrapped
    env.reset(seed=0)
    ended = env.step(0)[0]
    snapshot = env.snapshot()
    env.reset()
    assert data_equivalence(env.restore(snapshot), ended, exact=True)
    with pytest.raises(ResetNeeded):
        env.step(0)


def test_a_snapshot_belongs_to_the_environment_that_took_it():
    env, other = make().unwrapped, make().unwrapped
    env.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(ConfigError, match="another environment"):
        other.restore(env.snapshot())
    with pytest.raises(ConfigError, match="snapshot"):
        env.restore({"not": "a snapshot"})
    with pytest.raises(ResetNeeded, match="reset"):
        make().unwrapped.snapshot()


class SingleMachine(RuleBasedStateMachine):
    """Steps, illegal actions, snapshots and restores in any order, against ``PlainEpisode``."""

    @initialize(data=st.data(), rules=st.sampled_from(RULES))
    def open(self, data, rules):
        self.rules = {"top_k": 4, "max_new_tokens": 5, "reward_at": "step"} | rules
        self.env = make(model=letters(by_sum), observation="full", **self.rules).unwrapped
        self.plain = None
        self.snapshots = []
        with pytest.raises(ResetNeeded):
            self.env.step(0)

    @rule(prompt=st.sampled_from(PROMPTS))
    def reset(self, prompt):
        plain = PlainEpisode(prompt, table=by_sum, **self.rules)
        self.check(self.env.reset(options={"prompt": prompt})[0], plain)

    @precondition(lambda self: self.plain is not None)
    @rule(action=st.integers(-1, 6))
    def step(self, action):
        actions = self.plain.candidates()
        if self.plain.finish_reason:
            with pytest.raises(ResetNeeded):
                self.env.step(action)
        elif not 0 <= action < len(actions) or not actions[action][2]:
            with pytest.raises(IllegalAction):
                self.env.step(action)
        else:
            observation, reward, ended, _, info = self.env.step(action)
            assert reward == self.plain.step(action)
            assert ended == (self.plain.finish_reason is not None)
            if ended:
                assert info["completion"] == self.plain.text
                assert info["logprob"] == pytest.approx(self.plain.logprob, rel=1e-5)
            self.check(observation, self.plain)

    @precondition(lambda self: self.plain is not None)
    @rule()
    def snapshot(self):
        self.snapshots.append((self.env.snapshot(), copy.deepcopy(self.plain)))

    @precondition(lambda self: self.plain is not None and self.snapshots)
    @rule(data=st.data())
    def restore(self, data):
        snapshot, plain = data.draw(st.sampled_from(self.snapshots))
        self.check(self.env.restore(snapshot), copy.deepcopy(plain))

    def check(self, observation, plain):
        assert_same(observation, plain.observation())
        self.plain = plain


SingleMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAnyOrder = pytest.mark.slow(SingleMachine.TestCase)


# --- misuse


@pytest.mark.parametrize("action", [-1, 4, 1.0, True, "0", None, [0, 1], np.zeros((1, 1), int), np.nan])
def test_an_invalid_action_raises_and_changes_nothing(action):
    env = make().unwrapped
    before, _ = env.reset(seed=0)
    with pytest.raises(IllegalAction, match=r"0\.\.3"):
        env.step(action)
    assert data_equivalence(env._observation(), before, exact=True)
    assert env.step(0)[0]["length"] == before["length"] + 1


def test_a_masked_action_raises_and_changes_nothing():
    env = make(top_p=0.25).unwrapped
    before, _ = env.reset(options={"prompt": "a"})
    assert before["action_mask"].tolist() == [1, 0, 0, 0]
    with pytest.raises(IllegalAction, match="on_illegal='last_legal'"):
        env.step(1)
    assert data_equivalence(env._observation(), before, exact=True)


def test_a_masked_action_can_be_mapped_to_the_last_legal_one_and_is_counted():
    env = make(top_p=0.5, on_illegal="last_legal")  # after "a": a and b are legal, each of probability 0.3
    observation, _ = env.reset(options={"prompt": "a"})
    assert observation["action_mask"].tolist() == [1, 1, 0, 0]
    observation, _, _, _, info = env.step(3)
    assert observation["tokens"][:2].tolist() == [0, 1]
    assert info["illegal_actions"] == 1.0
    assert env.step(0)[-1]["illegal_actions"] == 1.0
    env.reset()
    assert env.step(0)[-1]["illegal_actions"] == 0.0
    assert env.step(0)[-1]["illegal_actions"] == 0.0
    with pytest.raises(IllegalAction):
        env.step(4)  # outside Discrete(k), whatever on_illegal says


def test_step_before_reset_and_after_the_end_asks_for_a_reset():
    env = make(max_new_tokens=1).unwrapped
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(0)
    env.reset(seed=0)
    env.step(0)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(0)
    env.reset()
    env.step(0)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "smolm2"}, UnknownName, "unknown model 'smolm2'. Did you mean 'smollm2'"),
        ({"reward": "sentimnt"}, UnknownName, "unknown reward 'sentimnt'. Did you mean 'sentiment'"),
        ({"max_tokens": 3}, UnknownName, "unknown argument 'max_tokens'. Did you mean 'max_new_tokens'"),
        ({"model": 3}, ModelError, "got int"),
        ({"prompts": 3}, PromptError, "3 gives no prompts"),
        ({"reward": 3}, ConfigError, "3 is no reward"),
        ({"prompts": []}, PromptError, "must not be empty"),
        ({"prompts": ["a", " "]}, PromptError, "prompt 1.*must not be empty"),
        ({"prompts": "missing.txt"}, PromptError, "no file of prompts at 'missing.txt'"),
        ({"top_k": 6}, ConfigError, r"top_k must be in 1\.\.5"),
        ({"max_prompt_tokens": 1 << 20}, ConfigError, "exceed the 1048576 tokens of context"),
        ({"reward_at": "step", "reward": lambda text: 0.0}, ConfigError, "can score a prefix"),
        ({"reward": lambda text: 0.0, "observation": ("candidate_scores",)}, ConfigError, "leave the key out"),
    ],
    ids=described,
)
def test_bad_arguments_are_named(changes, error, words):
    with pytest.raises(error, match=words):
        make(**changes)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"prompt": ""}, PromptError, "must not be empty"),
        ({"prompt": "a b a b a"}, PromptError, "has 9 tokens, more than max_prompt_tokens=4"),
        ({"prompt": "xyz"}, PromptError, "spells 'xyz'"),
        ({"prompt": 3}, PromptError, "must be a string, got int"),
        ({"promt": "a"}, ConfigError, "unknown reset options .*promt"),
        ({"reset_mask": np.ones(1, bool)}, ConfigError, "unknown reset options"),
    ],
    ids=described,
)
def test_a_bad_prompt_at_reset_is_named_and_the_running_episode_goes_on(given, error, words):
    env = make().unwrapped
    env.reset(seed=0)
    with pytest.raises(error, match=words):
        env.reset(options=given)
    assert env.step(0)[0]["budget"] == np.float32(0.8)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"a\nb\n\xff\n", "line 3: not UTF-8"), (b"a\n\nb\n", "line 2.*must not be empty")],
)
def test_a_bad_file_of_prompts_is_named_with_its_line(tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=words):
        make(prompts=str(path))


def broken(text):
    raise KeyError("lookup")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda text: float("nan"), "answered nan for the completion 'a'"),
        (lambda text: [1.0, 2.0], "answered shape .* for the completion 'a'"),
        (lambda text: "good", "not numbers, for the completion 'a'"),
        (broken, "reward 'broken' raised KeyError: 'lookup' .*'a'"),
    ],
)
def test_a_bad_reward_is_named_with_its_text_and_the_episode_needs_a_reset(reward, words):
    env = make(reward=reward, max_new_tokens=1).unwrapped
    env.reset(options={"prompt": "a"})
    with pytest.raises(RewardError, match=words):
        env.step(0)
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.reset()


def test_a_running_score_that_raises_leaves_no_half_made_step():
    class Broken(Worth):
        def running(self):
            score = super().running()
            score.extend = lambda state, completion: broken(completion)
            return score

    env = make(reward=Broken()).unwrapped
    env.reset(seed=0)
    with pytest.raises(
        RewardError, match=r"running score of reward 'worth' raised KeyError.*the completion 'a'"
    ) as raised:
        env.step(0)
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(ResetNeeded):
        env.step(0)


# --- rendering


def test_ansi_shows_the_text_and_the_candidates_with_their_probabilities():
    env = make(render_mode="ansi", top_p=0.75)
    assert "call reset" in env.unwrapped.render()
    env.reset(options={"prompt": "ab"})
    env.step(2)  # "ab", of probability 0.2
    lines = env.render().splitlines()
    assert lines[0] == "ab│ab"
    assert lines[1] == "1 of 5 tokens, score 0.750"
    assert [line.split() for line in lines[2:]] == [
        [str(i), "20.0%", "████", text] for i, text in enumerate(["'a'", "'b'", "'ab'"])
    ] + [["3", "20.0%", "████", "'", "'"]]
    env.step(0)
    for action in (3, 0, 0):  # b, then on to the end
        env.step(action)
    assert env.render().splitlines()[0].endswith("[end]")


def test_ansi_calls_the_end_token_by_name():
    env = make(render_mode="ansi", top_k=5)
    env.reset(options={"prompt": "."})
    assert "60.0% ████████████         <end>" in env.render()


def test_rgb_array_draws_the_text():
    env = make(render_mode="rgb_array")
    env.reset(options={"prompt": "a"})
    first = env.render()
    assert first.shape == (420, 640, 3)
    assert first.dtype == np.uint8
    assert (first < 128).any()
    env.step(0)
    assert (env.render() != first).any()


def test_rgb_array_has_letters_for_accents():
    env = make(model=TableModel(["é", "ö"], [0.5, 0.5], end=None), prompts=["é"], top_k=1, render_mode="rgb_array")
    env.reset(options={"prompt": "é"})
    first = env.render()
    env.reset(options={"prompt": "ö"})
    assert (env.render() != first).any()  # a font without them draws the same box for both


def test_human_prints_every_state_once(capsys):
    env = make(render_mode="human", max_new_tokens=2)
    env.reset(options={"prompt": "b"})
    env.step(0)
    env.step(0)
    assert env.render() is None
    shown = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert shown == ["b│", "b│a", "b│aa   [end]"]


def test_everything_written_to_info_is_plain_data():
    for *_, info in (answer for answer in play(make(), 0) if len(answer) == 5):
        json.dumps(info)


def test_a_chosen_prompt_brings_its_reference_to_the_reward():
    def same(generations):
        return np.array([float(g.completion == g.reference) for g in generations])

    env = make(reward=batch_reward(same), max_new_tokens=1)
    first = letters().decode([int(env.reset(options={"prompt": "a"})[0]["candidates"][0])])
    for given, expected in (
        ({"prompt": "a", "reference": first}, 1.0),
        (Prompt("a", first), 1.0),
        (Prompt("a", "other"), 0.0),
        ("a", 0.0),
    ):
        env.reset(options={"prompt": given})
        assert env.step(0)[1] == expected
