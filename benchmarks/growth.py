"""How time and memory grow with rows and with the length of texts.

    python -m benchmarks.growth                              # tiny, about 5 minutes
    python -m benchmarks.growth --model smollm2 --rows 1 16 64

    hf        Hugging Face's cached decode loop with top-k
    make_vec  ``gym.make_vec("TextGen-v0")``: running sentiment, rewards, observations and infos too

Each figure comes from a process of its own, whose peak of resident memory stands beside the time. The time is the
median of the last eighth of a text's steps, so it is that of texts of nearly this length.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from benchmarks import throughput
from textgen_env.models import load_language_model, load_pretrained
from textgen_env.models.hf import HFModel

CONTESTANTS = ("hf", "make_vec")
ROWS, TOKENS = (1, 4, 16, 64, 256), (20, 64, 240)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of a completion")
    parser.add_argument("--here", choices=CONTESTANTS, help="measure this one in this process, at one size")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measured(options.here, options.model, options.rows[0], options.tokens[0])))
        return
    print(throughput.headline(throughput.machine()))
    print("rows  tokens   ms a step: hf  make_vec   x hf   peak MB: hf  make_vec")
    for tokens in options.tokens:
        for rows in options.rows:
            hf, vec = (_in_a_process(name, options.model, rows, tokens) for name in CONTESTANTS)
            ms = [found["milliseconds"] for found in (hf, vec)]
            times = f"{ms[0]:10.2f} {ms[1]:9.2f} {ms[0] / ms[1]:6.2f}"
            print(f"{rows:4}  {tokens:6}     {times} {hf['peak_mb']:13,.0f} {vec['peak_mb']:9,.0f}", flush=True)


def measured(name: str, model: str, rows: int, tokens: int) -> dict[str, float]:
    """Return milliseconds a step near the end of texts of ``tokens`` tokens, and the peak memory of this process."""
    engine = load_language_model(model) if name == "make_vec" else HFModel(*load_pretrained(model, "auto"))
    assert isinstance(engine, HFModel)
    started = throughput.contestants(engine, rows, tokens, only=(name,))[name]
    words, rng = throughput.single_words(engine.tokenizer), np.random.default_rng(0)
    step = started(["".join(rng.choice(words, throughput.PROMPT_TOKENS)) for _ in range(rows)])
    times = []
    for _ in range(tokens):
        before = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - before))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kilobytes on Linux
    return {"milliseconds": median(times[-max(1, tokens // 8) :]), "peak_mb": peak}


def _in_a_process(name: str, model: str, rows: int, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.growth", "--here", name, "--model", model]
    command += ["--rows", str(rows), "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
