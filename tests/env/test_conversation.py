"""Conversations: the same text written as one, Hugging Face's uncached forward, forks, and partners that fail."""

from __future__ import annotations

import asyncio
import copy
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from numpy.testing import assert_allclose, assert_array_equal, assert_equal
from toys import TABLE, TOKENS, Worth, by_sum, letters, worth

from textgen_env import Prompt, TableModel, TextGenEnv, TextGenVectorEnv
from textgen_env.conversation import Conversation, FunctionPartner, Partner, Reply, Script, make_partner
from textgen_env.errors import ConfigError, PartnerError, ResetNeeded, UnknownName
from textgen_env.rewards import Reward
from textgen_env.rewards.base import Turn
from textgen_env.testing import check_env, check_vector_env

LINES = ["b.", "a", "ab a"]  # two, one and three tokens
SMALL = {"top_k": None, "max_turns": 3, "max_turn_tokens": 2, "max_new_tokens": 6, "max_reply_tokens": 3}


def summing() -> TableModel:
    """A model whose next token depends on all of the text, replies included, and may be any."""
    return TableModel(
        TOKENS, lambda ids: 0.9 * by_sum(ids) + 0.1 / 6, features=lambda ids: np.bincount(ids, minlength=6)
    )


def talk(partner=None, model=None, reward=None, prompts=("a",), **settings):
    partner = Script(LINES) if partner is None else partner
    return TextGenEnv(model or summing(), list(prompts), reward, partner, **{**SMALL, **settings})


def say(env, text):
    """Let the agent choose the tokens of ``text``, one a character; return the last answer."""
    for token in text:
        answer = env.step(TOKENS.index({"|": "<end>"}.get(token, token)))
    return answer


def echo(conversation):
    return Reply(conversation.last, reward=len(conversation.last))


# --- the same text written as one


def test_a_scripted_conversation_is_the_same_text_written_as_one():
    env = talk(reward=Worth(), observation="full")
    whole = TextGenEnv(summing(), ["a"], Worth(), top_k=None, max_new_tokens=12, observation="full")
    seen, _ = env.reset()
    alone, _ = whole.reset()
    asked = []
    for said, reply in zip(["ab", "ba", "a "], ["b.", "a", "ab a"], strict=True):
        for token in said:
            for key in ("logprobs", "hidden", "action_mask"):
                assert_array_equal(seen[key], alone[key])
            length = int(alone["length"][0])
            assert seen["length"] == length
            assert_array_equal(seen["tokens"][:length], alone["tokens"][:length])
            asked.append(float(alone["logprobs"][TOKENS.index(token)]))
            seen, paid, ended, _, info = env.step(TOKENS.index(token))
            alone, *_ = whole.step(TOKENS.index(token))
        for token in summing().encode(reply):
            alone, earned, *_, told = whole.step(token)
    assert ended
    assert told["finish_reason"] == "length"  # of 12 tokens: 6 by the agent and 6 by the partner
    assert info["completion"] == told["completion"] == "abb.baaa ab a"
    assert paid == earned == worth("abb.baaa ab a")
    assert info["logprob"] == pytest.approx(sum(asked))
    assert info["turns"] == (
        Turn("agent", "ab"), Turn("partner", "b."), Turn("agent", "ba"), Turn("partner", "a"), Turn("agent", "a "),
        Turn("partner", "ab a"),
    )  # fmt: skip


