"""Conversations: a partner answers the agent, and the episode goes on for another turn.

The agent's turn ends with an end token, a stop string or the turn's budget. In the same step the partner is
asked, and the tokens of its reply are appended as a prompt's are: no action, no log-probability, no KL.

    prompt | agent ... end | reply | agent ... end | reply | ...  ->  tokens (T,), speaker (T,)

A reply should depend on the conversation alone (its prompt, metadata and turns): rows fork and go back to
snapshots, and a partner with a memory of its own would answer a branch by what it heard in another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Event, Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.config import EnvConfig, check_unicode
from textgen_env.errors import ConfigError, PartnerError, TextGenError
from textgen_env.models.base import LanguageModel, Rows, Slots
from textgen_env.registry import Registry, build
from textgen_env.rewards.base import LARGEST, Turn, shorten
from textgen_env.rows import FINISH_REASONS, RowStates

PROMPT, AGENT, PARTNER = range(3)
"""Who a token is by, in the observation's ``speaker``; padding counts as ``PROMPT``."""

UNLESS_SAID: Mapping[str, Any] = {"max_turns": 4, "max_turn_tokens": 16, "max_new_tokens": 64, "max_reply_tokens": 32}
"""Settings of an environment with a partner, unless said."""


@dataclass(frozen=True)
class Conversation:
    """What was said so far: the prompt, then turns that alternate, the agent's first and last."""

    prompt: str
    turns: tuple[Turn, ...]
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> str:
        """What the agent has just said."""
        return self.turns[-1].text

    @property
    def said(self) -> tuple[str, ...]:
        """All turns of the agent's."""
        return tuple(turn.text for turn in self.turns if turn.speaker == "agent")


@dataclass(frozen=True)
class Reply:
    """A partner's answer.

    ``text`` may be empty: the agent's next turn then follows at once. ``reward`` is paid in this step.
    ``done`` ends the episode behind the reply.
    """

    text: str
    reward: float = 0.0
    done: bool = False


class Partner(ABC):
    """Someone who answers. Subclasses set ``name``."""

    name: str

    @abstractmethod
    def reply(self, conversation: Conversation) -> Reply | str:
        """Return the answer to the agent's last turn, or its text alone."""

    def written(self, conversation: Conversation, reply: Reply, end: int | None) -> str:
        """Return what is appended to the text for a reply; ``end`` is the end token of the agent's turn, if it has one.

        See ``textgen_env.chat``.
        """
        return reply.text

    def never_said(self, model: LanguageModel) -> tuple[int, ...]:
        """Return the tokens that the agent must not write: in a chat template, the special ones."""
        return ()


class FunctionPartner(Partner):
    """A Python function from a ``Conversation`` to a ``Reply``, or to its text, under the function's name."""

    def __init__(self, function: Callable[[Conversation], Any], name: str | None = None) -> None:
        self.function = function
        self.name = str(name or getattr(function, "__name__", type(function).__name__))

    def reply(self, conversation: Conversation) -> Reply | str:
        answer: Reply | str = self.function(conversation)
        return answer


PARTNERS: Registry[Callable[..., Partner]] = Registry("partner")
"""Partners by name: factories that take the partner's settings as keywords."""


@PARTNERS.register("script")
@dataclass(frozen=True)
class Script(Partner):
    """Says its lines one after the other, whatever it hears, and ends the conversation with the last."""

    lines: tuple[str, ...]
    name = "script"

    def __post_init__(self) -> None:
        lines = self.lines
        if not isinstance(lines, list | tuple) or not lines or not all(isinstance(line, str) for line in lines):
            raise ConfigError(f"lines must be strings, at least one, got {lines!r}")
        object.__setattr__(self, "lines", tuple(lines))

    def reply(self, conversation: Conversation) -> Reply:
        number = min(len(conversation.said), len(self.lines))
        return Reply(self.lines[number - 1], done=number == len(self.lines))


def make_partner(spec: Any) -> Partner | None:
    """Return the partner that ``spec`` means; None for None.

    A name in ``PARTNERS``, ``{"name": ..., settings}``, a function from a ``Conversation`` to a ``Reply`` (or to its
    text), or an object with such a method ``reply``.

    Raises:
        UnknownName: no partner of that name (suggests one).
        ConfigError: settings that the partner does not take, or a value that means no partner.
    """
    if spec is None or isinstance(spec, Partner):
        return spec
    check_unicode("the settings of a partner", spec)
    if isinstance(spec, str):
        return build(PARTNERS, spec)
    if isinstance(spec, Mapping) and "name" in spec:
        return build(PARTNERS, **spec)
    if callable(getattr(spec, "reply", None)):
        return FunctionPartner(spec.reply, getattr(spec, "name", type(spec).__name__))
    if callable(spec):
        return FunctionPartner(spec)
    raise ConfigError(
        f"{spec!r} is no partner; give a name ({', '.join(sorted(PARTNERS))}), a dict with a name, a function of a "
        "Conversation, or an object with such a method reply"
    )


