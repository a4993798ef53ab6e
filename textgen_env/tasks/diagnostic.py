"""Six tasks that each ask one thing of an agent, with exact optima and an exact language model.

What all of them share: the model ranks the tokens differently from prefix to prefix, so an action's
number means nothing by itself; all prompts are trained and tested on; rewards are in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from textgen_env.config import check_at_least, check_one_of
from textgen_env.errors import ConfigError
from textgen_env.tasks.exact import Process, check_between, check_number, diagnostic_task

Floats = npt.NDArray[np.float64]

LETTERS = len(ascii_lowercase)


@lru_cache(1 << 12)
def ranked(ratio: float, count: int, *seed: int) -> Floats:
    """Return ``count`` probabilities in an order drawn from ``seed``, each ``ratio`` times the one before."""
    weights = ratio ** np.random.default_rng(seed).permutation(count)
    weights /= weights.sum()
    weights.flags.writeable = False  # remembered
    return np.asarray(weights)


def one_hot(place: int | None, size: int) -> Floats:
    """Return (size,) with a 1 at ``place``, all zeros for None."""
    hot = np.zeros(size)
    if place is not None:
        hot[place] = 1.0
    return hot


@diagnostic_task("TextGen/Needle-v0")
@dataclass(frozen=True)
class Needle(Process):
    """Exploration: of all texts only one is worth anything.

    ## Description
    A text is `depth` letters, and one text, drawn from `seed`, is the needle. Nothing on the way
    says whether the letters so far begin it. The deceptive variant pays a little for every letter
    that is not the needle's, so each small improvement leads away from it.

    ## Action space
    `Discrete(branches)`: the letters, in the language model's order, which changes with the prefix.

    ## Observation
    `hidden` is the letters so far, one-hot by place: (depth branches,).

    ## Rewards
    1 for the needle, else 0; with `deceptive` else 0.5 times the share of letters that differ from it.

    ## Starting state
    The prompt is always ">".

    ## Episode end
    After `depth` letters.

    ## Arguments
    `depth` letters, 1 to 64; `branches` letters to choose from, 2 to 26; `deceptive`; `seed` of the needle.

    ## Bounds
    Language model: the needle's probability, about branches ** -depth. Best: 1.

    ## Reference
    Deep sea in Osband et al. 2020, "Behaviour suite for reinforcement learning", arXiv:1908.03568.
    """

    depth: int = 8
    branches: int = 2
    deceptive: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("depth", self.depth, 1, 64)
        check_between("branches", self.branches, 2, LETTERS)
        check_one_of("deceptive", self.deceptive, (False, True))
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        return (*ascii_lowercase[: self.branches], ">")

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        return ((self.branches,),)

    @property
    def steps(self) -> int:
        return self.depth

    @property
    def candidates(self) -> int:
        return self.branches

    @cached_property
    def needle(self) -> tuple[int, ...]:
        """The text that is worth 1, as ids."""
        return tuple(np.random.default_rng(self.seed).integers(self.branches, size=self.depth).tolist())

    def begin(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def follow(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*state, token)

    def probabilities(self, state: tuple[int, ...]) -> Floats:
        letters = ranked(0.8, self.branches, self.seed, len(state), *state[-1:])
        return np.append(letters, 0.0)

    def features(self, state: tuple[int, ...]) -> Floats:
        places = np.zeros((self.depth, self.branches))
        places[np.arange(len(state)), list(state)] = 1.0
        return places.ravel()

    def worth(self, state: tuple[int, ...]) -> float:
        if state == self.needle:
            return 1.0
        return 0.5 * self._off(state) / self.depth if self.deceptive else 0.0

    def summary(self, state: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        return self._off(state), state[-1:]

    def _off(self, state: tuple[int, ...]) -> int:
        return sum(token != right for token, right in zip(state, self.needle, strict=False))


class _Carried(NamedTuple):
    door: int
    key: int | None  # None before the first step


@diagnostic_task("TextGen/DelayedKey-v0")
@dataclass(frozen=True)
class DelayedKey(Process):
    """Credit: the first token decides, and its reward comes `delay` tokens later.

    ## Description
    The prompt is a door. The first token takes a key; then a corridor of `delay` steps follows, on
    which nothing matters; at its end the door opens or not. The language model prefers wrong keys.

    ## Action space
    `Discrete(max(keys, 3))`: the keys at the first step, afterwards the three tiles of the corridor; the
    rest is masked.

    ## Observation
    `hidden` is the door and the key carried, each one-hot: (2 keys,).

    ## Rewards
    1 if the first token was the door's own key, else 0, at the end.

    ## Starting state
    One of `keys` doors.

    ## Episode end
    After 1 + `delay` tokens.

    ## Arguments
    `delay` steps, 0 to 256; `keys`, 2 to 26; `prior`, the probability of the right key under the
    language model, in (0, 1); `seed` of which key fits which door.

    ## Bounds
    Language model: `prior`. Best: 1.

    ## Reference
    Key to door in Hung et al. 2019, "Optimizing agent behavior over long time scales by transporting
    value", arXiv:1810.06721.
    """

    delay: int = 16
    keys: int = 4
    prior: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("delay", self.delay, 0, 256)
        check_between("keys", self.keys, 2, LETTERS)
        check_number("prior", self.prior, 0.001, 0.999)
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        keys = ascii_lowercase[: self.keys]
        return (*keys, *TILES, *keys.upper())

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        return [(self.keys + len(TILES) + door,) for door in range(self.keys)]

    @property
    def steps(self) -> int:
        return 1 + self.delay

    @property
    def candidates(self) -> int:
        return max(self.keys, len(TILES))

    @cached_property
    def fitting(self) -> tuple[int, ...]:
        """The key of each door."""
        return tuple(np.random.default_rng(self.seed).permutation(self.keys).tolist())

    def begin(self, prompt: tuple[int, ...]) -> _Carried:
        return _Carried(prompt[0] - self.keys - len(TILES), None)

    def follow(self, state: _Carried, token: int) -> _Carried:
        return _Carried(state.door, token) if state.key is None else state

    def probabilities(self, state: _Carried) -> Floats:
        values = np.zeros(len(self.tokens))
        if state.key is None:
            right = self.fitting[state.door]
            wrong = [key for key in range(self.keys) if key != right]
            values[right] = self.prior
            values[wrong] = (1 - self.prior) * ranked(0.8, len(wrong), self.seed, state.door)
        else:
            values[self.keys : self.keys + len(TILES)] = ranked(0.8, len(TILES), self.seed, state.door, state.key)
        return values

    def features(self, state: _Carried) -> Floats:
        return np.concatenate([one_hot(state.door, self.keys), one_hot(state.key, self.keys)])

    def worth(self, state: _Carried) -> float:
        return float(state.key == self.fitting[state.door])


TILES = ".,_"
"""What a corridor is made of."""


class _Pulled(NamedTuple):
    context: int
    arm: int | None


@diagnostic_task("TextGen/NoisyBandit-v0")
@dataclass(frozen=True)
class NoisyBandit(Process):
    """Noise: one token a text, and a reward of which only the mean says which is right.

    ## Description
    The prompt is one of `contexts` machines, the only token an arm. The arms of a machine pay
    1/(arms+1), 2/(arms+1), ... on average, in an order drawn from `seed`. The language model's
    preferences have nothing to do with it.

    The noise is the luck of the episode, a number that comes with the prompt, unseen: the same reset
    and actions give the same reward, and luck is spread so evenly over the prompts that the means are
    exact. Luck favours all arms alike, so a search that reads the reward gains nothing from it.

    ## Action space
    `Discrete(arms)`: the arms, in the language model's order for this machine.

    ## Observation
    `hidden` is the machine, one-hot: (contexts,).

    ## Rewards
    `scale` times (1 - noise) mean + noise draw, where the draw is 1 with probability mean, else 0.

    ## Starting state
    One of `contexts` machines.

    ## Episode end
    After one token.

    ## Arguments
    `arms`, 2 to 26; `contexts`, 1 to 26; `noise`, 0 (the mean itself) to 1 (only 0 and `scale`);
    `scale`, in [0.001, 1]; `seed` of what the arms pay.

    ## Bounds
    Best: scale arms / (arms + 1), whatever the noise. Ceiling: `scale`.

    ## Reference
    Bandit noise and bandit scale in Osband et al. 2020, arXiv:1908.03568.
    """

    arms: int = 8
    contexts: int = 4
    noise: float = 1.0
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("arms", self.arms, 2, LETTERS)
        check_between("contexts", self.contexts, 1, LETTERS)
        check_number("noise", self.noise)
        check_number("scale", self.scale, 0.001)
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        return (*ascii_lowercase[: self.arms], *ascii_lowercase[: self.contexts].upper())

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        return [(self.arms + context,) for context in range(self.contexts)]

    @property
    def draws(self) -> Sequence[Mapping[str, Any]]:  # type: ignore[override]
        return [{"luck": (i + 0.5) / (self.arms + 1)} for i in range(self.arms + 1)]

    @property
    def steps(self) -> int:
        return 1

    @property
    def candidates(self) -> int:
        return self.arms

    @cached_property
    def means(self) -> Floats:
        """What each arm pays on average, unscaled: (contexts, arms)."""
        rng = np.random.default_rng(self.seed)
        return np.stack([(1 + rng.permutation(self.arms)) / (self.arms + 1) for _ in range(self.contexts)])

    def begin(self, prompt: tuple[int, ...]) -> _Pulled:
        return _Pulled(prompt[0] - self.arms, None)

    def follow(self, state: _Pulled, token: int) -> _Pulled:
        return _Pulled(state.context, token)

    def probabilities(self, state: _Pulled) -> Floats:
        return np.append(ranked(0.8, self.arms, self.seed, state.context), np.zeros(self.contexts))

    def features(self, state: _Pulled) -> Floats:
        return one_hot(state.context, self.contexts)

    def worth(self, state: _Pulled) -> float:
        return self.scale * float(self.means[state])

    def paid(self, state: _Pulled, metadata: Mapping[str, Any]) -> float:
        mean = float(self.means[state])
        return self.scale * ((1 - self.noise) * mean + self.noise * (metadata["luck"] < mean))

    @property
    def ceiling(self) -> float:
        return self.scale


class _Nested(NamedTuple):
    stack: tuple[int, ...]  # kinds of the open brackets, the innermost last
    closed: int  # pairs matched before the first mistake
    broken: bool


@diagnostic_task("TextGen/Dyck-v0")
@dataclass(frozen=True)
class Dyck(Process):
    """Memory and constraint: close every bracket, the last opened first, within the length.

    ## Description
    The prompt opens `depth` brackets of `kinds` kinds. The text has exactly `length` brackets, more
    than needed to close them: pairs may be opened and closed on the way. The language model knows
    about how deep it is, but neither which bracket is innermost nor how much room is left.

    ## Action space
    `Discrete(2 kinds)`: all brackets, in the language model's order.

    ## Observation
    `hidden` is the stack of open brackets, innermost first, one-hot by place, whether there was a
    mistake, and the share of pairs matched before it: (kinds (depth + length) / 2 + 2,).

    ## Rewards
    The share of pairs that are matched before the first bracket that closes the wrong one or none,
    out of (depth + length) / 2. With `graded=False` 1 for a balanced text, else 0.

    ## Starting state
    All ways to open `depth` brackets, or 64 of them drawn from `seed`.

    ## Episode end
    After `length` tokens.

    ## Arguments
    `depth`, 0 to 16; `length` tokens, from `depth` to 64, even if `depth` is even and odd if it is odd;
    `kinds`, 1 to 4; `graded`; `seed` of the model's habits.

    ## Bounds
    Best: 1, a balanced text. Language model: by dynamic programming over stacks.

    ## Reference
    Dyck languages as a probe of memory: Hewitt et al. 2020, "RNNs can generate bounded hierarchical
    languages with optimal memory", arXiv:2010.07515.
    """

    depth: int = 4
    length: int = 8
    kinds: int = 2
    graded: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("depth", self.depth, 0, 16)
        check_between("kinds", self.kinds, 1, len(OPENING))
        check_between("length", self.length, max(1, self.depth), 64)
        check_one_of("graded", self.graded, (False, True))
        check_at_least("seed", self.seed, 0)
        if (self.length - self.depth) % 2:
            raise ConfigError(
                f"length={self.length} brackets cannot close depth={self.depth} and balance: make both even or both odd"
            )

    @property
    def pairs(self) -> int:
        """How many pairs a balanced text has, prompt included."""
        return (self.depth + self.length) // 2

    @property
    def tokens(self) -> Sequence[str]:
        return (*OPENING[: self.kinds], *CLOSING[: self.kinds], ">")

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        mark = 2 * self.kinds
        count = self.kinds**self.depth
        if count <= MOST_PROMPTS:
            return [(mark, *opened) for opened in product(range(self.kinds), repeat=self.depth)]
        rng = np.random.default_rng(self.seed)
        drawn: set[tuple[int, ...]] = set()
        while len(drawn) < MOST_PROMPTS:
            drawn.add(tuple(rng.integers(self.kinds, size=self.depth).tolist()))
        return [(mark, *opened) for opened in sorted(drawn)]

    @property
    def steps(self) -> int:
        return self.length

    @property
    def candidates(self) -> int:
        return 2 * self.kinds

    def begin(self, prompt: tuple[int, ...]) -> _Nested:
        return _Nested(prompt[1:], 0, False)

    def follow(self, state: _Nested, token: int) -> _Nested:
        if state.broken:
            return state
        if token < self.kinds:
            return state._replace(stack=(*state.stack, token))
        if state.stack and state.stack[-1] == token - self.kinds:
            return state._replace(stack=state.stack[:-1], closed=state.closed + 1)
        return state._replace(stack=(), broken=True)

    def probabilities(self, state: _Nested) -> Floats:
        closes = 0.7 if state.stack else 0.1
        kinds = ranked(0.8, self.kinds, self.seed, len(state.stack))
        return np.concatenate([(1 - closes) * kinds, closes * kinds[::-1], [0.0]])

    def features(self, state: _Nested) -> Floats:
        places = np.zeros((self.depth + self.length, self.kinds))
        places[np.arange(len(state.stack)), list(reversed(state.stack))] = 1.0
        return np.append(places[: self.pairs], [state.broken, state.closed / self.pairs])

    def worth(self, state: _Nested) -> float:
        return state.closed / self.pairs if self.graded else float(state.closed == self.pairs)


OPENING, CLOSING = "([{<", ")]}/"
MOST_PROMPTS = 64


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
