"""Pruning methods by name: each cuts something out of a transformer, in place.

unstructured: l1_unstructured, global_unstructured, wanda   zero weights, shapes unchanged
structured:   ffn, heads, layers                            a smaller model that a plain config describes
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from agents.pruning.calibration import (
    Calibration,
    Linear,
    block_influence,
    input_energy,
    output_energy,
    weight_rows,
)
from textgen_env.errors import ConfigError, ModelError
from textgen_env.registry import Registry

REPORT_FILE = "pruning.json"


METHODS: Registry[Callable[[PreTrainedModel, float, Calibration], None]] = Registry("pruning method")
"""Name to ``method(model, amount, calibration)``, which prunes in place."""


@dataclass(frozen=True)
class PruningReport:
    """Counts before and after a pruning. Parameters are counted once where they are tied."""

    method: str  # of several cuts, all of them, such as "layers 10% + ffn"
    amount: float  # asked for, last: share of the weights, channels, KV groups or layers
    dense_parameters: int  # before
    parameters: int  # after
    dense_zeros: int  # of the prunable weights, before
    zeros: int  # the same, after
    sparsity: Mapping[str, float]  # share of zeros in each prunable weight, after

    @property
    def removed(self) -> float:
        """Share of the parameters that are gone, cut away or zero; those that were zero before don't count."""
        return 1 - (self.parameters - self.zeros) / (self.dense_parameters - self.dense_zeros)

    def after(self, earlier: PruningReport) -> PruningReport:
        """Return the report of both cuts, counted from where the earlier one began."""
        return replace(
            self,
            method=f"{earlier.method} {earlier.amount:.0%} + {self.method}",
            dense_parameters=earlier.dense_parameters,
            dense_zeros=earlier.dense_zeros,
        )

    def __str__(self) -> str:
        return (
            f"{self.method} {self.amount:.0%}: {self.dense_parameters / 1e6:.1f}M -> "
            f"{self.parameters / 1e6:.1f}M parameters, {self.zeros / 1e6:.1f}M of them zero "
            f"({self.removed:.1%} of all are gone)"
        )


def check_pruning(method: str, amount: float) -> None:
    """Raise ``ConfigError`` unless ``method`` is known and ``amount`` is in [0, 1)."""
    METHODS[method]
    if not 0 <= amount < 1:
        raise ConfigError(f"the pruning amount must be in [0, 1), the share to remove; got {amount}")


def parse_pruning(text: str) -> list[tuple[str, float]]:
    """Read ``METHOD:AMOUNT``, or several joined by ``+``, as cuts to make one after the other.

    >>> parse_pruning("layers:0.1+ffn:0.23")
    [('layers', 0.1), ('ffn', 0.23)]

    Raises:
        ConfigError: another form, an unknown method, or an amount outside [0, 1).
    """
    cuts = []
    for part in text.split("+"):
        method, _, amount = part.partition(":")
        try:
            cuts.append((method, float(amount)))
        except ValueError as error:
            raise ConfigError(f"a pruning is METHOD:AMOUNT, such as ffn:0.2, got {part!r}") from error
        check_pruning(*cuts[-1])
    return cuts


# --- zeroing weights, shapes unchanged


@METHODS.register("l1_unstructured")
def _l1_unstructured(model: PreTrainedModel, amount: float, calibration: Calibration) -> None:
    """Zero the smallest weights of each linear layer."""
    for linear in _linears(model).values():
        torch_prune.l1_unstructured(linear, "weight", amount)
        torch_prune.remove(linear, "weight")  # permanent: a mask left in place costs a multiply a forward


@METHODS.register("global_unstructured")
def _global_unstructured(model: PreTrainedModel, amount: float, calibration: Calibration) -> None:
    """Zero the smallest weights of all linear layers together."""
    weights = [(linear, "weight") for linear in _linears(model).values()]
    torch_prune.global_unstructured(weights, pruning_method=torch_prune.L1Unstructured, amount=amount)
    for linear, name in weights:
        torch_prune.remove(linear, name)


