"""Calibration: texts, and statistics of a model that runs on them, by which pruning methods choose.

texts or ids  ->  batches of ids (B, T)  ->  energy of a layer's inputs (in,), influence of each block (L,)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from textgen_env.errors import ConfigError
from textgen_env.models.forward import no_cache
from textgen_env.models.hf import positions_of

CALIBRATED = 128
"""Tokens of a text that a model is calibrated on, at most: its first."""

Linear = nn.Linear | Conv1D

Text = Sequence[str] | torch.Tensor
"""Texts, or token ids (N, T) without padding."""


Calibration = Callable[[], list[torch.Tensor]]
"""Draws the calibration batches, each (B, T) ids without padding; called by the methods that need them."""


def context_of(model: PreTrainedModel) -> int:
    """Return how many tokens ``model`` can read; 2^30 where its positions have no end."""
    return positions_of(model, model.config.get_text_config(decoder=True))


def self_written(model: PreTrainedModel, rows: int, length: int, seed: int) -> torch.Tensor:
    """Return text that the causal ``model`` writes: token ids (rows, length), no end token early.

    Each row starts with a token drawn uniformly from the vocabulary and goes on with samples at
    temperature 1, which covers more than the model's favourite openings do.

    Source: data-free calibration of LLM-QAT, Liu et al. 2023, arXiv:2305.17888.
    """
    generate: Any = model.generate
    ended_by_length = {"min_new_tokens": length - 1, "max_new_tokens": length - 1, "pad_token_id": 0}  # no padding
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    written = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        openings = torch.randint(model.config.vocab_size, (rows, 1)).to(model.device)
        for first in openings.split(64):  # bounds the cache
            mask = torch.ones_like(first)
            written.append(generate(input_ids=first, attention_mask=mask, **plain, **ended_by_length))
    return torch.cat(written)


def calibration_batches(model: PreTrainedModel, text: Text | None, tokenizer: Any, seed: int) -> list[torch.Tensor]:
    """Return token ids to measure activations on: batches (B, T) without padding, of the first tokens of each text.

    Raises:
        ConfigError: no text and a model that cannot write its own, or as of ``token_batches``.
    """
    length = min(CALIBRATED, context_of(model))
    if text is None:
        if not model.can_generate():
            raise ConfigError(f"{type(model).__name__} cannot write its own calibration text; pass calibration=[...]")
        text = self_written(model, rows=32, length=length, seed=seed)
    batches = token_batches(text, tokenizer, max_length=length, batch_size=8)
    return [batch.to(model.device) for batch in batches]


def token_batches(text: Text, tokenizer: Any, max_length: int | None, batch_size: int) -> list[torch.Tensor]:
    """Return ids without padding: rows of a tensor (B, T) at a time, or one text (1, T) at a time.

    Of each they are the first ``max_length``, or all for None.

    Raises:
        ConfigError: no text, or no tokenizer for it.
    """
    if isinstance(text, torch.Tensor):
        if text.ndim != 2 or text.numel() == 0:
            raise ConfigError(f"token ids must have the shape (rows, length), both above 0; got {tuple(text.shape)}")
        return list(text[:, :max_length].split(batch_size))
    if isinstance(text, str):
        raise ConfigError("give a list of texts, got one string")
    if not any(line.strip() for line in text):
        raise ConfigError("the calibration text is empty; give some texts that the model should handle well")
    if tokenizer is None:
        raise ConfigError("texts need the model's tokenizer: pass tokenizer=..., or token ids instead")
    given = {"truncation": max_length is not None, "max_length": max_length, "return_tensors": "pt", "verbose": False}
    return [tokenizer(line, **given)["input_ids"] for line in text if line.strip()]


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor, Any], None]) -> Iterator[None]:
    """Call ``see(name, input, output)`` whenever one of the modules runs."""

    def hook(name: str) -> Callable[..., None]:
        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(name, args[0] if args else kwargs["hidden_states"], output)

        return run

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    was_training = model.training
    model.eval()  # dropout would blur the measurement
    for ids in batches:
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **no_cache(model.base_model))
    model.train(was_training)


def input_energy(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], batches: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return, for each layer, ||x_j||^2 of every input j over all calibration tokens: (in,) float32."""
    energy: dict[str, torch.Tensor] = {}

    def see(name: str, inputs: torch.Tensor, output: Any) -> None:
        squares = inputs.float().square().flatten(0, -2).sum(0)
        energy[name] = energy[name] + squares if name in energy else squares

    with _hooked(modules, see):
        _run(model, batches)
    return energy


def output_energy(reader: Linear, energy: torch.Tensor) -> torch.Tensor:
    """Return the energy that each input adds to a layer's output: ||x_j||^2 ||W_:j||^2, (in,)."""
    return energy * weight_rows(reader).float().square().sum(0)


def block_influence(model: PreTrainedModel, blocks: nn.ModuleList, batches: list[torch.Tensor]) -> torch.Tensor:
    """Return 1 - cos(h_in, h_out) of each block, the mean over the calibration tokens: (L,) float64."""
    turned = torch.zeros(len(blocks), dtype=torch.float64)
    tokens = sum(ids.numel() for ids in batches)

    def see(name: str, inputs: torch.Tensor, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        cosine = nn.functional.cosine_similarity(inputs.float(), after.float(), dim=-1)
        turned[int(name)] += (1 - cosine).sum().double().cpu()

    with _hooked({str(i): block for i, block in enumerate(blocks)}, see):
        _run(model, batches)
    return turned / tokens


def weight_rows(linear: Linear) -> torch.Tensor:
    """Return the weight as (out, in), in the layer's own memory; GPT-2 keeps it transposed."""
    weight = linear.weight.data
    return weight.T if isinstance(linear, Conv1D) else weight