def test_a_transformer_reads_replies_as_its_uncached_forward_does(tiny_lm):
    import torch

    model, _ = tiny_lm
    script = Script(["the film was", "bad .", "", "long"])
    env = TextGenVectorEnv(
        3, tiny_lm, ["the film", "good", "and"], None, script, top_k=5, max_turns=4, max_turn_tokens=2,
        max_new_tokens=8, max_reply_tokens=3, min_new_tokens=2, max_prompt_tokens=3, observation="full",
        dtype="float32",
    )  # fmt: skip
    seen, _ = env.reset(seed=0, options={"prompt": ["the film", "good", "and"]})
    actions, shown = np.random.default_rng(0).integers(5, size=(7, 3)), []
    for step in range(7):
        shown.append(seen)
        for row in range(3):
            ids = torch.tensor(seen["tokens"][row, : int(seen["length"][row, 0])].astype(int))[None]
            with torch.no_grad():
                logits = model(ids).logits[0, -1].double()
            logits[0] = -torch.inf  # min_new_tokens is a whole turn
            expected = torch.log_softmax(logits, -1)[torch.from_numpy(seen["candidates"][row].astype(int))]
            assert_allclose(seen["logprobs"][row], expected.numpy(), atol=1e-4)
        said = seen["length"][:, 0] + 1
        seen, *_ = env.step(actions[step])
        replied = {1: 3, 3: 2}.get(step, 0)  # a turn has two tokens, and the third line is empty
        assert_array_equal(seen["length"][:, 0] - said, [replied] * 3)

    # Once more, out of the memo; and with a row that branches in the middle of a turn, out of the cache.
    again, _ = env.reset(options={"prompt": ["the film", "good", "and"]})
    for step, before in enumerate(shown):
        assert_allclose(again["logprobs"], before["logprobs"], atol=1e-4)
        if step == 3:
            again = env.fork([0], [2])
            actions[3:, 2] = actions[3:, 0]
            break
        again, *_ = env.step(actions[step])
    for step in range(3, 7):
        assert_allclose(again["logprobs"][[0, 2]], shown[step]["logprobs"][[0, 0]], atol=1e-4)
        again, *_ = env.step(actions[step])


# --- turns


def test_a_turn_ends_with_an_end_token_a_stop_string_or_its_budget():
    heard = []

    def listen(conversation):
        heard.append(conversation.last)
        return "b"

    env = talk(listen, stop=(".",), max_turn_tokens=3, max_turns=9, max_new_tokens=20, observation="full")
    env.reset()
    for text, ends in (("a|", 1), (" .", 2), ("aba", 3), ("|", 4)):
        for i, token in enumerate(text, 1):
            seen, *_ = say(env, token)
            assert seen["turn"] == (ends if i == len(text) else ends - 1)
    assert heard == ["a", " .", "aba", ""]
    assert seen["budget"] == pytest.approx(1 - 8 / 20)  # replies cost nothing
    assert seen["turn_budget"] == 1.0
    assert say(env, "a")[0]["turn_budget"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("settings", "partner", "said", "reason"),
    [
        ({"max_new_tokens": 9}, echo, "ababab", "turns"),
        ({}, echo, "ababab", "length"),  # both at once
        ({"max_turns": 9, "max_new_tokens": 3}, echo, "aba", "length"),
        ({"max_turns": 9, "max_new_tokens": 3, "max_turn_tokens": None}, echo, "aba", "length"),
        ({"max_turns": 9, "max_new_tokens": 9}, Script(["b", "a"]), "abab", "partner"),
        ({}, Script(LINES), "ababab", "partner"),  # all at once: the partner says so
        ({"max_new_tokens": 6, "max_turns": 2}, echo, "a|b|", "turns"),
    ],
)
def test_how_conversations_end(settings, partner, said, reason):
    env = talk(partner, **settings)
    env.reset()
    for token in said[:-1]:
        assert not say(env, token)[2]
    *_, ended, _, info = say(env, said[-1])
    assert ended
    assert info["finish_reason"] == reason
    with pytest.raises(ResetNeeded):
        env.step(0)


def test_speaker_says_who_each_token_is_by():
    env = talk(observation=("tokens", "length", "speaker"), prompts=["a b"])
    env.reset()
    seen, *_ = say(env, "aba")
    assert seen["speaker"].tolist() == [0] * 3 + [1] * 2 + [2] * 2 + [1] + [0] * (64 + 6 + 9 - 8)
    assert [TOKENS[i] for i in seen["tokens"][:8]] == ["a", " ", "b", "a", "b", "b", ".", "a"]


