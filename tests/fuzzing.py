"""How much is fuzzed, and how much has been: small by default, large for ``make fuzz``.

``FUZZ=large`` multiplies the examples and draws new ones on every run; without it a test tries the
same inputs every time. What was tried is counted here and shown at the end of the run.
"""

from __future__ import annotations

import faulthandler
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings

LARGE = os.environ.get("FUZZ") == "large"
HANG = 60.0  # seconds after which an input counts as a hang: all tracebacks, and the process ends

tried: Counter[str] = Counter()
"""Operations and inputs so far, by kind."""


def examples(small: int, large: int, steps: int = 50) -> settings:
    return settings(
        max_examples=large if LARGE else small,
        stateful_step_count=steps,
        derandomize=not LARGE,
        database=None,
        deadline=None,
        print_blob=LARGE,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def no_hang() -> Iterator[None]:
    """End the process with all tracebacks if what is within takes longer than ``HANG``."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
