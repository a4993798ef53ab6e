"""Writing by hand, beside an agent: texts that branch, candidates with their worth, and two writers on the same luck.

    prompt  ->  Desk.start  ->  Sheet (a tree of tokens for each writer)
    Sheet   ->  step, go, write  ->  Sheet  ->  view  ->  View (what a page shows)

The rules are the environment's. A token of the tree is a place to go back to: its row is kept as a snapshot, or
written again from the prompt where it no longer is. Visitors share the model and the agent; their sheets are their own.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.text_dqn.validation import LANGUAGE_MODEL
from textgen_env.errors import ConfigError
from textgen_env.policies import Floats, kl_to, sample
from textgen_env.prompts import Prompt
from textgen_env.rows import Snapshot
from textgen_env.vector_env import TextGenVectorEnv

KEPT_SNAPSHOTS = 64
"""Rows that the desk keeps, of all visitors together: a row of a larger model is megabytes."""

MOST_NODES = 5_000
"""Tokens that a writer's tree may have."""

WRITERS = ("sample", "greedy")
"""How a text is written to its end."""

END_SHOWN = "(end)"
"""The end token, as it is shown."""

BAR_BLOCKS = 12
"""Characters of a full bar."""


@dataclass(frozen=True)
class Token:
    """A token of a tree, or the prompt (the first node)."""

    parent: int  # its node, -1 for the prompt
    action: int  # that led here
    text: str
    depth: int  # tokens since the prompt
    score: float  # the running score so far; the reward where the text has ended
    kl: float  # nats since the prompt, of the writer's policies to the language model
    ended: str = ""  # the finish reason, or nothing


@dataclass
class Tree:
    """Everything that a writer has tried after one prompt, and the place where it stands."""

    nodes: list[Token]
    here: int = 0

    def path(self, node: int | None = None) -> list[int]:
        """Return the nodes from the prompt to ``node``, or to the place where the writer stands."""
        at, found = self.here if node is None else node, []
        while at >= 0:
            found.append(at)
            at = self.nodes[at].parent
        return found[::-1]

    def add(self, action: int, text: str, score: float, kl: float, ended: str) -> None:
        """Go to the token that ``action`` leads to; it is new unless it was tried before.

        Raises:
            ConfigError: the tree is full.
        """
        tried = [number for number in self.children(self.here) if self.nodes[number].action == action]
        if not tried:
            if len(self.nodes) >= MOST_NODES:
                raise ConfigError(f"the tree holds {MOST_NODES:,} tokens, which is the most: start again")
            here = self.nodes[self.here]
            self.nodes.append(Token(self.here, action, text, here.depth + 1, score, here.kl + kl, ended))
            tried = [len(self.nodes) - 1]
        self.here = tried[0]

    @property
    def ended(self) -> bool:
        """True where the text can go no further."""
        return bool(self.nodes[self.here].ended)

    def children(self, node: int) -> list[int]:
        """Return the nodes that follow ``node``, the first tried first."""
        return [number for number, other in enumerate(self.nodes) if other.parent == node]


@dataclass
class Sheet:
    """The work of one visitor: a prompt, and a tree for each writer."""

    prompt: Prompt
    seed: int  # of the luck that the writers share
    trees: dict[str, Tree] = field(default_factory=dict)
    number: int = field(default_factory=itertools.count().__next__)  # no two sheets of a process share it

    def luck(self, depth: int) -> float:
        """Return the random number in [0, 1) of the token at ``depth``: the same for both writers."""
        return float(np.random.default_rng([self.seed, depth]).random())


@dataclass(frozen=True)
class Candidate:
    """A token that may come next."""

    action: int
    text: str
    prior: float  # probability under the language model, among the candidates
    advantage: float | None  # Q minus the worth of the prefix, reward units; None for a writer without Q
    policy: float  # probability under the writer


@dataclass(frozen=True)
class View:
    """What a page shows of a writer."""

    tokens: list[tuple[int, str]]  # (node, text) from the prompt to here
    candidates: list[Candidate]  # likeliest under the language model first; none where the text has ended
    score: float
    kl: float
    ended: str
    branches: list[tuple[int, str, float]]  # (node, indented text, score) of the tree, in the order of reading


MODEL_WRITER = "language model"


