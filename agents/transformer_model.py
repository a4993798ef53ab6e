"""A Hugging Face transformer with a part of it pruned away, as an ``nn.Module`` with hidden states.

Zeroed weights (``l1_unstructured``, ``global_unstructured``, ``wanda``) keep the shapes and gain no
speed on ordinary hardware. Structured cuts (``ffn``, ``heads``, ``layers``) make the model smaller
and faster. They remove equal counts from every layer, so that a plain config describes the result
and ``from_pretrained`` loads it anywhere, without this package.

    name, folder or model  ->  prune_  ->  smaller or sparser model, PruningReport
    input_ids (B, T), attention_mask (B, T)  ->  PrunedTransformerModel  ->  hidden (B, T, d)
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from textgen_env.errors import ConfigError, ModelError
from textgen_env.models import model_folder
from textgen_env.registry import Registry

REPORT_FILE = "pruning.json"

Linear = nn.Linear | Conv1D

Text = Sequence[str] | torch.Tensor
"""Texts, or token ids (N, T) without padding."""

Calibration = Callable[[], list[torch.Tensor]]
"""Draws the calibration batches, each (B, T) ids without padding; called by the methods that need them."""

METHODS: Registry[Callable[[PreTrainedModel, float, Calibration], None]] = Registry("pruning method")
"""Name to ``method(model, amount, calibration)``, which prunes in place."""


@dataclass(frozen=True)
class PruningReport:
    """What a pruning did. Parameters are counted once where they are tied."""

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
            f"({self.removed:.1%} removed)"
        )


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
        ModelError: the model cannot be loaded, or lacks what the method removes.
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
        return _blocks(self.model)

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
        zeros, sizes = zip(*_zeros(self.model).values(), strict=True)
        return float(sum(zeros) / sum(sizes))

    def report(self) -> PruningReport:
        """Return what was pruned."""
        return self._report

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model, tokenizer if any, and report, for ``from_pretrained`` here or in transformers."""
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        (Path(folder) / REPORT_FILE).write_text(json.dumps(asdict(self._report), indent=1))

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
    ) -> PrunedTransformerModel:
        """Load what ``save_pretrained`` wrote. Nothing is pruned again.

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
            loaded._report = PruningReport(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, RecursionError) as error:
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
    """Prune ``model`` in place; return it and what was done.

    Cuts can follow one another (``layers``, then ``ffn``); each report counts from its own start.
    Arguments and errors are those of ``PrunedTransformerModel``.
    """
    check_pruning(method, amount)
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; give an encoder or a causal decoder")
    dense_parameters, dense = model.num_parameters(), _zeros(model)
    if amount > 0:
        METHODS[method](model, amount, lambda: _calibration(model, calibration, tokenizer, seed))
    pruned = _zeros(model)
    return model, PruningReport(
        method=method,
        amount=amount,
        dense_parameters=dense_parameters,
        parameters=model.num_parameters(),
        dense_zeros=sum(zeros for zeros, _ in dense.values()),
        zeros=sum(zeros for zeros, _ in pruned.values()),
        sparsity={name: zeros / size for name, (zeros, size) in pruned.items()},
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
    """Whether there is one to load; on the hub there is. (Without files, some classes load empty.)"""
    folder = Path(source)
    return not folder.is_dir() or any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))


def self_written(model: PreTrainedModel, rows: int, length: int, seed: int) -> torch.Tensor:
    """Return text that the causal ``model`` writes: token ids (rows, length), no end token early.

    Each row starts with a token drawn uniformly from the vocabulary and goes on with samples at
    temperature 1, which covers more than the model's favourite openings do.

    Source: data-free calibration of LLM-QAT, Liu et al. 2023, arXiv:2305.17888.
    """
    generate: Any = model.generate
    written = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        openings = torch.randint(model.config.vocab_size, (rows, 1)).to(model.device)
        for first in openings.split(64):  # bounds the cache
            written.append(
                generate(
                    input_ids=first,
                    attention_mask=torch.ones_like(first),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=length - 1,
                    max_new_tokens=length - 1,
                    pad_token_id=0,  # never used: no row ends early
                )
            )
    return torch.cat(written)


# ---------------------------------------------------------------- zeroing weights, shapes unchanged


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
    energy = _input_energy(model, linears, calibration())
    for name, linear in linears.items():
        rows = _rows(linear)  # (out, in)
        score = rows.abs().float() * energy[name].sqrt()
        smallest = score.topk(round(amount * rows.shape[1]), dim=1, largest=False).indices
        rows.scatter_(1, smallest, 0.0)


# ---------------------------------------------------------------- removing structure, a smaller model

FFN_LAYOUTS = (
    # the layers that make the channels, the layer that reads them, their number in the config
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size"),  # Llama, Mistral, Qwen, Gemma
    (("mlp.c_fc",), "mlp.c_proj", "n_inner"),  # GPT-2
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "intermediate_size"),  # GPT-NeoX
    (("fc1",), "fc2", "ffn_dim"),  # OPT
    (("intermediate.dense",), "output.dense", "intermediate_size"),  # BERT, RoBERTa
)

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Config entries with one item a layer."""


