"""A Hugging Face transformer with a part of it pruned away, as an ``nn.Module`` with hidden states.

Zeroed weights (``l1_unstructured``, ``global_unstructured``, ``wanda``) keep the shapes and gain no
speed on ordinary hardware. Structured cuts (``ffn``, ``heads``, ``layers``) make the model smaller
and faster. They remove equal counts from every layer, so that a plain config describes the result
and ``from_pretrained`` loads it anywhere, without this package.

    name, folder or model  ->  prune_  ->  smaller or sparser model, PruningReport
    input_ids (B, T), attention_mask (B, T)  ->  PrunedTransformerModel  ->  hidden (B, T, d)
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from agents.pruning.calibration import Text, calibration_batches
from agents.pruning.methods import (
    METHODS,
    REPORT_FILE,
    PruningReport,
    check_pruning,
    count_zeros,
    transformer_blocks,
)
from textgen_env.errors import ModelError
from textgen_env.files import read_json, write_file
from textgen_env.models import model_folder


class PrunedTransformerModel(nn.Module):
    """A pruned Hugging Face encoder or decoder that answers hidden states.

    Input:  input_ids (B, T) int64; attention_mask (B, T), 1 for real tokens, padded on the right.
    Output: (B, T, d), the last hidden state (after the final norm), in the model's dtype.

    ``model`` is the Hugging Face model. A causal one keeps its ``lm_head``, so the folder that
    ``save_pretrained`` writes is a language model for the environment as well.

    Args:
        model_name: A hub id, a folder, a name of ``textgen_env.models``, or a loaded model, which
            is then pruned in place.
        pruning_amount: Share to remove, in [0, 1): of the weights, channels, KV groups or layers.
        method: A name in ``METHODS``.
        calibration: Text for ``wanda`` and the structured methods. A causal model writes its own
            when none is given; an encoder needs some.
        tokenizer: For a loaded model; a named one brings its own.
        dtype: Of the weights of a named model.
        seed: Of the text that the model writes for itself.

    Raises:
        ConfigError: an unknown method, an amount outside [0, 1), or a cut that leaves nothing.
        ModelError: the model cannot be loaded, or lacks the parts that the method removes.
    """

    def __init__(
        self,
        model_name: str | os.PathLike[str] | PreTrainedModel,
        pruning_amount: float = 0.2,
        method: str = "l1_unstructured",
        *,
        calibration: Text | None = None,
        tokenizer: Any = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_pruning(method, pruning_amount)
        if isinstance(model_name, PreTrainedModel):
            model = model_name
        else:
            model, own = load_transformer(model_name, dtype)
            tokenizer = tokenizer or own
        self.tokenizer = tokenizer
        self.model, self._report = prune_(
            model, method, pruning_amount, calibration=calibration, tokenizer=tokenizer, seed=seed
        )

    @property
    def hidden_size(self) -> int:
        """The width d of the hidden states."""
        return int(self.model.config.hidden_size)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer's layers, first to last."""
        return transformer_blocks(self.model)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the last hidden state (B, T, d). No mask means that every token is real."""
        output = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def prune(self, amount: float, method: str, *, calibration: Text | None = None, seed: int = 0) -> None:
        """Cut once more; the report then covers all cuts. Arguments and errors are the constructor's."""
        _, report = prune_(self.model, method, amount, calibration=calibration, tokenizer=self.tokenizer, seed=seed)
        self._report = report.after(self._report)

    def sparsity(self) -> float:
        """Return the share of zeros among the prunable weights, as they are now."""
        zeros, sizes = zip(*count_zeros(self.model).values(), strict=True)
        return float(sum(zeros) / sum(sizes))

    def report(self) -> PruningReport:
        """Return the counts of all cuts."""
        return self._report

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model, tokenizer if any, and report, for ``from_pretrained`` here or in transformers."""
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        write_file(Path(folder) / REPORT_FILE, json.dumps(asdict(self._report), indent=1))

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
    ) -> PrunedTransformerModel:
        """Load a folder that ``save_pretrained`` wrote. Nothing is pruned again.

        Raises:
            ModelError: the folder holds no model, or no report of a pruning.
        """
        path = Path(folder) / REPORT_FILE
        if not path.is_file():
            raise ModelError(
                f"{str(folder)!r} holds no {REPORT_FILE}: not written by PrunedTransformerModel.save_pretrained"
            )
        loaded = cls(folder, pruning_amount=0.0, dtype=dtype)
        try:
            loaded._report = PruningReport(**read_json(path, (), ModelError))
        except (TypeError, ModelError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error
        return loaded


def prune_(
    model: PreTrainedModel,
    method: str,
    amount: float,
    *,
    calibration: Text | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PruningReport]:
    """Prune ``model`` in place; return it and a report.

    Cuts can follow one another (``layers``, then ``ffn``); each report counts from its own start.
    Arguments and errors are those of ``PrunedTransformerModel``.
    """
    check_pruning(method, amount)
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; give an encoder or a causal decoder")
    dense_parameters, dense = model.num_parameters(), count_zeros(model)
    if amount > 0:
        METHODS[method](model, amount, lambda: calibration_batches(model, calibration, tokenizer, seed))
    pruned = count_zeros(model)
    return model, PruningReport(
        method=method,
        amount=amount,
        dense_parameters=dense_parameters,
        parameters=model.num_parameters(),
        dense_zeros=sum(zeros for zeros, _ in dense.values()),
        zeros=sum(zeros for zeros, _ in pruned.values()),
        sparsity={name: zeros / size for name, (zeros, size) in pruned.items()},
    )


def load_transformer(name: str | os.PathLike[str], dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Return the model (causal where its checkpoint is) and tokenizer of a name, folder or hub id.

    Raises:
        ModelError: nothing there, or the hub cannot be reached.
    """
    source = model_folder(os.fspath(name))
    try:
        config = AutoConfig.from_pretrained(source)
        causal = set(config.architectures or ()) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        auto = AutoModelForCausalLM if causal else AutoModel
        model = auto.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source) if _has_tokenizer(source) else None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {str(name)!r} could not be loaded: {str(error).splitlines()[0]} Give a hub id (with a "
            "network, or after an earlier download), a folder made by save_pretrained, or a loaded model."
        ) from error
    return model.eval(), tokenizer


def _has_tokenizer(source: str) -> bool:
    """Return True if there is one to load; on the hub there is. (Without files, some classes load empty.)"""
    folder = Path(source)
    return not folder.is_dir() or any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))
