"""A limit on the time of somebody else's Python code."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` within the block once it has run for ``seconds``.

    The time is looked at before each line of Python, so a single call into C ends first. Code that a debugger
    traces has no limit.
    """
    end = time.monotonic() + seconds

    def look(*_: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it ran for more than {seconds} s")
        return look

    tracer = sys.gettrace()
    sys.settrace(tracer or look)
    try:
        yield
    finally:
        sys.settrace(tracer)
