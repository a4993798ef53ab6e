"""What pruning costs and what it buys, always together: one table and one plot.

Every row is a cut of SmolLM2 (or ``--model``), measured in three ways:

    quality   perplexity on held-out real text, agreement with the dense model's 16 candidates, file size
    agent     what TextDQN then reaches: the task of ``textgen train``, fewer steps, one seed for all
    speed     tokens a second in the environment's own engine, in turns with the dense model

    python -m benchmarks.pruning --quick                   # each method once, quality and speed: about 3 minutes
    python -m benchmarks.pruning                           # each method at 10, 20, 30, 50%, and a healed one
    python -m benchmarks.pruning --cuts ffn:0.2 --healed layers:0.1+heads:0.34 --heal 180

Each measurement is a line of ``cells.jsonl`` in ``--out``. Started again, the benchmark goes on after the
last one; ``--measure speed`` leaves the timings for a quiet hour. Training an agent takes a minute a row.

The text is the Python language reference that every Python carries, or ``--text`` (one document a
line). Every third document is held out; the others calibrate and heal, the latter together with
1,024 texts that the dense model writes from the agent's training prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from agents.baselines.one_step import SampleAgent
from agents.pruning.healing import CHECKPOINT, distil
from agents.pruning.methods import METHODS, parse_pruning
from agents.pruning.model import prune_
from agents.runs.config import RunConfig
from agents.runs.optimum import estimated_optimum, share_of_optimal_gain
from agents.runs.parts import open_env
from agents.runs.run import open_run
from textgen_env.errors import ConfigError, ModelError, RunFolderError
from textgen_env.evaluation import evaluate
from textgen_env.files import whole_file, write_file
from textgen_env.models import load_pretrained
from textgen_env.models.device import pick_dtype
from textgen_env.models.hf import HFModel

AMOUNTS = (0.1, 0.2, 0.3, 0.5)
HEALED = "layers:0.1+ffn:0.23"  # a fifth of SmolLM2's parameters
HEAL_STEPS = 150
MEASURES = ("quality", "agent", "speed")
CANDIDATES = 16
ROWS = 64  # texts that the engine writes at once
WRITTEN = 1_024  # texts of the dense model to heal on, beside the documents
AGENT = RunConfig(prune=None, steps=20_000, eval_texts=512, eval_samples=32)


@dataclass(frozen=True)
class Cut:
    """One row of the table to be: what to remove, how long to heal, what to measure."""

    pruning: str | None  # METHOD:AMOUNT[+...]; None: the dense model
    heal: int = 0  # steps of distillation
    measures: Sequence[str] = MEASURES

    @property
    def name(self) -> str:
        if self.pruning is None:
            return "dense"
        return f"{self.pruning}, healed" if self.heal else self.pruning


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
    removed: float | None = None  # share of all parameters, cut away or zero
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    top_16: float | None = None  # share of the dense model's 16 candidates that are kept
    megabytes: float | None = None
    healing_minutes: float | None = None
    healing_cpu_minutes: float | None = None  # of all threads: what counts where other work shares the machine
    model_reward: float | None = None  # of the pruned language model's own samples
    agent_reward: float | None = None
    agent_gain: float | None = None  # the second minus the first
    agent_kl: float | None = None  # nats a text, to the pruned language model
    agent_value: float | None = None  # J = reward - beta KL
    agent_share: float | None = None  # of the optimal gain in J that the pruned language model allows
    agent_dense_likelihood: float | None = None  # nats a token of the agent's texts, as the dense model sees them
    tokens_a_second: float | None = None
    speed_ratio: float | None = None
    note: str = ""  # why there is nothing to measure


class Cells:
    """The measurements so far: a JSON line each, the settings first.

    Raises:
        RunFolderError: the file is of other settings.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file = file
        self.figures: dict[str, dict[str, Any]] = {}  # of each cut
        self.done: set[tuple[str, str]] = set()
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_file(file, json.dumps(settings) + "\n")
        first, *lines = map(json.loads, file.read_text().splitlines())
        if first != settings:
            raise RunFolderError(f"{file} holds measurements of {first}, not of {settings}; choose another --out")
        for line in lines:
            self._take(**line)

    def add(self, cut: str, measure: str, figures: dict[str, Any]) -> None:
        line = {"cut": cut, "measure": measure, "figures": figures}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._take(**line)

    def missing(self, cut: Cut) -> list[str]:
        """Return what is still to be measured of a cut."""
        if self.figures.get(cut.name, {}).get("note"):
            return []
        return [measure for measure in cut.measures if (cut.name, measure) not in self.done]

    def rows(self) -> list[Row]:
        return [Row(cut, **figures) for cut, figures in self.figures.items()]

    def _take(self, cut: str, measure: str, figures: dict[str, Any]) -> None:
        self.figures.setdefault(cut, {}).update(figures)
        self.done.add((cut, measure))


