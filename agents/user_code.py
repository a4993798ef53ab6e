"""Rewards, partners, prompts, models and agents of a user's own: ``my_reward.py:score`` or ``package.module:score``.

Naming one on the command line, or in a Python program, is leave to run it. A run that was stored names its code
too, and may come from a stranger: there the file must be unchanged (SHA-256), and must be code that this user has
named before (``remember``), or be trusted explicitly.

    reference  ->  identify (nothing is run)  ->  FoundCode(file, sha256)  ->  load_code  ->  object

The checksum is that of the named file; modules that it imports are not covered.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.abc import SourceLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from textgen_env.errors import ConfigError, TextGenError
from textgen_env.files import locked, read_json, write_file
from textgen_env.models.hub import cache_folder
from textgen_env.registry import unknown_name

KNOWN_CODE_FILE = "known_code.json"
"""In the cache folder: the code that this user has named, by reference."""

_modules: dict[str, ModuleType] = {}  # that were loaded


@dataclass(frozen=True)
class FoundCode:
    """The file of a reference, before anything in it has run."""

    file: Path  # resolved
    sha256: str


def is_reference(value: object) -> bool:
    """Return True for ``FILE.py:NAME`` and ``package.module:NAME``.

    >>> [is_reference(text) for text in ("my_reward.py:score", "judges.tone:score", "sentiment", "TextGen/Needle-v0:x")]
    [True, True, False, False]
    """
    if not isinstance(value, str):
        return False
    place, _, name = value.rpartition(":")
    return name.isidentifier() and (is_file(value) or all(part.isidentifier() for part in place.split(".")))


def is_file(reference: str) -> bool:
    """Return True if a reference names a file, not a module."""
    return reference.rpartition(":")[0].endswith(".py")


def identify(reference: str) -> FoundCode:
    """Return the file of a reference and its checksum.

    A module is looked for where Python does, then in the current folder, then where it was found before.

    Raises:
        ConfigError: there is no such file or module.
    """
    place = reference.rpartition(":")[0]
    if is_file(reference):
        return _found(Path(place).expanduser(), reference)
    _make_importable(place)
    try:
        spec = importlib.util.find_spec(place.partition(".")[0])  # of a package's module: only the package is sought
    except (ImportError, ValueError):
        spec = None
    origin = None if spec is None else getattr(spec.loader_state, "filename", None) or spec.origin
    if not origin or not Path(origin).is_file():
        known = _known().get(reference)
        if known is not None:
            return _found(Path(known["file"]), reference)  # says that it is gone
        raise ConfigError(f"{reference!r} names no module that can be imported; name a file: FILE.py:NAME")
    folder = Path(origin).parent
    inner = folder.joinpath(*place.split(".")[1:])
    inside = [inner / "__init__.py", inner.with_suffix(".py")]
    return _found(next((file for file in inside if "." in place and file.is_file()), Path(origin)), reference)


def load_code(reference: str) -> Any:
    """Run the file or module of a reference, and return the object that it names.

    Its folder is searched for other modules, after all others. A file is run once, until it changes.

    Raises:
        ConfigError: no such file, module or name (with a suggestion), or it raised.
    """
    place, _, name = reference.rpartition(":")
    found = identify(reference)
    try:
        module = _run_file(found) if is_file(reference) else _import(place)
    except Exception as error:
        if isinstance(error, TextGenError):
            raise
        raise ConfigError(f"{reference!r} cannot be imported: {type(error).__name__}: {error}") from error
    _modules[module.__name__] = module
    if not hasattr(module, name):
        public = [public for public in vars(module) if not public.startswith("_")]
        raise ConfigError(f"{reference!r} cannot be imported: {unknown_name('name', name, public)}")
    return getattr(module, name)


def check_code(code: Mapping[str, str], trust: bool) -> None:
    """Refuse code of a stored run that was changed, or that this user has never named.

    Args:
        code: Reference to the checksum it had, or "" where none was stored.
        trust: Also take code that this user has never named.

    Raises:
        ConfigError: says which file, and what to do.
    """
    known = _known()
    for reference, checksum in code.items():
        entry = known.get(absolute_reference(reference))
        if entry is None and not trust:
            _check_there(reference, "that was never named on this machine, ")
            raise ConfigError(
                f"it names code to run, {reference}, that was never named on this machine: look at it, and add --trust "
                "(trust=True in Python) if it is yours"
            )
        _check_there(reference, "")
        found = identify(reference)
        if checksum and found.sha256 != checksum:
            raise ConfigError(
                f"{found.file} was changed since the run ({reference}: SHA-256 {found.sha256[:12]}..., was "
                f"{checksum[:12]}...). Put it back, or name it again: --reward or --partner FILE.py:NAME, or "
                "an object in Python"
            )
        if not trust and (entry is None or found.sha256 not in entry["sha256"]):
            raise ConfigError(
                f"{found.file} was changed since it was last named on this machine: look at it, and add --trust "
                "(trust=True in Python) if it is yours"
            )


def remember(references: Sequence[str]) -> None:
    """Keep in mind that this user has named the code, as it is now; where nothing can be kept, nothing is."""
    if not references:
        return
    named = {absolute_reference(reference): identify(reference) for reference in references}
    with suppress(TextGenError), locked(cache_folder(), f"{KNOWN_CODE_FILE}.lock", wait=True):
        known = _known()  # as other processes have left it
        for key, found in named.items():
            before = known[key]["sha256"] if key in known else []
            known[key] = {"file": str(found.file), "sha256": [*dict.fromkeys([*before, found.sha256])]}
        write_file(cache_folder() / KNOWN_CODE_FILE, json.dumps(known, indent=2) + "\n")


def absolute_reference(reference: str) -> str:
    """Return a reference that is the same from every folder."""
    place, _, name = reference.rpartition(":")
    return f"{os.path.realpath(os.path.expanduser(place))}:{name}" if is_file(reference) else reference


def send_by_value(ray: Any) -> None:
    """Have Ray send the functions of loaded modules whole: other machines do not have the files."""
    for module in _modules.values():
        ray.cloudpickle.register_pickle_by_value(module)


def replace_references(spec: Any, new: Callable[[str], Any]) -> Any:
    """Return the description of a reward with each reference in it replaced: alone, in a mix, or in ``shaped``."""
    if isinstance(spec, str):
        return new(spec) if is_reference(spec) else spec
    if isinstance(spec, Mapping):
        if "name" in spec:
            inner = ("reward", "potential")
            return {key: replace_references(value, new) if key in inner else value for key, value in spec.items()}
        if any(map(is_reference, spec)):
            return [[replace_references(name, new), weight] for name, weight in spec.items()]
        return spec
    if isinstance(spec, list):
        return [[replace_references(p[0], new), *p[1:]] if isinstance(p, list) and p else p for p in spec]
    return spec


# --- one file


def _found(file: Path, reference: str) -> FoundCode:
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = f"no file at {str(file)!r}" if not file.exists() else str(error)
        raise ConfigError(f"{reference!r} cannot be imported: {reason}; check the path") from error
    return FoundCode(file.resolve(), hashlib.sha256(content).hexdigest())


def _check_there(reference: str, known: str) -> None:
    """Raise ``ConfigError`` if the file of a stored reference is missing; ``known`` is said of it."""
    place = reference.rpartition(":")[0]
    if is_file(reference) and not Path(place).expanduser().exists():
        raise ConfigError(
            f"it names code to run, {reference}, {known}and there is no such file: put it there, or name it where it "
            "is now (to resume a run it must be there): --reward or --partner FILE.py:NAME"
        )


def _run_file(found: FoundCode) -> ModuleType:
    """Return the module that a file makes, run from the very bytes that the checksum is of."""
    content = found.file.read_bytes()
    name = f"textgen_user_code_{hashlib.sha256(str(found.file).encode() + content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    _search(found.file.parent)
    loader = _LoaderOf(found.file, content)
    spec = importlib.util.spec_from_file_location(name, found.file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look there
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _LoaderOf(SourceLoader):
    """Makes a module of bytes that were read already; the file may change meanwhile."""

    def __init__(self, file: Path, content: bytes) -> None:
        self._file, self._content = str(file), content

    def get_filename(self, fullname: str) -> str:
        return self._file

    def get_data(self, path: str | bytes | os.PathLike[str]) -> bytes:
        if os.fspath(path) != self._file:
            raise OSError("only the file itself is at hand, no compiled copy of it")
        return self._content


def _import(place: str) -> ModuleType:
    _make_importable(place)
    return importlib.import_module(place)


def _make_importable(place: str) -> None:
    """Search the current folder, then those that a module was found in before, if Python does not find it."""
    top = place.partition(".")[0]
    known = [Path(entry["file"]) for name, entry in _known().items() if name.rpartition(":")[0] == place]
    before = [file.parents[place.count(".") + (file.name == "__init__.py")] for file in known]
    for folder in (Path.cwd(), *before):
        with suppress(ImportError, ValueError):
            if top in sys.modules or importlib.util.find_spec(top) is not None:
                return
        _search(folder)


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: no module of the user's hides one that is installed
    importlib.invalidate_caches()


# --- the code that this user has named


def _known() -> dict[str, Any]:
    """Return by reference: ``file``, and ``sha256``, a list of the checksums that it had when it was named."""
    try:
        read = read_json(cache_folder() / KNOWN_CODE_FILE, ())
    except TextGenError:
        return {}
    return {name: entry for name, entry in read.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("file"), str) and isinstance(entry.get("sha256"), list)
