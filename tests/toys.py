"""An exact model, a reward that can be counted by hand, and the decision process said a second time.

``PlainEpisode`` is one row, without batches, caches or arrays of state: slow, and short enough to
be checked by reading. What the environments do is compared with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from textgen_env import Reward, TableModel

TOKENS = ("a", "b", "ab", " ", ".", "<end>")  # "ab" can be written in two ways
TABLE = np.array(
    [  # the next token by the last one: ties, zeros, and an end that is likely after a full stop
        [0.3, 0.3, 0.1, 0.1, 0.1, 0.1],
        [0.4, 0.1, 0.2, 0.1, 0.1, 0.1],
        [0.2, 0.2, 0.2, 0.2, 0.0, 0.2],
        [0.5, 0.2, 0.1, 0.0, 0.1, 0.1],
        [0.1, 0.1, 0.0, 0.1, 0.1, 0.6],
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)
PROMPTS = ["a", "ab", "b a", ". b"]


def by_sum(ids):
    """Rows of ``TABLE`` chosen by all of the text, so that a model which holds the wrong text shows."""
    return TABLE[sum(ids) % 5]


def letters(table=TABLE) -> TableModel:
    return TableModel(TOKENS, table, name="letters")


class CountingModel(TableModel):
    """``letters`` that notes how many rows each forward had."""

    def __init__(self) -> None:
        super().__init__(TOKENS, TABLE)
        self.forwards: list[int] = []

    def slots(self, rows, length, k):
        slots = super().slots(rows, length, k)
        propose = slots.propose

        def counted(rows, block_end):
            self.forwards.append(len(rows))
            return propose(rows, block_end)

        slots.propose = counted
        return slots


def worth(text: str) -> float:
    """The reward of a completion. All values are exact in binary, so sums can be compared with ==."""
    return text.count("a") - 0.5 * text.count("b") + 0.25 * text.count("ab")


@dataclass(frozen=True)
class Counted:
    text: str
    value: float


class RunningWorth:
    """``worth`` from its last value and what was added, so a state that went astray shows."""

    def start(self, prompt, reference, metadata):
        return Counted("", 0.0)

    def extend(self, state, completion):
        if not completion.startswith(state.text):
            raise AssertionError(f"the state of {state.text!r} was given {completion!r}")
        seen = max(len(state.text) - 1, 0)
        return Counted(completion, state.value + worth(completion[seen:]) - worth(state.text[seen:]))

    def lookahead(self, state, completions):
        return np.array([self.extend(state, text).value for text in completions], np.float32)


class Worth(Reward):
    name = "worth"

    def __call__(self, generations):
        return np.array([worth(g.completion) for g in generations])

    def running(self):
        return RunningWorth()


class PlainEpisode:
    """The decision process of one text under ``letters``, or another table for its tokens, and ``worth``."""

    def __init__(
        self,
        prompt,
        *,
        top_k=4,
        top_p=1.0,
        max_new_tokens=5,
        min_new_tokens=0,
        max_prompt_tokens=4,
        stop=(),
        reward_at="end",
        table=TABLE,
    ):
        self.prompt = letters().encode(prompt)
        self.ids, self.table = [], table
        self.top_k, self.top_p, self.stop, self.reward_at = top_k, top_p, stop, reward_at
        self.most, self.least, self.room = max_new_tokens, min_new_tokens, max_prompt_tokens + max_new_tokens
        self.finish_reason = None
        self.logprob = 0.0

    @property
    def text(self):
        return "".join(TOKENS[i] for i in self.ids).replace("<end>", "")

    def candidates(self):
        """(token, log-probability, allowed) of each action."""
        ids = self.prompt + self.ids
        p = dict(enumerate(self.table(ids) if callable(self.table) else self.table[ids[-1]]))
        if len(self.ids) < self.least:
            p[TOKENS.index("<end>")] = 0.0
        total = sum(p.values())
        p = {token: value / total for token, value in p.items()}
        best_first = sorted(p, key=lambda token: (-p[token], token))
        before, allowed = 0.0, set()
        for token in best_first:
            if p[token] > 0 and before < self.top_p:
                allowed.add(token)
            before += p[token]
        listed = sorted(p) if self.top_k is None else best_first[: self.top_k]
        return [(t, math.log(p[t]) if t in allowed else -1e4, t in allowed) for t in listed]

    def observation(self):
        ids = self.prompt + self.ids
        actions = self.candidates()
        hidden = np.eye(len(TOKENS))[ids[-1]]
        scores = [worth(self.text + TOKENS[t].replace("<end>", "")) for t, _, _ in actions]
        if self.finish_reason:
            k = len(actions)
            actions, hidden, scores = [(0, -math.log(k), True)] * k, 0 * hidden, [worth(self.text)] * k
        tokens, logprobs, mask = zip(*actions, strict=True)
        everything = {
            "tokens": ids + [0] * (self.room - len(ids)),
            "length": [len(ids)],
            "budget": [1 - len(self.ids) / self.most],
            "candidates": tokens,
            "logprobs": logprobs,
            "score": [worth(self.text)],
            "candidate_scores": scores,
            "action_mask": mask,
            "hidden": hidden,
        }
        left_out = {"candidates", "candidate_scores"} if self.top_k is None else set()
        return {key: value for key, value in everything.items() if key not in left_out}

    def step(self, action):
        """Append a token and return the reward."""
        token, logprob, allowed = self.candidates()[action]
        assert allowed
        assert self.finish_reason is None
        before = worth(self.text)
        self.ids.append(token)
        self.logprob += logprob
        if TOKENS[token] == "<end>":
            self.finish_reason = "eos"
        elif any(stop in self.text for stop in self.stop):
            self.finish_reason = "stop"
        elif len(self.ids) == self.most:
            self.finish_reason = "length"
        if self.reward_at == "step":
            return worth(self.text) - before
        return worth(self.text) if self.finish_reason else 0.0


def assert_same(observation, expected):
    """Compare observations: ids exactly, floats to the precision of float32."""
    assert set(observation) == set(expected)
    for key, value in observation.items():
        np.testing.assert_allclose(value, np.asarray(expected[key]), rtol=1e-6, atol=1e-7, err_msg=key)
