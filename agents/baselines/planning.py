"""Agents that plan: beam search, best of n, and tree search with the language model as prior.

They spend tokens instead of learning. Each is built for an environment, holds its model and
reward, and writes ahead in rows of its own, so the environment that asks is not disturbed. Where
a row stands is read from the observation: its prompt and the tokens generated since.

    tokens, length, budget  ->  rows of its own, forked  ->  rewards of finished texts  ->  action

Best-of-n and beam choose a whole text and then emit its tokens, one a step. ``tokens_used``
counts every token that the search has generated: the cost of its result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from agents.baselines.one_step import check_keys_of, choose
from textgen_env.config import check_at_least
from textgen_env.episode import Episodes, Outcome
from textgen_env.errors import ConfigError
from textgen_env.models.base import Rows
from textgen_env.observation import Observation
from textgen_env.policies import Floats, sample
from textgen_env.prompts import Prompt
from textgen_env.registry import Registry
from textgen_env.rows import Snapshot
from textgen_env.vector_env import TextGenVectorEnv

Ids = tuple[int, ...]
T = TypeVar("T")

PLANNING_AGENTS: Registry[type[PlanningAgent]] = Registry("agent")
"""Agents that search ahead in an environment, by name."""

ROWS = 64
"""Texts written at a time, at most, unless a single plan needs more."""


class Memory(Generic[T]):
    """Plans for prefixes, each taken out when a text gets there; the oldest prefix is forgotten.

    Two texts may have the same prefix and different plans: each takes one.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._held: OrderedDict[Ids, deque[T]] = OrderedDict()

    def put(self, ids: Ids, plan: T) -> None:
        self._held.setdefault(ids, deque()).append(plan)
        if len(self._held) > self._most:
            self._held.popitem(last=False)

    def take(self, ids: Ids) -> T | None:
        plans = self._held.get(ids)
        if not plans:
            return None
        if len(plans) == 1:
            del self._held[ids]
        return plans.popleft()


