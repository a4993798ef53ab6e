"""A short soak: memory that stays and a cache that does not drift; ``make soak`` is the long one."""

from __future__ import annotations

import pytest

from benchmarks.soak import slope, soak, toy


@pytest.mark.slow
def test_seven_thousand_steps_add_no_more_than_the_memo_may_hold_and_leave_the_cache_exact():
    """The heap has its size after some 2,000 steps: until then oneDNN makes programs for other numbers of rows."""
    found = soak(toy(), 7_000)
    assert (found.steps, found.forks) == (7_000, 7_000 // 7)
    assert found.texts > 300
    assert found.drift < 1e-4
    # The memo is still filling, so whether memory is flat after that is for the long soak to show.
    assert found.slope / 10 < 64  # MB per 10,000 steps; the memo's bound


def test_the_slope_of_a_leak_is_its_size():
    assert slope([(step, 50_000_000 + 20 * step) for step in range(0, 100_000, 1_000)]) == pytest.approx(2.0)
    assert slope([(0, 1)]) == 0.0