@METHODS.register("ffn")
def _ffn(model: PreTrainedModel, amount: float, calibration: Calibration) -> None:
    """Remove the feed-forward channels that carry the least energy into the residual stream."""
    blocks = _blocks(model)
    layout = next((layout for layout in FFN_LAYOUTS if _has(blocks[0], *layout[0], layout[1])), None)
    if layout is None:
        raise ModelError(
            f"method 'ffn' does not know the feed-forward layers of {type(model).__name__}; it knows "
            f"{', '.join(' + '.join((*makers, reader)) for makers, reader, _ in FFN_LAYOUTS)}"
        )
    makers, reader, key = layout
    readers = {str(i): _linear(block, reader) for i, block in enumerate(blocks)}
    channels = _rows(readers["0"]).shape[1]
    removed = _count("ffn", amount, channels, "channels")
    config = _changed_config(model, "ffn", {key: channels - removed})

    energy = _input_energy(model, readers, calibration())
    for i, block in enumerate(blocks):
        kept = _largest(_output_energy(readers[str(i)], energy[str(i)]), channels - removed)
        for maker in makers:
            _keep(_linear(block, maker), kept, outputs=True)
        _keep(readers[str(i)], kept, outputs=False)
    _adopt(model, config)


@METHODS.register("heads")
def _heads(model: PreTrainedModel, amount: float, calibration: Calibration) -> None:
    """Remove whole key-value groups: a key head, a value head, and the query heads that read them."""
    blocks, config = _blocks(model), model.config
    head_dim = getattr(config, "head_dim", None)
    names = tuple(f"self_attn.{part}_proj" for part in "qkvo")
    if head_dim is None or not _has(blocks[0], *names):
        lack = "no head_dim in its config" if head_dim is None else f"not all of {', '.join(names)}"
        raise ModelError(
            f"method 'heads' needs what the Llama family has, and {type(model).__name__} has {lack}: its config "
            "could not describe the smaller model. Use 'ffn' or 'layers'."
        )
    norm = getattr(blocks[0].get_submodule("self_attn"), "q_norm", None)
    if norm is not None and norm.weight.numel() != head_dim:
        raise ModelError(f"{type(model).__name__} normalises all heads together; removing one changes the others")
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    queries = config.num_attention_heads // groups  # query heads a group
    kept_groups = groups - _count("heads", amount, groups, "key-value groups")
    config = _changed_config(
        model, "heads", {"num_attention_heads": kept_groups * queries, "num_key_value_heads": kept_groups}
    )

    readers = {str(i): _linear(block, "self_attn.o_proj") for i, block in enumerate(blocks)}
    energy = _input_energy(model, readers, calibration())
    for i, block in enumerate(blocks):
        per_group = _output_energy(readers[str(i)], energy[str(i)]).view(groups, -1).sum(1)
        kept = _largest(per_group, kept_groups)
        wide = torch.arange(groups * queries * head_dim).view(groups, -1)[kept].flatten()
        narrow = torch.arange(groups * head_dim).view(groups, -1)[kept].flatten()
        _keep(_linear(block, "self_attn.q_proj"), wide, outputs=True)
        _keep(_linear(block, "self_attn.k_proj"), narrow, outputs=True)
        _keep(_linear(block, "self_attn.v_proj"), narrow, outputs=True)
        _keep(readers[str(i)], wide, outputs=False)
    _adopt(model, config)


@METHODS.register("layers")
def _layers(model: PreTrainedModel, amount: float, calibration: Calibration) -> None:
    """Remove the layers that turn their input the least: 1 - E cos(h_in, h_out).

    Source: block influence of ShortGPT, Men et al. 2024, arXiv:2403.03853.
    """
    blocks = _blocks(model)
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError("this GPT-2 scales attention by the layer's index; removing layers would change the rest")
    removed = _count("layers", amount, len(blocks), "layers")
    kept = _largest(_influence(model, blocks, calibration()), len(blocks) - removed).tolist()
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key in PER_LAYER:
        if getattr(model.config, key, None):
            changes[key] = [getattr(model.config, key)[i] for i in kept]
    config = _changed_config(model, "layers", changes)

    survivors = [blocks[i] for i in kept]
    del blocks[:]
    blocks.extend(survivors)
    for i, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.__dict__["layer_idx"] = i  # its slot in the KV cache
    _adopt(model, config)


# ---------------------------------------------------------------- what the methods share


def _linears(model: PreTrainedModel) -> dict[str, Linear]:
    """The prunable layers by name: every linear one but the output embedding (tied to the input's)."""
    body: nn.Module = model.base_model
    return {name: module for name, module in body.named_modules() if isinstance(module, Linear)}


def _linear(block: nn.Module, name: str) -> Linear:
    layer = block.get_submodule(name)
    if not isinstance(layer, Linear):
        raise ModelError(
            f"{name} is a {type(layer).__name__}; only plain linear layers can be cut (not quantised ones)"
        )
    return layer


def _rows(linear: Linear) -> torch.Tensor:
    """The weight as (out, in); GPT-2 keeps it transposed."""
    weight = linear.weight.data
    return weight.T if isinstance(linear, Conv1D) else weight


