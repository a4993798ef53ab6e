"""Stops: Ctrl-C, SIGTERM and SIGHUP ask the training to stop, or raise where nothing can be asked."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""SIGHUP comes when a terminal is closed or a connection breaks."""


class Stopped(KeyboardInterrupt):
    """One of ``STOPS`` arrived."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__()
        self.signum = signum

    @property
    def name(self) -> str:
        """The signal's name for users."""
        return "Ctrl-C" if self.signum == signal.SIGINT else signal.Signals(self.signum).name


@contextmanager
def stop_signals(request_stop: Callable[[int], bool]) -> Iterator[None]:
    """Within, each of ``STOPS`` calls ``request_stop(signum)``; where it returns False, it raises ``Stopped``.

    Only the main thread can listen; in others nothing changes. A SIGHUP that is ignored, as under
    ``nohup``, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        received.append(signum)
        if not request_stop(signum):
            raise Stopped(signum)

    heard = [s for s in STOPS if s in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(s) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, handle) for signum in heard}
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Stopped) or not received:
            raise
        raise Stopped(received[-1]) from error  # a library in between has lost which signal it was
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
