"""Which decoder runs a model: the fastest that agrees with the model's own uncached forward.

candidates, fastest first  ->  a few short texts in ragged rows  ->  the first whose log-probabilities agree
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from textgen_env.errors import ModelError
from textgen_env.models.base import LanguageModel
from textgen_env.models.generic import GenericDecoder
from textgen_env.models.llama import LlamaDecoder
from textgen_env.models.packing import Decoder, PackedDecoder
from textgen_env.models.slots import HFSlots
from textgen_env.models.stateful import WAYS, StatefulDecoder

EXACT, HALF = 1e-3, 0.15
"""Largest difference of log-probabilities that is rounding, relative to their spread, in full and half precision."""
STEPS = 3  # tokens that a check writes
SMALL_WINDOW = 64  # windows up to this one are passed by a check

_log = logging.getLogger(__name__)


def agreeing_decoder(model: LanguageModel, module: Any, window: int | None, far: bool = False) -> Decoder:
    """Return the fastest decoder that agrees with the model's own uncached forward.

    Args:
        model: Encodes the texts of the check.
        module: The causal LM.
        window: The smallest window of a layer in tokens; None where each layer sees the whole text.
        far: The texts are to be longer than the window.

    Raises:
        ModelError: none does, with the reason of each.
    """
    allowed = EXACT if module.dtype in (torch.float32, torch.float64) else HALF
    reasons = []
    for make in _candidates(module, far):
        try:
            decoder = make()
            gap = _disagreement(model, module, decoder, window)
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            reasons.append(f"{_name(make)}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        if gap <= allowed:
            _log.log(
                logging.INFO if "uncached" in decoder.name else logging.DEBUG,
                "%s runs %s; %s",
                type(module).__name__,
                decoder.name,
                "; ".join(reasons) or "the first choice",
            )
            return decoder
        reasons.append(f"{decoder.name}: differs by {gap:.1%} (at most {allowed:.1%} is rounding)")
    raise ModelError(
        f"{type(module).__name__} is not supported: no way to run it agrees with its own uncached forward. "
        + "; ".join(reasons)
    )


def _candidates(module: Any, far: bool) -> Iterator[Callable[[], Decoder]]:
    if not far and LlamaDecoder.fits(module):
        yield partial(LlamaDecoder, module)
    if not far:
        yield partial(GenericDecoder, module)
    for way in WAYS:
        yield partial(StatefulDecoder, module, way)


def _name(make: Any) -> str:
    return str(make.args[1].name if len(make.args) > 1 else make.func.name)


@torch.inference_mode()
def _disagreement(model: LanguageModel, module: Any, decoder: Decoder, window: int | None) -> float:
    """Return how far texts, written in ragged rows, are from the uncached forward, relative to its spread.

    A decoder with a forward of its own for single rows also writes a row alone. All texts are beginnings of one,
    so its forward gives the expected values of each.
    """
    packed = isinstance(decoder, PackedDecoder)
    most = 3 if packed else min(window + 2 if window and window <= SMALL_WINDOW else 12, model.max_context - STEPS)
    courses = [(most, 1)] if packed else [(most, max(1, most // 2), 1, most)]
    if decoder.alone:
        courses.append((most,))
    ids = _plain_ids(model, module, most + STEPS)
    uncached = module(input_ids=torch.tensor([ids], device=decoder.device)).logits[0]
    expected = uncached.float().log_softmax(-1).cpu().numpy()
    if not np.isfinite(expected[:, 0]).all():
        raise ModelError("its own uncached forward answers numbers that are not finite")
    return max(_largest_gap(model, decoder, ids, expected, lengths) for lengths in courses)


def _plain_ids(model: LanguageModel, module: Any, count: int) -> list[int]:
    """Return ``count`` ids of plain language: on special tokens half precision differs from itself, and some models
    skip padding in the text."""
    config = module.config.get_text_config(decoder=True)
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")} | set(model.end_ids)
    text = [i for i in dict.fromkeys(model.encode("The old man went down to the")) if i not in special]
    others = [i for i in range(model.vocab_size) if i not in special and i not in text]
    rng = np.random.default_rng(0)
    return [*text[: count // 2], *rng.choice(others or text, count).tolist()][:count]


def _largest_gap(
    model: LanguageModel,
    decoder: Decoder,
    ids: Sequence[int],
    expected: npt.NDArray[np.float32],
    lengths: Sequence[int],
) -> float:
    """Return the largest gap to ``expected`` (T, V) of rows that begin with ``lengths`` of the ``ids`` (T,)."""
    # Without a memo, which would answer where a prefix comes back.
    slots = HFSlots(model, decoder, rows=len(lengths), length=len(ids), k=None, memo_bytes=0)
    rows, gaps = np.arange(len(lengths)), []
    slots.start(rows, [ids[:length] for length in lengths])
    for step in range(STEPS):
        found = slots.propose(rows, np.zeros(len(rows), bool)).logprobs
        for row, length in enumerate(lengths):
            target = expected[length + step - 1]
            spread = float(np.linalg.norm(target - target.mean()))
            gaps.append(float(np.linalg.norm(found[row] - target)) / max(spread, 1e-6))
        slots.advance(rows, np.array([ids[length + step] for length in lengths]))
    return float(np.max(gaps))  # not a number, if one is
