"""Benchmarks: agents on tasks, with several seeds and intervals."""