def _zeros(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Zeros and size of every prunable weight."""
    weights = {name: _rows(linear) for name, linear in _linears(model).items()}
    return {name: (weight.numel() - int(weight.count_nonzero()), weight.numel()) for name, weight in weights.items()}


def _has(block: nn.Module, *names: str) -> bool:
    """Whether the block has all these submodules."""
    known = {name for name, _ in block.named_modules()}
    return known.issuperset(names)


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of layers, which every architecture names differently."""
    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(model).__name__} keeps no list of its {count} layers (it may share their weights); "
        "use an unstructured method"
    )


def _count(method: str, amount: float, total: int, what: str) -> int:
    """How many of ``total`` units ``amount`` removes: the nearest count, never none or all."""
    if total == 1:
        raise ConfigError(f"{method} finds 1 of {what} in each layer, which cannot go; use another method")
    removed = round(amount * total)
    if not 1 <= removed < total:
        raise ConfigError(
            f"{method} {amount} of {total} {what} would remove {removed}; each layer needs from 1 to {total - 1} "
            f"removed, an amount of about {1 / total:.2g} to {(total - 1) / total:.2g}"
        )
    return removed


def _changed_config(model: PreTrainedModel, method: str, changes: dict[str, Any]) -> Any:
    """A copy of the config with ``changes``, refused before any weight is touched if it is not valid."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    try:
        type(config).from_dict(config.to_dict())
    except (StrictDataclassError, ValueError) as error:
        stated = ", ".join(f"{key}={value}" for key, value in changes.items())
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(
            f"method {method!r}: {type(config).__name__} does not allow {stated} ({reason}); try another amount"
        ) from error
    return config


def _adopt(model: PreTrainedModel, config: Any) -> None:
    """Write the changed values into the config that all submodules share."""
    model.config.__dict__.update(config.__dict__)


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest scores, ascending; ties go to the smaller index."""
    return scores.cpu().argsort(descending=True, stable=True)[:count].sort().values


def _keep(linear: Linear, kept: torch.Tensor, *, outputs: bool) -> None:
    """Keep only these outputs (or inputs) of a linear layer."""
    dim = int(outputs == isinstance(linear, Conv1D))
    kept = kept.to(linear.weight.device)
    _shrink(linear, "weight", kept, dim)
    if outputs and linear.bias is not None:
        _shrink(linear, "bias", kept, 0)
    rows, columns = _rows(linear).shape
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = rows, columns
    else:
        linear.out_features, linear.in_features = rows, columns


def _shrink(linear: Linear, name: str, kept: torch.Tensor, dim: int) -> None:
    old = getattr(linear, name)
    setattr(linear, name, nn.Parameter(old.detach().index_select(dim, kept), requires_grad=old.requires_grad))


# ---------------------------------------------------------------- calibration


def _calibration(model: PreTrainedModel, text: Text | None, tokenizer: Any, seed: int) -> list[torch.Tensor]:
    """Token ids to measure activations on: batches (B, T) without padding."""
    if text is None:
        if not model.can_generate():
            raise ConfigError(f"{type(model).__name__} cannot write its own calibration text; pass calibration=[...]")
        text = self_written(model, rows=32, length=128, seed=seed)
    batches = token_batches(text, tokenizer, max_length=128, batch_size=8)
    return [batch.to(model.device) for batch in batches]


def token_batches(text: Text, tokenizer: Any, max_length: int, batch_size: int) -> list[torch.Tensor]:
    """Return ids without padding: rows of a tensor (B, T) at a time, or one text (1, T) at a time.

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
    return [
        tokenizer(line, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
        for line in text
        if line.strip()
    ]


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
    model.eval()  # dropout would blur what is measured
    for ids in batches:
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.train(was_training)


def _input_energy(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], batches: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """For each layer, ||x_j||^2 of every input j over all calibration tokens: (in,) float32."""
    energy: dict[str, torch.Tensor] = {}

    def see(name: str, inputs: torch.Tensor, output: Any) -> None:
        squares = inputs.float().square().flatten(0, -2).sum(0)
        energy[name] = energy[name] + squares if name in energy else squares

    with _hooked(modules, see):
        _run(model, batches)
    return energy


def _output_energy(reader: Linear, energy: torch.Tensor) -> torch.Tensor:
    """What each input of a layer adds to its output: ||x_j||^2 ||W_:j||^2, (in,)."""
    return energy * _rows(reader).float().square().sum(0)


def _influence(model: PreTrainedModel, blocks: nn.ModuleList, batches: list[torch.Tensor]) -> torch.Tensor:
    """For each block 1 - cos(h_in, h_out), mean over the calibration tokens: (L,)."""
    turned = torch.zeros(len(blocks), dtype=torch.float64)
    tokens = sum(ids.numel() for ids in batches)

    def see(name: str, inputs: torch.Tensor, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        cosine = nn.functional.cosine_similarity(inputs.float(), after.float(), dim=-1)
        turned[int(name)] += (1 - cosine).sum().double().cpu()

    with _hooked({str(i): block for i, block in enumerate(blocks)}, see):
        _run(model, batches)
    return turned / tokens
