"""What a step costs: the environment beside Hugging Face's own loop and the model's linear layers.

    linear    the model's linear layers alone, as ``F.linear`` runs them: the limit of a plain engine
    hf        Hugging Face's cached decode loop with top-k
    slots     the engine: ``advance`` and ``propose``
    make_vec  ``gym.make_vec("TextGen-v0")``: running sentiment, rewards, observations and infos too
    sb3       the same through ``SB3VecEnv``
    make      ``gym.make("TextGen-v0")``, beside the others at 1 row

All take one step in turn, on the same prompts, at the same prefix lengths, in one process, and the
median is reported: a busy machine slows them alike. Prompts are random words, new ones in every
episode, so that nothing is found in a memo. Ratios above 1 mean faster.

    python -m benchmarks.throughput            # all, about 3 minutes
    python -m benchmarks.throughput --quick    # 1 and 64 rows, a few steps
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import DynamicCache

import textgen_env  # noqa: F401  registers TextGen-v0
from agents.sb3_vec import SB3VecEnv
from textgen_env.files import write_file
from textgen_env.models import load_pretrained
from textgen_env.models.device import own_cores
from textgen_env.models.hf import HFModel

CANDIDATES = 16
PROMPT_TOKENS = 8
WIDEST = {"amx_tile": "AMX", "avx512f": "AVX512", "avx2": "AVX2"}  # flags of a CPU, the widest products first
Step = Callable[[], object]
Contestant = Callable[[list[str]], Step]  # prompts of all rows -> one step; starting is not timed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 and 64 rows, one short episode")
    parser.add_argument("--rows", type=int, nargs="+", help="rows to measure (default 1 16 64 256)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    rows = options.rows or ([1, 64] if options.quick else [1, 16, 64, 256])
    episodes, steps = (1, 6) if options.quick else (3, 12)
    report: dict[str, Any] = {**machine(), "results": []}
    print(headline(report))
    print("model        rows  ms a step: linear      hf   slots make_vec     sb3    make_vec/s  x hf  of limit")
    for name in ("tiny", "smollm2"):
        model, tokenizer = load_pretrained(name, options.dtype)
        dtype = str(model.dtype).removeprefix("torch.")
        engine = HFModel(model, tokenizer, name=name)
        words = single_words(tokenizer)
        for n in rows:
            times = compare(contestants(engine, n, steps), words, n, episodes, steps)
            result = {"model": name, "dtype": dtype, "rows": n, "milliseconds": times, **ratios(times, n)}
            report["results"].append(result)
            shown = " ".join(f"{times[key]:8.2f}" for key in ("linear", "hf", "slots", "make_vec", "sb3"))
            print(
                f"{name:12} {n:4}          {shown}    {result['steps_a_second']:10,.0f}"
                f" {result['times_hf']:5.2f} {result['of_limit']:9.2f}"
                + (f"   gym.make: {1e3 / times['make']:,.0f} steps/s" if "make" in times else f"   {dtype}"),
                flush=True,
            )
    if options.json:
        write_file(options.json, json.dumps(report, indent=1) + "\n")


def contestants(
    engine: HFModel, rows: int, steps: int, only: Sequence[str] = ("linear", "hf", "slots", "make_vec", "sb3", "make")
) -> dict[str, Contestant]:
    """Return the functions that are compared, by name; ``make`` only at one row."""
    settings: dict[str, Any] = {
        "model": engine,
        "prompts": ["unused"],
        "top_k": CANDIDATES,
        "max_prompt_tokens": PROMPT_TOKENS,
        "max_new_tokens": steps + 2,  # no row ends while the clock runs
        "min_new_tokens": steps + 2,
    }
    every, free = np.arange(rows), np.zeros(rows, bool)
    rng = np.random.default_rng(0)

    def slotted(prompts: list[str]) -> Step:
        slots = engine.slots(rows, PROMPT_TOKENS + steps + 2, CANDIDATES)
        slots.start(every, [engine.encode(prompt) for prompt in prompts])
        proposals = slots.propose(every, free)

        def step() -> None:
            nonlocal proposals
            slots.advance(every, proposals.candidates[every, rng.integers(CANDIDATES, size=rows)].astype(np.int64))
            proposals = slots.propose(every, free)

        return step

    def vectorised(prompts: list[str]) -> Step:
        environment = gym.make_vec("TextGen-v0", num_envs=rows, **settings)
        environment.reset(options={"prompt": prompts})
        return lambda: environment.step(rng.integers(CANDIDATES, size=rows))

    def adapted(prompts: list[str]) -> Step:
        adapter = SB3VecEnv(gym.make_vec("TextGen-v0", num_envs=rows, **settings))
        adapter.set_options({"prompt": prompts})
        adapter.reset()
        return lambda: adapter.step(rng.integers(CANDIDATES, size=rows))

    def single(prompts: list[str]) -> Step:
        alone = gym.make("TextGen-v0", **settings)
        alone.reset(options={"prompt": prompts[0]})
        return lambda: alone.step(rng.integers(CANDIDATES))

    every_one = {
        "linear": _linear(engine, rows),
        "hf": _hugging_face(engine, rows, rng),
        "slots": slotted,
        "make_vec": vectorised,
        "sb3": adapted,
        "make": single,
    }
    return {name: every_one[name] for name in only if rows == 1 or name != "make"}


def _linear(engine: HFModel, rows: int) -> Contestant:
    """Return the linear layers alone: a bound on speed."""
    layers = [layer for layer in engine.model.modules() if isinstance(layer, torch.nn.Linear)]

    def start(prompts: list[str]) -> Step:
        inputs = {n: torch.randn(rows, n).to(engine.model.dtype) for n in {layer.in_features for layer in layers}}

        @torch.inference_mode()
        def step() -> None:
            for layer in layers:
                F.linear(inputs[layer.in_features], layer.weight)

        return step

    return start


def _hugging_face(engine: HFModel, rows: int, rng: np.random.Generator) -> Contestant:
    """Return Hugging Face's own cached loop."""

    @torch.inference_mode()
    def start(prompts: list[str]) -> Step:
        ids = torch.tensor([engine.encode(prompt) for prompt in prompts])
        cache = DynamicCache(config=engine.model.config)
        found = engine.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        best = found.logits[:, -1].topk(CANDIDATES).indices

        @torch.inference_mode()
        def step() -> None:
            nonlocal best
            token = torch.from_numpy(rng.integers(CANDIDATES, size=(rows, 1)))
            found = engine.model(
                input_ids=best.gather(1, token), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            best = found.logits[:, -1].topk(CANDIDATES).indices

        return step

    return start


def compare(
    compared: dict[str, Contestant], words: list[str], rows: int, episodes: int, steps: int
) -> dict[str, float]:
    """Return each contestant's median milliseconds a step, all taking turns."""
    rng = np.random.default_rng(1)
    times: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(episodes):
        running = {
            name: start(["".join(rng.choice(words, PROMPT_TOKENS)) for _ in range(rows)])
            for name, start in compared.items()
        }
        for number in range(steps + 1):
            for name, step in running.items():
                started = time.perf_counter()
                step()
                if number:  # the first one warms up
                    times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(median(all_times), 3) for name, all_times in times.items()}


