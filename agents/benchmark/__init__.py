"""Benchmarks: agents on tasks with several seeds, and the meaning of their results. Begin with ``grid.run_benchmark``.

``config`` names the cells, ``cells`` runs one, ``results`` and ``statistics`` compare, ``plots`` and ``pages`` report.
"""
