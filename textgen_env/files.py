"""Files and folders that are there whole or not at all, and JSON that is read within bounds.

One process works in a folder at a time: ``locked`` refuses the second.

A process can be killed, and a disk can fill up, between any two writes. So new content gets a
temporary name beside the old one, reaches the disk, and is renamed: a reader finds the old content
or the new, never a part. JSON comes from strangers too: size and depth are bounded, and damage
becomes an error that names the file.

    content  ->  .NAME.half-made  ->  flush, fsync  ->  NAME   (a link called NAME is replaced, not followed)
    NAME  ->  bytes (bounded)  ->  JSON (bounded depth)  ->  keys checked
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from textgen_env.errors import ConfigError, RunFolderError, TextGenError

MOST_BYTES = 1 << 28
"""Of a JSON file: far more than any that this project writes."""

DEEPEST = 100
"""Lists and objects inside one another."""

LOCK_FILE = ".lock"
HALF_MADE = ".half-made"


# --- writing


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, whole or not at all.

    Raises:
        RunFolderError: it cannot be written (a full disk, say); an older file is unchanged.
    """
    with whole_file(path) as half_made:
        half_made.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: str | os.PathLike[str], failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block it becomes ``path``.

    If the block raises, the temporary file is deleted and ``path`` stays as it was. Two processes
    must not write the same path at the same time.

    Args:
        path: Its folder is made if need be. An older file is replaced.
        failures: What a library raises, beside ``OSError``, when the disk fails it.

    Raises:
        RunFolderError: it cannot be written.
    """
    target = Path(path)
    with _half_made(target, failures) as half_made:
        yield half_made
        flush(half_made)
        half_made.replace(target)


@contextmanager
def whole_folder(path: str | os.PathLike[str], failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; at the end of the block it becomes ``path``.

    Args:
        path: Must not exist, or be an empty folder. Its parent is made if need be.
        failures: As of ``whole_file``.

    Raises:
        RunFolderError: it cannot be written.
    """
    target = Path(path)
    with _half_made(target, failures) as half_made:
        half_made.mkdir()
        yield half_made
        for part in (*half_made.rglob("*"), half_made):
            flush(part)
        half_made.rename(target)
        flush(target.parent)


