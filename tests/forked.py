"""Processes to kill: forked from one that has imported everything, so that a start costs no imports.

A child has its own memory, files, session and signals, as one that is started anew. Imports and hash seed are those
of the process it was forked from: where these matter, a test starts Python itself.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["agents.cli.app", "agents.runs.run", "agents.benchmark.grid", "transformers.models.llama.modeling_llama"]
)


class Forked:
    """``function(*arguments)`` in a process of its own, with the interface of ``subprocess.Popen``.

    Args:
        folder: Where it works, and where ``said-*.txt`` is written: what it prints on stdout and stderr.
        env: Environment variables besides those of the test.
    """

    def __init__(self, folder: Path, function: Callable[..., None], *arguments: Any, **env: str) -> None:
        self.said = folder / f"said-{len(list(folder.glob('said-*.txt')))}.txt"
        self.said.touch()
        given = (self.said, {**os.environ, **env}, function, arguments)
        self.process = CONTEXT.Process(target=in_child, args=given)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> str:
        """Wait until it has ended, and return what it said."""
        self.process.join(timeout)
        return self.said.read_text()


def in_child(said: Path, env: Mapping[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(said.parent)
    file = os.open(said, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*arguments)


def textgen(*arguments: Any) -> None:
    """Run the command line."""
    from agents.cli.app import main

    sys.argv = ["textgen", *map(str, arguments)]
    main()


def script(path: Path, *arguments: Any) -> None:
    """Run a script as a program."""
    sys.argv = [str(path), *map(str, arguments)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def program(source: str, *arguments: Any) -> None:
    """Run source text as ``python -c`` does."""
    sys.argv = ["-c", *map(str, arguments)]
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