class Desk:
    """A language model and, if there is one, an agent, to write with.

    Args:
        env: Of two rows at least, with the observation that the agent reads; used by this desk alone.
        agent: With ``probabilities``; None: the language model alone.
        name: Of the agent.
        scored: False: the reward is not known, and shown as nothing.

    Raises:
        ConfigError: an environment of one row or with a partner, or an agent without probabilities.
    """

    def __init__(self, env: TextGenVectorEnv, agent: Any = None, name: str = "agent", scored: bool = True) -> None:
        if env.num_envs < 2:
            raise ConfigError(f"a desk needs an environment of two rows, got {env.num_envs}")
        if env.episodes.partner is not None:
            raise ConfigError("a desk knows no replies, and the environment has a partner: make one without partner=")
        if agent is not None and not hasattr(agent, "probabilities"):
            raise ConfigError(f"{name} has no probabilities to show; a desk takes agents such as text_dqn and ppo")
        self.env, self.agent, self.scored = env, agent, scored
        self.writers = (MODEL_WRITER,) if agent is None else (MODEL_WRITER, name)
        self.beta: float | None = getattr(agent, "beta", None)
        self._episodes = env.episodes
        self._snapshots: OrderedDict[tuple[int, str, int], Snapshot] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def is_language_model(self) -> bool:
        """True if the agent has chosen to act as the language model: it has no values to show at that temperature."""
        return self.beta is not None and self.beta >= LANGUAGE_MODEL

    @property
    def shown_beta(self) -> float | None:
        """The temperature that a page begins with, reward units a nat: the agent's, or what it learned for."""
        return getattr(self.agent, "target_beta", self.beta) if self.is_language_model else self.beta

    # --- what a visitor does

    def start(self, prompt: str, seed: int = 0) -> Sheet:
        """Return a new sheet.

        Raises:
            PromptError: an empty prompt, or one that is too long.
        """
        sheet = Sheet(Prompt(prompt), seed)
        with self._lock:
            for writer in self.writers:
                sheet.trees[writer] = Tree([Token(-1, -1, prompt, 0, 0.0, 0.0)])
                self._begin(sheet, writer)
        return sheet

    def step(self, sheet: Sheet, writer: str, action: int, beta: float | None = None) -> None:
        """Append a candidate, or go to where it has been tried before.

        Raises:
            ConfigError: the text has ended, or the tree is full.
            IllegalAction: no such candidate.
        """
        tree = sheet.trees[writer]
        if tree.ended:
            raise ConfigError("the text has ended: go back to one of its tokens")
        with self._lock, self._acting_at(beta):
            self._restore(sheet, [writer])
            self._act(sheet, [writer], [action], self._policies([writer]))

    def go(self, sheet: Sheet, writer: str, node: int) -> None:
        """Go to a token of the tree; what follows it stays there.

        Raises:
            ConfigError: there is no such token.
        """
        if not 0 <= node < len(sheet.trees[writer].nodes):
            raise ConfigError(f"there is no token {node} in the tree of {len(sheet.trees[writer].nodes)}")
        sheet.trees[writer].here = node

    def write(self, sheet: Sheet, writers: Sequence[str], way: str = "sample", beta: float | None = None) -> None:
        """Write the texts of ``writers`` to their ends, from where they stand; the same luck for the same place.

        Raises:
            ConfigError: no such way, or a tree is full.
        """
        if way not in WRITERS:
            raise ConfigError(f"a text is written by {' or '.join(WRITERS)}, got {way!r}")
        with self._lock, self._acting_at(beta):
            live = [name for name in writers if not sheet.trees[name].ended]
            self._restore(sheet, live)
            while live:
                policies = self._policies(live)
                depths = [sheet.trees[name].nodes[sheet.trees[name].here].depth for name in live]
                actions = policies.argmax(-1) if way == "greedy" else _drawn(policies, map(sheet.luck, depths))
                self._act(sheet, live, actions.tolist(), policies)
                live = [name for name in live if not sheet.trees[name].ended]

    def view(self, sheet: Sheet, writer: str, beta: float | None = None) -> View:
        """Return what a page shows of a writer, its candidates at the acting temperature ``beta``."""
        tree = sheet.trees[writer]
        node = tree.nodes[tree.here]
        candidates: list[Candidate] = []
        if not node.ended:
            with self._lock, self._acting_at(beta):
                self._restore(sheet, [writer])
                candidates = self._candidates(writer)
        tokens = [(number, tree.nodes[number].text) for number in tree.path()]
        return View(tokens, candidates, node.score, node.kl, node.ended, branches(tree))

    # --- rows: writer i of ``writers`` has row i

    def _rows(self, writers: Sequence[str]) -> npt.NDArray[np.int64]:
        return np.array([self.writers.index(name) for name in writers], np.int64)

    @contextmanager
    def _acting_at(self, beta: float | None) -> Iterator[None]:
        if beta is None or self.beta is None:
            yield
            return
        if not beta > 0:
            raise ConfigError(f"beta must be above 0 (reward units a nat), got {beta}")
        own, self.agent.beta = self.agent.beta, beta
        try:
            yield
        finally:
            self.agent.beta = own

    def _begin(self, sheet: Sheet, writer: str) -> None:
        self._episodes.begin(self._rows([writer]), [sheet.prompt])
        self._episodes.observe(self._rows([writer]))
        self._keep(sheet, writer, 0)

    def _restore(self, sheet: Sheet, writers: Sequence[str]) -> None:
        """Bring the rows to where the writers stand: from the nearest snapshot, or from the prompt."""
        for writer in writers:
            tree, (row,) = sheet.trees[writer], self._rows([writer])
            path = tree.path()
            kept = [i for i, number in enumerate(path) if self._key(sheet, writer, number) in self._snapshots]
            if not kept:
                self._begin(sheet, writer)
            known = kept[-1] if kept else 0
            self._episodes.load(int(row), self._snapshots[self._key(sheet, writer, path[known])])
            for number in path[known + 1 :]:
                self._episodes.observe(self._rows([writer]))
                self._episodes.act(self._rows([writer]), np.array([tree.nodes[number].action]))
                self._episodes.observe(self._rows([writer]))
                self._keep(sheet, writer, number)

    def _key(self, sheet: Sheet, writer: str, node: int) -> tuple[int, str, int]:
        return sheet.number, writer, node

    def _keep(self, sheet: Sheet, writer: str, node: int) -> None:
        key = self._key(sheet, writer, node)
        self._snapshots[key] = self._episodes.save(self.writers.index(writer))
        self._snapshots.move_to_end(key)
        while len(self._snapshots) > KEPT_SNAPSHOTS:
            self._snapshots.popitem(last=False)

    # --- policies

    def _policies(self, writers: Sequence[str]) -> Floats:
        """Return the policy of each writer where its row stands, (len(writers), k)."""
        rows = self._rows(writers)
        prior = np.exp(self._episodes.log_prior(rows)[0])
        if self.agent is None:
            return prior
        observation = self._episodes.observe(rows)
        asked: Floats = np.asarray(self.agent.probabilities(observation), np.float64)
        return np.where((rows > 0)[:, None], asked, prior)

    def _candidates(self, writer: str) -> list[Candidate]:
        rows = self._rows([writer])
        policy = self._policies([writer])[0]
        log_prior = self._episodes.log_prior(rows)[0][0]
        found = self._episodes.proposals(rows).candidates[0]
        prompt, new = self._episodes.ids_of(int(rows[0]))
        model, text = self._episodes.model, self._episodes.text_of(int(rows[0]))
        wholes = model.continuations(prompt, new, found.tolist())
        beta = None if writer == MODEL_WRITER or self.beta is None else self.agent.beta
        if beta is not None and beta >= LANGUAGE_MODEL:  # Q - V would be beta times rounding errors
            beta = None
        ends = set(model.end_ids)
        candidates = []
        for action in np.flatnonzero(np.isfinite(log_prior)).tolist():
            token = END_SHOWN if int(found[action]) in ends else piece(text, wholes[action])
            advantage = None
            if beta is not None:  # pi = mu exp((Q - V) / beta)
                advantage = float(beta * (np.log(max(policy[action], 1e-300)) - log_prior[action]))
            candidates.append(
                Candidate(action, token, float(np.exp(log_prior[action])), advantage, float(policy[action]))
            )
        return candidates

    def _act(self, sheet: Sheet, writers: Sequence[str], actions: Sequence[int], policies: Floats) -> None:
        """Append an action a writer, all with one forward."""
        rows = self._rows(writers)
        log_prior = self._episodes.log_prior(rows)[0]
        before = [self._episodes.text_of(int(row)) for row in rows]
        paid = [sheet.trees[writer].nodes[sheet.trees[writer].here].score for writer in writers]
        tokens = self._episodes.proposals(rows).candidates
        outcome = self._episodes.act(rows, np.asarray(actions))
        self._episodes.observe(rows)
        costs = kl_to(policies, log_prior)
        at_step = self._episodes.config.reward_at == "step"
        for i, writer in enumerate(writers):
            row, action = int(rows[i]), int(outcome.actions[i])
            text = piece(before[i], self._episodes.text_of(row))
            if int(tokens[i, action]) in self._episodes.model.end_ids:
                text = END_SHOWN
            score = self._episodes.score_of(row)
            if outcome.ended[i]:
                score = float(outcome.rewards[i]) + (paid[i] if at_step else 0.0)
            ended = str(outcome.infos[i].get("finish_reason", ""))
            sheet.trees[writer].add(action, text, score, float(costs[i]), ended)
            self._keep(sheet, writer, sheet.trees[writer].here)