@contextmanager
def locked(folder: str | os.PathLike[str], name: str = LOCK_FILE, wait: bool = False) -> Iterator[None]:
    """Hold ``folder`` for this process; make it if need be. A killed process holds nothing any more.

    Args:
        name: Of the lock file in it, which is deleted in the end.
        wait: For another process that holds it: it is soon done.

    Raises:
        RunFolderError: another process holds it, or it cannot be written to.
    """
    path = Path(folder) / name
    descriptor = _lock(path, wait)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path, wait: bool) -> int:
    """Return the descriptor of the lock file, locked."""
    try:
        import fcntl
    except ImportError as error:
        raise RunFolderError(
            f"cannot work in {str(path.parent)!r}: a folder is locked while one process writes to it, and Python has "
            "no fcntl on this system; use Linux, macOS, or Windows' WSL"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            except FileNotFoundError:
                pass  # the one before has just deleted it
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except BlockingIOError as error:
        raise RunFolderError(
            f"another process works in {str(path.parent)!r}: wait until it has ended, or choose another folder"
        ) from error
    except OSError as error:
        raise RunFolderError(f"cannot work in {str(path.parent)!r}: {error}") from error


def refuse_links(folder: str | os.PathLike[str]) -> None:
    """Raise ``RunFolderError`` if an entry of ``folder`` is a link: what is written there would land elsewhere."""
    path = Path(folder)
    links = sorted(entry.name for entry in path.iterdir() if entry.is_symlink()) if path.is_dir() else []
    if links:
        raise RunFolderError(
            f"{str(path / links[0])!r} is a link, and results are not written through links: delete it"
        )


def is_free(folder: str | os.PathLike[str]) -> bool:
    """Return True if ``folder`` does not exist, or holds nothing but what a killed process left."""
    path = Path(folder)
    if not path.is_dir():
        return not (path.exists() or path.is_symlink())
    return all(entry.name == LOCK_FILE or _is_half_made(entry) for entry in path.iterdir())


def _is_half_made(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(HALF_MADE)


def clear_half_made(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files that killed processes left in ``folder``."""
    for path in Path(folder).glob(f".*{HALF_MADE}"):
        _remove(path)


def flush(path: Path) -> None:
    """Have the disk hold the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reporting_full_disk(target: Path, failures: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what the disk and ``failures`` raise into one ``RunFolderError`` that names ``target``."""
    expected: tuple[type[Exception], ...] = (OSError, *failures)
    try:
        yield
    except TextGenError:
        raise
    except expected as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunFolderError(
            f"cannot write {str(target)!r}: {reason}. Make room, or choose a folder that can be written to; what was "
            "there before is unchanged"
        ) from error


@contextmanager
def _half_made(target: Path, failures: tuple[type[Exception], ...]) -> Iterator[Path]:
    half_made = target.with_name(f".{target.name}{HALF_MADE}")
    try:
        with reporting_full_disk(target, failures):
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove(half_made)  # a killed process left it
            yield half_made
    finally:
        _remove(half_made)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


# --- reading


def read_text(path: str | os.PathLike[str], error: type[TextGenError] = ConfigError) -> str:
    """Return the text of a UTF-8 file.

    Args:
        error: The class of what is raised.

    Raises:
        TextGenError: of the class ``error``: no such file, more than ``MOST_BYTES``, or not UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        return content.decode()
    except (OSError, ValueError) as cause:
        raise error(f"cannot read {os.fspath(path)!r}: {cause}") from cause


CONSTANTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""One object each, so that what was read twice compares as equal."""


YAML_TAG = "tag:yaml.org,2002:"
YAML_SCALARS = (
    ("null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("bool", r"^(?:true|false)$", ["t", "f"]),
    ("int", r"^-?(?:0|[1-9][0-9_]*)$", list("-0123456789")),
    ("float", r"^-?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?$", list("-0123456789")),
)
"""What a plain word of YAML is, with its first characters; anything else is a string."""


def read_json(
    path: str | os.PathLike[str],
    keys: Sequence[str] | None = None,
    error: type[TextGenError] = RunFolderError,
    *,
    allow_nan: bool = False,
) -> Any:
    """Return what a JSON file holds.

    Args:
        keys: Of the JSON object that it must hold; None: any JSON.
        error, allow_nan: As of ``parse_json``.

    Raises:
        TextGenError: of the class ``error``: what ``read_text``, ``parse_json`` and ``check_keys`` raise.
    """
    source = repr(os.fspath(path))
    found = parse_json(read_text(path, error), source, error, allow_nan=allow_nan)
    if keys is not None:
        check_keys(found, keys, source, error)
    return found


def parse_json(
    text: str | bytes, source: str, error: type[TextGenError] = ConfigError, *, allow_nan: bool = False
) -> Any:
    """Return what ``text`` means.

    Args:
        source: What the text is, for messages.
        error: The class of what is raised.
        allow_nan: Also take ``NaN`` and ``Infinity``, which Python writes and JSON does not know.

    Raises:
        TextGenError: of the class ``error``: no JSON, a number that is not finite, or more than
            ``DEEPEST`` levels.
    """
    try:
        found = json.loads(text, parse_constant=CONSTANTS.__getitem__ if allow_nan else _refuse_constant)
        deep = _is_deeper(found, DEEPEST)
    except ValueError as cause:
        raise error(f"{source} must be JSON: {cause}") from cause
    except RecursionError:
        deep = True
    if deep:
        raise error(f"{source} must be JSON of at most {DEEPEST} levels: it is nested too deep")
    return found


def parse_yaml(text: str, source: str, error: type[TextGenError] = ConfigError) -> Any:
    """Return what a YAML text means, in the data types of JSON: no aliases, dates or tags.

    Args:
        source, error: As of ``parse_json``.

    Raises:
        TextGenError: of the class ``error``: no such YAML, or more than ``DEEPEST`` levels.
    """
    import yaml

    class JsonLoader(yaml.SafeLoader):
        """YAML with numbers such as 1e-3, and without words such as "no" as booleans."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not taken")
            return super().compose_node(parent, index)

    JsonLoader.yaml_implicit_resolvers = {}
    for tag, pattern, first in YAML_SCALARS:
        JsonLoader.add_implicit_resolver(YAML_TAG + tag, re.compile(pattern), first)
    tags = [YAML_TAG + tag for tag in ("null", "bool", "int", "float", "str", "seq", "map")]
    JsonLoader.yaml_constructors = {tag: JsonLoader.yaml_constructors[tag] for tag in (*tags, None)}
    try:
        found = JsonLoader(text).get_single_data()
        deep = _is_deeper(found, DEEPEST)
    except (yaml.YAMLError, ValueError) as cause:
        raise error(f"{source} must be YAML: {' '.join(str(cause).split())}") from cause
    except RecursionError:
        deep = True
    if deep:
        raise error(f"{source} must be YAML of at most {DEEPEST} levels: it is nested too deep")
    return found


def check_keys(
    found: Any, keys: Sequence[str], source: str, error: type[TextGenError] = RunFolderError
) -> dict[str, Any]:
    """Return ``found``, a JSON object that has all of ``keys``.

    Raises:
        TextGenError: of the class ``error``: another type, or a key that is missing.
    """
    if not isinstance(found, dict):
        raise error(f"{source} must be a JSON object, got {type(found).__name__}")
    missing = [key for key in keys if key not in found]
    if missing:
        raise error(f"{source} lacks the key {missing[0]!r} (it has {', '.join(found) or 'none'}): it is damaged")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a finite number")


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inner)