def ratios(times: dict[str, float], rows: int) -> dict[str, float]:
    """Return how ``make_vec`` stands to the others."""
    step = times["make_vec"]
    return {
        "steps_a_second": round(1e3 * rows / step, 1),
        "times_hf": round(times["hf"] / step, 3),
        "of_limit": round(times["linear"] / step, 3),
        "beside_the_engine": round(1 - times["slots"] / step, 3),
        "slots_times_hf": round(times["hf"] / times["slots"], 3),
        "slots_of_limit": round(times["linear"] / times["slots"], 3),
    }


def single_words(tokenizer: Any) -> list[str]:
    """Return words with a space before them that are one token each."""
    marked = [
        text for text in tokenizer.get_vocab() if text.startswith("Ġ") and text[1:].isascii() and text[1:].isalpha()
    ]
    words = sorted(" " + (text.removeprefix("Ġ")) for text in marked or tokenizer.get_vocab() if "<" not in text)
    return [word for word in words if len(tokenizer(word)["input_ids"]) == 1]


def machine() -> dict[str, Any]:
    """Return machine, threads and versions of the figures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    flags = {flag for line in _cpu_lines() if line.startswith("flags") for flag in line.split()}
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "machine": f"{names[0] if names else platform.processor() or platform.machine()}, {platform.system()}",
        "flags": next((name for flag, name in WIDEST.items() if flag in flags), ""),
        "cores": own_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def headline(report: dict[str, Any]) -> str:
    """Return the line that says which machine the figures are of."""
    machine = f"{report['machine']} ({report['flags'] or 'no AVX2'}), {report['cores']} cores"
    return f"{machine}, {report['threads']} threads, torch {report['torch']}"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
