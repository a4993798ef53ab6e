"""Hugging Face causal language models behind ``LanguageModel``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from textgen_env.config import check_at_least
from textgen_env.errors import CapacityError, ConfigError, ModelError
from textgen_env.models.base import LanguageModel
from textgen_env.models.cache import KeyValues
from textgen_env.models.device import available_bytes, compute_alone_after_fork, forward_lock, release_freed_memory
from textgen_env.models.generic import GenericDecoder
from textgen_env.models.llama import LlamaDecoder
from textgen_env.models.packing import Decoder
from textgen_env.models.slots import HFSlots

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNLIMITED = 1 << 30
WINDOWS = ("max_position_embeddings", "sliding_window", "window_size", "attention_chunk_size", "attention_window_size")
"""Names under which configurations say how far a layer sees."""
LONGROPE = "original_max_position_embeddings"

compute_alone_after_fork()


class HFModel(LanguageModel):
    """A causal LM and its tokenizer, as loaded by ``from_pretrained``.

    The module is put into eval mode and otherwise left alone; it goes on working for its owner.
    Weights that change in place (an optimiser's step, ``load_state_dict``) are noticed before the next
    proposal, and what older ones computed is forgotten; a write to ``weight.data`` in place leaves no
    trace. The first forward is checked against the model's own, so an architecture that the engine
    gets wrong is refused, not guessed. Tokens that the generation config suppresses are not proposed.

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
        + rows * vocabulary * bytes per number (logits) + 8 MB (scratch of the candidates) + memo_bytes.

    Raises:
        ModelError: no tokenizer, no end-of-text token, or an architecture that caches something
            other than keys and values for each token.
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
        self.vocab_size, self.hidden_size = _head_weight(model).shape
        embedding: Any = model.get_input_embeddings()
        self._embeddings: torch.Tensor = embedding.weight
        self.embedding_size = self._embeddings.shape[-1]
        self._relayout = relayout
        self._weights = [weight for weight in model.parameters() if not weight.is_inference()]  # those have no version
        self.max_context = _max_context(model.config.get_text_config())
        self.end_ids = _end_ids(model, tokenizer, self.name)
        self._token_bytes = _byte_level_tokens(tokenizer, self.vocab_size)
        self._token_text = [_decoded(token) for token in self._token_bytes or []]
        self._appends_end = _appends_end(tokenizer, self.end_ids)
        self._suppressed, self._begin_suppressed = _suppressed(model, self.name, self.vocab_size)
        with forward_lock(model):
            self.decoder = _agreeing_decoder(self, relayout)
            self._seen = self._versions()
        release_freed_memory()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deep copy: the same model and tokenizer, wrapped anew."""
        return _wrapped, (self.model, self.tokenizer, self.name, self.memo_bytes)

    def current_decoder(self) -> Decoder:
        """Return the decoder of the weights as they are now."""
        if self._versions() != self._seen:
            with forward_lock(self.model):
                if self._versions() != self._seen:
                    self.decoder = _agreeing_decoder(self, self._relayout)
                    self._seen = self._versions()
        return self.decoder

    def _versions(self) -> list[tuple[int, int]]:
        """Return where each weight is and how often it has been written to: cheap, and no look at its numbers."""
        return [(weight.data_ptr(), weight._version) for weight in self._weights]

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
        rows = torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(self._embeddings.device)
        return self._embeddings[rows].float().cpu().numpy()

    def slots(self, rows: int, length: int, k: int | None) -> HFSlots:
        never = {*self.end_ids, *self._suppressed, *self._begin_suppressed}
        most = self.vocab_size - len(never)
        if k is not None and not 1 <= k <= most:
            raise ConfigError(f"top_k must be in 1..{most} (vocabulary without end and suppressed tokens), got {k}")
        if rows < 1:
            raise ConfigError(f"rows must be at least 1, got {rows}")
        if not 1 <= length <= self.max_context:
            raise ConfigError(f"a row of model {self.name!r} holds 1..{self.max_context} tokens, got length={length}")
        needed, free = self.slots_bytes(rows, length), available_bytes(self.decoder.shape.device)
        if needed > free:
            raise CapacityError(
                f"{rows} rows of {length} tokens need {needed:,} bytes and {free:,} are free: "
                "use fewer rows or shorter texts"
            )
        return HFSlots(
            self,
            self.current_decoder(),
            rows,
            length,
            k,
            self.memo_bytes,
            current=self.current_decoder,
            suppressed=self._suppressed,
            begin_suppressed=self._begin_suppressed,
        )

    def slots_bytes(self, rows: int, length: int) -> int:
        """Return the bytes that ``slots(rows, length, k)`` takes at most."""
        shape = self.decoder.shape
        logits = rows * self.vocab_size * shape.dtype.itemsize
        return rows * KeyValues.rounded(length) * shape.token_bytes + logits + (8 << 20) + self.memo_bytes


def _wrapped(model: Any, tokenizer: Any, name: str, memo_bytes: int) -> HFModel:
    return HFModel(model, tokenizer, name=name, memo_bytes=memo_bytes)


# --- properties of a model and a tokenizer

FORCED = ("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "bad_words_ids", "sequence_bias")
"""Settings of a generation config that change what a model writes, and that the environment does not follow."""


def _suppressed(model: Any, name: str, vocab_size: int) -> tuple[list[int], list[int]]:
    """Return the tokens that the generation config suppresses always, and at the beginning.

    Raises:
        ModelError: it forces or forbids others, in a way that the environment does not follow.
    """
    config = getattr(model, "generation_config", None)
    own = () if model.config.is_encoder_decoder else FORCED
    forced = [key for key in own if getattr(config, key, None) is not None]
    if forced:
        raise ModelError(
            f"the generation config of model {name!r} has {forced[0]}={getattr(config, forced[0])!r}, which the "
            f"environment does not follow: set model.generation_config.{forced[0]} = None to go without"
        )
    always, first = (getattr(config, key, None) or [] for key in ("suppress_tokens", "begin_suppress_tokens"))
    return [i for i in always if 0 <= i < vocab_size], [i for i in first if 0 <= i < vocab_size]


def _max_context(config: Any) -> int:
    """Tokens that the model attends to from its last one: positions it knows, or the smallest window of a layer.

    Beyond ``original_max_position_embeddings`` the factors of longrope change for the whole text,
    those of cached keys included, so such a model stops there.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, name, None) for name in WINDOWS]
    if rope.get("rope_type") == "longrope":
        limits += [rope.get(LONGROPE), getattr(config, LONGROPE, None)]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=UNLIMITED)