class PlanningAgent(ABC):
    """A policy that tries continuations in rows of its own before it answers.

    Args:
        env: What it acts in: its model, prompts, reward and settings are searched with.
        seed: Of the random numbers.

    Raises:
        ConfigError: an observation without ``tokens``, ``length`` or ``budget``, a prompt that is
            not one of the environment's and does not re-encode to the same tokens, or a partner.
    """

    def __init__(self, env: TextGenVectorEnv, seed: int | None = None) -> None:
        if env.episodes.partner is not None:
            raise ConfigError(
                f"{type(self).__name__} writes texts to their end before it acts, and would ask the partner for its "
                "answers in advance: use an agent that learns, or one that reads the observation alone"
            )
        self.tokens_used = 0
        self._env = env
        self._rng = np.random.default_rng(seed)
        self._prompts: dict[Ids, Prompt] = {}

    @abstractmethod
    def predict(
        self,
        observation: Observation,
        state: tuple[Any, ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[np.int64], tuple[Any, ...] | None]:
        """Return an action a row, (B,), or one action, (), for an observation without a batch axis."""

    # --- rows of its own

    def _open(self, rows: int, *keys: str) -> Episodes:
        """Return episodes like the environment's, paid at the end."""
        episodes = self._env.episodes
        settings = replace(
            episodes.config, observation=("logprobs", "action_mask", *keys), reward_at="end", render_mode=None
        )
        return Episodes(episodes.model, episodes.prompts, episodes.reward, settings, rows)

    def _stand(self, episodes: Episodes, rows: Rows, texts: Sequence[tuple[Prompt, Ids]]) -> None:
        """Let each row hold a prompt and generated tokens, ready to act."""
        episodes.begin(rows, [prompt for prompt, _ in texts])
        for step in range(max(len(ids) for _, ids in texts)):
            going = [j for j, (_, ids) in enumerate(texts) if len(ids) > step]
            episodes.act(rows[going], episodes.offer(rows[going], np.array([texts[j][1][step] for j in going])))
        episodes.proposals(rows)

    def _act(self, episodes: Episodes, rows: Rows, actions: npt.NDArray[np.int64]) -> Outcome:
        self.tokens_used += len(rows)
        return episodes.act(rows, actions)

    def _finish(self, episodes: Episodes, rows: Rows) -> Floats:
        """Let the language model write each row to its end; return the rewards, (B,)."""
        rewards, live = np.zeros(episodes.rows), rows
        while live.size:
            policy = np.exp(episodes.log_prior(live)[0])
            outcome = self._act(episodes, live, sample(policy, self._rng.random(len(live))))
            rewards[live] += outcome.rewards
            live = live[~outcome.ended]
        return rewards[rows]

    # --- reading the observation

    def _read(self, observation: Observation) -> tuple[list[Ids], list[tuple[Prompt, Ids]], bool]:
        """Return all ids of each row, its prompt and generated ids, and True for an observation of a single row."""
        check_keys_of(observation, ("tokens", "length", "budget"), type(self).__name__)
        tokens = np.asarray(observation["tokens"])
        rows, whole, texts = np.atleast_2d(tokens), [], []
        lengths, budgets = np.ravel(observation["length"]), np.ravel(observation["budget"])
        for ids, length, budget in zip(rows, lengths, budgets, strict=True):
            steps = round((1.0 - float(budget)) * self._env.max_new_tokens)
            read = tuple(ids[:length].tolist())
            whole.append(read)
            texts.append((self._prompt(read[: length - steps]), read[length - steps :]))
        return whole, texts, tokens.ndim == 1

    def _prompt(self, ids: Ids) -> Prompt:
        """Return the prompt of ``ids``: with its reference, if the environment is at it."""
        if ids not in self._prompts:
            model = self._env.language_model
            prompts = self._env.episodes.prompts_at(np.arange(self._env.num_envs))
            running = [prompt for prompt in prompts if prompt is not None]
            for prompt in (Prompt(model.decode(ids)), *running):
                self._prompts[tuple(model.encode(prompt.text))] = prompt
        if ids not in self._prompts:
            raise ConfigError(
                f"the prompt {self._env.language_model.decode(ids)!r} is not one that the agent's environment is at, "
                "and its text alone does not give the same tokens: ask for actions on the environment it was built for"
            )
        return self._prompts[ids]


class TextPlanner(PlanningAgent):
    """Choose a whole text, then emit its tokens; plan anew wherever the text left the plan."""

    def __init__(self, env: TextGenVectorEnv, seed: int | None = None) -> None:
        super().__init__(env, seed)
        self._plans: Memory[Ids] = Memory()

    @abstractmethod
    def _plan(self, texts: Sequence[tuple[Prompt, Ids]]) -> list[Ids]:
        """Return the tokens that should follow each text, to its end."""

    def predict(
        self,
        observation: Observation,
        state: tuple[Any, ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[np.int64], tuple[Any, ...] | None]:
        whole, texts, single = self._read(observation)
        candidates = observation.get("candidates")
        listed = None if candidates is None else np.atleast_2d(candidates)
        plans = {b: plan for b, ids in enumerate(whole) if (plan := self._plans.take(ids)) is not None}
        # Half-precision models may drop a planned token from the end of the list: then plan again.
        missing = [b for b in range(len(whole)) if b not in plans or not _offers(listed, b, plans[b][0])]
        if missing:
            plans.update(zip(missing, self._plan([texts[b] for b in missing]), strict=True))
        actions = np.zeros(len(whole), np.int64)
        for b, (token, *rest) in plans.items():
            actions[b] = token if listed is None else np.argmax(listed[b] == token)
            if rest:
                self._plans.put((*whole[b], token), tuple(rest))
        return (actions[0] if single else actions), state


def _offers(listed: npt.NDArray[Any] | None, row: int, token: int) -> bool:
    return listed is None or bool((listed[row] == token).any())


@PLANNING_AGENTS.register("best_of_n")
class BestOfNAgent(TextPlanner):
    """The best of n texts that the language model writes, by reward.

    Args:
        n: Texts to choose from, at least 1; each costs its tokens.
    """

    def __init__(self, env: TextGenVectorEnv, seed: int | None = None, n: int = 16) -> None:
        super().__init__(env, seed)
        check_at_least("n", n, 1)
        self.n = n
        self._at_a_time = max(1, ROWS // n)
        self._episodes = self._open(self._at_a_time * n)

    def _plan(self, texts: Sequence[tuple[Prompt, Ids]]) -> list[Ids]:
        plans: list[Ids] = []
        for start in range(0, len(texts), self._at_a_time):
            group = texts[start : start + self._at_a_time]
            rows = np.arange(len(group) * self.n).reshape(-1, self.n)
            self._stand(self._episodes, rows[:, 0], group)
            self._episodes.fork(np.repeat(rows[:, 0], self.n - 1), rows[:, 1:].ravel())
            rewards = self._finish(self._episodes, rows.ravel()).reshape(rows.shape)
            for (_, ids), row in zip(group, rows[np.arange(len(group)), rewards.argmax(-1)], strict=True):
                plans.append(tuple(self._episodes.ids_of(row)[1][len(ids) :]))
        return plans


@PLANNING_AGENTS.register("beam")
class BeamAgent(TextPlanner):
    """Beam search for the text with the highest reward + beta log mu.

    Unfinished texts are ranked by the same, with the running score in place of the reward where the
    reward can score a prefix, and by their likelihood alone where it cannot. It draws nothing, so
    a prompt has one answer.

    Args:
        width: Unfinished texts kept, at least 1.
        beta: Reward units a nat, above 0.
    """

    def __init__(self, env: TextGenVectorEnv, seed: int | None = None, width: int = 16, beta: float = 0.05) -> None:
        super().__init__(env, seed)
        check_at_least("width", width, 1)
        if not beta > 0:
            raise ConfigError(f"beta must be above 0 (reward units a nat), got {beta}")
        self.width = width
        self.beta = beta
        self._scored = env.episodes.reward.running() is not None and env.episodes.config.top_k is not None
        self._episodes = self._open(width, *(("score", "candidate_scores") if self._scored else ()))

    def _plan(self, texts: Sequence[tuple[Prompt, Ids]]) -> list[Ids]:
        return [self._plan_one(text) for text in texts]

    def _plan_one(self, text: tuple[Prompt, Ids]) -> Ids:
        episodes, live, likelihood = self._episodes, np.zeros(1, np.int64), np.zeros(1)
        self._stand(episodes, live, [text])
        best, plan = -np.inf, list[int]()
        while live.size:
            extended = likelihood[:, None] + episodes.log_prior(live)[0]  # (w, k) nats
            rank = self.beta * extended
            if self._scored:
                rank = rank + episodes.observe(live)["candidate_scores"]
            kept = np.argsort(-rank, axis=None, kind="stable")[: self.width]
            kept = kept[np.isfinite(rank.ravel()[kept])]
            sources, actions = np.divmod(kept, episodes.k)
            rows = np.arange(len(kept))
            episodes.fork(live[sources], rows)
            outcome = self._act(episodes, rows, actions)
            likelihood = extended.ravel()[kept]
            values = outcome.rewards + self.beta * likelihood
            for row in np.flatnonzero(outcome.ended).tolist():
                if values[row] > best:
                    best, plan = values[row], episodes.ids_of(row)[1]
            live, likelihood = rows[~outcome.ended], likelihood[~outcome.ended]
        return tuple(plan[len(text[1]) :])


@dataclass
class Node:
    """A prefix in the search tree, with counts and rewards below each of its k candidates."""

    at: Snapshot
    candidates: npt.NDArray[np.int32]  # (k,) token ids
    prior: Floats  # (k,) mu_k
    visits: Floats  # (k,)
    total: Floats  # (k,) sum of the rewards seen
    children: dict[int, Node | float] = field(default_factory=dict)  # a reward where the text ends


@PLANNING_AGENTS.register("mcts")
class MCTSAgent(PlanningAgent):
    """Monte Carlo tree search on forks of the environment, with mu_k as PUCT's prior.

    A new prefix is valued by letting the language model finish it. All rows of the observation
    search side by side, so a forward serves one simulation of each. The tree below the chosen token
    is kept for the next step.

    Args:
        simulations: Texts tried for each token, at least 1.
        exploration: PUCT's constant, in units of the range of rewards seen so far.

    Source: Silver et al. 2017 (PUCT); Schrittwieser et al. 2020, arXiv:1911.08265 (values scaled by their range).
    """

    def __init__(
        self, env: TextGenVectorEnv, seed: int | None = None, simulations: int = 32, exploration: float = 1.0
    ) -> None:
        super().__init__(env, seed)
        check_at_least("simulations", simulations, 1)
        if not exploration > 0:
            raise ConfigError(f"exploration must be above 0, got {exploration}")
        self.simulations = simulations
        self.exploration = exploration
        self._episodes = self._open(ROWS)
        self._trees: Memory[Node] = Memory(most=256)  # by the ids of their root's text
        self._low, self._high = np.inf, -np.inf  # rewards seen

    def probabilities(self, observation: Observation) -> Floats:
        """Return each candidate's share of the simulations, (B, k), given this search's own luck."""
        whole, texts, single = self._read(observation)
        listed = np.atleast_2d(observation["candidates"]) if "candidates" in observation else None
        policy = np.zeros((len(whole), self._episodes.k))
        for start in range(0, len(whole), ROWS):
            part = slice(start, start + ROWS)
            roots = self._roots(whole[part], texts[part])
            for _ in range(self.simulations):
                self._simulate(roots)
            for b, root in enumerate(roots, start):
                policy[b] = root.visits / root.visits.sum()
                ids = root.candidates
                if listed is not None and not np.array_equal(listed[b], ids):  # near-ties in half precision
                    policy[b] = _reordered(policy[b], ids, listed[b])
                for action, child in root.children.items():
                    if isinstance(child, Node):
                        self._trees.put((*whole[b], int(ids[action])), child)
        return policy[0] if single else policy

    def predict(
        self,
        observation: Observation,
        state: tuple[Any, ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[np.int64], tuple[Any, ...] | None]:
        return choose(self.probabilities(observation), self._rng, deterministic), state

    def _roots(self, whole: Sequence[Ids], texts: Sequence[tuple[Prompt, Ids]]) -> list[Node]:
        """Return the tree of each row, grown at the step before or new."""
        found = [self._trees.take(ids) for ids in whole]
        new = np.array([b for b, root in enumerate(found) if root is None], np.int64)
        if new.size:
            self._stand(self._episodes, new, [texts[b] for b in new])
        return [self._node(b) if root is None else root for b, root in enumerate(found)]

    def _node(self, row: int) -> Node:
        rows = np.array([row])
        candidates, prior = self._episodes.proposals(rows).candidates[0], np.exp(self._episodes.log_prior(rows)[0][0])
        return Node(self._episodes.save(row), candidates, prior, np.zeros_like(prior), np.zeros_like(prior))

    def _simulate(self, roots: Sequence[Node]) -> None:
        """Try one text more in each tree."""
        paths = [self._descend(root) for root in roots]
        values = np.zeros(len(roots))
        new = []
        for b, path in enumerate(paths):
            node, action = path[-1]
            known = node.children.get(action)
            if isinstance(known, float):
                values[b] = known
            else:
                self._episodes.load(b, node.at)
                new.append(b)
        if new:
            values[new] = self._expand(np.array(new), [paths[b][-1] for b in new])
        self._low, self._high = min(self._low, values.min()), max(self._high, values.max())
        for path, value in zip(paths, values, strict=True):
            for node, action in path:
                node.visits[action] += 1
                node.total[action] += value

    def _expand(self, rows: Rows, edges: Sequence[tuple[Node, int]]) -> Floats:
        """Let each row leave its tree by an edge, add the node there, and finish the text; return the rewards."""
        outcome = self._act(self._episodes, rows, np.array([action for _, action in edges]))
        values = outcome.rewards.astype(np.float64)
        going = rows[~outcome.ended]
        self._episodes.proposals(going)  # one forward for all new nodes
        for row, value, ended, (node, action) in zip(rows.tolist(), values, outcome.ended, edges, strict=True):
            node.children[action] = float(value) if ended else self._node(row)
        values[~outcome.ended] += self._finish(self._episodes, going)
        return values

    def _descend(self, root: Node) -> list[tuple[Node, int]]:
        """Return the nodes and actions from the root to an edge that leaves the tree, or to an end."""
        path: list[tuple[Node, int]] = []
        node: Node | float | None = root
        while isinstance(node, Node):
            action = self._choose(node)
            path.append((node, action))
            node = node.children.get(action)
        return path

    def _choose(self, node: Node) -> int:
        """Return the action with the highest upper bound; an untried one is valued at the mean of the others."""
        visited = node.visits.sum()
        mean = node.total.sum() / visited if visited else 0.0
        values = np.where(node.visits > 0, node.total / np.maximum(node.visits, 1), mean)
        spread = self._high - self._low
        scaled = (values - self._low) / spread if spread > 0 and np.isfinite(spread) else np.zeros_like(values)
        bound = scaled + self.exploration * node.prior * np.sqrt(visited + 1) / (1 + node.visits)
        return int(np.where(node.prior > 0, bound, -np.inf).argmax())


def _reordered(policy: Floats, ids: npt.NDArray[Any], listed: npt.NDArray[Any]) -> Floats:
    """Return the policy over ``ids`` as one over ``listed``: the same tokens, but for a few at the end."""
    same = listed[:, None] == ids  # (k, k)
    moved = (same * policy).sum(-1)
    kept = moved if moved.any() else same.any(-1)
    return kept / kept.sum()
