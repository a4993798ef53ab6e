"""Writing by hand, beside an agent: texts that branch, candidates with their worth, and two writers on the same luck.

    prompt  ->  Desk.start  ->  Sheet (a tree of tokens for each writer)
    Sheet   ->  step, go, write  ->  Sheet  ->  view  ->  View (what a page shows)

The rules are the environment's. A token of the tree is a place to go back to: its row is kept as a snapshot, or
written again from the prompt where it no longer is. Visitors share the model and the agent; their sheets are their own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.baselines.one_step import LookaheadAgent
from agents.baselines.particles import ParticlesAgent
from agents.playground.tree import Sheet, Token, Tree, branches, piece
from agents.text_dqn.validation import LANGUAGE_MODEL
from textgen_env.config import check_one_of
from textgen_env.errors import ConfigError, PromptError
from textgen_env.policies import Floats, kl_to, sample
from textgen_env.prompts import Prompt
from textgen_env.rows import Snapshot
from textgen_env.vector_env import TextGenVectorEnv

KEPT_SNAPSHOTS = 64
"""Rows that the desk keeps, of all visitors together: a row of a larger model is megabytes."""

WRITING_WAYS = ("sample", "greedy", "particles")
"""How a text is written to its end."""

FIRST_PROMPT = "The movie was"
"""What a page begins with, if the model can read it."""

ROWS_A_TEXT = 8
"""Texts from which ``particles`` picks one, by weight."""

END_SHOWN = "(end)"
"""The end token, as it is shown."""


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
    score: float | None  # None where nothing is known yet
    kl: float
    ended: str
    branches: list[tuple[int, str, float | None]]  # (node, indented text, score) of the tree, in the order of reading


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
        self.writers: tuple[str, ...] = (MODEL_WRITER,) if agent is None else (MODEL_WRITER, name)
        self.beta: float | None = getattr(agent, "beta", None)
        self._episodes = env.episodes
        config, keys = env.episodes.config, set(env.episodes.keys)
        shows_scores = config.reward_at == "step" or bool(keys & {"score", "candidate_scores"})
        self._runs = scored and shows_scores and env.episodes.reward.running() is not None  # prefixes have scores
        self._snapshots: OrderedDict[tuple[int, str, int], Snapshot] = OrderedDict()
        self._lock = threading.RLock()
        self.first_prompt = self._first_prompt()

    @property
    def is_language_model(self) -> bool:
        """True if the agent has chosen to act as the language model: it has no values to show at that temperature."""
        return self.beta is not None and self.beta >= LANGUAGE_MODEL

    @property
    def shown_beta(self) -> float | None:
        """The temperature that a page begins with, reward units a nat: the agent's, or what it learned for."""
        return getattr(self.agent, "target_beta", self.beta) if self.is_language_model else self.beta

    @property
    def ways(self) -> tuple[str, ...]:
        """How texts can be written to their ends here, of ``WRITING_WAYS``."""
        return WRITING_WAYS[:-1] if self.no_particles else WRITING_WAYS

    @property
    def no_particles(self) -> str:
        """The reason why particles cannot write here, or nothing."""
        if not self.scored:
            return "the reward is not known here, and particles are weighted by it"
        if self.agent is None:
            return "there is no agent, whose Q and beta they need"
        if self.beta is None or _values_of(self.agent) is None:
            return f"{self.writers[1]} has no Q and beta to guide them"
        return ""

    # --- what a visitor does

    def start(self, prompt: str, seed: int = 0) -> Sheet:
        """Return a new sheet.

        Raises:
            PromptError: an empty prompt, or one that is too long.
        """
        own = self.first_prompt  # with what the agent is not told, where it is the environment's
        sheet = Sheet(own if prompt == own.text else Prompt(prompt), seed)
        with self._lock:
            for writer in self.writers:
                self._begin(sheet, writer)
                score = self._running_score(self.writers.index(writer))
                sheet.trees[writer] = Tree([Token(-1, -1, prompt, 0, score, 0.0)])
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

        By particles each text is picked from ``ROWS_A_TEXT``, which all go on from where the writer stands and are
        weighted for the trade at ``beta``: the agent's are guided by its Q, the language model's by none.

        Raises:
            ConfigError: no such way, one that is not possible here, or a tree is full.
            CapacityError: the particles do not fit into memory.
        """
        check_one_of("the way to write", way, WRITING_WAYS)
        if way == "particles" and self.no_particles:
            raise ConfigError(f"particles cannot write here: {self.no_particles}. Choose sample or greedy")
        with self._lock, self._acting_at(beta):
            live = [name for name in writers if not sheet.trees[name].ended]
            self._restore(sheet, live)
            if way == "particles":
                for name in live:
                    self._write_planned(sheet, name, self._planned(sheet, name, beta or self.shown_beta))
                return
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

    def _first_prompt(self) -> Prompt:
        """Return ``FIRST_PROMPT``, or one of the environment's where the model cannot read that."""
        first = Prompt(FIRST_PROMPT)
        try:
            self._episodes.begin(np.zeros(1, np.int64), [first])
        except PromptError:
            return self._episodes.prompts.draw(np.random.default_rng(0))
        return first

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

    def _running_score(self, row: int) -> float | None:
        return self._episodes.score_of(row) if self._runs else None

    # --- particles

    def _planned(self, sheet: Sheet, writer: str, beta: float | None) -> tuple[int, ...]:
        """Return the tokens that particles put behind the text where the writer's row stands."""
        so_far = self._episodes.ids_of(self.writers.index(writer))[1]
        values = "zero" if writer == MODEL_WRITER else _values_of(self.agent)
        planner = ParticlesAgent(
            self.env, sheet.seed_at(len(so_far)), n=ROWS_A_TEXT, values=values, beta=beta, rows=ROWS_A_TEXT
        )
        (found,) = planner.write([sheet.prompt], [so_far])
        return found.ids[found.chosen][len(so_far) :]

    def _write_planned(self, sheet: Sheet, writer: str, tokens: Sequence[int]) -> None:
        rows = self._rows([writer])
        for token in tokens:
            policies = self._policies([writer])
            self._act(sheet, [writer], self._episodes.offer(rows, np.array([token])).tolist(), policies)

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
            score = self._running_score(row)
            if outcome.ended[i] and self.scored:
                score = float(outcome.rewards[i]) + ((paid[i] or 0.0) if at_step else 0.0)
            ended = str(outcome.infos[i].get("finish_reason", ""))
            sheet.trees[writer].add(action, text, score, float(costs[i]), ended)
            self._keep(sheet, writer, sheet.trees[writer].here)


def _drawn(policies: Floats, numbers: Any) -> npt.NDArray[np.int64]:
    return sample(policies, np.array(list(numbers)))


def _values_of(agent: Any) -> Any:
    """Return where the Q of an agent comes from, as ``ParticlesAgent`` takes it, or None."""
    if isinstance(agent, LookaheadAgent):
        return "lookahead"
    return agent if hasattr(getattr(agent, "learner", None), "q") else None