def test_what_a_tokenizer_puts_before_a_text_is_not_put_before_a_reply():
    class Begun(TableModel):
        def encode(self, text):
            return [TOKENS.index("."), *super().encode(text)]

    env = talk(Script(["b"]), model=Begun(TOKENS, 0.9 * TABLE + 0.1 / 6))
    env.reset()
    seen, *_ = say(env, "a|")
    assert [TOKENS[i] for i in seen["tokens"][: int(seen["length"][0])]] == [".", "a", "a", "<end>", "b"]


def test_a_partner_is_told_the_whole_conversation():
    told = []

    def listen(conversation):
        told.append(conversation)
        return Reply("b", reward=0.5)

    prompt = Prompt("ab", reference="abb", metadata={"secret": 7})
    env = talk(listen, prompts=[prompt])
    env.reset(seed=0)
    say(env, "a|bb")
    turns = (Turn("agent", "a"), Turn("partner", "b", 0.5), Turn("agent", "bb"))
    assert told == [
        Conversation("ab", turns[:1], "abb", {"secret": 7}),
        Conversation("ab", turns, "abb", {"secret": 7}),
    ]
    assert (told[1].last, told[1].said) == ("bb", ("a", "bb"))


# --- rewards


def test_a_reply_s_reward_is_paid_in_its_step_and_the_environment_s_at_the_end():
    env = talk(echo, reward=Worth())
    env.reset()
    paid, infos = [], []
    for token in "ab|a|":
        _, reward, ended, _, info = say(env, token)
        paid.append(reward)
        infos.append(info)
    text = "ab" + "ab" + "" + "" + "a" + "a"
    assert ended
    assert paid == [0.0, 2.0, 0.0, 0.0, 1.0 + worth(text)]
    assert infos[-1]["reward_parts"] == {"worth": worth(text), "partner": 3.0}
    assert infos[-1]["completion"] == text


def test_without_a_reward_the_partner_s_counts_alone():
    env = talk(echo, reward=None)
    env.reset()
    assert [say(env, token)[1] for token in "ab|a|"] == [0.0, 2.0, 0.0, 0.0, 1.0]


def test_running_scores_go_on_behind_replies_and_step_rewards_sum_to_the_reward():
    env = talk(reward=Worth(), reward_at="step", observation="full", top_k=5)
    seen, _ = env.reset()
    total, text = 0.0, ""
    for token, reply in zip("abbaa ", ["", "b.", "", "a", "", "ab a"], strict=True):
        action = seen["candidates"].tolist().index(TOKENS.index(token))
        promised = seen["candidate_scores"][action]
        text += token
        assert promised == worth(text)
        seen, reward, *_ = env.step(action)
        text += reply
        total += reward
        assert total == seen["score"][0] == worth(text)


def test_rewards_are_told_who_said_what():
    told = []

    class Listener(Reward):
        name = "listener"

        def __call__(self, generations):
            told.extend(generations)
            return np.zeros(len(generations))

    env = talk(Script(["b", "."]), model=letters(), reward=Listener())
    env.reset()
    say(env, "aa|")
    (text,) = told
    assert (text.completion, text.ids, text.finish_reason) == ("aab.", (0, 0, 1, 5, 4), "partner")
    assert text.turns == (Turn("agent", "aa"), Turn("partner", "b"), Turn("agent", ""), Turn("partner", "."))
    # After a, a and b the next tokens were a, a and <end>; the partner's have no probability.
    assert_allclose(text.logprobs, [np.log(TABLE[0, 0])] * 2 + [0] + [np.log(TABLE[1, 5])] + [0], rtol=1e-6)


@pytest.mark.parametrize("reply", ["", "a", "a b a "])
def test_fluency_is_of_the_agent_s_tokens_however_long_the_partner_talks(reply):
    given = {"max_turns": 2, "max_turn_tokens": 1, "max_new_tokens": 2, "max_reply_tokens": 6}
    env = talk(lambda conversation: reply, model=letters(), reward="fluency", **given)
    env.reset()
    say(env, "a")
    reward = say(env, "b")[1]
    before = TOKENS.index(reply[-1]) if reply else 0  # the token before the agent's second one
    assert reward == pytest.approx((np.log(TABLE[0, 0]) + np.log(TABLE[before, 1])) / 2, rel=1e-6)


