"""What a visitor of the playground has tried: a tree of tokens for each writer, and the luck that the writers share.

Sheet: prompt, seed  ->  Tree of each writer  ->  Token, ...
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from textgen_env.errors import ConfigError
from textgen_env.prompts import Prompt

MOST_NODES = 5_000
"""Tokens that a writer's tree may have."""


@dataclass(frozen=True)
class Token:
    """A token of a tree, or the prompt (the first node)."""

    parent: int  # its node, -1 for the prompt
    action: int  # that led here
    text: str
    depth: int  # tokens since the prompt
    score: float | None  # the running score; the reward where the text has ended; None where nothing is known yet
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

    def add(self, action: int, text: str, score: float | None, kl: float, ended: str) -> None:
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

    def seed_at(self, depth: int) -> int:
        """Return a seed for all tokens after ``depth``: the same for both writers."""
        return int(np.random.default_rng([self.seed, depth]).integers(2**63))


def piece(before: str, after: str) -> str:
    """Return what a token adds to a text; where it changes the end of the text, from there on.

    >>> piece("a caf\\ufffd", "a café"), piece("a", "a b")
    ('é', ' b')
    """
    same = 0
    while same < min(len(before), len(after)) and before[same] == after[same]:
        same += 1
    return after[same:]


def branches(tree: Tree) -> list[tuple[int, str, float | None]]:
    """Return the runs of tokens between two branchings, indented by level: (last node, text, score)."""
    found: list[tuple[int, str, float | None]] = []
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
