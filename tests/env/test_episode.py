"""The rules of an episode on random models and settings, with real rewards, and against kept episodes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_equal
from toys import TABLE, TOKENS, Counted, CountingModel, PlainEpisode, Worth, assert_same, letters

from textgen_env import Prompt, Reward, TableModel, TextGenEnv, TextGenVectorEnv, make_prompts, make_reward
from textgen_env.config import EnvConfig
from textgen_env.episode import Episodes
from textgen_env.errors import ConfigError, ModelError, PromptError, ResetNeeded, RewardError
from textgen_env.rows import Phase

WORDS = (" good", " bad", " not", "!", " awful", " the", "ly", " sun", " rain", ".", "\n", "<end>")

REWARDS = {
    "sentiment": "sentiment",
    "keywords": {"name": "keywords", "words": ["sun", "rain", "good"]},
    "length": {"name": "length", "target": 3},
    "repetition": "repetition",
    "distinct": "distinct",
    "readability": "readability",
    "rouge": "rouge",
    "mix": [["sentiment", 1.0], ["repetition", -0.5]],
    "a mix with a part that no prefix shows": [["sentiment", 1.0], [lambda text: len(text) % 7, 0.25]],
    "shaped": {"name": "shaped", "reward": {"name": "regex", "pattern": "sun"}, "potential": "sentiment"},
}
NO_PREFIX_SHOWS_ALL = ("a mix with a part that no prefix shows", "shaped")


def words_env(reward, **changes):
    table = np.full(len(WORDS), 1 / len(WORDS))
    prompts = [Prompt(" the sun", reference="The sun is good.")]
    arguments = {"top_k": 11, "max_new_tokens": 8, "observation": "full", "min_new_tokens": 3} | changes
    return TextGenEnv(TableModel(WORDS, table), prompts, make_reward(reward), **arguments)


# --- rewards on the way


@pytest.mark.parametrize("name", REWARDS)
@settings(max_examples=15, deadline=None)
@given(actions=st.lists(st.integers(0, 10), min_size=8, max_size=8))
def test_the_increments_sum_to_the_reward_of_the_text(name, actions):
    env = words_env(REWARDS[name], reward_at="step")
    observation, _ = env.reset(seed=0)
    total, ended = 0.0, False
    for action in actions:
        observation, reward, ended, _, _ = env.step(action)
        total += reward
        if ended:
            break
        assert total == pytest.approx(observation["score"][0], abs=1e-5)
    assert ended
    once = words_env(REWARDS[name], reward_at="end")
    once.reset(seed=0)
    paid = [once.step(action)[1] for action in actions[: observation["length"][0] - 2]]
    assert total == pytest.approx(paid[-1], abs=1e-6)
    assert not any(paid[:-1])


@pytest.mark.parametrize("name", REWARDS)
@settings(max_examples=10, deadline=None)
@given(actions=st.lists(st.integers(0, 8), min_size=4, max_size=4), data=st.data())
def test_a_candidate_s_score_is_the_score_after_taking_it(name, actions, data):
    env = words_env(REWARDS[name])
    observation, _ = env.reset(seed=0)
    for action in actions:
        promised = observation["candidate_scores"]
        snapshot = env.snapshot()
        for other in data.draw(st.lists(st.integers(0, 10), max_size=2)):
            assert env.step(other)[0]["score"][0] == pytest.approx(promised[other], abs=1e-6)
            env.restore(snapshot)
        observation, _, ended, _, _ = env.step(action)
        assert observation["score"][0] == pytest.approx(promised[action], abs=1e-6)
        if ended:
            break


@pytest.mark.parametrize("name", sorted(set(REWARDS) - set(NO_PREFIX_SHOWS_ALL)))
def test_the_last_score_is_the_reward(name):
    env = words_env(REWARDS[name], min_new_tokens=8)
    env.reset(seed=0)
    for action in (0, 2, 1, 4, 3, 8, 0, 7):
        observation, reward, *_ = env.step(action)
    assert observation["budget"] == [0.0]
    assert reward == pytest.approx(observation["score"][0], abs=1e-6)


# --- random models and settings


@st.composite
def tables(draw):
    """Six rows of probabilities over ``TOKENS``, with many ties and zeros, and always more than the end."""
    weights = draw(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=6, max_size=6))
    table = np.array(weights, float)
    table[:, 0] += table[:, :5].sum(-1) == 0
    return table / table.sum(-1, keepdims=True)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    table=tables(),
    rules=st.fixed_dictionaries(
        {
            "top_k": st.sampled_from([1, 2, 4, 5, None]),
            "top_p": st.sampled_from([0.113, 0.317, 0.513, 0.739, 1.0]),  # no sum of the tables' fractions
            "min_new_tokens": st.integers(0, 4),
            "reward_at": st.sampled_from(["end", "step"]),
            "stop": st.sampled_from([(), ("ab",), ("bb", " ")]),
        }
    ),
    prompt=st.sampled_from(["a", "ab", "b.", "   a"]),
    choices=st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_any_model_under_any_rules_follows_the_plain_telling(table, rules, prompt, choices):
    rules = rules | {"max_new_tokens": 4}
    env = TextGenEnv(TableModel(TOKENS, table), [prompt], Worth(), observation="full", max_prompt_tokens=4, **rules)
    plain = PlainEpisode(prompt, table=table, **rules)
    observation, _ = env.reset(seed=0)
    for choice in choices:
        assert env.observation_space.contains(observation)
        assert_same(observation, plain.observation())
        legal = np.flatnonzero(observation["action_mask"])
        assert len(legal)
        action = legal[choice % len(legal)]
        observation, reward, ended, _, _ = env.step(action)
        assert reward == plain.step(action)
        assert ended == (plain.finish_reason is not None)
        if ended:
            break
    assert_same(observation, plain.observation())


# --- by hand


def hand(**changes):
    return TextGenEnv(letters(), ["b"], Worth(), **({"top_k": None, "max_new_tokens": 6} | changes))


def finish(env, *tokens):
    """Append ``tokens`` after "b" and return how many the text took, and the last info."""
    env.reset()
    for count, token in enumerate(tokens, 1):
        *_, ended, _, info = env.step(TOKENS.index(token))
        if ended:
            return count, info
    raise AssertionError(f"{tokens} did not end the text")


@pytest.mark.parametrize(
    ("stop", "tokens", "count", "reason"),
    [
        (("ab",), ["b", "ab", "a"], 2, "stop"),  # within a token
        (("ab",), ["a", "b", "a"], 2, "stop"),  # across two
        (("bab",), ["b", "ab"], 2, "stop"),  # across a token and a half
        (("b",), ["a", "ab"], 2, "stop"),  # inside of a token
        (("ba",), ["a", "a", "<end>"], 3, "eos"),  # the prompt's b does not count
        (("aaaa",), ["a"] * 6, 4, "stop"),
        ((), ["a"] * 6, 6, "length"),
        (("aaaaaa",), ["a"] * 6, 6, "stop"),  # both at once: the text says so
        (("a", "b"), ["<end>"], 1, "eos"),
    ],
)
def test_how_texts_end(stop, tokens, count, reason):
    got, info = finish(hand(stop=stop), *tokens)
    assert (got, info["finish_reason"]) == (count, reason)
    assert info["completion"] == "".join(tokens[:count]).replace("<end>", "")


def test_the_state_is_token_ids_and_never_decoded_and_encoded_again():
    env = hand(top_k=5)
    observation, _ = env.reset(options={"prompt": "ab"})
    assert observation["tokens"][:1].tolist() == [2]
    for token in (0, 1):  # "a", "b": the text of one token in two
        observation, *_ = env.step(observation["candidates"].tolist().index(token))
    assert observation["tokens"][:3].tolist() == [2, 0, 1]
    np.testing.assert_allclose(np.exp(observation["logprobs"]), sorted(TABLE[1], reverse=True)[:5], rtol=1e-6)


def test_a_reward_is_told_everything_about_the_text():
    told = []

    class Listener(Reward):
        name = "listener"

        def __call__(self, generations):
            told.extend(generations)
            return np.zeros(len(generations))

    prompt = Prompt("ab", reference="abb", metadata={"topic": 1})
    env = TextGenEnv(letters(), [prompt], Listener(), top_k=5, max_new_tokens=2)
    env.reset(seed=0)
    env.step(1)  # b, of probability 0.2
    env.step(0)  # a, of 0.4
    (text,) = told
    assert (text.prompt, text.completion, text.text, text.finish_reason) == ("ab", "ba", "abba", "length")
    assert (text.prompt_ids, text.ids, text.reference, text.metadata) == ((2,), (1, 0), "abb", {"topic": 1})
    assert np.exp(text.logprobs) == pytest.approx([0.2, 0.4])


def test_log_probabilities_are_those_of_the_blocked_distribution():
    _, info = finish(hand(min_new_tokens=6), *"ababab")
    after_b = TABLE[1] / 0.9
    after_a = TABLE[0] / 0.9
    assert info["logprob"] == pytest.approx(3 * np.log(after_b[0]) + 3 * np.log(after_a[1]), rel=1e-5)


def test_rewards_of_rows_that_end_together_are_asked_for_once():
    batches = []

    class Batches(Worth):
        def __call__(self, generations):
            batches.append(len(generations))
            return super().__call__(generations)

    env = TextGenVectorEnv(3, letters(), ["a"], Batches(), top_k=4, max_new_tokens=2, min_new_tokens=2)
    env.reset(seed=0)
    for _ in range(4):
        env.step(np.zeros(3, int))
    assert batches == [3, 3]


def test_a_prompt_without_tokens_is_refused():
    class Mute(TableModel):
        def encode(self, text):
            return []

    env = TextGenEnv(Mute(TOKENS, TABLE), ["a"], Worth(), top_k=4)
    with pytest.raises(PromptError, match="'a' has no tokens"):
        env.reset()


def test_a_text_that_can_only_end_says_so_where_it_must_go_on():
    table = TABLE.copy()
    table[0] = [0, 0, 0, 0, 0, 1]
    env = TextGenEnv(TableModel(TOKENS, table), ["b"], Worth(), top_k=4, min_new_tokens=3)
    env.reset()
    with pytest.raises(ModelError, match="only the end is possible"):
        env.step(0)
    with pytest.raises(ResetNeeded):  # rather than go on with the candidates of the prefix before
        env.step(0)


def test_a_running_score_that_cannot_start_leaves_the_running_episode_as_it_is():
    prompt = Prompt("a", metadata={"keywords": ["b"]})
    env = TextGenEnv(letters(), [prompt], make_reward("keywords"), top_k=4)
    before, _ = env.reset(seed=0)
    with pytest.raises(RewardError, match='has no "keywords"'):
        env.reset(options={"prompt": "ab"})
    after, *_ = env.step(0)
    assert after["tokens"][:2].tolist() == [before["tokens"][0], before["candidates"][0]]


class Straying(Reward):
    """The number of characters, with a running score that strays: methods given here answer in its place."""

    name = "straying"

    def __init__(self, **methods):
        self._methods = methods

    def __call__(self, generations):
        return np.array([len(g.completion) for g in generations], np.float64)

    def running(self):
        methods = {
            "start": lambda prompt, reference, metadata: Counted("", 0.0),
            "extend": lambda state, completion: Counted(completion, float(len(completion))),
            "lookahead": lambda state, texts: np.array([len(text) for text in texts], np.float32),
        }
        return SimpleNamespace(**{**methods, **self._methods})


def straying(**methods):
    return TextGenEnv(letters(), ["a"], Straying(**methods), top_k=3, observation="full", reward_at="step")


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (lambda text: Counted(text, float("nan")), "answered nan for the completion 'aa'; rewards must be finite"),
        (lambda text: Counted(text, float("inf")), "answered inf"),
        (lambda text: Counted(text, -1e31), r"answered -1e\+31"),
        (lambda text: Counted(text, "2"), "answered dtype .*, not numbers"),
        (lambda text: Counted(text, [2.0]), r"answered shape \(1, 1\)"),
        (lambda text: None, "raised AttributeError"),
        (lambda text: {}[text], "raised KeyError: 'aa'"),
    ],
)
def test_a_running_score_that_is_no_finite_number_is_named_in_its_step(second, words):
    env = straying(extend=lambda state, text: second(text) if len(text) == 2 else Counted(text, float(len(text))))
    env.reset(seed=0)
    assert env.step(0)[1] == 1.0  # a character a step
    with pytest.raises(RewardError, match=f"the running score of reward 'straying' {words}"):
        env.step(0)
    with pytest.raises(ResetNeeded):
        env.step(0)


@pytest.mark.parametrize(
    ("lookahead", "words"),
    [
        (lambda state, texts: 0.5, r"looked ahead with shape \(\) for 3 texts.*expected \(3,\)"),
        (lambda state, texts: np.zeros(2), r"shape \(2,\)"),
        (lambda state, texts: np.zeros((3, 1)), r"shape \(3, 1\)"),
        (lambda state, texts: np.array([0.0, 1.0, np.nan]), "answered nan for the completion"),
        (lambda state, texts: ["a", "b", "c"], "not numbers"),
        (lambda state, texts: {}[texts[0]], "raised KeyError"),
    ],
)
def test_a_look_ahead_that_is_not_a_number_a_candidate_is_named(lookahead, words):
    env = straying(lookahead=lookahead)
    with pytest.raises(RewardError, match=f"running score of reward 'straying' .*{words}"):
        env.reset(seed=0)
    with pytest.raises(ResetNeeded):
        env.step(0)


@pytest.mark.parametrize("value", [-np.inf, np.nan, None])
def test_a_running_score_that_starts_at_no_number_leaves_the_running_episode_as_it_is(value):
    starts = iter([0.0, value])
    env = straying(start=lambda prompt, reference, metadata: Counted("", next(starts)))
    env.reset(seed=0)
    with pytest.raises(RewardError, match="running score of reward 'straying' answered"):
        env.reset()
    assert env.step(0)[1] == 1.0


def test_scores_beyond_the_observation_space_are_shown_as_its_bound_and_paid_in_full():
    env = straying()
    mixed = TextGenEnv(letters(), ["a"], [[Straying(), 1e7]], top_k=3, observation="full", reward_at="step")
    env.reset(seed=0)
    mixed.reset(seed=0)
    for _ in range(2):
        plain, large = env.step(0), mixed.step(0)
        assert large[1] == 1e7 * plain[1]
        assert large[0] in mixed.observation_space
        assert large[0]["score"] == 1e6


def test_a_mix_whose_weights_leave_the_finite_numbers_is_named():
    env = TextGenEnv(letters(), ["a"], [[lambda text: 1e20, 1e20]], top_k=3, max_new_tokens=1)
    env.reset(seed=0)
    with pytest.raises(RewardError, match=r"'mix' answered 1e\+40"):
        env.step(0)


# --- phases

ALL = np.arange(2)


def two_rows(model=None, reward=None, **changes):
    """Two rows on ``letters``, without an environment around them."""
    config = EnvConfig(**({"top_k": 4, "max_new_tokens": 2, "min_new_tokens": 2, "observation": "full"} | changes))
    return Episodes(model or letters(), make_prompts(["a"]), reward or Worth(), config, rows=2)


def begun(**arguments):
    episodes = two_rows(**arguments)
    episodes.begin(ALL, [Prompt("a"), Prompt("b")])
    return episodes


def ended(**arguments):
    """Row 0 has ended, row 1 is in the middle of its text."""
    episodes = begun(**arguments)
    episodes.observe(ALL)
    episodes.act(ALL, [0, 0])
    episodes.observe(ALL)
    episodes.act(ALL[:1], [0])
    return episodes


def phases(episodes):
    return episodes.phases.tolist()


def test_begin_makes_rows_stale_and_observe_makes_them_ready():
    episodes = two_rows()
    assert phases(episodes) == [Phase.EMPTY, Phase.EMPTY]
    episodes.begin(ALL[1:], [Prompt("a")])
    assert phases(episodes) == [Phase.EMPTY, Phase.STALE]
    episodes.observe(ALL)
    assert phases(episodes) == [Phase.EMPTY, Phase.READY]


@pytest.mark.parametrize("read", ["observe", "legal", "proposals", "log_prior"])
def test_reading_a_stale_row_proposes_for_its_tokens(read):
    model = CountingModel()
    episodes = begun(model=model)
    for forwards in ([2], [2], [2]):
        getattr(episodes, read)(ALL)
        assert phases(episodes) == [Phase.READY, Phase.READY]
        assert model.forwards == forwards


def test_act_makes_rows_stale_or_ended():
    episodes = ended()
    assert phases(episodes) == [Phase.ENDED, Phase.READY]
    episodes.act(ALL[1:], [0])
    assert phases(episodes) == [Phase.ENDED, Phase.ENDED]
    episodes = begun(max_new_tokens=3)
    episodes.observe(ALL)
    episodes.act(ALL, [0, 0])
    assert phases(episodes) == [Phase.STALE, Phase.STALE]


def test_only_ready_rows_may_act():
    with pytest.raises(ResetNeeded, match=r"rows \[0, 1\] have no live episode: call reset before the first step"):
        two_rows().act(ALL, [0, 0])
    with pytest.raises(ResetNeeded, match=r"rows \[0\] have no live episode"):
        ended().act(ALL, [0, 0])
    with pytest.raises(ResetNeeded, match=r"rows \[0, 1\] have changed since they were observed"):
        begun().act(ALL, [0, 0])


def test_an_ended_row_stays_ended_however_often_it_is_observed():
    model = CountingModel()
    episodes = ended(model=model)
    forwards = len(model.forwards)
    for _ in range(2):
        seen = episodes.observe(ALL)
        assert episodes.legal(ALL)[0].all()
        assert seen["hidden"][0].tolist() == [0.0] * 6
        np.testing.assert_allclose(seen["logprobs"][0], -np.log(4))
        assert phases(episodes) == [Phase.ENDED, Phase.READY]
    assert len(model.forwards) == forwards
    with pytest.raises(ResetNeeded, match=r"rows \[0\]"):
        episodes.act(ALL[:1], [0])


def test_begin_load_and_fork_end_the_end():
    for revive in (
        lambda episodes, _: episodes.begin(ALL[:1], [Prompt("a")]),
        lambda episodes, saved: episodes.load(0, saved),
        lambda episodes, _: episodes.fork(ALL[1:], ALL[:1]),
    ):
        episodes = ended()
        revive(episodes, episodes.save(1))
        episodes.observe(ALL)
        assert phases(episodes) == [Phase.READY, Phase.READY]
        episodes.act(ALL, [0, 0])


def test_load_and_fork_copy_the_end():
    episodes = ended()
    saved = episodes.save(0)
    episodes.load(1, saved)
    assert phases(episodes) == [Phase.ENDED, Phase.ENDED]
    episodes = ended()
    episodes.fork(ALL[:1], ALL[1:])
    assert phases(episodes) == [Phase.ENDED, Phase.ENDED]


def assert_needs_a_reset(episodes):
    for call in (
        lambda: episodes.observe(ALL),
        lambda: episodes.act(ALL, [0, 0]),
        lambda: episodes.save(0),
        lambda: episodes.fork(ALL[:1], ALL[1:]),
    ):
        with pytest.raises(ResetNeeded, match="need a reset: the model or the reward raised"):
            call()
    episodes.begin(ALL, [Prompt("b"), Prompt("b")])
    episodes.observe(ALL)
    episodes.act(ALL, [0, 0])


def test_rows_on_which_the_model_raised_need_a_reset():
    table = TABLE.copy()
    table[0] = [0, 0, 0, 0, 0, 1]  # after "a" only the end is possible
    episodes = begun(model=letters(table))
    with pytest.raises(ModelError, match="only the end is possible"):
        episodes.observe(ALL)
    assert_needs_a_reset(episodes)


def test_rows_on_which_the_reward_raised_need_a_reset():
    def fragile(text):
        return 1 / text.count("!")

    episodes = begun(reward=make_reward(fragile))
    episodes.observe(ALL)
    episodes.act(ALL, [0, 0])
    episodes.observe(ALL)
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        episodes.act(ALL, [0, 0])
    assert_needs_a_reset(episodes)


def test_stored_rows_come_back_in_their_phases():
    episodes, other = ended(), two_rows()
    arrays, plain = episodes.state_dict()
    assert arrays["phase"].tolist() == [Phase.ENDED, Phase.READY]
    other.load_state_dict(arrays, plain)
    assert phases(other) == [Phase.ENDED, Phase.READY]
    assert_equal(other.observe(ALL), episodes.observe(ALL))
    assert other.prompts_at(ALL) == [Prompt("a"), Prompt("b")]
    with pytest.raises(ConfigError, match="phase is None"):
        other.load_state_dict({name: array for name, array in arrays.items() if name != "phase"}, plain)
    with pytest.raises(ConfigError, match=r"lengths <= 66"):
        other.load_state_dict(arrays | {"length": arrays["length"] + 99}, plain)


# --- golden episodes


def assert_close(got, kept, where=""):
    if isinstance(kept, dict):
        assert set(got) == set(kept), where
        for key, value in kept.items():
            assert_close(got[key], value, f"{where}/{key}")
    elif isinstance(kept, list):
        assert len(got) == len(kept), where
        for i, value in enumerate(kept):
            assert_close(got[i], value, f"{where}/{i}")
    elif isinstance(kept, float):
        assert got == pytest.approx(kept, abs=1e-4), where
    else:
        assert got == kept, where


def test_episodes_equal_the_golden_ones():
    assert_close(golden.episodes(), json.loads(golden.PATH.read_text()))