# --- rows that branch, batches, and rows that are stored


def rows_of(count=3, partner=None, **settings):
    prompts = ["a", "b a", ". b", "ab"]
    partner = echo if partner is None else partner
    given = {**SMALL, "top_k": 4, "max_prompt_tokens": 4, "observation": "full", "stop": (".",), **settings}
    return TextGenVectorEnv(count, summing(), prompts, Worth(), partner, **given)


def single_of(**settings):
    given = {**SMALL, "top_k": 4, "max_prompt_tokens": 4, "observation": "full", "stop": (".",), **settings}
    return TextGenEnv(summing(), ["a", "b a", ". b", "ab"], Worth(), echo, **given)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"max_turn_tokens": 1, "max_turns": 6}, {"reward_at": "step"}])
def test_the_contract_of_environments_holds_and_rows_equal_single_environments(settings):
    check_env(single_of(**settings))
    check_vector_env(rows_of(**settings), lambda: single_of(**settings), tolerance=0.0)


def test_gymnasium_makes_and_checks_conversations():
    arguments = {"model": letters(), "prompts": ["a"], "reward": None, "top_k": 4, "observation": "full"}
    env = gym.make("TextGen-v0", partner={"name": "script", "lines": ["b", "a"]}, **arguments)
    gymnasium_check_env(env.unwrapped, skip_render_check=True)
    assert gym.make(env.spec).unwrapped.episodes.partner == Script(("b", "a"))
    vec = gym.make_vec("TextGen-v0", num_envs=2, partner=echo, **arguments)
    assert gym.make_vec(vec.spec).unwrapped.episodes.partner.name == "echo"


def test_forks_and_snapshots_in_the_middle_of_a_turn():
    env = rows_of(2, stop=())
    env.reset(options={"prompt": ["a", ". b"]})
    env.step(np.array([0, 1]))  # the first turn's first token
    seen = env.fork([0], [1])
    assert_equal({key: value[1] for key, value in seen.items()}, {key: value[0] for key, value in seen.items()})
    env.step(np.array([0, 1]))  # the branches end the turn differently, and each is echoed its own words
    one, other = (env.episodes.text_of(row) for row in (0, 1))
    assert one[:2] != other[:2]
    assert (one[2:], other[2:]) == (one[:2], other[:2])

    single = single_of(stop=())
    single.reset(options={"prompt": "a"})
    single.step(0)
    saved = single.snapshot()
    texts = []
    for action in (0, 1, 0):
        back = single.restore(saved)
        assert back["turn"] == 0
        single.step(action)
        texts.append(single.episodes.text_of(0))
    assert texts[0] == texts[2] == one
    assert texts[1] == other


def test_stored_rows_go_on_in_the_middle_of_a_turn():
    env, other = rows_of(stop=()), rows_of(stop=())
    env.reset(seed=0)
    for _ in range(3):
        env.step(np.array([0, 1, 2]))
    other.load_state_dict(*env.state_dict())
    assert_equal(other.observe(), env.observe())
    for _ in range(3):
        answers = [each.step(np.array([2, 1, 0])) for each in (env, other)]
        assert_equal(answers[0][0], answers[1][0])
        assert_array_equal(answers[0][1], answers[1][1])
    finals = [answer[4]["final_info"]["turns"][0] for answer in answers]
    assert finals[0] == finals[1]
    assert isinstance(finals[1][1], Turn)


def test_a_copy_of_an_environment_goes_on_in_the_middle_of_a_turn():
    env = single_of(stop=())
    env.reset(seed=0)
    for _ in range(3):
        env.step(1)
    other = copy.deepcopy(env)
    for action in (0, 2, 1):
        one, two = env.step(action), other.step(action)
        assert_equal(one[0], two[0])
        assert one[1:] == two[1:]


def test_judging_counts_what_the_partner_has_paid():
    env = talk(echo, reward=Worth())
    env.reset()
    say(env, "aba")
    assert env.judge() == worth("ab" + "ab" + "a") + 2.0


