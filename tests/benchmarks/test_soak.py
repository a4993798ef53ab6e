"""A short soak: memory that stays and a cache that does not drift; ``make soak`` is the long one."""

from __future__ import annotations

import pytest

from benchmarks.soak import slope, soak, toy


@pytest.mark.slow
def test_three_thousand_steps_add_little_beside_a_full_memo_and_leave_the_cache_exact(monkeypatch):
    monkeypatch.setattr("benchmarks.soak.MEMO_BYTES", 1 << 16)  # full within the warm-up of so few steps, too
    found = soak(toy(), 3_000)
    assert (found.steps, found.forks) == (3_000, 3_000 // 7)
    assert found.texts > 300
    assert found.drift < 1e-4
    assert found.slope / 10 < 20  # MB per 10,000 steps: oneDNN still makes programs for other numbers of rows


def test_the_slope_of_a_leak_is_its_size():
    assert slope([(step, 50_000_000 + 20 * step) for step in range(0, 100_000, 1_000)]) == pytest.approx(2.0)
    assert slope([(0, 1)]) == 0.0
