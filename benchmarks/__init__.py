"""Measurements: each module is run with ``python -m benchmarks.NAME``."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: waiting threads sleep
