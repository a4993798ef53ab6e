"""Files that are whole or not there, and JSON that is read within bounds."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from textgen_env import files
from textgen_env.errors import ConfigError, ModelError, RunFolderError
from textgen_env.files import check_keys, parse_json, read_json, read_text, whole_file, whole_folder, write_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing


def test_a_file_and_its_folder_are_made_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_file(path, "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()  # ends of lines stay as they are
    write_file(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert names(path.parent) == ["b.txt"]


def test_a_folder_appears_with_everything_in_it(tmp_path):
    with whole_folder(tmp_path / "new") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "inner" / "a").read_text() == "1"
    assert names(tmp_path) == ["new"]


def test_a_folder_with_content_is_not_replaced(tmp_path):
    write_file(tmp_path / "held" / "a", "old")
    with pytest.raises(RunFolderError, match="cannot write"), whole_folder(tmp_path / "held") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "held" / "a").read_text() == "old"
    assert names(tmp_path) == ["held"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_writer_that_raises_leaves_the_old_content(tmp_path, error, whole):
    def write_and_raise():
        with whole(tmp_path / ("file" if whole is whole_file else "folder")) as half_made:
            (half_made if whole is whole_file else half_made / "a").write_text("ne")
            raise error

    write_file(tmp_path / "file", "old")
    with pytest.raises(error):
        write_and_raise()
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


PROGRAM = """
import sys, time
from pathlib import Path
from textgen_env.files import whole_file, whole_folder
target, kind = Path(sys.argv[1]), sys.argv[2]
with (whole_folder if kind == "folder" else whole_file)(target) as half_made:
    (half_made / "a" if kind == "folder" else half_made).write_text("half")
    print("in the middle", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_process_killed_in_the_middle_leaves_the_old_content_and_its_rest_is_cleared(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        write_file(target, "old")
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, target, kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in the middle\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(names(tmp_path)) == (2 if kind == "file" else 1)  # the half-made one is still there
    if kind == "file":
        assert target.read_text() == "old"
        write_file(target, "new")
        assert target.read_text() == "new"
    else:
        assert not target.exists()
        with whole_folder(target) as folder:
            assert names(folder) == []
            (folder / "b").write_text("new")
        assert names(target) == ["b"]
    assert names(tmp_path) == ["target"]


@pytest.mark.slow
def test_a_reader_never_sees_a_part(tmp_path):
    path, size = tmp_path / "file", 1 << 20
    program = (
        "import sys; from textgen_env.files import write_file\n"
        f"for n in range(10_000): write_file(sys.argv[1], bytes([n % 256]) * {size})"
    )
    process = subprocess.Popen([sys.executable, "-c", program, path])
    try:
        while not path.exists():  # a busy machine takes a while to start Python
            assert process.poll() is None
            time.sleep(0.005)
        for _ in range(200):
            content = path.read_bytes()
            assert len(content) == size
            assert content == content[:1] * size
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert path.exists()


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk_is_one_line_and_leaves_the_old_content(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_file(tmp_path / "file", "old")
    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "write_bytes", full)))
        with pytest.raises(RunFolderError, match=r"cannot write '.*file': .*No space left on device\. Make room") as e:
            write_file(tmp_path / "file", "new")
        with pytest.raises(RunFolderError, match="No space left"), whole_folder(tmp_path / "folder") as folder:
            (folder / "a").write_bytes(b"new")
    assert "\n" not in str(e.value)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_a_library_raises_for_a_full_disk_is_named_by_the_caller(tmp_path):
    with pytest.raises(RunFolderError, match="unexpected pos 64"), whole_file(tmp_path / "a", (RuntimeError,)):
        raise RuntimeError("unexpected pos 64\nmore of it")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a"):
        raise RuntimeError("not the disk's")
    with pytest.raises(ModelError), whole_folder(tmp_path / "a", (ValueError,)):
        raise ModelError("an error of this project stays what it is")


# --- reading


def test_json_is_read_as_it_was_written(tmp_path):
    found = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    write_file(tmp_path / "a.json", json.dumps(found))
    assert read_json(tmp_path / "a.json", ["a", "b"]) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be JSON: Expecting value"),
        (b'{"a": 1', "must be JSON: .*line 1 column 8"),
        (b'{"a": NaN}', "must be JSON: NaN is not a finite number"),
        (b"[-Infinity]", "-Infinity is not a finite number"),
        (b"[" * 101 + b"]" * 101, "at most 100 levels"),
        (b"[" * 100_000, "at most 100 levels"),
        (b"\xff", "cannot read .*utf-8"),
        (b"[1, 2]", "must be a JSON object, got list"),
        (b'{"b": 1}', r"lacks the key 'a' \(it has b\): it is damaged"),
        (b"{}", r"lacks the key 'a' \(it has none\)"),
    ],
)
@pytest.mark.parametrize("error", [RunFolderError, ConfigError])
def test_damaged_json_says_which_file_and_what_is_wrong(tmp_path, content, message, error):
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as e:
        read_json(path, ["a"], error)
    assert "damaged.json" in str(e.value)


def test_a_file_that_is_missing_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RunFolderError, match=r"cannot read '.*nowhere': .*No such file"):
        read_json(tmp_path / "nowhere")
    monkeypatch.setattr(files, "MOST_BYTES", 10)
    write_file(tmp_path / "ten", "[1, 2, 34]")
    assert read_json(tmp_path / "ten") == [1, 2, 34]
    write_file(tmp_path / "eleven", "[1, 2, 345]")
    with pytest.raises(ConfigError, match=r"cannot read '.*eleven': it has more than 10 bytes"):
        read_text(tmp_path / "eleven")


def test_numbers_that_are_not_finite_are_read_where_they_are_allowed():
    assert str(parse_json("[NaN, Infinity]", "it", allow_nan=True)) == "[nan, inf]"
    assert parse_json("[" * 100 + "]" * 100, "it")
    assert check_keys({"a": 1}, ["a"], "it") == {"a": 1}