def test_the_partner_of_a_row_is_asked_once_a_turn():
    asked = []

    def count(conversation):
        asked.append(conversation.last)
        return "b"

    env = rows_of(2, count, stop=(), max_turns=2)
    env.reset(options={"prompt": "a"})
    for _ in range(4):
        env.step(np.zeros(2, int))
    assert len(asked) == 2 * 2


# --- partners that fail


def fails(answer):
    def partner(conversation):
        return answer() if callable(answer) else answer

    return partner


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda: 1 / 0, r"partner 'partner' raised ZeroDivisionError: division by zero \(when it was to answer 'ab'\)"),
        (None, "answered 'ab' with None; it must return a Reply, or its text"),
        (Reply(3), "must return a Reply"),
        (Reply("b", reward=float("nan")), "with the reward nan; it must be one finite number"),
        (Reply("b", reward=[1.0]), r"with the reward \[1.0\]"),
        (Reply("b", reward="1"), "with the reward '1'"),
        (Reply("b", done="yes"), "done='yes'; it must be True or False"),
        ("a.a.", r"'a.a.' of 4 tokens, more than max_reply_tokens=3: let it say less, or raise max_reply_tokens"),
        ("what?", "with 'what[?]', which has no tokens: no token of model 'table' spells 'what"),
        ("\ud800", "with '\\\\ud800', which has no tokens"),
    ],
)
@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_partner_that_fails_is_named_and_its_row_needs_a_reset(answer, says, seconds):
    env = talk(fails(answer), reply_seconds=seconds)
    env.reset()
    with pytest.raises(PartnerError, match=says):
        say(env, "ab")
    with pytest.raises(ResetNeeded, match="need a reset"):
        env.step(0)
    env.reset()
    say(env, "a")


def test_a_partner_that_hangs_is_left_behind():
    release = threading.Event()

    def sleeper(conversation):
        release.wait(20)
        return "b"

    env = talk(sleeper, reply_seconds=0.05)
    env.reset()
    started = time.monotonic()
    with pytest.raises(
        PartnerError, match=r"partner 'sleeper' took more than 0.05 seconds to answer 'ab': raise reply"
    ):
        say(env, "ab")
    assert time.monotonic() - started < 10
    release.set()
    env.reset()
    assert say(env, "ab")[0]["length"] == 4


@pytest.mark.slow
def test_after_an_error_the_partner_is_not_asked_for_the_other_rows():
    calls = []

    def over_quota(conversation):
        calls.append(conversation)
        time.sleep(0.05)
        raise ValueError("quota exceeded")

    vec = rows_of(20, over_quota, max_turn_tokens=1)
    vec.reset(seed=0)
    with pytest.raises(PartnerError, match="ValueError: quota exceeded"):
        vec.step(np.zeros(20, np.int64))
    time.sleep(0.5)
    assert len(calls) <= 2  # the second may have been under way


@pytest.mark.parametrize("error", [SystemExit(2), asyncio.CancelledError(), KeyboardInterrupt()], ids=repr)
def test_an_error_that_ends_threads_is_told_at_once(error):
    def leaves(conversation):
        raise error

    env = talk(leaves)
    env.reset()
    started = time.monotonic()
    with pytest.raises(PartnerError, match=f"partner 'leaves' raised {type(error).__name__}") as raised:
        say(env, "ab")
    assert raised.value.__cause__ is error
    assert time.monotonic() - started < 10  # of the 60 that it may take


def test_an_interrupt_passes_where_the_partner_is_asked_without_a_thread():
    def interrupted(conversation):
        raise KeyboardInterrupt

    env = talk(interrupted, reply_seconds=None)
    env.reset()
    with pytest.raises(KeyboardInterrupt):
        say(env, "ab")


@pytest.mark.parametrize("seconds", [float("inf"), 1e10, np.float32(1e30)])
def test_a_partner_may_be_given_any_time(seconds):
    env = talk(echo, reply_seconds=seconds)
    env.reset()
    assert say(env, "ab")[1] == 2


