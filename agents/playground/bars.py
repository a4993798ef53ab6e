"""Numbers as bars of characters, so that a table of plain text shows them.

Bars have the same number of characters, and stand below each other in a font of fixed width.
"""

from __future__ import annotations

BAR_BLOCKS = 8
"""Characters of a bar."""

SMALLEST_SHOWN = 0.0005
"""Numbers nearer to 0 are shown as 0, and are rounding errors where all of them are."""


def bar(share: float) -> str:
    """Return a probability as a bar of blocks and as a percentage."""
    return f"{_filled(share, BAR_BLOCKS)} {share:.1%}"


def signed_bar(value: float, largest: float) -> str:
    """Return a number as a bar that goes from the middle to the left if it is negative, else to the right.

    Args:
        value: At most ``largest`` from 0.
        largest: What fills a half of the bar, at least 0.
    """
    share, half = abs(value) / max(largest, SMALLEST_SHOWN), BAR_BLOCKS // 2
    left, right = (share, 0.0) if value < 0 else (0.0, share)
    return f"{_filled(left, half)[::-1]}│{_filled(right, half)} {value:+.3f}"


def _filled(share: float, blocks: int) -> str:
    full = round(blocks * share)
    return "█" * full + "·" * (blocks - full)
