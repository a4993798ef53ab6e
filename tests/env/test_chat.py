"""Conversations in chat templates: after each reply the text is ``apply_chat_template`` of the whole conversation."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from textgen_env import TextGenEnv, TextGenVectorEnv
from textgen_env.chat import ChatPartner
from textgen_env.conversation import Reply
from textgen_env.errors import ConfigError, PartnerError, PromptError
from textgen_env.prompts import chat
from textgen_env.rewards.base import Turn

SPECIAL = ["<|im_end|>", "<|im_start|>", "<s>", "[/I]", "[I]"]
VOCABULARY = [*SPECIAL, "<unk>", "\n", " ", "user", "assistant", "system", *"abcde"]
LETTERS = [VOCABULARY.index(letter) for letter in "abcde"]
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + OPENED
BRACKETS = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
    "{% else %}[I] {{ m.content }} [/I]{% endif %}{% endfor %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
WITHOUT_THOUGHTS = CHATML.replace(
    "m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content)"
)
FORGETS = CHATML.replace("in messages", "in messages[-3:]")
NUMBERED = CHATML.replace("<|im_start|>{{", "<|im_start|>{{ messages | length }}{{")
FAILS_LATER = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML


@pytest.fixture
def tokenizer(request):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("user|assistant|system|."), "isolated")
    words.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", unk_token="<unk>", bos_token="<s>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.chat_template = getattr(request, "param", CHATML)
    expected = ["a", " ", "b", "<|im_end|>", "\n", "user"]
    assert made("a b<|im_end|>\nuser")["input_ids"] == [VOCABULARY.index(token) for token in expected]
    return made


@pytest.fixture
def lm(tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(VOCABULARY), **sizes, eos_token_id=0, max_position_embeddings=256)
    return LlamaForCausalLM(config).eval(), tokenizer


def replies(conversation):
    """Say how many turns the agent has had, and pay for an "a"; say nothing the second time."""
    number = len(conversation.said)
    return Reply("" if number == 2 else " " + "abcde"[number - 1] * number, reward=float("a" in conversation.last))


def env_in(lm, partner=replies, system=None, prompts=("a b",), **settings):
    talk = {"max_turns": 4, "max_turn_tokens": 3, "max_new_tokens": 12, "max_reply_tokens": 24, "top_k": None}
    talk |= {"max_prompt_tokens": 24, "observation": "full", **settings}
    tokenizer = lm[1]
    user = partner if isinstance(partner, ChatPartner) else ChatPartner(partner, tokenizer, system)
    return TextGenEnv(lm, chat(list(prompts), tokenizer, system), None, user, **talk)


def ids_of(tokenizer, messages):
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(found)


@pytest.mark.parametrize("tokenizer", [CHATML, BRACKETS], indirect=True)
@pytest.mark.parametrize("system", [None, "c d"])
def test_the_text_is_the_template_of_the_whole_conversation_after_each_reply(lm, system):
    env, tokenizer, rng = env_in(lm, system=system), lm[1], np.random.default_rng(0)
    seen, _ = env.reset()
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": "a b"})
    assert seen["tokens"][: int(seen["length"][0])].tolist() == ids_of(tokenizer, messages)
    for turn, letters in enumerate((3, 1, 2, 0)):  # a turn of three is full; the others end with the end token
        said = rng.choice(LETTERS, letters).tolist()
        for token in said if letters == 3 else [*said, 0]:
            seen, reward, ended, _, info = env.step(token)
        content = "".join(VOCABULARY[token] for token in said)
        assert reward == float("a" in content)
        messages.append({"role": "assistant", "content": content})
        messages.append({"role": "user", "content": ["" if turn == 1 else " " + "abcde"[turn] * (turn + 1)][0]})
        assert seen["tokens"][: int(seen["length"][0])].tolist() == ids_of(tokenizer, messages)
    assert ended
    speakers = {"user": "partner", "assistant": "agent"}
    told = [(speakers[m["role"]], m["content"]) for m in messages[1 if system is None else 2 :]]
    assert [(turn.speaker, turn.text) for turn in info["turns"]] == told
    assert [turn.reward for turn in info["turns"][1::2]] == [float("a" in text) for who, text in told if who == "agent"]


def test_the_partner_hears_plain_texts_and_the_template_s_tokens_are_no_agent_s(lm):
    heard = []

    def listen(conversation):
        heard.append(conversation)
        return "b"

    env = env_in(lm, listen)
    env.reset()
    seen, *_ = env.step(LETTERS[0])
    seen, *_ = env.step(0)
    (conversation,) = heard
    assert (conversation.prompt, conversation.turns) == ("a b", (Turn("agent", "a"),))
    text = [VOCABULARY[token] for token in seen["tokens"][: int(seen["length"][0])]]
    start = text.index("a", text.index("assistant"))
    assert text[start:] == ["a", "<|im_end|>", "\n", "<|im_start|>", "user", "\n", "b", "<|im_end|>", "\n",
                            "<|im_start|>", "assistant", "\n"]  # fmt: skip
    assert seen["speaker"][start : len(text)].tolist() == [1, 1, *[2] * 10]


@pytest.mark.parametrize(
    ("tokenizer", "turn"),
    [(TRIMMED, "' a '"), (WITHOUT_THOUGHTS, "<think>"), (FORGETS, "'Good.'"), (NUMBERED, "'I see.'")],
    indirect=["tokenizer"],
)
def test_a_template_that_does_more_than_append_is_refused(tokenizer, turn):
    with pytest.raises(ConfigError, match="does more than append: with the assistant's turn") as refused:
        ChatPartner(replies, tokenizer)
    assert turn in str(refused.value)
    # By hand: what it makes of one turn is not how it begins two.
    said = {"' a '": " a ", "<think>": "<think>\nno\n</think>\n\nyes"}.get(turn, "I see.")
    messages = [{"role": "user", "content": "Hello"}]
    for _ in range(3):
        opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + said
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
        if not tokenizer.apply_chat_template(messages, tokenize=False).startswith(opened):
            return
    pytest.fail("the template only appends")


@pytest.mark.parametrize("tokenizer", [FAILS_LATER], indirect=True)
def test_a_template_of_one_turn_is_refused_before_anything_is_written(tokenizer):
    with pytest.raises(PromptError, match="one turn only"):
        ChatPartner(replies, tokenizer)


def test_what_is_wrong_with_a_chat_is_said(lm):
    model, tokenizer = lm
    with pytest.raises(ConfigError, match="got None"):
        ChatPartner(None, tokenizer)
    partner = ChatPartner(replies, tokenizer)
    settings = {"max_turn_tokens": 1, "max_new_tokens": 4, "top_k": None, "max_prompt_tokens": 24}
    for prompts, message in (
        (["a b"], "in no chat template: make the prompts with"),
        (chat(["a b"], tokenizer, system="c"), "the same tokenizer and system"),
    ):
        env = TextGenEnv(lm, prompts, None, partner, **settings)
        env.reset()
        with pytest.raises(PartnerError, match=message):
            env.step(LETTERS[0])
    env = env_in(lm, max_reply_tokens=4)
    env.reset()
    with pytest.raises(PartnerError, match="more than max_reply_tokens=4"):
        env.step(0)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["f"])
    with pytest.raises(ConfigError, match="has another tokenizer"):
        env_in((model, tokenizer), ChatPartner(replies, other))
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</turn>")
    with pytest.raises(ConfigError, match=r"ends a turn with '</turn>.*, and model .* with '<\|im_end\|>': add the"):
        env_in((model, tokenizer))
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        ChatPartner(replies, tokenizer)


def test_the_agent_writes_no_special_token_but_the_one_that_closes_a_turn(lm):
    """Their probability goes to the others, as in ``generate`` with ``suppress_tokens``."""
    import torch

    model, _ = lm
    model.generation_config.eos_token_id = [0, VOCABULARY.index("<s>")]
    env = env_in(lm)
    seen, _ = env.reset()
    special = [VOCABULARY.index(token) for token in (*SPECIAL[1:], "<unk>")]
    for token in (LETTERS[0], 0):
        with torch.no_grad():
            ids = torch.from_numpy(seen["tokens"][: int(seen["length"][0])].astype(int))[None]
            logits = model(ids).logits[0, -1].double()
        logits[special] = -torch.inf
        legal = seen["action_mask"].astype(bool)
        assert np.flatnonzero(~legal).tolist() == sorted(special)
        np.testing.assert_allclose(seen["logprobs"][legal], torch.log_softmax(logits, -1).numpy()[legal], atol=1e-4)
        seen, *_ = env.step(token)


def test_rows_of_a_vector_chat_alike(lm):
    tokenizer = lm[1]
    talk = {"max_turns": 2, "max_turn_tokens": 2, "max_new_tokens": 4, "max_reply_tokens": 24, "top_k": None}
    env = TextGenVectorEnv(
        2, lm, chat(["a", "b c"], tokenizer), None, ChatPartner(replies, tokenizer), max_prompt_tokens=24,
        observation="full", **talk,
    )  # fmt: skip
    env.reset(options={"prompt": [*env.episodes.prompts]})
    env.step(np.array([LETTERS[3], 0]))
    seen, *_ = env.step(np.array([LETTERS[4], LETTERS[0]]))
    said = (("a", "de", " a"), ("b c", "", " a"))
    for row, texts in enumerate(said):
        roles = ("user", "assistant", "user")
        expected = ids_of(tokenizer, [{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)])
        expected += [LETTERS[0]] if row else []
        assert seen["tokens"][row, : int(seen["length"][row, 0])].tolist() == expected