@METHODS.register("wanda")
@torch.no_grad()
def _wanda(model: PreTrainedModel, amount: float, calibration: Calibration) -> None:
    """Zero, in each output row, the weights with the smallest |W_ij| ||x_j||.

    Source: Sun et al. 2023, arXiv:2306.11695.
    """
    linears = _linears(model)
    energy = input_energy(model, linears, calibration())
    for name, linear in linears.items():
        rows = weight_rows(linear)  # (out, in)
        score = rows.abs().float() * energy[name].sqrt()
        smallest = score.topk(round(amount * rows.shape[1]), dim=1, largest=False).indices
        rows.scatter_(1, smallest, 0.0)


# --- removing structure, a smaller model

FFN_LAYOUTS = (
    # the layers that make the channels, the layer that reads them, names of their number in the config
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", ("intermediate_size",)),  # Llama, Mistral, Qwen, Gemma
    (("mlp.c_fc",), "mlp.c_proj", ("intermediate_size", "n_inner")),  # StarCoder 2, GPT-2
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", ("intermediate_size", "ffn_hidden_size")),  # GPT-NeoX, Falcon
    (("fc1",), "fc2", ("ffn_dim", "decoder_ffn_dim")),  # OPT, BART
    (("intermediate.dense",), "output.dense", ("intermediate_size",)),  # BERT, RoBERTa
)


PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Config entries with one item a layer."""


@METHODS.register("ffn")
def _ffn(model: PreTrainedModel, amount: float, calibration: Calibration) -> None:
    """Remove the feed-forward channels that carry the least energy into the residual stream."""
    blocks = transformer_blocks(model)
    known = [layout for layout in FFN_LAYOUTS if all(_has(block, *layout[0], layout[1]) for block in blocks)]
    if not known:
        raise ModelError(
            f"method 'ffn' does not know the feed-forward layers of {type(model).__name__}, or not of each layer; it "
            f"knows {', '.join(' + '.join((*makers, reader)) for makers, reader, _ in FFN_LAYOUTS)}"
        )
    makers, reader, keys = known[0]
    readers = {str(i): _linear(block, reader) for i, block in enumerate(blocks)}
    channels = weight_rows(readers["0"]).shape[1]
    removed = _count("ffn", amount, channels, "channels")
    key = next((name for name in keys if _entry(model.config, name) == channels), keys[-1])
    if isinstance(_entry(model.config, key), list | tuple):
        raise ModelError(
            f"{type(model).__name__} has several {key}, one a layer, and method 'ffn' cuts all layers alike"
        )
    config = _changed_config(model, "ffn", {key: channels - removed})

    energy = input_energy(model, readers, calibration())
    kept = [_largest(output_energy(readers[i], energy[i]), channels - removed) for i in readers]

    def cut(blocks: nn.ModuleList) -> None:
        for block, own in zip(blocks, kept, strict=True):
            for maker in makers:
                _keep(_linear(block, maker), own, outputs=True)
            _keep(_linear(block, reader), own, outputs=False)

    _cut(model, "ffn", config, cut)


@METHODS.register("heads")
def _heads(model: PreTrainedModel, amount: float, calibration: Calibration) -> None:
    """Remove whole key-value groups: a key head, a value head, and the query heads that read them."""
    blocks, config = transformer_blocks(model), model.config
    head_dim = _head_dim(model, blocks)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    queries = config.num_attention_heads // groups  # query heads a group
    kept_groups = groups - _count("heads", amount, groups, "key-value groups")
    config = _changed_config(
        model, "heads", {"num_attention_heads": kept_groups * queries, "num_key_value_heads": kept_groups}
    )

    readers = {str(i): _linear(block, "self_attn.o_proj") for i, block in enumerate(blocks)}
    energy = input_energy(model, readers, calibration())
    kept = [_largest(output_energy(readers[i], energy[i]).view(groups, -1).sum(1), kept_groups) for i in readers]

    def cut(blocks: nn.ModuleList) -> None:
        for block, own in zip(blocks, kept, strict=True):
            wide = torch.arange(groups * queries * head_dim).view(groups, -1)[own].flatten()
            narrow = torch.arange(groups * head_dim).view(groups, -1)[own].flatten()
            _keep(_linear(block, "self_attn.q_proj"), wide, outputs=True)
            _keep(_linear(block, "self_attn.k_proj"), narrow, outputs=True)
            _keep(_linear(block, "self_attn.v_proj"), narrow, outputs=True)
            _keep(_linear(block, "self_attn.o_proj"), wide, outputs=False)

    _cut(model, "heads", config, cut)


def _head_dim(model: PreTrainedModel, blocks: nn.ModuleList) -> int:
    """Return the width of a head, if heads of the model can be removed one by one.

    Raises:
        ModelError: they cannot.
    """
    head_dim: int | None = _entry(model.config, "head_dim")
    names = tuple(f"self_attn.{part}_proj" for part in "qkvo")
    if head_dim is None or not all(_has(block, *names) for block in blocks):
        lack = "no head_dim in its config" if head_dim is None else f"not all of {', '.join(names)} in each layer"
        raise ModelError(
            f"method 'heads' needs the layers of the Llama family, and {type(model).__name__} has {lack}: its config "
            "could not describe the smaller model. Use 'ffn' or 'layers'."
        )
    norm = getattr(blocks[0].get_submodule("self_attn"), "q_norm", None)
    if norm is not None and norm.weight.numel() != head_dim:
        raise ModelError(f"{type(model).__name__} normalises all heads together; removing one changes the others")
    return head_dim


@METHODS.register("layers")
def _layers(model: PreTrainedModel, amount: float, calibration: Calibration) -> None:
    """Remove the layers that turn their input the least: 1 - E cos(h_in, h_out).

    Source: block influence of ShortGPT, Men et al. 2024, arXiv:2403.03853.
    """
    blocks = transformer_blocks(model)
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError("this GPT-2 scales attention by the layer's index; removing layers would change the rest")
    removed = _count("layers", amount, len(blocks), "layers")
    kept = _largest(block_influence(model, blocks, calibration()), len(blocks) - removed).tolist()
    kinds = list(_entry(model.config, "layer_types") or ())
    if gone := sorted(set(kinds) - {kinds[i] for i in kept if kinds}):
        raise ConfigError(f"layers {amount} would remove every layer of kind {gone[0]!r}; try a smaller amount")
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key in PER_LAYER:
        if getattr(model.config, key, None):
            changes[key] = [getattr(model.config, key)[i] for i in kept]
    config = _changed_config(model, "layers", changes)

    def cut(blocks: nn.ModuleList) -> None:
        survivors = [blocks[i] for i in kept]
        del blocks[:]
        blocks.extend(survivors)
        for i, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.__dict__["layer_idx"] = i  # its slot in the KV cache

    _cut(model, "layers", config, cut)


# --- parts of several methods


def _linears(model: PreTrainedModel) -> dict[str, Linear]:
    """Return the prunable layers by name: every linear one but the output embedding (tied to the input's)."""
    body: nn.Module = model.base_model
    return {name: module for name, module in body.named_modules() if isinstance(module, Linear)}


def _linear(block: nn.Module, name: str) -> Linear:
    layer = block.get_submodule(name)
    if not isinstance(layer, Linear):
        raise ModelError(
            f"{name} is a {type(layer).__name__}; only plain linear layers can be cut (not quantised ones)"
        )
    return layer


def count_zeros(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return (zeros, size) of every prunable weight, by the layer's name."""
    weights = {name: weight_rows(linear) for name, linear in _linears(model).items()}
    return {name: (weight.numel() - int(weight.count_nonzero()), weight.numel()) for name, weight in weights.items()}


def _entry(config: Any, name: str) -> Any:
    """Return an entry of a config, None where it has none for all layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of transformers: it differs by layer
        return None


def _has(block: nn.Module, *names: str) -> bool:
    """Return True if the block has all these submodules."""
    known = {name for name, _ in block.named_modules()}
    return known.issuperset(names)


def transformer_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's list of layers, which every architecture names differently.

    Raises:
        ModelError: there is none.
    """
    count = getattr(model.config, "num_hidden_layers", None)  # None of a model that is made of several
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(model).__name__} keeps no list of its {count or 'own'} layers (it may share their weights, or be made "
        "of several models); use an unstructured method"
    )


def _count(method: str, amount: float, total: int, unit: str) -> int:
    """Return how many of ``total`` units ``amount`` removes: the nearest count, never none or all."""
    if total == 1:
        raise ConfigError(f"{method} finds 1 of {unit} in each layer, which cannot go; use another method")
    removed = round(amount * total)
    if not 1 <= removed < total:
        raise ConfigError(
            f"{method} {amount} of {total} {unit} would remove {removed}; each layer needs from 1 to {total - 1} "
            f"removed, an amount of about {1 / total:.2g} to {(total - 1) / total:.2g}"
        )
    return removed


def _changed_config(model: PreTrainedModel, method: str, changes: dict[str, Any]) -> Any:
    """Return a copy of the config with ``changes``; an invalid one is refused before any weight is touched."""
    config = copy.deepcopy(model.config)
    try:
        for key, value in changes.items():
            setattr(config, key, value)
    except AttributeError as error:
        raise ModelError(
            f"method {method!r} cannot cut {type(model).__name__}: {key} is no entry of its own"
        ) from error
    try:
        type(config).from_dict(config.to_dict())
    except (StrictDataclassError, ValueError) as error:
        stated = ", ".join(f"{key}={value}" for key, value in changes.items())
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(
            f"method {method!r}: {type(config).__name__} does not allow {stated} ({reason}); try another amount"
        ) from error
    return config


def _cut(model: PreTrainedModel, method: str, config: Any, cut: Callable[[nn.ModuleList], None]) -> None:
    """Cut, and write the changed values into the config that all submodules share.

    Raises:
        ModelError: the config would not describe what is left. No weight has been touched: a copy without any was cut.
    """
    try:
        with torch.device("meta"):
            rehearsed, described = type(model)(copy.deepcopy(model.config)), type(model)(config)
    except ValueError as error:
        raise ModelError(
            f"method {method!r} cannot cut {type(model).__name__} so: {error}; try another amount"
        ) from error
    runs = _error_of(rehearsed) is None  # some do not run without weights
    cut(transformer_blocks(rehearsed))
    rehearsed.config.__dict__.update(config.__dict__)
    found, expected = _sizes(rehearsed), _sizes(described)
    wrong = next((name for name in {**expected, **found} if found.get(name) != expected.get(name)), None)
    reason = f"{wrong} would be {found.get(wrong)}, where its config says {expected.get(wrong)}" if wrong else None
    reason = reason or (_error_of(rehearsed) if runs else None)
    if reason is not None:
        raise ModelError(
            f"method {method!r} cannot cut {type(model).__name__}: {reason}; use another method (unstructured ones "
            "cut every model)"
        )
    cut(transformer_blocks(model))
    model.config.__dict__.update(config.__dict__)


@torch.no_grad()
def _error_of(model: PreTrainedModel) -> str | None:
    """Return why a forward of ``model``, which has no weights, fails; None if it does not."""
    try:
        model.eval()(input_ids=torch.zeros((1, 4), dtype=torch.long, device="meta"))
    except Exception as error:  # whatever a module raises
        return f"its forward would fail ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def _sizes(model: PreTrainedModel) -> dict[str | None, Any]:
    """Return the shapes of a model's weights, and the numbers that its modules have made of its config, by name."""
    found: dict[str | None, Any] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        # Integers are sizes, which a layer may note and not read again, but for the number of layers.
        own = {
            key: value for key, value in vars(module).items() if isinstance(value, float) or key == "num_hidden_layers"
        }
        found |= {f"{name}.{key}": value for key, value in own.items()}
    return found


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the ``count`` largest scores, ascending; ties go to the smaller index."""
    return scores.cpu().argsort(descending=True, stable=True)[:count].sort().values


def _keep(linear: Linear, kept: torch.Tensor, *, outputs: bool) -> None:
    """Keep only these outputs (or inputs) of a linear layer."""
    dim = int(outputs == isinstance(linear, Conv1D))
    kept = kept.to(linear.weight.device)
    _shrink(linear, "weight", kept, dim)
    if outputs and linear.bias is not None:
        _shrink(linear, "bias", kept, 0)
    rows, columns = weight_rows(linear).shape
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = rows, columns
    else:
        linear.out_features, linear.in_features = rows, columns


def _shrink(linear: Linear, name: str, kept: torch.Tensor, dim: int) -> None:
    old = getattr(linear, name)
    setattr(linear, name, nn.Parameter(old.detach().index_select(dim, kept), requires_grad=old.requires_grad))