def piece(before: str, after: str) -> str:
    """Return what a token adds to a text; where it changes the end of the text, from there on.

    >>> piece("a caf\\ufffd", "a café"), piece("a", "a b")
    ('é', ' b')
    """
    same = 0
    while same < min(len(before), len(after)) and before[same] == after[same]:
        same += 1
    return after[same:]


def branches(tree: Tree) -> list[tuple[int, str, float]]:
    """Return the runs of tokens between two branchings, indented by level: (last node, text, score)."""
    found: list[tuple[int, str, float]] = []
    waiting = [(0, 0)]  # node, level
    while waiting:
        node, level = waiting.pop()
        run = [node]
        following = tree.children(node)
        while len(following) == 1:
            run.append(following[0])
            following = tree.children(following[0])
        text = "".join(tree.nodes[number].text for number in run)
        found.append((run[-1], "    " * level + text, tree.nodes[run[-1]].score))
        waiting += [(child, level + 1) for child in reversed(following)]
    return found


def bar(share: float) -> str:
    """Return a probability as a bar of blocks and as a percentage."""
    return f"{'█' * round(BAR_BLOCKS * share)}{'·' * (BAR_BLOCKS - round(BAR_BLOCKS * share))} {share:.1%}"


def _drawn(policies: Floats, numbers: Any) -> npt.NDArray[np.int64]:
    return sample(policies, np.array(list(numbers)))
