"""What our programs set before torch loads; a library changes nothing, the user's own settings stay."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from textgen_env.models import device

SETTINGS = (*device.WAITING, *device.KEPT, "KMP_BLOCKTIME")
AS_A_LIBRARY = f"""
import gc, os
before = gc.get_threshold()
import textgen_env.models, agents.text_dqn
textgen_env.models.load_language_model("tiny")
assert not os.environ.keys() & {set(SETTINGS)}
assert gc.get_threshold() == before
"""
OPENMP = [str(path) for path in (Path(find_spec("torch").origin).parent / "lib").glob("libgomp*")]
AS_A_PROGRAM = f"""
import ctypes, sys
from agents.cli.app import main
sys.argv = ["textgen", "list", "models"]
try:
    main()
finally:
    ctypes.CDLL({OPENMP}[0])  # as torch loads it
"""


def stderr_of(program, **settings):
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    env |= settings
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not OPENMP, reason="torch has no GNU OpenMP of its own, which prints its settings")
@pytest.mark.parametrize(
    ("own", "policy", "turns"),
    [
        ({}, "PASSIVE", "1000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", "30000000000"),  # five minutes, as libgomp's manual says
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE", "7"),
    ],
)
def test_threads_of_the_command_line_sleep_soon_unless_the_user_says_otherwise(own, policy, turns):
    shown = stderr_of(AS_A_PROGRAM, OMP_DISPLAY_ENV="VERBOSE", **own)
    assert f"OMP_WAIT_POLICY = '{policy}'" in shown
    assert f"GOMP_SPINCOUNT = '{turns}'" in shown


@pytest.mark.parametrize("own", [{}, {"LRU_CACHE_CAPACITY": "7"}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}])
def test_few_programs_of_products_are_kept_unless_the_user_says_otherwise(own, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(own))
    device.prepare_process()
    found = {name: value for name, value in os.environ.items() if name in device.KEPT}
    assert found == (own or {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"})


@pytest.mark.parametrize(
    ("own", "kept"), [((700, 10, 10), (50_000, 10, 10)), ((0, 10, 10), (0, 10, 10)), ((10**6, 5, 5), (10**6, 5, 5))]
)
def test_garbage_is_looked_for_less_often_unless_the_user_looks_for_it_never_or_less_still(own, kept):
    before = gc.get_threshold()
    gc.set_threshold(*own)
    try:
        device.prepare_process()
        assert gc.get_threshold() == kept
    finally:
        gc.set_threshold(*before)


@pytest.mark.slow
def test_to_import_the_library_and_load_a_model_leaves_the_settings_of_the_process():
    stderr_of(AS_A_LIBRARY)


def test_all_cores_are_ours_where_a_process_cannot_ask(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    for known, expected in ((3, 3), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda known=known: known)
        assert device.own_cores() == expected
