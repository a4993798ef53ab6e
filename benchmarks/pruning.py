"""What pruning costs and what it buys, always together: one table and one plot.

Every row is a cut of SmolLM2 (or ``--model``): perplexity on held-out real text, agreement with the
dense model's 16 candidates, tokens a second in the environment's own engine, and file size. The
dense model is timed again beside every cut, so a busy machine slows both.

    python -m benchmarks.pruning --quick                                   # each method once, about 3 minutes
    python -m benchmarks.pruning                                           # each method at 10, 20, 30, 50%
    python -m benchmarks.pruning --cuts layers:0.1+ffn:0.23 --heal 180     # one combination, healed

The text is the Python language reference that every Python carries, or ``--text`` (one document a
line). Every third document is held out; the others calibrate and heal.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from agents.distil import distil
from agents.transformer_model import METHODS, parse_pruning, prune_
from textgen_env.device import pick_dtype
from textgen_env.errors import ConfigError, ModelError
from textgen_env.hf_model import HFModel
from textgen_env.models import load_pretrained

AMOUNTS = (0.1, 0.2, 0.3, 0.5)
CANDIDATES = 16
ROWS = 64  # texts that the engine writes at once


@dataclass(frozen=True)
class Text:
    """Token ids: a few rows (N, T) to calibrate on, documents to heal on, documents (1, T) held out."""

    calibration: torch.Tensor
    healing: list[str]
    held_out: list[torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table. Ratios are to the dense model; None where nothing was measured."""

    cut: str
    removed: float = 0.0  # share of all parameters, cut away or zero
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    top_16: float | None = None  # share of the dense model's 16 candidates that are kept
    tokens_a_second: float | None = None
    speed_ratio: float | None = None
    megabytes: float | None = None
    healing_minutes: float | None = None
    agent_return: float | None = None
    note: str = ""  # why there is nothing to measure


AgentReturn = Callable[[Path], float]
"""Trains an agent on the model in a folder and returns what it earns: the table's last column."""


def run(
    model: str,
    cuts: Sequence[str],
    text_file: Path | None,
    documents: int,
    heal: int,
    out: Path,
    agent_return: AgentReturn | None = None,
) -> list[Row]:
    """Measure the dense model and every cut; print the table, write it and a plot to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    dense, tokenizer = load_pretrained(model, pick_dtype("auto"))
    text = read_text(text_file, tokenizer, documents)
    dense_loss, dense_top = _quality(dense, text.held_out)
    dense_engine = _Engine(dense, tokenizer)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(_line(row), flush=True)

    def measure(cut: str, measured: PreTrainedModel, minutes: float | None) -> Row:
        loss, top = _quality(measured, text.held_out)
        dense_speed, speed = _speeds(dense_engine, _Engine(measured, tokenizer))
        with tempfile.TemporaryDirectory() as folder:
            measured.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
            earned = None if agent_return is None else agent_return(Path(folder))
        return Row(
            cut,
            removed=1 - _nonzero(measured) / _nonzero(dense),
            perplexity=math.exp(loss),
            perplexity_ratio=math.exp(loss - dense_loss),
            top_16=_shared(top, dense_top),
            tokens_a_second=speed,
            speed_ratio=speed / dense_speed,
            megabytes=size / 1e6,
            healing_minutes=minutes,
            agent_return=earned,
        )

    print(HEADER)
    add(measure("dense", dense, None))
    for cut in cuts:
        pruned, _ = load_pretrained(model, pick_dtype("auto"))
        try:
            for method, amount in parse_pruning(cut):
                prune_(pruned, method, amount, calibration=text.calibration)
        except (ConfigError, ModelError) as error:
            add(Row(cut, note=str(error)))
            continue
        minutes = _heal(pruned, dense, tokenizer, text.healing, heal, out / cut) if heal else None
        add(measure(cut, pruned, minutes))
    (out / "table.md").write_text("\n".join([HEADER, *(_line(row) for row in rows)]) + "\n")
    (out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    _plot(rows, out / "pruning.png")
    return rows


def _heal(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, texts: list[str], steps: int, folder: Path
) -> float:
    """Distil in place, keep the healed model in ``folder``, and return the minutes of this call."""
    started = time.perf_counter()
    distil(student, teacher, texts, steps, tokenizer=tokenizer, folder=folder)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return (time.perf_counter() - started) / 60


def read_text(file: Path | None, tokenizer: Any, documents: int) -> Text:
    """Split a file's lines, or the Python reference's topics, into held-out and other documents."""
    if file is None:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    else:
        texts = file.read_text(encoding="utf-8").splitlines()
    texts = [text.strip() for text in texts if len(text.split()) > 100]
    held_out = [_ids(text, tokenizer, 256) for text in texts[2::3]][:documents]
    others = [text for i, text in enumerate(texts) if i % 3 != 2]
    if not held_out or not others:
        raise ConfigError(f"{file} must have at least 3 lines of more than 100 words, got {len(texts)}")
    rows = [ids for text in others if (ids := _ids(text, tokenizer, 128)).shape[1] == 128]
    return Text(torch.cat(rows[:64]), others, held_out)


def _ids(text: str, tokenizer: Any, limit: int) -> torch.Tensor:
    """(1, T) with T at most ``limit``."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)["input_ids"]
    return ids