class Bench:
    """The dense model, the text, and what is measured against them."""

    def __init__(self, model: str, text_file: Path | None, documents: int) -> None:
        self.name = model
        self.dense, self.tokenizer = load_pretrained(model, pick_dtype("auto"))
        self.text = read_text(text_file, self.tokenizer, documents)
        self.dense_loss, self.dense_top = _quality(self.dense, self.text.held_out)

    def run(self, cuts: Sequence[Cut], cells: Cells, say: Callable[[str], None]) -> None:
        """Measure what is missing in ``cells``."""
        for cut in cuts:
            missing = cells.missing(cut)
            if not missing:
                continue
            try:
                model = self._pruned(cut, cells)
            except (ConfigError, ModelError) as error:
                cells.add(cut.name, "note", {"note": str(error)})
                continue
            for measure in missing:
                figures = getattr(self, f"_{measure}")(model)
                cells.add(cut.name, measure, figures)
                say(f"{cut.name}, {measure}: {figures}")

    def _pruned(self, cut: Cut, cells: Cells) -> PreTrainedModel:
        """Prune and heal; a healed model is kept beside the cells."""
        if cut.pruning is None:
            return self.dense
        folder = cells.file.parent / cut.name
        if cut.heal and (cut.name, "healing") in cells.done:
            return load_pretrained(str(folder), pick_dtype("auto"))[0]
        model, _ = load_pretrained(self.name, pick_dtype("auto"))
        for method, amount in parse_pruning(cut.pruning):
            prune_(model, method, amount, calibration=self.text.calibration)
        if cut.heal:
            figures = self._heal(model, cut.heal, folder / "healing")
            self._save(model, folder)
            cells.add(cut.name, "healing", figures)
        return model

    def _heal(self, model: PreTrainedModel, steps: int, folder: Path) -> dict[str, float]:
        """Distil in place, going on from a checkpoint if there is one; return the minutes of all steps at this pace."""
        texts = [*self.text.healing, *self._written()]
        checkpoint = folder / CHECKPOINT
        done = len(torch.load(checkpoint, weights_only=True)["losses"]) if checkpoint.exists() else 0
        wall, cpu = time.perf_counter(), time.process_time()
        distil(model, self.dense, texts, steps, tokenizer=self.tokenizer, folder=folder, checkpoint_every=25)
        share = 60 * max(1, steps - done) / steps
        return {
            "healing_minutes": (time.perf_counter() - wall) / share,
            "healing_cpu_minutes": (time.process_time() - cpu) / share,
        }

    def _written(self) -> list[str]:
        """Return what the dense model writes from the agent's training prompts, to heal on."""
        run = open_run(AGENT, model=HFModel(self.dense, self.tokenizer, name="dense"))
        texts = evaluate(SampleAgent(), run.env, WRITTEN, AGENT.seed)
        return [a + b for a, b in zip(texts.prompts, texts.completions, strict=True)]

    def _save(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _quality(self, model: PreTrainedModel) -> dict[str, float]:
        loss, top = _quality(model, self.text.held_out)
        with tempfile.TemporaryDirectory() as folder:
            self._save(model, Path(folder))
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        return {
            "removed": 1 - _nonzero(model) / _nonzero(self.dense),
            "perplexity": math.exp(loss),
            "perplexity_ratio": math.exp(loss - self.dense_loss),
            "top_16": _shared(top, self.dense_top),
            "megabytes": size / 1e6,
        }

    def _agent(self, model: PreTrainedModel) -> dict[str, float]:
        """Train TextDQN on the model, and measure both on prompts that it has not seen."""
        torch.manual_seed(AGENT.seed)
        run = open_run(AGENT, model=HFModel(model, self.tokenizer, name="pruned"))
        run.agent.learn(AGENT.steps)
        keys = ("logprobs", "action_mask")
        plain = open_env(AGENT, run.env.language_model, run.test_prompts, AGENT.reward, keys)
        samples = AGENT.eval_samples * len(run.test_prompts)
        before = evaluate(SampleAgent(), plain, samples, AGENT.seed, run.test_prompts)
        after = evaluate(run.agent, run.env, AGENT.eval_texts, AGENT.seed, run.test_prompts)  # type: ignore[arg-type]
        best = float(estimated_optimum(before.by_prompt(before.rewards), AGENT.beta).value.mean())
        value = after.reward - AGENT.beta * (after.mean_kl or 0.0)
        texts = [a + b for a, b in zip(after.prompts[:128], after.completions[:128], strict=True)]
        loss, _ = _quality(self.dense, [_ids(text, self.tokenizer, 128) for text in texts])
        return {
            "model_reward": before.reward,
            "agent_reward": after.reward,
            "agent_gain": after.reward - before.reward,
            "agent_kl": after.mean_kl or 0.0,
            "agent_value": value,
            "agent_share": share_of_optimal_gain(value, before.reward, best),
            "agent_dense_likelihood": -loss,
        }

    def _speed(self, model: PreTrainedModel) -> dict[str, float]:
        dense_speed, speed = _speeds(_TimedSlots(self.dense, self.tokenizer), _TimedSlots(model, self.tokenizer))
        return {"tokens_a_second": speed, "speed_ratio": speed / dense_speed}


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


class _TimedSlots:
    """64 texts on a model, written by the environment's engine a few tokens at a time."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        language_model = HFModel(model, tokenizer, name="timed")
        self.random = np.random.default_rng(0)
        self.slots = language_model.slots(ROWS, 160, CANDIDATES)
        self.rows = np.arange(ROWS)
        self.may_end = np.zeros(ROWS, dtype=bool)
        self.prompts = self.random.integers(3, model.config.vocab_size, (ROWS, 8)).tolist()

    def seconds(self, tokens: int = 8) -> float:
        """Write ``tokens`` tokens a text, from the prompts on; the prompts' own forward is not timed."""
        # One thread's own CPU time is the time of a quiet machine; other work does not lengthen it.
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.slots.start(self.rows, self.prompts)
        proposals = self.slots.propose(self.rows, self.may_end)
        started = clock()
        for _ in range(tokens):
            chosen = proposals.candidates[self.rows, self.random.integers(CANDIDATES, size=ROWS)]
            self.slots.advance(self.rows, chosen.astype(np.int64))
            proposals = self.slots.propose(self.rows, self.may_end)
        return (clock() - started) / tokens


def _speeds(one: _TimedSlots, other: _TimedSlots) -> tuple[float, float]:
    """Tokens a second of two engines, timed in turns; the median of eight each."""
    seconds = np.array([(one.seconds(), other.seconds()) for _ in range(9)])[1:]  # (8, 2); the first warms up
    first, second = ROWS / np.median(seconds, axis=0)
    return float(first), float(second)


HEADER = """\
| cut | parameters removed | perplexity | top-16 kept | MB | agent: reward | gain | KL | loglik, dense | tokens/s |
|---|---|---|---|---|---|---|---|---|---|"""


def _line(row: Row, dense_gain: float | None) -> str:
    def cell(value: float | None, form: str, ratio: float | None = None) -> str:
        shown = "-" if value is None else format(value, form)
        return shown if ratio is None else f"{shown} ({ratio:.2f}x)"

    if row.note:
        return f"| {row.cut} | {row.note} |"
    gain_ratio = None if row.agent_gain is None or not dense_gain else row.agent_gain / dense_gain
    cells = [
        row.cut if row.healing_minutes is None else f"{row.cut} in {row.healing_minutes:.1f} min",
        cell(row.removed, ".1%"),
        cell(row.perplexity, ".1f", row.perplexity_ratio),
        cell(row.top_16, ".0%"),
        cell(row.megabytes, ".0f"),
        cell(row.agent_reward, ".2f"),
        cell(row.agent_gain, ".2f", gain_ratio),
        cell(row.agent_kl, ".1f"),
        cell(row.agent_dense_likelihood, ".2f"),
        cell(row.tokens_a_second, ".0f", row.speed_ratio),
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown; gains are compared with the dense model's."""
    dense_gain = next((row.agent_gain for row in rows if row.cut == "dense"), None)
    return "\n".join([HEADER, *(_line(row, dense_gain) for row in rows)]) + "\n"


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw perplexity against size and speed, and the agent's gain against perplexity: a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), dpi=130, layout="constrained")
    worse, gain = "perplexity, times dense", "agent's gain in reward"
    panels = (
        ("removed", "perplexity_ratio", "share of parameters removed", worse, {"yscale": "log"}),
        ("speed_ratio", "perplexity_ratio", "tokens a second, times dense", worse, {"yscale": "log"}),
        ("perplexity_ratio", "agent_gain", worse, gain, {"xscale": "log"}),
    )
    colors: dict[str, str] = {}  # each method has the same one in all panels
    for axes, (x, y, x_label, y_label, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for method, points in _lines(rows, x, y):
            color = colors.setdefault(method, f"C{len(colors)}")
            alone = {"marker": "*", "markersize": 12} if len(points) == 1 else {"marker": "o", "markersize": 4}
            axes.plot(*zip(*(place for _, place in points), strict=True), label=method, color=color, **alone)
            for amount, place in points:
                axes.annotate(amount, place, fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set(xlabel=x_label, ylabel=y_label, **scale)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    with whole_file(file) as half_made:
        figure.savefig(half_made, format=file.suffix[1:])


def _lines(rows: Sequence[Row], x: str, y: str) -> Iterator[tuple[str, list[tuple[str, tuple[float, float]]]]]:
    """Yield each method with its amounts and points (x, y); combinations stand alone."""
    lines: dict[str, list[tuple[str, tuple[float, float]]]] = {}
    for row in rows:
        place = getattr(row, x), getattr(row, y)
        if None in place:
            continue
        method, _, amount = row.cut.partition(":")
        single = "+" not in amount and "," not in amount
        lines.setdefault(method if single else row.cut, []).append((amount if single else "", place))
    yield from lines.items()


def plan(options: argparse.Namespace) -> list[Cut]:
    """Return the rows that the options ask for, the dense model first."""
    wanted = tuple(options.measure or (MEASURES if not options.quick else ("quality", "speed")))
    sweep = [f"{method}:{amount}" for method in METHODS for amount in ((0.3,) if options.quick else AMOUNTS)]
    healed = options.healed if options.healed is not None else [] if options.cuts or options.quick else [HEALED]
    return [
        Cut(None, measures=wanted),
        *(Cut(cut, options.heal, wanted) for cut in healed),
        *(Cut(cut, measures=wanted) for cut in options.cuts or sweep),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.pruning"
    )
    parser.add_argument("--model", default="smollm2", help="a name, folder or hub id of a causal model")
    parser.add_argument("--cuts", nargs="+", metavar="METHOD:AMOUNT[+...]", help="instead of every method")
    parser.add_argument(
        "--healed", nargs="*", metavar="METHOD:AMOUNT[+...]", help=f"healed cuts; the sweep's: {HEALED}"
    )
    parser.add_argument("--heal", type=int, default=HEAL_STEPS, metavar="STEPS", help="of 1,024 tokens each")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, help="only these")
    parser.add_argument("--text", type=Path, help="a text file with one document a line")
    parser.add_argument("--out", type=Path, default=Path("out/pruning"), help="for cells, table, plot, healed models")
    parser.add_argument("--quick", action="store_true", help="each method once, on little text, without agents")
    options = parser.parse_args(arguments)
    for cut in (*(options.cuts or ()), *(options.healed or ())):
        parse_pruning(cut)  # a typing error should not wait for the cuts before it
    transformers_logging.disable_progress_bar()
    documents = 12 if options.quick else 60
    settings = {
        "model": options.model,
        "text": options.text and options.text.name,
        "documents": documents,
        "heal": options.heal,
        "agent": {"steps": AGENT.steps, "texts": AGENT.eval_texts, "beta": AGENT.beta, "seed": AGENT.seed},
    }
    cells = Cells(options.out / "cells.jsonl", settings)
    Bench(options.model, options.text, documents).run(plan(options), cells, lambda line: print(line, flush=True))
    rows = cells.rows()
    print(table(rows))
    write_file(options.out / "table.md", table(rows))
    results = {"settings": settings, "rows": [asdict(row) for row in rows]}
    write_file(options.out / "results.json", json.dumps(results, indent=1) + "\n")
    draw(rows, options.out / "pruning.png")


if __name__ == "__main__":
    main()
