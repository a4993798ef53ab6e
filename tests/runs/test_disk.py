"""A disk that fills up, a folder that two processes want, and links in it."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
from test_checkpoint import CONFIG, assert_same_run, breaking_after
from weather import RUN_FILES, weather

from agents.runs.checkpoint import newest_checkpoint
from agents.runs.run import load_run, resume, train
from textgen_env.errors import DivergenceError, RunFolderError
from textgen_env.files import LOCK_FILE, locked, write_file

pytestmark = pytest.mark.usefixtures("blank_pictures")


@contextmanager
def no_room():
    """No file of this process can grow any more, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def filling_after(calls, fill):
    """The words' own reward; the disk is full from the given call on."""
    left = [calls]

    def reward(completion):
        left[0] -= 1
        if left[0] == 0:
            fill()
        return float("sun" in completion)

    return reward


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that found room."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(CONFIG, folder, model=weather(), reward=breaking_after(-1))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("calls", [50, 125])
def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_once_there_is_room(whole, tmp_path, calls):
    folder = tmp_path / "run"
    with no_room() as fill, pytest.raises(RunFolderError, match="cannot write") as error:
        train(CONFIG, folder, model=weather(), reward=filling_after(calls, fill))
    assert "\n" not in str(error.value)
    has_checkpoint = newest_checkpoint(folder / "checkpoints") is not None
    assert has_checkpoint == (calls == 125)
    assert not list(folder.rglob("*.half-made"))
    assert not (folder / "summary.json").exists()

    result = resume(folder, model=weather(), reward=breaking_after(-1))

    assert result.finished
    assert_same_run(whole, folder)
    assert sorted(path.name for path in folder.iterdir()) == RUN_FILES


@pytest.mark.slow
def test_a_run_that_diverges_names_its_step_and_goes_on_from_the_last_finite_checkpoint(tmp_path):
    left = [70]

    def reward(completion):  # finite, and too much for float32 once it is squared
        left[0] -= 1
        return 1e29 if left[0] < 0 else float("sun" in completion)

    folder = tmp_path / "run"
    with pytest.raises(DivergenceError, match=r"in update \d+, after \d+ steps") as error:
        train(CONFIG, folder, model=weather(), reward=reward)
    diverged_at = int(re.search(r"after (\d+) steps", str(error.value))[1])
    assert 0 < int(newest_checkpoint(folder / "checkpoints").name) <= diverged_at
    load_run(folder, model=weather(), reward=len)  # what was saved is finite
    assert resume(folder, model=weather(), reward=breaking_after(-1)).steps == 400


def test_what_a_kill_after_the_summary_left_is_cleared(tmp_path):
    folder = tmp_path / "run"
    train(replace(CONFIG, steps=40), folder, model=weather())
    write_file(folder / "checkpoints" / "000000000040" / "state.json", "{}")
    write_file(folder / ".plane.png.half-made", "")
    write_file(folder / LOCK_FILE, "")
    with pytest.raises(RunFolderError, match="nothing to resume"):
        resume(folder, model=weather())
    assert sorted(path.name for path in folder.iterdir()) == RUN_FILES


# --- two processes

HOLD = """
import sys, time
from textgen_env.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_folder_is_of_one_process_until_it_ends_or_is_killed(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match="another process works in"), locked(folder):
        pass
    with pytest.raises(RunFolderError, match="another process works in"):
        train(replace(CONFIG, steps=40), folder, model=weather())
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert train(replace(CONFIG, steps=40), folder, model=weather()).finished
    assert sorted(path.name for path in folder.iterdir()) == RUN_FILES


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="cannot work in"), locked(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


# --- links


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "metrics.csv", "agent.zip"])
def test_security_a_resumed_run_writes_through_no_link(tmp_path, name):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with no_room() as fill, pytest.raises(RunFolderError):
        train(CONFIG, folder, model=weather(), reward=filling_after(50, fill))
    elsewhere.mkdir()
    for path in folder.glob(name):
        path.rename(tmp_path / "moved")
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(RunFolderError, match=f"{name}' is a link"):
        resume(folder, model=weather(), reward=len)
    assert list(elsewhere.iterdir()) == []


def test_security_a_file_replaces_a_link_and_is_not_written_through_it(tmp_path):
    write_file(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "old"
    assert (tmp_path / "link").read_text() == "new"


def test_a_system_whose_python_cannot_lock_files_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with (
        pytest.raises(RunFolderError, match="no fcntl on this system; use Linux, macOS, or Windows' WSL"),
        locked(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())
