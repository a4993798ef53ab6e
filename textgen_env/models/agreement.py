"""Which decoder runs a model: the fastest that agrees with the model's own uncached forward.

candidates, fastest first  ->  a few short texts in ragged rows  ->  the first whose log-probabilities agree
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from textgen_env.errors import ModelError
from textgen_env.models.base import Slots
from textgen_env.models.forward import without_dropout
from textgen_env.models.packing import Decoder, PackedDecoder

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a module raises that cannot run in some way; ``ModelError`` is a ``ValueError``."""
EXACT, HALF = 1e-4, 0.15
"""Largest difference of log-probabilities that is rounding, relative to their spread, in full and half precision."""
STEPS = 4  # tokens that a check writes
SMALL_WINDOW = 64  # windows up to this one are passed by every check, larger ones where texts go beyond them

_log = logging.getLogger(__name__)


class Reach(Enum):
    """How far texts go: within the smallest window, beyond it, or where cached tokens no longer fit."""

    NEAR = "near"
    WINDOWS = "windows"
    UNCACHED = "uncached"


class CheckedModel(Protocol):
    """A language model, as a check uses it."""

    model: Any
    vocab_size: int
    max_context: int
    end_ids: tuple[int, ...]
    begin: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def candidate_decoders(self, reach: Reach) -> Iterable[partial[Any]]:
        """Return functions that make decoders, fastest first."""

    def open_slots(self, decoder: Decoder, rows: int, length: int, k: int | None, memo_bytes: int) -> Slots:
        """Open rows on a decoder."""

    def check_prompt(self, ids: Sequence[int], length: int) -> list[int]:
        """Return a prompt of ``length`` tokens for a row whose text goes on with ``ids``."""

    def uncached(self, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        """Return the logits (V,) of the token behind ``ids``, from the model's own forward over all of them."""


def agreeing_decoder(model: CheckedModel, windows: Sequence[int], reach: Reach = Reach.NEAR) -> Decoder:
    """Return the fastest decoder that agrees with the model's own uncached forward.

    Args:
        model: What is to be run.
        windows: Of layers that do not see the whole text, in tokens; texts of a check are longer than small ones.
        reach: How far the texts go.

    Raises:
        ModelError: none does, with the reason of each.
    """
    kind = type(model.model).__name__
    allowed = EXACT if model.model.dtype in (torch.float32, torch.float64) else HALF
    reasons = []
    for make in model.candidate_decoders(reach):
        try:
            decoder = make()
            gap = _disagreement(model, decoder, windows, reach)
        except FAILURES as error:
            name = make.args[1].name if len(make.args) > 1 else make.func.name  # type: ignore[attr-defined]
            reasons.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        if gap <= allowed:
            level = logging.INFO if "uncached" in decoder.name else logging.DEBUG
            _log.log(level, "%s runs %s; %s", kind, decoder.name, "; ".join(reasons) or "the first choice")
            return decoder
        reasons.append(f"{decoder.name}: differs by {gap:.2%} (at most {allowed:.2%} is rounding)")
    raise ModelError(
        f"{kind} is not supported: no way to run it agrees with its own uncached forward. " + "; ".join(reasons)
    )


@torch.inference_mode()
def _disagreement(model: CheckedModel, decoder: Decoder, windows: Sequence[int], reach: Reach) -> float:
    """Return how far texts, written in ragged rows, are from the uncached forward, relative to its spread.

    A row is also written alone, unless that is the same forward, and one that passes large windows if texts will.
    """
    packed = isinstance(decoder, PackedDecoder)
    beyond = max((window + 2 for window in windows if window <= SMALL_WINDOW), default=0)
    most = 3 if packed else min(max(12, beyond), model.max_context - STEPS)
    courses: list[tuple[int, ...]] = [(most, 1)] if packed else [(most, max(1, most // 2), 1, most)]
    if decoder.alone or not packed:
        courses.append((most,))
    if reach is Reach.WINDOWS and (large := [window for window in windows if window > SMALL_WINDOW]):
        most = min(min(large) * 9 // 8, model.max_context - STEPS)
        courses.append((most,))
    ids = plain_ids(model, most + STEPS)
    with without_dropout(model.model.modules()):
        return max(_largest_gap(model, decoder, ids, lengths) for lengths in courses)


def plain_ids(model: CheckedModel, count: int) -> list[int]:
    """Return ``count`` ids of plain language: on special tokens half precision differs from itself, and some models
    skip padding in the text."""
    config = model.model.config.get_text_config(decoder=True)
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")} | set(model.end_ids)
    text = [i for i in dict.fromkeys(model.encode("The old man went down to the")) if i not in special]
    others = [i for i in range(model.vocab_size) if i not in special and i not in text]
    rng = np.random.default_rng(0)
    return [*text[: count // 2], *rng.choice(others or text, count).tolist()][:count]


def _largest_gap(model: CheckedModel, decoder: Decoder, ids: Sequence[int], lengths: Sequence[int]) -> float:
    """Return the largest gap to the uncached forward of rows that begin with ``lengths`` of the ``ids`` (T,)."""
    ids = list(ids[: max(lengths) + STEPS])
    prompts = [model.check_prompt(ids, length) for length in lengths]
    if len(lengths) > 1:  # the first row and the last one are of equal length, and differ
        prompts[-1] = model.check_prompt(ids[::-1], lengths[-1])
    # Without a memo, which would answer where a prefix comes back.
    slots = model.open_slots(decoder, rows=len(lengths), length=len(ids), k=None, memo_bytes=0)
    rows, gaps = np.arange(len(lengths)), []
    known: dict[tuple[Any, ...], npt.NDArray[np.float32]] = {}
    slots.start(rows, prompts)
    ids = [*slots.ids_of(0), *ids[slots.lengths[0] :]] if model.begin else ids
    for step in range(STEPS if lengths[0] <= SMALL_WINDOW + 2 else 2):  # each is a forward of the whole text
        if step == 2:
            slots.rebuild()
        found = slots.propose(rows, np.zeros(len(rows), bool)).logprobs
        for row, prompt in enumerate(prompts):
            key = (tuple(slots.prompt_of(row)), tuple(slots.ids_of(row)))
            if key not in known:
                known[key] = model.uncached(prompt, slots.ids_of(row)).float().log_softmax(-1).cpu().numpy()
            spread = float(np.linalg.norm(known[key] - known[key].mean()))
            gaps.append(float(np.linalg.norm(found[row] - known[key])) / max(spread, 1e-6))
        slots.advance(rows, np.array([ids[length] for length in slots.lengths]))
        if step == 0:
            slots.load(0, slots.save(0))
        if step == 0 and len(rows) > 1:
            slots.start(rows[-1:], prompts[-1:])
    return float(np.max(gaps))  # not a number, if one is