def test_a_partner_that_says_nothing_leaves_the_floor_to_the_agent():
    env = talk(lambda conversation: Reply("", reward=1.0), observation="full")
    env.reset()
    seen, reward, *_ = say(env, "ab")
    assert (int(seen["length"][0]), int(seen["turn"][0]), reward) == (3, 1, 1.0)
    seen, _, ended, _, info = say(env, "abab")
    assert ended
    assert info["completion"] == "ababab"
    assert not (seen["speaker"] == 2).any()


# --- names and settings


def test_partners_by_name_object_and_function():
    class Object:
        def reply(self, conversation):
            return Reply("a")

    assert make_partner(None) is None
    assert make_partner({"name": "script", "lines": ["a"]}) == Script(("a",))
    assert make_partner(Object()).name == "Object"
    assert make_partner(Object()).reply(Conversation("", ())) == Reply("a")
    assert isinstance(make_partner(echo), FunctionPartner)
    with pytest.raises(UnknownName, match=r"unknown partner 'scirpt'\. Did you mean 'script'"):
        make_partner("scirpt")
    with pytest.raises(ConfigError, match=r"partner 'script': .*missing.*lines"):
        make_partner("script")
    with pytest.raises(ConfigError, match="lines must be strings, at least one"):
        make_partner({"name": "script", "lines": []})
    with pytest.raises(ConfigError, match="3 is no partner; give a name"):
        make_partner(3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_turns": 0}, "max_turns must be a whole number of at least 1, got 0"),
        ({"max_turn_tokens": 0}, "max_turn_tokens"),
        ({"max_reply_tokens": -1}, "max_reply_tokens"),
        ({"reply_seconds": 0}, "reply_seconds must be above 0 or None, got 0"),
        ({"observation": ("turns",)}, "unknown observation key 'turns'. Did you mean 'turn'"),
    ],
)
def test_settings_out_of_range_say_what_is_allowed(settings, says):
    with pytest.raises(ConfigError, match=says):
        talk(**settings)


@pytest.mark.parametrize("setting", [{"max_turns": 2}, {"max_turn_tokens": 2}, {"max_reply_tokens": 2}])
def test_turns_need_a_partner(setting):
    with pytest.raises(ConfigError, match="need a partner: give partner="):
        TextGenEnv(letters(), ["a"], Worth(), top_k=4, **setting)
    with pytest.raises(ConfigError, match=r"observation keys \['turn'\] need a partner"):
        TextGenEnv(letters(), ["a"], Worth(), top_k=4, observation=("turn",))


def test_a_conversation_must_fit_the_context(tiny_lm):
    with pytest.raises(ConfigError, match="max_new_tokens=6 and 3 replies of 99 exceed the 128 tokens of context"):
        talk(model=tiny_lm, max_reply_tokens=99, top_k=4)


# --- encoder-decoders: the encoder reads the prompt, the decoder both speakers


@pytest.fixture(scope="module", params=["t5", "bart"])
def encoder_decoder(request):
    """An encoder-decoder with random weights, and a tokenizer that puts its end token (Bart: both) around a text."""
    from tokenizers.processors import TemplateProcessing

    from benchmarks.models import build, words

    module, tokenizer = build(request.param, seq2seq=True), words()
    module.generation_config.decoder_start_token_id = 0
    start, end = tokenizer.convert_ids_to_tokens([2, 1])
    around = f"{start} $A {end}" if request.param == "bart" else f"$A {end}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=around, special_tokens=[(start, 2), (end, 1)]
    )
    assert tokenizer("w5")["input_ids"] in ([2, 5, 1], [5, 1])
    return module, tokenizer


