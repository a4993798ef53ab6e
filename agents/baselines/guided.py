"""Guided best-of-n: the best of n blocks of tokens, again and again, by V.

    n rows  ->  a block each, from pi  ->  the one with the largest V, or reward  ->  n copies of it  ->  ...

Source: Mudgal et al. 2024, arXiv:2310.17022 (controlled decoding, blockwise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.baselines.planning import PLANNING_AGENTS, ROWS, Ids
from agents.baselines.values import ValuePlanner, beginnings
from textgen_env.config import check_at_least
from textgen_env.models.base import Rows
from textgen_env.policies import Floats, sample
from textgen_env.prompts import Prompt
from textgen_env.vector_env import TextGenVectorEnv


@dataclass(frozen=True)
class GuidedText:
    """A text whose blocks of tokens were each the best of n."""

    prompt: str
    completion: str
    ids: Ids  # of the completion
    reward: float
    kl_at_most: float  # nats; its mean over texts bounds the KL to mu_k from above
    tokens: int  # generated, those of dropped blocks included
    judge_calls: int  # finished texts that the reward was asked about


@dataclass
class _Draft:
    """A text while it is written, in n rows."""

    rows: Rows  # (n,)
    kl_at_most: float = 0.0
    tokens: int = 0
    judge_calls: int = 0
    reward: float | None = None  # None while it goes on


@PLANNING_AGENTS.register("guided_best_of_n")
class GuidedBestOfNAgent(ValuePlanner):
    """The best of n blocks of tokens, again and again.

    The rows of a text draw a block each from the language model, tilted by Q. The one with the largest
    soft value goes on, a finished text counting by its true reward. A block as long as the text is
    best-of-n of the tilted policy.

    Choosing among n blocks costs at most log n - (n - 1) / n nats, so the KL of a text has a bound,
    which may be far above it.

    Args:
        n: Rows a text, at least 1.
        block: Tokens of a block, at least 1.
        values, beta, trust, rows: See ``ValuePlanner``.

    Raises:
        ConfigError: a value out of range, or values that cannot be had.
        CapacityError: n rows do not fit into memory.
    """

    def __init__(
        self,
        env: TextGenVectorEnv,
        seed: int | None = None,
        *,
        n: int = 8,
        block: int = 5,
        values: object = None,
        beta: float | None = None,
        trust: float = 1.0,
        rows: int = ROWS,
    ) -> None:
        super().__init__(env, seed, n=n, values=values, beta=beta, trust=trust, rows=rows)
        check_at_least("block", block, 1)
        self.block = block

    def write(self, prompts: Sequence[str | Prompt]) -> list[GuidedText]:
        """Return a text for each prompt.

        Raises:
            PromptError: a prompt without tokens, or one that is too long.
            RewardError: the reward failed.
        """
        return self._guide(beginnings(prompts))

    def _plan(self, texts: Sequence[tuple[Prompt, Ids]]) -> list[Ids]:
        return [found.ids[len(ids) :] for found, (_, ids) in zip(self._guide(texts), texts, strict=True)]

    def _guide(self, texts: Sequence[tuple[Prompt, Ids]]) -> list[GuidedText]:
        found: list[GuidedText] = []
        for start in range(0, len(texts), self._at_a_time):
            drafts = [_Draft(rows) for rows in self._start(texts[start : start + self._at_a_time])]
            while going := [draft for draft in drafts if draft.reward is None]:
                worth, log_ratio, ended = self._write_blocks(going)
                self._keep_best(going, worth, log_ratio, ended)
            found += [self._result(draft) for draft in drafts]
        return found

    def _write_blocks(self, drafts: Sequence[_Draft]) -> tuple[Floats, Floats, Floats]:
        """Let every row write a block; return what it is worth, its log pi / mu in nats, and if it ended, by row."""
        worth, log_ratio, ended = np.zeros((3, self._episodes.rows))
        live = np.concatenate([draft.rows for draft in drafts])
        tilted = self._tilted(live)
        for _ in range(self.block):
            actions = sample(np.exp(tilted.log_pi), self._rng.random(len(live)))
            log_ratio[live] += (tilted.q[np.arange(len(live)), actions] - tilted.value) / self.beta
            for draft in drafts:
                draft.tokens += int(np.isin(draft.rows, live).sum())
            outcome = self._act(self._episodes, live, actions)
            worth[live], ended[live] = outcome.rewards, outcome.ended
            live = live[~outcome.ended]
            if not live.size:
                break
            tilted = self._tilted(live)
            worth[live] = tilted.worth
        return worth, log_ratio, ended

    def _keep_best(self, drafts: Sequence[_Draft], worth: Floats, log_ratio: Floats, ended: Floats) -> None:
        """Let the rows of each draft become copies of the best of them."""
        src, dst = [], []
        for draft in drafts:
            best = draft.rows[worth[draft.rows].argmax()]
            draft.kl_at_most += float(log_ratio[best]) + math.log(self.n) - (self.n - 1) / self.n
            draft.judge_calls += int(ended[draft.rows].sum())
            if ended[best]:
                draft.reward = float(worth[best])
            src.append(np.full(self.n - 1, best))
            dst.append(draft.rows[draft.rows != best])
        self._episodes.fork(np.concatenate(src), np.concatenate(dst))

    def _result(self, draft: _Draft) -> GuidedText:
        row = int(draft.rows[0])
        prompt = self._episodes.prompts_at(draft.rows[:1])[0]
        assert prompt is not None
        assert draft.reward is not None
        return GuidedText(
            prompt=prompt.text,
            completion=self._episodes.text_of(row),
            ids=tuple(self._episodes.ids_of(row)[1]),
            reward=draft.reward,
            kl_at_most=draft.kl_at_most,
            tokens=draft.tokens,
            judge_calls=draft.judge_calls,
        )
