"""Conversations in a chat template: a reply is a user's turn, and the assistant's next one is opened behind it::

    prompt of ``chat`` | answer <|im_end|> | <|im_start|>user reply <|im_end|> <|im_start|>assistant | answer <|im_end|>

After each reply the text is the template of the whole conversation. That takes a template that only appends: one that
trims what the assistant says, drops its earlier thoughts or forgets old messages is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textgen_env.conversation import Conversation, Partner, Reply, make_partner
from textgen_env.errors import ConfigError, PartnerError
from textgen_env.models.base import LanguageModel, special_ids
from textgen_env.prompts import apply_template
from textgen_env.rewards.base import Turn, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAID = (("I see.", "Good.", "Well."), (" a ", "b\n", "c"), ("<think>\nno\n</think>\n\nyes", "no", "so"), ("", "", ""))
"""What an assistant says in three turns, to see if a template only appends."""


class ChatPartner(Partner):
    """A partner whose replies are a user's turns in the tokenizer's chat template.

    The prompts come from ``textgen_env.prompts.chat``, with the same tokenizer and system message. The partner itself,
    rewards and ``turns`` see the plain texts; ``max_reply_tokens`` counts what the template adds, too.

    Args:
        partner: See ``textgen_env.conversation.make_partner``.
        tokenizer: With a chat template, and that of the environment's model.
        system: As given to ``chat``.

    Raises:
        PromptError: the tokenizer has no chat template, or one that fails.
        ConfigError: a template that does more than append; the message shows where it differs.
    """

    def __init__(self, partner: Any, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        made = make_partner(partner)
        if made is None:
            raise ConfigError("partner must be a partner, got None: without one, chat(prompts, tokenizer) is enough")
        self.partner, self.tokenizer, self.name = made, tokenizer, made.name
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._closing = ""  # what the template puts behind an assistant's turn, up to the next message
        for probe in SAID:
            self._probe(probe)

    def reply(self, conversation: Conversation) -> Reply | str:
        return self.partner.reply(replace(conversation, prompt=self._prompt(conversation)))

    def written(self, conversation: Conversation, reply: Reply, end: int | None) -> str:
        """Return the rest of the assistant's turn, a user's turn with the reply, and the beginning of the next one."""
        messages = self._messages(self._prompt(conversation), conversation.turns)
        before = apply_template(self.tokenizer, messages[:-1])
        if not before.endswith(conversation.prompt) and len(conversation.turns) == 1:
            raise PartnerError(
                f"the prompt {shorten(conversation.prompt)} is not what the chat template makes of "
                f"{shorten(self._prompt(conversation))}: give chat() and ChatPartner the same tokenizer and system"
            )
        added = self._added(messages, reply.text)
        if added is None:
            raise PartnerError(
                f"the chat template of tokenizer {self.tokenizer.name_or_path!r} changes what the assistant said, "
                f"{shorten(conversation.last)}: ChatPartner needs one that only appends"
            )
        if end is None:
            return added
        token = str(self.tokenizer.convert_ids_to_tokens(end))
        return added.removeprefix(token)

    def never_said(self, model: LanguageModel) -> tuple[int, ...]:
        """Return all special tokens but the one that closes a turn: the agent neither fakes a turn nor leaves one open.

        Raises:
            ConfigError: the model has another tokenizer, or does not end a turn as the template does.
        """
        own: Any = getattr(model, "tokenizer", None)
        if own is None or own.get_vocab() != self.tokenizer.get_vocab():
            raise ConfigError(f"model {model.name!r} has another tokenizer than the chat template: give both the same")
        closing = self.tokenizer(self._closing, add_special_tokens=False)["input_ids"][0]
        if closing not in model.end_ids:
            ends = [str(self.tokenizer.convert_ids_to_tokens(end)) for end in model.end_ids]
            raise ConfigError(
                f"the chat template ends a turn with {shorten(self._closing)}, and model {model.name!r} with "
                f"{' or '.join(map(repr, ends))}: add the template's token to model.generation_config.eos_token_id"
            )
        return tuple({*special_ids(self.tokenizer), *model.end_ids} - {closing})

    def _prompt(self, conversation: Conversation) -> str:
        plain = conversation.metadata.get("prompt")
        if not isinstance(plain, str):
            raise PartnerError(
                f"the prompt {shorten(conversation.prompt)} is in no chat template: make the prompts with "
                "textgen_env.prompts.chat(prompts, tokenizer)"
            )
        return plain

    def _messages(self, prompt: str, turns: Sequence[Turn]) -> list[dict[str, str]]:
        roles = {"agent": "assistant", "partner": "user"}
        said = [{"role": roles[turn.speaker], "content": turn.text} for turn in turns]
        return [*self._opening, {"role": "user", "content": prompt}, *said]

    def _added(self, messages: list[dict[str, str]], reply: str) -> str | None:
        """Return what the template puts behind the last message and for ``reply``; None if it does more than append."""
        before = apply_template(self.tokenizer, messages[:-1]) + messages[-1]["content"]
        after = apply_template(self.tokenizer, [*messages, {"role": "user", "content": reply}])
        return after[len(before) :] if after.startswith(before) else None

    def _probe(self, said: Sequence[str]) -> None:
        messages = self._messages("Hello", [])
        for text in said:
            messages.append({"role": "assistant", "content": text})
            added = self._added(messages, "And then?")
            if added is None:
                raise ConfigError(
                    f"the chat template of tokenizer {self.tokenizer.name_or_path!r} does more than append: with the "
                    f"assistant's turn {text!r}, the conversation so far is not the beginning of the next one (it "
                    "trims a turn, drops earlier thoughts, or forgets messages). Use a template that keeps them"
                )
            self._closing = added
            messages.append({"role": "user", "content": "And then?"})
