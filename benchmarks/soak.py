"""Does it last? A million vector steps, and memory and caches after them.

    python -m benchmarks.soak --steps 1000000     (make soak; stops after --minutes, and says so)

Rows write under prompts that hardly ever repeat; they end, restart, fork, are reset alone, saved and put
back, while a memo too small for it all forgets the oldest. Resident memory is noted all along; its slope
after the warm-up is a least-squares line. At the end what the rows propose from their caches is
compared with the model's own forward of the whole text, which caches nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textgen_env.env import EpisodesMixin
from textgen_env.files import write_file
from textgen_env.models import load_pretrained
from textgen_env.models.hf import HFModel
from textgen_env.vector_env import TextGenVectorEnv

WARM_UP = 0.3  # share of the steps until allocators, memo and tables of words have their size
MEMO_BYTES = 2 << 20  # full within the warm-up
NOTES = 400  # of the resident memory, at most
WORDS = ("the", "film", "was", "a", "good", "bad", "long", "story", "of", "old", "house", "and", "sea", "in", "winter")


@dataclass(frozen=True)
class Soaked:
    """What came of it. Memory in MB of 1e6 bytes."""

    steps: int  # of the vector environment
    texts: int
    forks: int
    partial_resets: int
    restores: int
    seconds: float
    resident: float  # at the end
    slope: float  # MB per 100,000 steps after the warm-up
    worst_slope: float  # the larger one of the two halves after the warm-up
    drift: float  # largest difference of a log-probability, cached against uncached, nats


def soak(model: HFModel, steps: int, rows: int = 2, seed: int = 0, stop: Callable[[], bool] = lambda: False) -> Soaked:
    """Step ``steps`` times, or until ``stop()``."""
    rng = np.random.default_rng(seed)
    env = TextGenVectorEnv(
        rows, model, varied_prompts, "length", top_k=8, max_new_tokens=12, max_prompt_tokens=48, observation="full"
    )
    env.reset(seed=seed)
    process, started = psutil.Process(), time.perf_counter()
    every = 1
    notes: list[tuple[int, int]] = []
    done = texts = forks = resets = restores = 0
    saved = env.episodes.save(0)
    while done < steps and not stop():
        legal = env.action_masks()
        _, _, ended, _, _ = env.step(np.argmax(rng.random(legal.shape) * legal, axis=-1))
        texts += int(ended.sum())
        done += 1
        if done % 7 == 0:
            src, dst = rng.permutation(rows)[:2]
            env.fork([src], [dst])
            forks += 1
        if done % 19 == 0:
            mask = np.zeros(rows, bool)
            mask[rng.integers(rows)] = True
            env.reset(options={"reset_mask": mask})
            resets += 1
        if done % 23 == 0:
            row = int(rng.integers(rows))
            env.episodes.load(row, saved)
            saved = env.episodes.save(int(rng.integers(rows)))
            restores += 1
        if done % every == 0:
            notes.append((done, process.memory_info().rss))
        if len(notes) > NOTES:
            notes, every = notes[1::2], 2 * every
    warm = notes[int(WARM_UP * len(notes)) :]
    halves = (warm[: len(warm) // 2], warm[len(warm) // 2 :])
    return Soaked(
        done, texts, forks, resets, restores, time.perf_counter() - started, notes[-1][1] / 1e6,
        slope(warm), max(map(slope, halves)), drift(env, model),
    )  # fmt: skip


def toy() -> HFModel:
    """Return a random Llama of two small layers over ``WORDS``: a step is mostly bookkeeping."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<end>", *WORDS))}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=1 + len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    return HFModel(LlamaForCausalLM(config), tokenizer, name="toy", memo_bytes=MEMO_BYTES)


def varied_prompts(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, 9)))


def slope(notes: list[tuple[int, int]]) -> float:
    """Return the least-squares slope of resident memory, MB per 100,000 steps."""
    if len(notes) < 2:
        return 0.0
    at, resident = np.array(notes, np.float64).T
    return float(np.polyfit(at / 1e5, resident / 1e6, 1)[0])


@torch.inference_mode()
def drift(env: EpisodesMixin, model: HFModel) -> float:
    """Return the largest difference of a candidate's log-probability from the model's own uncached forward."""
    rows, worst = np.arange(env.episodes.rows), 0.0
    proposals, legal = env.episodes.proposals(rows), env.episodes.legal(rows)
    for row in rows:
        ids = torch.tensor([env.episodes.slots.ids_of(row)])
        expected = model.model(ids).logits[0, -1].float().log_softmax(-1).numpy()
        found = proposals.logprobs[row, legal[row]]
        worst = max(worst, float(np.abs(found - expected[proposals.candidates[row, legal[row]]]).max()))
    return worst


def main(arguments: list[str] | None = None) -> Soaked:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=14.5)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--model", default="toy", help="toy: a small random one; or a name, folder or hub id")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.model == "toy":
        model = toy()
    else:
        model = HFModel(*load_pretrained(options.model, torch.float32), name=options.model, memo_bytes=MEMO_BYTES)
    until = time.monotonic() + 60 * options.minutes
    found = soak(model, options.steps, options.rows, stop=lambda: time.monotonic() > until)
    short = "" if found.steps == options.steps else f" of {options.steps:,}: {options.minutes} minutes were over"
    print(
        f"{found.steps:,} steps of {options.rows} rows{short}, in {found.seconds:.0f} s: {found.texts:,} texts, "
        f"{found.forks:,} forks, {found.partial_resets:,} partial resets, {found.restores:,} restores\n"
        f"resident memory {found.resident:.0f} MB; after the first {WARM_UP:.0%} it grew by {found.slope:+.3f} MB per "
        f"100,000 steps ({found.worst_slope:+.3f} in the steeper half)\n"
        f"cached against uncached log-probabilities at the end: at most {found.drift:.1e} nats apart"
    )
    if options.json:
        written: dict[str, Any] = asdict(found)
        write_file(options.json, json.dumps(written, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
