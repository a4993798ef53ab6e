"""Walks on graphs: StarGraph and RandomWalks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

from textgen_env.config import check_at_least
from textgen_env.errors import ConfigError
from textgen_env.tasks.exact import (
    LETTERS,
    Floats,
    Process,
    check_between,
    check_number,
    diagnostic_task,
    one_hot,
    ranked,
)


class _Walked(NamedTuple):
    goal: int  # arm
    nodes: tuple[int, ...]  # arm of each node so far


@diagnostic_task("TextGen/StarGraph-v0")
@dataclass(frozen=True)
class StarGraph(Process):
    """A bad prior: the right first step is one that the language model hardly ever takes.

    ## Description
    From the centre of a star `degree` arms go out, each a path of `length` nodes. The prompt names the
    leaf to reach. The language model has learned to follow an arm once it is on it, slipping at times
    onto another one (which no edge allows), but not which arm to enter: the right one has the
    probability `prior`. Greedy decoding, and beams over likelihood, enter a wrong arm every time.

    ## Action space
    `Discrete(degree)`: the next node on each arm, in the language model's order.

    ## Observation
    `hidden` is the goal's arm, the first node's arm, and the last node's arm, each one-hot, and whether
    the walk has slipped: (3 degree + 1,).

    ## Rewards
    1 if the walk follows the goal's arm from its first node to its leaf, else 0.

    ## Starting state
    One of `degree` leaves as the goal.

    ## Episode end
    After `length` nodes.

    ## Arguments
    `degree`, 2 to 26; `length`, 1 to 64; `prior`, in (0, 1); `slip`, in [0, 1); `seed` of which arm leads
    to which leaf's name.

    ## Bounds
    Language model: prior (1 - slip) ** (length - 1). Best: 1.

    ## Reference
    Bachmann and Nagarajan 2024, "The pitfalls of next-token prediction", arXiv:2403.06963; Zhou et al.
    2025, "Q#", arXiv:2502.20548, whose graphs differ from prompt to prompt, while here one graph is
    learned.
    """

    degree: int = 5
    length: int = 5
    prior: float = 0.05
    slip: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("degree", self.degree, 2, LETTERS)
        check_between("length", self.length, 1, 64)
        check_number("prior", self.prior, 0.001, 0.999)
        check_number("slip", self.slip, 0.0, 0.999)
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        arms = ascii_lowercase[: self.degree]
        return (*(f"{arm}{place}" for place in range(1, self.length + 1) for arm in arms), *(f"{a}:" for a in arms))

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        return [(self.degree * self.length + goal,) for goal in range(self.degree)]

    @property
    def steps(self) -> int:
        return self.length

    @property
    def candidates(self) -> int:
        return self.degree

    @cached_property
    def arms(self) -> tuple[int, ...]:
        """The arm that leads to each goal."""
        return tuple(np.random.default_rng(self.seed).permutation(self.degree).tolist())

    def begin(self, prompt: tuple[int, ...]) -> _Walked:
        return _Walked(prompt[0] - self.degree * self.length, ())

    def follow(self, state: _Walked, token: int) -> _Walked:
        return state._replace(nodes=(*state.nodes, token % self.degree))

    def probabilities(self, state: _Walked) -> Floats:
        likely, probability = (state.nodes[-1], 1 - self.slip) if state.nodes else (self.arms[state.goal], self.prior)
        others = [arm for arm in range(self.degree) if arm != likely]
        arms = np.zeros(self.degree)
        arms[likely] = probability
        arms[others] = (1 - probability) * ranked(0.8, len(others), self.seed, state.goal, len(state.nodes))
        values = np.zeros(len(self.tokens))
        values[len(state.nodes) * self.degree : (len(state.nodes) + 1) * self.degree] = arms
        return values

    def features(self, state: _Walked) -> Floats:
        first, last = (state.nodes[0], state.nodes[-1]) if state.nodes else (None, None)
        arms = [one_hot(arm, self.degree) for arm in (state.goal, first, last)]
        return np.append(np.concatenate(arms), float(self._slipped(state)))

    def worth(self, state: _Walked) -> float:
        return float(not self._slipped(state) and state.nodes[0] == self.arms[state.goal])

    def summary(self, state: _Walked) -> tuple[object, ...]:
        return state.goal, state.nodes[:1], state.nodes[-1:], self._slipped(state)

    def _slipped(self, state: _Walked) -> bool:
        return len(set(state.nodes)) > 1


class _Visited(NamedTuple):
    start: int
    node: int
    moves: int


@diagnostic_task("TextGen/RandomWalks-v0")
@dataclass(frozen=True)
class RandomWalks(Process):
    """Planning: reach the goal of a graph by the shortest path, with a language model of random walks.

    ## Description
    A directed graph of `nodes` nodes, drawn from `seed`, with `degree` edges out of each. The prompt is
    the node to start from, a token the node to go to, and node "a" is the goal. The language model
    walks at random.

    ## Action space
    `Discrete(degree)`: the nodes that an edge leads to.

    ## Observation
    `hidden` is the node, and the one started from, each one-hot: (2 nodes,).

    ## Rewards
    (length - nodes visited) / (length - nodes on a shortest path), both ends counted; 0 if the goal
    is not reached.

    ## Starting state
    Any node but the goal.

    ## Episode end
    At the goal, or after `length` - 1 moves.

    ## Arguments
    `nodes`, 3 to 26; `degree`, 2 to nodes - 1; `length`, the nodes that a walk can visit, up to 64 and
    more than the longest of the shortest paths; `seed` of the graph.

    ## Bounds
    Best: 1. Language model: by dynamic programming over nodes and moves.

    ## Reference
    The random walks of trlX, Havrilla et al. 2023, EMNLP; there every edge has a probability of 0.1.
    """

    nodes: int = 21
    degree: int = 3
    length: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("nodes", self.nodes, 3, LETTERS)
        check_between("degree", self.degree, 2, self.nodes - 1)
        check_between("length", self.length, 3, 64)
        check_at_least("seed", self.seed, 0)
        longest = max(self.shortest) + 1
        if self.length <= longest:
            raise ConfigError(
                f"a shortest path of this graph has {longest} nodes, so length must be more, got {self.length}"
            )

    @property
    def tokens(self) -> Sequence[str]:
        return tuple(ascii_lowercase[: self.nodes])

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        return [(node,) for node in range(1, self.nodes)]

    @property
    def stop(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.tokens[0],)

    @property
    def steps(self) -> int:
        return self.length - 1

    @property
    def candidates(self) -> int:
        return self.degree

    @cached_property
    def edges(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that can be reached from each node in one move; the goal is reached from all."""
        rng = np.random.default_rng(self.seed)
        while True:
            drawn = [rng.permutation([n for n in range(self.nodes) if n != node]) for node in range(self.nodes)]
            edges = tuple(tuple(sorted(others[: self.degree].tolist())) for others in drawn)
            if math.inf not in _distances(edges):
                return edges

    @cached_property
    def shortest(self) -> tuple[int, ...]:
        """The fewest moves from each node to the goal."""
        return tuple(int(moves) for moves in _distances(self.edges))

    def begin(self, prompt: tuple[int, ...]) -> _Visited:
        return _Visited(prompt[0], prompt[0], 0)

    def follow(self, state: _Visited, token: int) -> _Visited:
        return _Visited(state.start, token, state.moves + 1)

    def ended(self, state: _Visited) -> bool:
        return state.node == 0

    def probabilities(self, state: _Visited) -> Floats:
        values = np.zeros(self.nodes)
        values[list(self.edges[state.node])] = 1 / self.degree
        return values

    def features(self, state: _Visited) -> Floats:
        return np.concatenate([one_hot(state.node, self.nodes), one_hot(state.start, self.nodes)])

    def worth(self, state: _Visited) -> float:
        if state.node:
            return 0.0
        return (self.length - 1 - state.moves) / (self.length - 1 - self.shortest[state.start])


def _distances(edges: Sequence[Sequence[int]]) -> list[float]:
    """Return the fewest moves from each node to node 0, infinity where there is no way."""
    moves = [0.0] + [math.inf] * (len(edges) - 1)
    for _ in edges:
        moves = [0.0] + [1 + min(moves[other] for other in out) for out in edges[1:]]
    return moves