def _appends_end(tokenizer: Any, end_ids: Sequence[int]) -> bool:
    """Return True if the tokenizer ends every text with an end token: a text that goes on must not have it."""
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return len(ids) > len(plain) > 0 and ids[-1] in end_ids and plain[-1] not in end_ids


def _head_weight(model: Any) -> torch.Tensor:
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embedding: a causal language model is needed")
    weight: torch.Tensor = head.weight
    return weight


def _end_ids(model: Any, tokenizer: Any, name: str) -> tuple[int, ...]:
    sources = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    found: set[int] = set()
    for source in sources:
        ends = getattr(source, "eos_token_id", None)
        found.update([ends] if isinstance(ends, int) else ends or [])
    if "<|endoftext|>" in tokenizer.all_special_tokens:
        found.add(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    known = tuple(sorted(i for i in found if 0 <= i < len(_head_weight(model))))
    if not known:
        raise ModelError(
            f"model {name!r} has no end-of-text token: set tokenizer.eos_token or model.generation_config.eos_token_id"
        )
    return known


def _byte_level_tokens(tokenizer: Any, vocab_size: int) -> list[bytes] | None:
    """Return the bytes of every token of a byte-level tokenizer, else None. Special ones are empty."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ != "ByteLevel":
        return None
    # GPT-2's alphabet: bytes that print stand for themselves, the others come after code point 255.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    alphabet = {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}
    special = set(tokenizer.all_special_ids)
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


def _agreeing_decoder(model: HFModel, relayout: bool) -> Decoder:
    """Return the fastest decoder that agrees with the model's own uncached forward.

    Raises:
        ModelError: none does.
    """
    kinds: list[Callable[[Any], Decoder]] = [GenericDecoder]
    if LlamaDecoder.fits(model.model):
        kinds.insert(0, partial(LlamaDecoder, relayout=relayout))
    allowed = 1e-3 if model.model.dtype in (torch.float32, torch.float64) else 0.15
    for kind in kinds:
        decoder = kind(model.model)
        gap = _disagreement(model, decoder)
        if gap <= allowed:
            return decoder
    raise ModelError(
        f"the cached forward of {type(model.model).__name__} differs from its own uncached one by {gap:.1%} "
        f"(at most {allowed:.1%} is rounding): this architecture is not supported"
    )


@torch.inference_mode()
def _disagreement(model: HFModel, decoder: Decoder) -> float:
    """Return how far short texts, written in ragged rows, are from the uncached forward, relative to its spread.

    A decoder with a forward of its own for single rows also writes a row alone. The texts are plain
    language: on special tokens, half precision differs from itself.
    """
    ids = [*model.encode("The old man went down to the"), *range(8)][:6]
    try:
        # All texts are beginnings of one, so its forward gives the expected values of each.
        uncached = model.model(input_ids=torch.tensor([ids], device=decoder.shape.device)).logits[0]
        expected = uncached.float().log_softmax(-1).cpu().numpy()
        courses = [(3, 1), (3,)] if decoder.alone else [(3, 1)]
        return max(_largest_gap(model, decoder, ids, expected, lengths) for lengths in courses)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(model.model).__name__} cannot run on a cache with a row for each text: {error}"
        ) from error


def _largest_gap(
    model: HFModel, decoder: Decoder, ids: Sequence[int], expected: npt.NDArray[np.float32], lengths: Sequence[int]
) -> float:
    """Return the largest gap to ``expected`` (T, V) of rows that begin with ``lengths`` of the ``ids`` (T,)."""
    # Without a memo, which would answer where a prefix comes back.
    slots = HFSlots(model, decoder, rows=len(lengths), length=len(ids), k=None, memo_bytes=0)
    rows, gaps = np.arange(len(lengths)), []
    slots.start(rows, [ids[:length] for length in lengths])
    for step in range(3):
        found = slots.propose(rows, np.zeros(len(rows), bool)).logprobs
        for row, length in enumerate(lengths):
            target = expected[length + step - 1]
            spread = float(np.linalg.norm(target - target.mean()))
            gaps.append(float(np.linalg.norm(found[row] - target)) / max(spread, 1e-6))
        slots.advance(rows, np.array([ids[length + step] for length in lengths]))
    return max(gaps)
