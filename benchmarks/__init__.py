"""Measurements: each module is run with ``python -m benchmarks.NAME``."""

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads
