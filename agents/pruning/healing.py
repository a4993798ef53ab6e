"""Healing: a pruned language model learns its dense self's next-token distributions again.

The loss is KL(teacher || student), mean over all positions, in nats a token. It needs no labels, so
any text will do, and without any the teacher writes its own. Text like the one
that it will write heals best.

Weights in bfloat16 swallow small steps (1 + 1e-3 is 1), so the optimiser works on float32 copies
and writes them back after each step. That is as fast as bfloat16 and as exact as float32.

    texts  ->  rows of ids (N, length)  ->  teacher, student logits (B, length, V)  ->  KL
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from agents.pruning.calibration import Linear, Text, context_of, self_written, token_batches
from agents.pruning.methods import PruningReport
from agents.pruning.model import PrunedTransformerModel, load_transformer
from textgen_env.errors import ConfigError, ModelError, RunFolderError
from textgen_env.files import check_keys, locked, reporting_full_disk, whole_file
from textgen_env.models.forward import without_dropout

CHECKPOINT = "distil.pt"
HEALING = "healing"  # the folder of the checkpoint
WRITTEN_ROWS = 512  # how much the teacher writes at most: about the time of 100 steps

_log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
"""Beside a model that is being written: a process that was killed left it, and the same command goes on."""


def distil(
    student: PreTrainedModel | PrunedTransformerModel,
    teacher: PreTrainedModel | PrunedTransformerModel,
    texts: Text | None = None,
    steps: int = 500,
    *,
    tokenizer: Any = None,
    batch_size: int = 4,
    length: int = 256,
    learning_rate: float = 4e-4,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> list[float]:
    """Train ``student`` in place to predict as ``teacher`` does; return the KL of each step.

    The embeddings stay as they are (pruning does not touch them), and so does every zero that
    pruning made. Calling again with the same arguments and ``folder`` goes on where a stopped run
    left off, and ends with the same weights as a run that was not stopped.

    Args:
        student: The pruned causal model.
        teacher: The dense one, with the same vocabulary.
        texts: Texts or token ids (N, T); None lets the teacher write up to 512 rows.
        steps: Updates; rows are reshuffled and used again when they run out.
        tokenizer: For texts, unless the student brings one.
        batch_size: Rows a step.
        length: Tokens a row, at most what both models can read; texts are joined and cut to it.
        learning_rate: AdamW's peak: 5% of the steps lead up to it, then it falls linearly to zero. The
            default was the better of 1e-4 and 4e-4 on SmolLM2-135M; larger models want less.
        seed: Of the order of the rows, and of the text that the teacher writes.
        folder: Where the checkpoint lives; None keeps none.
        checkpoint_every: Steps from one checkpoint to the next.
        progress: Show a bar.

    Returns:
        KL(teacher || student) of each step's batch before its update, nats a token.

    Raises:
        ConfigError: numbers out of range, no text, different vocabularies, or a model without logits.
        RunFolderError: ``folder`` holds a checkpoint of a different run.
        ModelError: the loss became infinite or NaN.
    """
    student, tokenizer = _unwrap(student, tokenizer)
    teacher, tokenizer = _unwrap(teacher, tokenizer)
    sizes = {"steps": steps, "batch_size": batch_size, "length": length, "checkpoint_every": checkpoint_every}
    _check(sizes, learning_rate, student, teacher)
    length = min(length, context_of(student), context_of(teacher))
    rows = _rows(texts, teacher, tokenizer, min(steps * batch_size, WRITTEN_ROWS), length, seed, folder)
    run = _Run(student, learning_rate)
    settings: dict[str, Any] = {**sizes, "learning_rate": learning_rate, "seed": seed}
    settings["text and weights"] = _fingerprint([rows, *run.weights])
    with without_dropout([*student.modules(), *teacher.modules()]):
        try:
            _distil(run, student, teacher, rows, settings, None if folder is None else Path(folder), progress)
        finally:
            run.release()
    return run.losses


def _check(sizes: dict[str, int], learning_rate: float, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if sizes["length"] < 2 or not learning_rate > 0:
        raise ConfigError(
            f"length must be at least 2 and learning_rate above 0, got {sizes['length']} and {learning_rate}"
        )
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ConfigError(
            f"student and teacher must share a vocabulary, got {student.config.vocab_size} and "
            f"{teacher.config.vocab_size} tokens"
        )


def _distil(
    run: _Run,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: torch.Tensor,
    settings: dict[str, Any],
    folder: Path | None,
    progress: bool,
) -> None:
    """Take the steps that are left, with a checkpoint in ``folder`` every so many."""
    steps, every = settings["steps"], settings["checkpoint_every"]
    if folder is not None and (folder / CHECKPOINT).is_file():
        run.load(folder / CHECKPOINT, settings)
    with tqdm(total=steps, initial=len(run.losses), desc="healing", disable=not progress) as bar:
        for step in range(len(run.losses), steps):
            ids = rows[_indices(step, settings["batch_size"], len(rows), settings["seed"])].to(student.device)
            with torch.no_grad():
                target = teacher(input_ids=ids, use_cache=False).logits
            loss = _kl(student(input_ids=ids, use_cache=False).logits, target)
            run.update(loss, settings["learning_rate"] * _schedule(step, steps))
            bar.update()
            bar.set_postfix(kl=f"{run.losses[-1]:.3f}")
            if folder is not None and ((step + 1) % every == 0 or step + 1 == steps):
                run.save(folder / CHECKPOINT, settings)


def prune_and_heal(
    name: str | os.PathLike[str] | tuple[PreTrainedModel, Any],
    out: str | os.PathLike[str],
    cuts: Sequence[tuple[str, float]],
    steps: int = 0,
    *,
    texts: Text | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: bool = True,
) -> PruningReport:
    """Prune the model called ``name``, heal it for ``steps``, and save it in the folder ``out``.

    Called again after a stop, it goes on healing; the checkpoints in ``out`` are gone once the
    model is there.

    Args:
        name: As for ``PrunedTransformerModel``; or a loaded model, which stays as it is, and its tokenizer.
        out: The folder.
        cuts: At least one (method, amount), made one after the other; ``parse_pruning`` reads them.
        steps: As for ``distil``; 0 heals nothing.
        texts: For calibration and healing; None lets the dense model write them.
        dtype, seed, progress: As for ``PrunedTransformerModel`` and ``distil``.

    Raises:
        RunFolderError: ``out`` holds a model already, or the checkpoint of a different run; another
            process works in it; or it cannot be written to.
        ConfigError, ModelError: as ``PrunedTransformerModel`` and ``distil`` do.
    """
    folder = Path(out)
    _check_no_model(folder)
    (method, amount), *others = cuts
    (model, tokenizer) = name if isinstance(name, tuple) else (name, None)
    own: Any = copy.deepcopy(model) if isinstance(name, tuple) else model
    settings: dict[str, Any] = {"calibration": texts, "tokenizer": tokenizer, "dtype": dtype, "seed": seed}
    student = PrunedTransformerModel(own, amount, method, **settings)
    for method, amount in others:
        student.prune(amount, method, calibration=texts, seed=seed)
    with locked(folder):
        _check_no_model(folder)  # pruning took a while
        if steps:
            teacher = model if isinstance(model, PreTrainedModel) else load_transformer(model, dtype)[0]
            distil(student, teacher, texts, steps, seed=seed, folder=folder / HEALING, progress=progress)
        with reporting_full_disk(folder, (SafetensorError,)):
            (folder / UNFINISHED).touch()
            student.save_pretrained(folder)
            (folder / UNFINISHED).unlink()
        shutil.rmtree(folder / HEALING, ignore_errors=True)
    return student.report()


def _check_no_model(folder: Path) -> None:
    if (folder / "config.json").exists() and not (folder / UNFINISHED).exists():
        if (folder / HEALING / CHECKPOINT).is_file():  # a kill at the very end left it
            shutil.rmtree(folder / HEALING, ignore_errors=True)
        raise RunFolderError(f"{str(folder)!r} holds a model already; choose another folder")


class _Run:
    """The student's weights under training: float32 masters, optimiser, losses so far."""

    def __init__(self, student: PreTrainedModel, learning_rate: float) -> None:
        self.was_trainable = [(p, p.requires_grad) for p in student.parameters()]
        frozen = {
            id(p)
            for part in (student.get_input_embeddings(), student.get_output_embeddings())
            for p in part.parameters()
        }
        self.weights = [p for p in student.parameters() if id(p) not in frozen]
        for parameter, _ in self.was_trainable:
            parameter.requires_grad_(id(parameter) not in frozen)
        self.masters = [p.detach().float() for p in self.weights]  # float32 weights are their own master
        pruned = {id(m.weight) for m in student.modules() if isinstance(m, Linear)}
        self.holes = [
            (master, zero)
            for weight, master in zip(self.weights, self.masters, strict=True)
            if id(weight) in pruned and (zero := weight.detach() == 0).any()
        ]
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.losses: list[float] = []

    def update(self, loss: torch.Tensor, learning_rate: float) -> None:
        """Take one step down ``loss``, with gradients of a norm of at most 1."""
        value = loss.item()
        if not math.isfinite(value):
            raise ModelError(f"the KL became {value} at step {len(self.losses)}; lower the learning rate")
        loss.backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        with torch.no_grad():
            for master, zero in self.holes:
                master.masked_fill_(zero, 0.0)
        self._write_back()
        self.losses.append(value)

    def _write_back(self) -> None:
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write everything that the next step depends on."""
        state = {
            "settings": settings,
            "losses": self.losses,
            "masters": self.masters,
            "optimizer": self.optimizer.state_dict(),
        }
        write_state(state, path)

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        state = read_state(path)
        check_keys(state, ("settings", "losses", "masters", "optimizer"), str(path))
        if state["settings"] != settings:
            raise RunFolderError(
                f"{path} belongs to another run ({state['settings']}); this one is {settings}. "
                "Give the same arguments to go on, or another folder to start anew."
            )
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"]
        self._write_back()
        _log.info("going on after step %d of %s", len(self.losses), path)

    def release(self) -> None:
        """Give the student back as trainable as it came."""
        for parameter, trainable in self.was_trainable:
            parameter.requires_grad_(trainable)
            parameter.grad = None


def _kl(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return KL(target || logits) in nats, the mean over positions, in float32. Both are (B, T, V)."""
    logp = logits.flatten(0, 1).float().log_softmax(-1)
    return nn.functional.kl_div(
        logp, target.flatten(0, 1).float().log_softmax(-1), reduction="batchmean", log_target=True
    )


def _schedule(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step: up over 5% of the steps, then down to zero."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _indices(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """Return the rows that a step reads: each once an epoch, in an order that depends on seed and epoch alone."""
    orders: dict[int, list[int]] = {}
    picked = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        picked.append(orders[epoch][place])
    return picked


def _rows(
    texts: Text | None,
    teacher: PreTrainedModel,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    folder: str | os.PathLike[str] | None,
) -> torch.Tensor:
    """Return the training text as ids (N, length)."""
    if texts is None:
        cached = None if folder is None else Path(folder) / f"written-{count}x{length}-{seed}.pt"
        return _written(teacher, count, length, seed, cached)
    if isinstance(texts, torch.Tensor):
        return torch.cat(token_batches(texts, None, length, len(texts) or 1))
    pieces = [row[0] for row in token_batches(texts, tokenizer, None, 1)]
    end = teacher.generation_config.eos_token_id if teacher.generation_config else None
    if end is not None:
        end = torch.tensor([end if isinstance(end, int) else end[0]])
        pieces = [part for piece in pieces for part in (piece, end)]
    stream = torch.cat(pieces)
    length = min(length, len(stream))
    return stream[: len(stream) // length * length].view(-1, length)


def _written(teacher: PreTrainedModel, count: int, length: int, seed: int, cached: Path | None) -> torch.Tensor:
    """Return rows that the teacher writes, (count, length); read from ``cached`` if they are there."""
    if cached is not None and cached.is_file():
        held: torch.Tensor = read_state(cached)
        return held
    _log.info("the teacher writes %d rows of %d tokens", count, length)
    written = self_written(teacher, count, length, seed)
    if cached is not None:
        write_state(written, cached)
    return written


def _unwrap(model: PreTrainedModel | PrunedTransformerModel, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    if isinstance(model, PrunedTransformerModel):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    if model.get_output_embeddings() is None:
        raise ConfigError(f"{type(model).__name__} has no next-token logits to distil; give a causal language model")
    return model, tokenizer


def _fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """Return a hash of the tensors that a run starts from: a checkpoint goes on with the same ones only."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_state(state: Any, path: Path) -> None:
    """Write tensors and plain data with ``torch.save``, whole or not at all."""
    with whole_file(path, (RuntimeError,)) as half_made:
        torch.save(state, half_made)


def read_state(path: Path) -> Any:
    """Return the content of a file of ``write_state``; nothing else is unpickled.

    Raises:
        RunFolderError: another file, or a damaged one.
    """
    try:
        return torch.load(path, weights_only=True)
    except (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
        raise RunFolderError(f"{path} is damaged, or nothing that distillation wrote: delete it ({error})") from error
