"""Measurements: each module is run with ``python -m benchmarks.NAME``."""

from textgen_env.models.device import wait_briefly

wait_briefly()  # before torch loads