@torch.inference_mode()
def _quality(model: PreTrainedModel, documents: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Nats a token, and the 16 likeliest next tokens of every position, (positions, 16)."""
    total, count, top = 0.0, 0, []
    for ids in documents:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(logits)
        top.append(logits.topk(CANDIDATES).indices)
    return total / count, torch.cat(top)


def _shared(top: torch.Tensor, dense: torch.Tensor) -> float:
    """Share of the dense model's candidates that the other one has too. Both (positions, 16)."""
    return float((top[:, :, None] == dense[:, None, :]).any(dim=1).float().mean())


def _nonzero(model: PreTrainedModel) -> int:
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


class _Engine:
    """The environment's engine with 64 texts on a model, a few tokens at a time."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        language_model = HFModel(model, tokenizer, name="timed")
        self.random = np.random.default_rng(0)
        self.slots = language_model.slots(ROWS, 160, CANDIDATES)
        self.rows = np.arange(ROWS)
        self.may_end = np.zeros(ROWS, dtype=bool)
        self.prompts = self.random.integers(3, model.config.vocab_size, (ROWS, 8)).tolist()

    def seconds(self, tokens: int = 16) -> float:
        """Write ``tokens`` tokens a text, from the prompts on; the prompts' own forward is not timed."""
        self.slots.start(self.rows, self.prompts)
        proposals = self.slots.propose(self.rows, self.may_end)
        started = time.perf_counter()
        for _ in range(tokens):
            chosen = proposals.candidates[self.rows, self.random.integers(CANDIDATES, size=ROWS)]
            self.slots.advance(self.rows, chosen.astype(np.int64))
            proposals = self.slots.propose(self.rows, self.may_end)
        return (time.perf_counter() - started) / tokens


def _speeds(one: _Engine, other: _Engine) -> tuple[float, float]:
    """Tokens a second of two engines, timed in turns; the best of eight each, which other load disturbs least."""
    seconds = np.array([(one.seconds(), other.seconds()) for _ in range(9)])[1:]  # (8, 2); the first warms up
    first, second = ROWS / seconds.min(axis=0)
    return float(first), float(second)


def _line(row: Row) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    if row.note:
        return f"| {row.cut} | {row.note} |"
    cells = [
        row.cut,
        f"{row.removed:.1%}",
        f"{cell(row.perplexity, '.1f')} ({cell(row.perplexity_ratio, '.2f')}x)",
        cell(row.top_16, ".0%"),
        f"{cell(row.tokens_a_second, '.0f')} ({cell(row.speed_ratio, '.2f')}x)",
        cell(row.megabytes, ".0f"),
        cell(row.healing_minutes, ".1f"),
        cell(row.agent_return, ".3f"),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| cut | parameters removed | perplexity | top-16 kept | tokens/s, 64 rows | MB | healed, min | return |
|---|---|---|---|---|---|---|---|"""


def _plot(rows: Sequence[Row], file: Path) -> None:
    """Perplexity against speed, one line a method, the amounts beside the points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    lines: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row.speed_ratio is not None and row.perplexity_ratio is not None:
            method, _, amount = row.cut.partition(":")
            lines.setdefault(method, {})[amount] = (row.speed_ratio, row.perplexity_ratio)
    for method, points in lines.items():
        axes.plot(*zip(*points.values(), strict=True), "o-", label=method)
        for amount, place in points.items():
            axes.annotate(amount, place, fontsize=7)
    axes.set(xlabel="speed, times dense", ylabel="perplexity, times dense", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.pruning"
    )
    parser.add_argument("--model", default="smollm2", help="a name, folder or hub id of a causal model")
    parser.add_argument("--cuts", nargs="+", metavar="METHOD:AMOUNT[+...]", help="instead of every method")
    parser.add_argument("--text", type=Path, help="a text file with one document a line")
    parser.add_argument("--heal", type=int, default=0, metavar="STEPS", help="distil every cut, 1,024 tokens a step")
    parser.add_argument("--out", type=Path, default=Path("out/pruning"), help="for table, plot and healed models")
    parser.add_argument("--quick", action="store_true", help="each method once, on little text")
    options = parser.parse_args(arguments)
    for cut in options.cuts or ():
        parse_pruning(cut)  # a typing error should not wait for the cuts before it
    transformers_logging.disable_progress_bar()
    amounts = (0.3,) if options.quick else AMOUNTS
    run(
        options.model,
        options.cuts or [f"{method}:{amount}" for method in METHODS for amount in amounts],
        options.text,
        documents=12 if options.quick else 60,
        heal=options.heal,
        out=options.out,
    )


if __name__ == "__main__":
    main()
