"""``python -m benchmarks.learning --suite``, ``--fronts`` and ``--diagnose``: what they run, print and write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.diagnose import diagnose
from benchmarks.fronts import run_fronts
from benchmarks.suite import Cell, Suite, run_suite
from benchmarks.throughput import machine
from textgen_env.files import write_file


def main(options: argparse.Namespace) -> None:
    """Run what ``options`` of ``benchmarks.learning`` ask for, print it, and write it as JSON."""
    folder = options.out or Path("out/judges-quick" if options.quick else "out/judges")
    found: list[dict[str, Any]]
    if options.suite:
        found = run_suite(folder, options.quick, options.seeds)
        name = "suite"
    elif options.fronts:
        suite = Suite(folder, *((64, 128) if options.quick else (512, 512)))
        found = run_fronts(suite, options.quick, options.seeds, options.model or "tiny")
        name = "fronts"
    else:
        found = _diagnosed(folder, options.quick, options.seeds)
        name = "diagnosis"
    report = json.dumps({**machine(), "rows": found}, indent=1) + "\n"
    write_file(options.json or folder / f"{name}.json", report)


def _diagnosed(folder: Path, quick: bool, seeds: int) -> list[dict[str, Any]]:
    suite = Suite(folder, 64 if quick else 512)
    states, steps = (12, 8_000) if quick else (100, 40_000)
    print(f"{'judge':10}{'score':9}{'rms':>8}{'rollouts':>10}{'heads':>8}{'signal':>8}   a step, reward units")
    rows = []
    for seed in range(1 if quick else seeds):
        for judge in ("pairs", "lexicon"):
            for score in (None, "learned"):
                cell = Cell(judge, score=score, seed=seed, steps=steps)
                found = diagnose(suite, cell, states, **({"learning_starts": 2_000} if quick else {}))
                rows.append({"judge": judge, "score": score, "seed": seed, **found})
                figures = f"{found['rms']:8.3f}{found['rollouts']:10.3f}{found['heads']:8.3f}{found['signal']:8.3f}"
                print(f"{judge:10}{score!s:9}{figures}", flush=True)
    return rows
