"""A reward of one's own, in a file: any function of the completion that returns a number.

    textgen train --reward examples/my_reward.py:score --beta 0.02 --steps 12000 --out runs/mine
    textgen generate runs/mine --prompt "Hello"

The run keeps the name of the file and its checksum. ``evaluate``, ``--resume``, ``record`` and ``generate`` use the
function again; if the file was changed, they say so.
"""

from __future__ import annotations

import itertools


def score(completion: str) -> float:
    """Return the share of neighbouring words that begin with the same letter, 0 to 1: alliteration."""
    words = [word for word in completion.lower().split() if word[0].isalpha()]
    pairs = list(itertools.pairwise(words))
    return sum(first[0] == second[0] for first, second in pairs) / max(1, len(pairs))
