"""The load of the busy benchmark, and where its measurements run."""

from __future__ import annotations

import psutil
import pytest

from benchmarks import busy


def test_the_load_runs_within_its_context_and_is_gone_after_it():
    before = set(psutil.Process().children())
    with busy.load(2):
        running = set(psutil.Process().children()) - before
        assert len(running) == 2
    assert not any(process.is_running() for process in running)


@pytest.mark.parametrize("added", [{}, {"OMP_WAIT_POLICY": "PASSIVE"}])
def test_a_measurement_has_the_settings_of_its_way_of_waiting_and_no_other(added, monkeypatch):
    given = {}
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setattr(busy, "WAITING", {"the only one": added})

    def run(command, env, **settings):
        given.update(env)
        return busy.subprocess.CompletedProcess(command, 0, stdout="1.5")

    monkeypatch.setattr(busy.subprocess, "run", run)
    monkeypatch.setattr(busy, "own_cores", lambda: 0)
    found = busy.measured("tiny", 2, 0.0)
    assert found == {("the only one", False): 1.5, ("the only one", True): 1.5}
    assert {name: given[name] for name in busy.SETTINGS if name in given} == added