@pytest.mark.slow
def test_an_encoder_decoder_reads_replies_as_its_uncached_forward_does(encoder_decoder):
    import torch

    module, tokenizer = encoder_decoder
    prompts = ["w5 w6 w7", "w8", "w9 w9"]
    env = TextGenVectorEnv(
        3, encoder_decoder, prompts, None, Script(["w10 w11 w12", "w13", "", "w14"]), top_k=5, max_turns=4,
        max_turn_tokens=2, max_new_tokens=8, max_reply_tokens=3, min_new_tokens=2, max_prompt_tokens=6,
        observation="full", dtype="float32",
    )  # fmt: skip
    sources = tokenizer(prompts)["input_ids"]
    blocked = list(env.language_model.end_ids)
    seen, _ = env.reset(seed=0, options={"prompt": prompts})
    actions = np.random.default_rng(0).integers(5, size=(7, 3))
    for step in range(7):
        for row, source in enumerate(sources):
            ids = torch.tensor(seen["tokens"][row, : int(seen["length"][row, 0])].astype(int))[None]
            with torch.no_grad():
                logits = module(input_ids=torch.tensor([source]), decoder_input_ids=ids, use_cache=False).logits[0, -1]
            logits = logits.double()
            logits[blocked] = -torch.inf  # min_new_tokens is a whole turn
            expected = torch.log_softmax(logits, -1)[torch.from_numpy(seen["candidates"][row].astype(int))]
            assert_allclose(seen["logprobs"][row], expected.numpy(), atol=1e-4)
        if step == 4:  # a branch in the middle of a turn has another's source, too
            seen = env.fork([0], [2])
            sources[2], actions[4:, 2] = sources[0], actions[4:, 1]
        began = seen["length"][:, 0]
        seen, *_ = env.step(actions[step])
        reply = {1: [10, 11, 12], 3: [13]}.get(step, [])  # a turn has two tokens, and the third line is empty
        for row in range(3):
            after = seen["tokens"][row, began[row] + 1 : seen["length"][row, 0]]
            assert after.tolist() == reply  # nothing of what the tokenizer puts around a text
            assert (seen["speaker"][row, began[row] + 1 :][: len(reply)] == 2).all()


@pytest.mark.slow
def test_text_dqn_learns_conversations_on_an_encoder_decoder(encoder_decoder):
    from agents.text_dqn.agent import TextDQN

    env = TextGenVectorEnv(
        2, encoder_decoder, ["w5 w6", "w8"], None, lambda heard: Reply("w10 w11", reward=float("w1" in heard.last)),
        top_k=5, max_turns=2, max_turn_tokens=2, max_new_tokens=4, max_reply_tokens=2, max_prompt_tokens=4,
        observation="full",
    )  # fmt: skip
    agent = TextDQN("CandidatePolicy", env, learning_starts=8, steps_per_update=8, buffer_size=400, seed=0)
    agent.learn(48)
    observation, _ = env.reset(seed=1)
    assert_allclose(agent.probabilities(observation).sum(-1), 1, atol=1e-6)


# --- tokens that a partner forbids


class Forbids(Partner):
    """Let nobody say the first ``count`` tokens."""

    name = "forbids"

    def __init__(self, count):
        self.count = count

    def never_said(self, model):
        return tuple(range(self.count))

    def reply(self, conversation):
        return Reply("a")


@pytest.mark.parametrize(
    ("count", "says"), [(1, None), (8, "leaves 2 of 10 tokens to be said: top_k must be at most 2, got 4")]
)
def test_a_partner_leaves_enough_to_be_said(tiny_lm, count, says):
    settings = {"prompts": ["the film"], "reward": None, "top_k": 4, "max_turns": 2, "max_new_tokens": 4}
    settings |= {"max_prompt_tokens": 8, "max_reply_tokens": 8}
    if says is None:
        env = TextGenEnv(tiny_lm, partner=Forbids(count), **settings)
        assert 0 not in env.reset(seed=0)[0]["candidates"]
    else:
        with pytest.raises(ConfigError, match=says):
            TextGenEnv(tiny_lm, partner=Forbids(count), **settings)


def test_a_partner_forbids_nothing_to_a_model_that_proposes_any_token():
    model = TableModel(["a", "b"], [0.5, 0.5], end=None)
    with pytest.raises(ConfigError, match=r"partner 'forbids' forbids tokens, and model .* proposes any"):
        TextGenEnv(model, prompts=["a"], reward=None, partner=Forbids(1), top_k=2, max_new_tokens=4, max_turns=2)