class TurnStates(RowStates):
    """The state of N rows that converse."""

    def __init__(self, rows: int, config: EnvConfig, k: int, hidden: int) -> None:
        super().__init__(rows, config.max_length - config.max_prompt_tokens, k, hidden)
        self.turn = np.zeros(rows, np.int64)  # turns that the agent has finished
        self.turn_began = np.zeros(rows, np.int64)  # tokens of the row before the running turn
        self.replied = np.zeros(rows, np.int64)  # tokens of all replies
        self.speaker = np.zeros((rows, config.max_length), np.int8)
        self.turns = np.full(rows, None, object)  # tuple of Turn


class Talk:
    """The turns of N rows: when one ends, what the partner answers, and whether the episode ends with it.

    Args:
        partner: Who answers.
        config: Of the episodes.
        model: Encodes replies.
        slots, state: The rows, shared with the episodes.
    """

    def __init__(
        self, partner: Partner, config: EnvConfig, model: LanguageModel, slots: Slots, state: TurnStates
    ) -> None:
        self.partner, self.config, self.model, self.slots, self.state = partner, config, model, slots, state
        if never := partner.never_said(model):
            own = getattr(slots, "suppressed", None)
            if own is None:
                raise ConfigError(f"partner {partner.name!r} forbids tokens, and model {model.name!r} proposes any")
            slots.suppressed = (*own, *never)  # type: ignore[attr-defined]
            left = model.vocab_size - len({*slots.suppressed, *model.end_ids})  # type: ignore[attr-defined]
            if left < (slots.k or 1):
                raise ConfigError(
                    f"partner {partner.name!r} leaves {left} of {model.vocab_size} tokens to be said: top_k must be "
                    f"at most {left}, got {slots.k}"
                )
        self._turn_budget = config.max_turn_tokens or config.max_new_tokens
        self._around = list(model.encode(""))  # what the tokenizer puts before and behind every text

    def begin(self, rows: Rows) -> None:
        """Start a new conversation in each row."""
        state = self.state
        state.turn[rows], state.replied[rows], state.speaker[rows] = 0, 0, PROMPT
        state.turn_began[rows] = self.slots.lengths[rows]
        for row in rows.tolist():
            state.turns[row] = ()

    def turn_steps(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return how many tokens the running turn of each row has."""
        return self.slots.lengths[rows] - self.state.turn_began[rows]

    def budget_left(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Return the share of the running turn's tokens that is left, 1 to 0."""
        return 1.0 - self.turn_steps(rows) / self._turn_budget

    def is_full(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Return True where the running turn has used its tokens up, (B,)."""
        return self.turn_steps(rows) >= self._turn_budget

    def text_of_turn(self, row: int) -> str:
        """Return what the agent has said in the running turn."""
        ids, began = self.slots.ids_of(row), self.state.turn_began[row]
        before, new = ids[:began], ids[began:]
        return self.model.continuations(before, new[:-1], new[-1:])[0] if new else ""

    def paid(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Return the partner's rewards of each row so far, (B,)."""
        return np.array([sum(turn.reward for turn in turns) for turns in self.state.turns[rows]], np.float64)

    def go_on(
        self, rows: Rows, reasons: npt.NDArray[np.int64], prompts: Sequence[Any]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Take note of one more token a row, and let the partner answer the turns that it ended.

        Args:
            rows: (B,) that acted.
            reasons: (B,) numbers in ``FINISH_REASONS``: why the turn ended; 0 where it goes on.
            prompts: (B,) ``Prompt`` of each row.

        Returns:
            Why the episode ended, (B,) as above, and the partner's rewards, (B,).

        Raises:
            PartnerError: the partner raised, took too long, or gave no usable answer. The rows need a reset.
        """
        state, slots = self.state, self.slots
        state.speaker[rows, slots.lengths[rows] - 1] = AGENT
        ended, rewards = np.zeros(len(rows), np.int64), np.zeros(len(rows))
        which = np.flatnonzero(reasons)
        if not which.size:
            return ended, rewards
        asking = rows[which]
        conversations = [
            Conversation(
                prompts[i].text,
                (*state.turns[row], Turn("agent", self.text_of_turn(row))),
                prompts[i].reference,
                prompts[i].metadata,
            )
            for i, row in zip(which.tolist(), asking.tolist(), strict=True)
        ]
        replies = list(self._replies(conversations))
        last = slots.tokens[asking, slots.lengths[asking] - 1].tolist()
        eos = FINISH_REASONS.index("eos")
        ends = [token if reason == eos else None for token, reason in zip(last, reasons[which], strict=True)]
        self._append(asking, [self._encoded(*told) for told in zip(replies, conversations, ends, strict=True)])
        state.turn[asking] += 1
        for row, heard, reply in zip(asking.tolist(), conversations, replies, strict=True):
            state.turns[row] = (*heard.turns, Turn("partner", reply.text, float(reply.reward)))
        generated = slots.lengths[asking] - slots.prompt_lengths[asking] - state.replied[asking]
        done = np.array([reply.done for reply in replies])
        for over, reason in (
            (state.turn[asking] >= self.config.max_turns, "turns"),
            (generated >= self.config.max_new_tokens, "length"),
            (done, "partner"),
        ):
            ended[which[over]] = FINISH_REASONS.index(reason)
        rewards[which] = [reply.reward for reply in replies]
        return ended, rewards

    def _append(self, rows: Rows, ids: Sequence[Sequence[int]]) -> None:
        """Append the tokens of a reply to each row, and begin its next turn."""
        counts = np.array([len(reply) for reply in ids])
        for place in range(counts.max()):
            at = np.flatnonzero(counts > place)
            self.state.speaker[rows[at], self.slots.lengths[rows[at]]] = PARTNER
            self.slots.advance(rows[at], np.array([ids[i][place] for i in at.tolist()]))
        self.state.replied[rows] += counts
        self.state.turn_began[rows] = self.slots.lengths[rows]

    def _encoded(self, reply: Reply, heard: Conversation, end: int | None) -> list[int]:
        text = self.partner.written(heard, reply, end)
        if not text:
            return []
        try:
            check_unicode("a reply", text, PartnerError)
            ids = self.model.encode(text)
        except TextGenError as error:
            raise PartnerError(f"{self._of(heard)} with {shorten(reply.text)}, which has no tokens: {error}") from error
        for before in range(len(self._around), -1, -1):
            behind = len(ids) - (len(self._around) - before)
            if before <= behind and [*ids[:before], *ids[behind:]] == self._around:
                ids = ids[before:behind]
                break
        if len(ids) > self.config.max_reply_tokens:
            raise PartnerError(
                f"{self._of(heard)} with {shorten(reply.text)} of {len(ids)} tokens, more than max_reply_tokens="
                f"{self.config.max_reply_tokens}: let it say less, or raise max_reply_tokens"
            )
        return ids

    def _replies(self, conversations: Sequence[Conversation]) -> Iterator[Reply]:
        """Yield the partner's checked answers; with a time limit it is asked in a thread, which can be left behind."""
        seconds = self.config.reply_seconds
        if seconds is None:
            yield from (self._checked(self._answer(heard), heard) for heard in conversations)
            return
        answers: SimpleQueue[Any] = SimpleQueue()
        given_up = Event()

        def ask() -> None:
            for heard in conversations:
                if not given_up.is_set():
                    answers.put(self._answer(heard, BaseException))  # in a thread, nobody else hears of SystemExit

        Thread(target=ask, name="partner", daemon=True).start()
        try:
            for heard in conversations:
                yield self._checked(answers.get(timeout=min(seconds, TIMEOUT_MAX)), heard)
        except Empty:
            raise PartnerError(
                f"partner {self.partner.name!r} took more than {seconds:g} seconds to answer {shorten(heard.last)}: "
                "raise reply_seconds, or set it to None to wait as long as it takes"
            ) from None
        finally:
            given_up.set()  # after an error, the other rows need no answers

    def _answer(self, heard: Conversation, caught: type[BaseException] = Exception) -> Any:
        """Return what the partner answers, or the error that it raises."""
        try:
            return self.partner.reply(heard)
        except caught as error:
            return error

    def _checked(self, answer: Any, heard: Conversation) -> Reply:
        if isinstance(answer, BaseException):
            raise PartnerError(
                f"partner {self.partner.name!r} raised {type(answer).__name__}: {answer} (when it was to answer "
                f"{shorten(heard.last)})"
            ) from answer
        reply = Reply(answer) if isinstance(answer, str) else answer
        if not isinstance(reply, Reply) or not isinstance(reply.text, str):
            raise PartnerError(f"{self._of(heard)} with {answer!r}; it must return a Reply, or its text")
        reward = np.asarray(reply.reward)
        if reward.shape or reward.dtype.kind not in "biuf" or not abs(reward) <= LARGEST:
            raise PartnerError(
                f"{self._of(heard)} with the reward {reply.reward!r}; it must be one finite number within {LARGEST:g}"
            )
        if not isinstance(reply.done, bool | np.bool_):
            raise PartnerError(f"{self._of(heard)} with done={reply.done!r}; it must be True or False")
        return reply

    def _of(self, heard: Conversation) -> str:
        return f"partner {self.partner.name!r} answered {shorten(heard.last)}"
