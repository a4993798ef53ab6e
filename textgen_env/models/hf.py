"""Hugging Face causal language models behind ``LanguageModel``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from textgen_env.config import check_at_least
from textgen_env.errors import CapacityError, ConfigError, ModelError
from textgen_env.models.agreement import Reach, agreeing_decoder
from textgen_env.models.base import LanguageModel, special_ids
from textgen_env.models.device import available_bytes, compute_alone_after_fork, forward_lock, release_freed_memory
from textgen_env.models.forward import Forward, no_cache
from textgen_env.models.generic import GenericDecoder
from textgen_env.models.llama import LlamaDecoder
from textgen_env.models.packing import Decoder, PackedDecoder
from textgen_env.models.parts import ModuleParts
from textgen_env.models.slots import HFSlots
from textgen_env.models.stateful import WAYS, StatefulDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNLIMITED = 1 << 30
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""Names under which configurations say how many positions a model knows."""
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "attention_window_size")
"""Names under which configurations say how far a layer sees."""
LONGROPE = "original_max_position_embeddings"
SELECTIONS = ("index_topk", "keep_window_size")
"""Names under which configurations say how many earlier tokens a layer picks: ties make cached picks differ."""

compute_alone_after_fork()


class HFModel(LanguageModel):
    """A causal LM and its tokenizer, as loaded by ``from_pretrained``.

    The module is put into eval mode and otherwise left alone; it goes on working for its owner.
    Weights that change (an optimiser's step, ``load_state_dict``), and parameters and modules that are
    replaced (pruning, LoRA), are noticed before the next proposal, and what older ones computed is
    forgotten; ``textgen_env.models.parts`` says what leaves no trace. The first forward is checked against
    the model's own, so an architecture that the engine gets wrong is refused, not guessed. Tokens that the
    generation config suppresses are not proposed.

    Args:
        model: The causal LM, on any device, in any floating dtype.
        tokenizer: Its tokenizer.
        name: Shown in error messages and logs.
        memo_bytes: Bound of the memory of each ``slots``: half for proposals of prefixes seen
            before, half for the keys and values of prompts. 0 remembers nothing.
        relayout: The module's weights may be laid out anew in memory, which saves a copy of them. Its values
            stay, and it goes on working; its forward may differ in the last bits.

    Memory of ``slots(rows, length, k)``, see ``slots_bytes``:
        rows * length * layers * kv_heads * (key_size + value_size) * bytes per number
        (on a cache of the model's own: what it keeps, twice)
        + rows * vocabulary * bytes per number (logits) + 8 MB (scratch of the candidates) + memo_bytes.

    Raises:
        ModelError: no tokenizer, no end-of-text token, or no way to run the model agrees with its own uncached
            forward: each way and its reason.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        memo_bytes: int = 64 << 20,
        relayout: bool = False,
    ) -> None:
        self.name = name or model.config.name_or_path or type(model).__name__
        if tokenizer is None:
            raise ModelError(f"model {self.name!r} has no tokenizer; pass the one it was trained with")
        check_at_least("memo_bytes", memo_bytes, 0)
        self.model, self.tokenizer, self.memo_bytes = model.eval(), tokenizer, memo_bytes
        self.vocab_size, self.hidden_size = _output_sizes(model)
        embedding: Any = self._written_embedding(model)
        if not isinstance(getattr(embedding, "weight", None), torch.Tensor):
            raise ModelError(f"{type(model).__name__} embeds no single stream of tokens: it does not write text")
        self.embedding_size = embedding.weight.shape[-1]
        self._relayout = relayout
        config = model.config.get_text_config(decoder=True)
        self.max_context = positions_of(model, config)
        self._windows, self._cache_limits = _sizes(config, WINDOWS), _cache_limits(config)
        self.end_ids = _end_ids(model, tokenizer, self.name)
        _check_forced(model, self.name)
        banned = [i for i in _token_list(model, "bad_words_ids") if i not in self.end_ids]  # as ``generate`` has it
        self.suppressed = (*_token_list(model, "suppress_tokens"), *banned)
        self.suppressed_first = _token_list(model, "begin_suppress_tokens")
        self._token_bytes = _byte_level_tokens(tokenizer, self.vocab_size)
        self._token_text = [_decoded(token) for token in self._token_bytes or []]
        self._appends_end = appends_end(tokenizer, self.end_ids)
        with forward_lock(model):
            self._choose_decoder()
        release_freed_memory()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deep copy: the same model and tokenizer, wrapped anew."""
        return partial(type(self), name=self.name, memo_bytes=self.memo_bytes), (self.model, self.tokenizer)

    def _choose_decoder(self) -> None:
        if _output_sizes(self.model) != (self.vocab_size, self.hidden_size):
            raise ModelError(f"the vocabulary or width of model {self.name!r} has changed: make the environment anew")
        self._further: dict[Reach, Decoder] = {}
        vars(self).pop("_forward", None)  # of older weights
        self.decoder = agreeing_decoder(self, self._windows)
        self._parts = ModuleParts(self.model)

    @cached_property
    def _forward(self) -> Forward:
        """The module's own forward, with weights as they are now."""
        return Forward(self.model)

    def _written_embedding(self, model: Any) -> Any:
        """Return the module that embeds the tokens that are written."""
        return model.get_input_embeddings()

    def encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if self._appends_end else ids

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def continuations(self, prompt_ids: Sequence[int], ids: Sequence[int], candidates: Sequence[int]) -> list[str]:
        if self._token_bytes is not None:
            known = self._token_bytes
            prefix = b"".join([known[i] for i in ids])
            return [(prefix + known[c]).decode("utf-8", "replace") for c in candidates]
        # Other tokenizers strip a leading space at the start of a text: decode after the prompt.
        before = self.decode(prompt_ids)
        texts = [self.decode([*prompt_ids, *ids, c]) for c in candidates]
        return [
            text[len(before) :] if text.startswith(before) else self.decode([*ids, c])
            for text, c in zip(texts, candidates, strict=True)
        ]

    def extended(self, completion: str, token: int) -> str | None:
        # A text that ends in the replacement character may end within a character.
        if self._token_bytes is None or completion.endswith("\ufffd"):
            return None
        text = self._token_text[token]
        return None if text is None else completion + text

    @torch.inference_mode()
    def embed(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        weight = self._written_embedding(self.model).weight
        rows = torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(weight.device)
        return weight[rows].float().cpu().numpy()

    def slots(self, rows: int, length: int, k: int | None) -> HFSlots:
        most = self.vocab_size - len({*self.end_ids, *self.suppressed, *self.suppressed_first})
        if k is not None and not 1 <= k <= most:
            raise ConfigError(f"top_k must be in 1..{most} (vocabulary without end and suppressed tokens), got {k}")
        if rows < 1:
            raise ConfigError(f"rows must be at least 1, got {rows}")
        if not 1 <= length <= self.max_context:
            raise ConfigError(f"a row of model {self.name!r} holds 1..{self.max_context} tokens, got length={length}")
        needed, free = self.slots_bytes(rows, length), available_bytes(self.decoder.device)
        if needed > free:
            raise CapacityError(
                f"{rows} rows of {length} tokens need {needed:,} bytes and {free:,} are free: "
                "use fewer rows or shorter texts"
            )
        slots = self.open_slots(self.decoder_for(length), rows, length, k, self.memo_bytes)
        slots.current = partial(self.decoder_for, length)
        slots.suppressed, slots.suppressed_first = self.suppressed, self.suppressed_first
        return slots

    def open_slots(self, decoder: Decoder, rows: int, length: int, k: int | None, memo_bytes: int) -> HFSlots:
        """Open rows on a decoder of this model, unchecked: ``slots`` chooses the decoder and checks the arguments."""
        return HFSlots(self, decoder, rows, length, k, memo_bytes)

    def candidate_decoders(self, reach: Reach) -> Iterator[partial[Any]]:
        """Return functions that make decoders of this model, fastest first."""
        if reach is Reach.NEAR and LlamaDecoder.fits(self.model):
            yield partial(LlamaDecoder, self.model, relayout=self._relayout)
        if reach is Reach.NEAR:
            yield partial(GenericDecoder, self._forward)
        for way in WAYS:
            if reach is not Reach.UNCACHED or not way.cached:
                yield partial(StatefulDecoder, self._forward, way)

    def check_prompt(self, ids: Sequence[int], length: int) -> list[int]:
        """Return a prompt of ``length`` tokens for a row whose text goes on with ``ids``."""
        return list(ids[:length])

    @torch.inference_mode()
    def uncached(self, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        """Return the logits (V,) of the token behind ``ids``, from the model's own forward over all of them."""
        given = torch.tensor([list(ids)], device=self.model.device)
        logits: torch.Tensor = self.model(input_ids=given, **no_cache(self.model)).logits[0, -1]
        return logits

    def decoder_for(self, length: int) -> Decoder:
        """Return the decoder of the weights as they are now, for texts of up to ``length`` tokens.

        Beyond the smallest window it is one that sees windows; where cached tokens no longer fit, one without a cache.

        Raises:
            ModelError: none agrees with the model there.
        """
        if self._parts.have_changed():
            with forward_lock(self.model):
                if self._parts.have_changed():
                    self._choose_decoder()
        if length > min(self._cache_limits, default=length):
            reach = Reach.UNCACHED
        elif length > min(self._windows, default=length) and isinstance(self.decoder, PackedDecoder):
            reach = Reach.WINDOWS
        else:
            return self.decoder
        further = self._further  # of these weights
        if reach not in further:
            with forward_lock(self.model):
                further[reach] = agreeing_decoder(self, self._windows, reach)
        return further[reach]

    def slots_bytes(self, rows: int, length: int) -> int:
        """Return the bytes that ``slots(rows, length, k)`` takes at most."""
        decoder = self.decoder_for(length)
        logits = rows * self.vocab_size * decoder.dtype.itemsize
        return decoder.cache_bytes(rows, length) + logits + (8 << 20) + self.memo_bytes


# --- properties of a model and a tokenizer

FORCED = ("forced_decoder_ids", "bad_words_ids", "sequence_bias")
"""Settings of a generation config that change what a model writes, and that the environment does not follow."""
FORCED_ENDS = ("forced_bos_token_id", "forced_eos_token_id")
"""The same for causal models: the decoder of an encoder-decoder begins with the first, and its texts have a budget."""


def _check_forced(model: Any, name: str) -> None:
    """Raise ``ModelError`` if a generation config forces or forbids tokens in a way that is not followed."""
    config: Any = getattr(model, "generation_config", None)
    own = FORCED if model.config.is_encoder_decoder else (*FORCED_ENDS, *FORCED)
    forced = [key for key in own if getattr(config, key, None) is not None]
    if forced == ["bad_words_ids"] and all(len(word) == 1 for word in config.bad_words_ids):
        return  # words of one token are suppressed
    if forced:
        raise ModelError(
            f"the generation config of model {name!r} has {forced[0]}={getattr(config, forced[0])!r}, which the "
            f"environment does not follow: set model.generation_config.{forced[0]} = None to go without"
        )


def positions_of(model: Any, config: Any) -> int:
    """Return the positions that the model knows, in tokens."""
    limits = [getattr(config, name, None) for name in POSITIONS]
    found = min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=UNLIMITED)
    for module in model.modules():  # a table of positions may begin behind a place for padding
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == found and module.padding_idx is not None:
            return found - module.padding_idx - 1
    return found


def _sizes(config: Any, names: Sequence[str]) -> list[int]:
    """Return the sizes that a configuration has under these names."""
    sizes = [getattr(config, name, None) for name in names]
    return [size for size in sizes if isinstance(size, int) and size > 0]


def _cache_limits(config: Any) -> list[int]:
    """Return how many tokens a text may have before those in a cache no longer are what a whole forward computes.

    Beyond ``original_max_position_embeddings`` the factors of longrope change for the whole text.
    """
    rope = getattr(config, "rope_parameters", None) or {}  # of all layers, or by their kind
    long = [own for own in (rope, *rope.values()) if isinstance(own, dict) and own.get("rope_type") == "longrope"]
    known = [limit for rope in long for limit in (rope.get(LONGROPE), getattr(config, LONGROPE, None))]
    return [*_sizes(config, SELECTIONS), *(limit for limit in known if isinstance(limit, int) and limit > 0)]


def appends_end(tokenizer: Any, end_ids: Sequence[int]) -> bool:
    """Return True if the tokenizer ends every text with an end token: a text that goes on must not have it."""
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return len(ids) > len(plain) > 0 and ids[-1] in end_ids and plain[-1] not in end_ids


def _output_sizes(model: Any) -> tuple[int, int]:
    """Return the numbers of logits and of hidden units behind them.

    Raises:
        ModelError: the model has no output over a vocabulary.
    """
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is not None and weight.dim() == 2:
        return len(weight), weight.shape[1]
    config = model.config.get_text_config(decoder=True)
    vocab, hidden = getattr(config, "vocab_size", None), getattr(config, "hidden_size", None)
    if not isinstance(vocab, int) or not isinstance(hidden, int):
        raise ModelError(f"{type(model).__name__} has no output embedding: a causal language model is needed")
    return vocab, hidden


def _end_ids(model: Any, tokenizer: Any, name: str) -> tuple[int, ...]:
    sources = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    found: set[int] = set()
    for source in sources:
        ends = getattr(source, "eos_token_id", None)
        found.update([ends] if isinstance(ends, int) else ends or [])
    if "<|endoftext|>" in tokenizer.all_special_tokens:
        found.add(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    known = tuple(sorted(i for i in found if 0 <= i < _output_sizes(model)[0]))
    if not known:
        raise ModelError(
            f"model {name!r} has no end-of-text token: set tokenizer.eos_token or model.generation_config.eos_token_id"
        )
    return known


def _token_list(model: Any, name: str) -> tuple[int, ...]:
    """Return tokens that the generation settings list under ``name``, plain or as words of one token."""
    listed = getattr(getattr(model, "generation_config", None), name, None) or []
    tokens = [word[0] if isinstance(word, list) else word for word in listed]
    return tuple(i for i in tokens if 0 <= i < _output_sizes(model)[0])


def _byte_level_tokens(tokenizer: Any, vocab_size: int) -> list[bytes] | None:
    """Return the bytes of every token of a byte-level tokenizer, else None. Special ones are empty."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ != "ByteLevel":
        return None
    # GPT-2's alphabet: bytes that print stand for themselves, the others come after code point 255.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    alphabet = {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}
    special = special_ids(tokenizer)
    tokens = [b""] * vocab_size
    for text, i in tokenizer.get_vocab().items():
        if i < vocab_size and i not in special:
            known = all(c in alphabet for c in text)
            tokens[i] = bytes(alphabet[c] for c in text) if known else text.encode()
    return tokens


def _decoded(token: bytes) -> str | None:
    """Return the text of a token, or None if it is a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None
