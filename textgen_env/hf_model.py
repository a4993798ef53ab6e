"""Hugging Face causal language models behind ``LanguageModel``: slots, a KV cache, and a memo.

A row of slots is its token ids and the number of them whose keys and values are cached. To start,
advance or fork a row only changes these; ``propose`` feeds each row the ids that its cache lacks,
all rows in one forward. So a row whose proposals are remembered can skip the forward, and is
caught up in one chunk when it meets a new prefix.

    ids (R, T), length (R,), cached (R,)  ->  length - cached tokens a row  ->  decoder  ->  Proposals
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from textgen_env.candidates import top_candidates
from textgen_env.decoders import Batch, Decoder, GenericDecoder, Group, KeyValues, LlamaDecoder
from textgen_env.device import available_bytes
from textgen_env.errors import CapacityError, ConfigError, ModelError, PromptError, ResetNeeded
from textgen_env.language_model import LanguageModel, Proposals, Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNLIMITED = 1 << 30
Rows = npt.NDArray[np.int64]
T = TypeVar("T")


class HFModel(LanguageModel):
    """A causal LM and its tokenizer, as loaded by ``from_pretrained``.

    The module is put into eval mode and otherwise left alone; it goes on working for its owner.
    Its weights are read once: wrap it again after changing them. The first forward is checked
    against the model's own, so an architecture that the engine gets wrong is refused, not guessed.

    Args:
        model: The causal LM, on any device, in any floating dtype.
        tokenizer: Its tokenizer.
        name: Shown in error messages and logs.
        memo_bytes: Bound of what each ``slots`` remembers: half for proposals of prefixes seen
            before, half for the keys and values of prompts. 0 remembers nothing.

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
    ) -> None:
        self.name = name or model.config.name_or_path or type(model).__name__
        if tokenizer is None:
            raise ModelError(f"model {self.name!r} has no tokenizer; pass the one it was trained with")
        if memo_bytes < 0:
            raise ConfigError(f"memo_bytes must not be negative, got {memo_bytes}")
        head: Any = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(model).__name__} has no output embedding: a causal language model is needed")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.memo_bytes = memo_bytes
        self.vocab_size, self.hidden_size = head.weight.shape
        embedding: Any = model.get_input_embeddings()
        self._embeddings: torch.Tensor = embedding.weight
        self.embedding_size = self._embeddings.shape[-1]
        self.max_context = _max_context(model.config.get_text_config())
        self.end_ids = _end_ids(model, tokenizer)
        if not self.end_ids:
            raise ModelError(
                f"model {self.name!r} has no end-of-text token: set tokenizer.eos_token or "
                "model.generation_config.eos_token_id"
            )
        self._token_bytes = _byte_level_tokens(tokenizer, self.vocab_size)
        self._token_text = [_decoded(token) for token in self._token_bytes or []]
        self.decoder = _agreeing_decoder(self)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

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
        most = self.vocab_size - len(self.end_ids)
        if k is not None and not 1 <= k <= most:
            raise ConfigError(f"top_k must be in 1..{most} (vocabulary without end tokens), got {k}")
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
        return HFSlots(self, self.decoder, rows, length, k)

    def slots_bytes(self, rows: int, length: int) -> int:
        """Return the bytes that ``slots(rows, length, k)`` takes at most."""
        shape = self.decoder.shape
        logits = rows * self.vocab_size * shape.dtype.itemsize
        return rows * KeyValues.rounded(length) * shape.token_bytes + logits + (8 << 20) + self.memo_bytes


@dataclass(frozen=True)
class SavedRow:
    """A row taken out of its slots: ids, and the keys and values cached for them."""

    owner: HFModel
    ids: npt.NDArray[np.int32]
    prompt_length: int
    key_values: tuple[torch.Tensor, torch.Tensor]


class HFSlots(Slots):
    """Rows of text with a KV cache. See ``Slots`` for the contract."""

    def __init__(self, model: HFModel, decoder: Decoder, rows: int, length: int, k: int | None) -> None:
        self.model = model
        self.rows = rows
        self.length = length
        self.k = k
        self._decoder = decoder
        self._ids = np.zeros((rows, length), np.int32)
        self._held = np.zeros(rows, np.int64)  # tokens of each row
        self._cached = np.zeros(rows, np.int64)  # how many of them have keys and values
        self._prompt = np.zeros(rows, np.int64)  # how many of them are the prompt
        self._memo: _Bounded[npt.NDArray[np.float32]] = _Bounded(model.memo_bytes // 2)
        self._prompts: _Bounded[tuple[torch.Tensor, torch.Tensor]] = _Bounded(model.memo_bytes // 2)
        self.cache = KeyValues(decoder.shape, rows, length)

    # --- bookkeeping

    def start(self, rows: Rows, prompts: Sequence[Sequence[int]]) -> None:
        self._check_rows(rows)
        arrays = [np.asarray(prompt, np.int64) for prompt in prompts]
        for ids in arrays:
            if not len(ids):
                raise PromptError("a prompt needs at least one token")
            if len(ids) > self.length:
                raise CapacityError(f"a row holds at most {self.length} tokens, got a prompt of {len(ids)}")
            self._check_ids(ids)
        for row, ids in zip(rows, arrays, strict=True):
            self._ids[row, : len(ids)] = ids
            self._held[row] = self._prompt[row] = len(ids)
            self._cached[row] = 0
            known = self._prompts.get(self._key(row, len(ids)))
            if known is not None:
                self.cache.write(row, known)
                self._cached[row] = len(ids)

    def advance(self, rows: Rows, tokens: npt.NDArray[np.int64]) -> None:
        self._check_rows(rows, started=True)
        self._check_ids(tokens)
        held = self._held[rows]
        if (held >= self.length).any():
            raise CapacityError(f"row {rows[held.argmax()]} is full: it holds all of its {self.length} tokens")
        self._ids[rows, held] = tokens
        self._held[rows] = held + 1

    def fork(self, src: Rows, dst: Rows) -> None:
        self._check_rows(src, started=True)
        self._check_rows(dst)
        for array in (self._ids, self._held, self._prompt):
            array[dst] = array[src]
        self._copy(src, dst)

    def save(self, row: int) -> SavedRow:
        self._check_rows(np.array([row]), started=True)
        ids = self._ids[row, : self._held[row]].copy()
        return SavedRow(self.model, ids, int(self._prompt[row]), self.cache.read(row, self._cached[row]))

    def load(self, row: int, saved: SavedRow) -> None:
        self._check_rows(np.array([row]))
        if not isinstance(saved, SavedRow) or saved.owner is not self.model:
            of = repr(saved.owner.name) if isinstance(saved, SavedRow) else f"a {type(saved).__name__}"
            raise ModelError(f"this was not saved from slots of this very model {self.model.name!r}, but of {of}")
        if len(saved.ids) > self.length:
            raise CapacityError(f"a row holds at most {self.length} tokens, the saved one holds {len(saved.ids)}")
        self._ids[row, : len(saved.ids)] = saved.ids
        self._held[row], self._prompt[row] = len(saved.ids), saved.prompt_length
        self._cached[row] = saved.key_values[0].shape[-2]
        self.cache.write(row, saved.key_values)

    def rebuild(self) -> None:
        self._memo.clear()
        self._prompts.clear()
        self._cached[:] = 0
        self.cache.clear()  # its width decides in which order numbers are added

    # --- proposals

    def propose(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> Proposals:
        self._check_rows(rows, started=True)
        block_end = np.asarray(block_end, bool)
        keys = [
            self._key(row, self._held[row]) + (b"\1" if flag else b"\0")
            for row, flag in zip(rows, block_end, strict=True)
        ]
        known = [self._memo.get(key) for key in keys]
        hit = np.array([entry is not None for entry in known], bool)
        # A row that lacks one token rides along in the forward for almost nothing, and stays in
        # step. So it is left out only if half of the rows are; rows that lack more always are.
        if 2 * hit.sum() < len(rows):
            hit &= self._held[rows] - self._cached[rows] > 1
        k = self.k or self.model.vocab_size
        table = np.empty((len(rows), 2 * k + self.model.hidden_size), np.float32)
        for i in np.flatnonzero(hit):
            table[i] = known[i]
        new = np.flatnonzero(~hit)
        if len(new):
            table[new] = self._forward(rows[new], block_end[new])
            for i in new:
                self._memo.put(keys[i], table[i].copy(), table[i].nbytes + len(keys[i]))
        ids = table[:, :k].copy().view(np.int32)
        return Proposals(ids, table[:, k : 2 * k].copy(), table[:, 2 * k :].copy())

    @torch.inference_mode()
    def _forward(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """Catch up with ``rows`` and return a row (ids as bits, logprobs, hidden) for each."""
        # A prefix whose last token is cached, but whose proposals are not, feeds that token again.
        self._cached[rows] = np.minimum(self._cached[rows], self._held[rows] - 1)
        leaders, leader_of = self._same_starts(rows)
        fresh = leaders[self._cached[leaders] == 0]
        logits, hidden = self._decoder(self._batch(leaders), self.cache)
        self._cached[leaders] = self._held[leaders]
        for row in fresh:
            self._remember_prompt(row)
        if len(leaders) < len(rows):
            followers = rows != leaders[leader_of]
            self._copy(leaders[leader_of[followers]], rows[followers])
            logits, hidden = logits[leader_of], hidden[leader_of]
        ids, logprobs = top_candidates(logits, self.k, self.model.end_ids, block_end)
        return np.concatenate([ids.view(np.float32), logprobs, hidden.float().cpu().numpy()], axis=1)

    def _same_starts(self, rows: Rows) -> tuple[Rows, npt.NDArray[np.int64]]:
        """Return one row for each text among the rows that start from nothing, and all other rows;
        and the place of each row's representative in that list."""
        if self._cached[rows].all():
            return rows, np.arange(len(rows))
        places: dict[Any, int] = {}
        leaders: list[int] = []
        leader_of = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows):
            key = row if self._cached[row] else self._key(row, self._held[row])
            if key not in places:
                places[key] = len(leaders)
                leaders.append(row)
            leader_of[i] = places[key]
        return np.array(leaders), leader_of

    def _copy(self, src: Rows, dst: Rows) -> None:
        """Copy what is cached of rows to other rows."""
        self.cache.write(dst, self.cache.read(src, self._cached[src].max()))
        self._cached[dst] = self._cached[src]

    def _remember_prompt(self, row: int) -> None:
        length = int(self._prompt[row])
        key = self._key(row, length)
        size = len(key) + length * self._decoder.shape.token_bytes
        if size <= self._prompts.limit and self._prompts.get(key) is None:
            self._prompts.put(key, self.cache.read(row, length), size)

    # --- one ragged forward

    def _batch(self, rows: Rows) -> Batch:
        """Pack what the cache lacks of ``rows``."""
        first, end = self._cached[rows], self._held[rows]
        counts = end - first
        self.cache.grow(int(end.max()))
        stops = np.cumsum(counts)
        owners = np.repeat(rows, counts)
        positions = np.arange(stops[-1]) - np.repeat(stops - end, counts)
        single = counts == 1

        def group_of(some: npt.NDArray[np.bool_]) -> Group:
            places = (stops - counts)[some][:, None] + np.arange(counts[some].max())
            places = np.minimum(places, stops[some][:, None] - 1)
            return self._group(places, rows[some], positions[places])

        if len(owners) == 1 and self._decoder.alone:
            groups = []
        elif self._decoder.splits and not single.all():
            groups = [group_of(some) for some in (single, ~single) if some.any()]
        elif single.all() or len(rows) * counts.max() > 2 * len(owners):
            # Each token attends for itself: padding would cost more.
            groups = [self._group(None, owners, positions)]
        else:
            groups = [group_of(single | True)]
        return Batch(
            ids=self._tensor(self._ids[owners, positions].astype(np.int64)),
            rows=self._tensor(owners),
            positions=self._tensor(positions),
            last=None if single.all() else self._tensor(stops - 1),
            groups=groups,
        )

    def _group(self, places: npt.NDArray[np.int64] | None, rows: Rows, positions: npt.NDArray[np.int64]) -> Group:
        positions = positions.reshape(len(rows), -1)
        every = np.array_equal(rows, np.arange(self.rows))
        kept = None
        if not every and self._decoder.splits and positions.shape[1] == 1 and 2 * len(rows) > self.rows:
            # Most rows attend. To let the others attend too, to no effect, costs less than to copy
            # the cache of those that take part.
            every, kept = True, rows
            given = np.arange(len(rows))[:, None] if places is None else places
            spread = np.zeros((2, self.rows, 1), np.int64)
            spread[:, kept] = given, positions
            places, positions = spread
        dtype = self._decoder.shape.dtype
        later = np.arange(self.cache.reach) > positions[..., None]
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        mask = torch.from_numpy(np.where(later, np.float32(lowest), np.float32(0)))
        return Group(
            tokens=None if places is None else self._tensor(places),
            rows=None if every else self._tensor(rows),
            mask=mask.to(self._decoder.shape.device, dtype),
            kept=None if kept is None else self._tensor(kept),
        )

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._decoder.shape.device)

    def _key(self, row: int, length: int) -> bytes:
        return self._ids[row, :length].tobytes()

    # --- checks

    def _check_rows(self, rows: Rows, started: bool = False) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise ConfigError(f"rows must be in 0..{self.rows - 1}, got {rows.tolist()}")
        if started and not self._held[rows].all():
            raise ResetNeeded(f"rows {rows[self._held[rows] == 0].tolist()} hold no text: start them first")

    def _check_ids(self, ids: npt.NDArray[np.int64]) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.model.vocab_size):
            raise ModelError(f"token ids must be in 0..{self.model.vocab_size - 1}, got {ids.tolist()}")


class _Bounded(Generic[T]):
    """A mapping from token ids (as bytes) that forgets what was used least recently."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._entries: OrderedDict[bytes, tuple[T, int]] = OrderedDict()

    def get(self, key: bytes) -> T | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: bytes, value: T, size: int) -> None:
        if size > self.limit:
            return
        if key in self._entries:
            self.size -= self._entries.pop(key)[1]
        self._entries[key] = (value, size)
        self.size += size
        while self.size > self.limit:
            self.size -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        self._entries.clear()
        self.size = 0


# --- what a model and a tokenizer say about themselves


def _max_context(config: Any) -> int:
    """Tokens that the model attends to from its last one: positions it knows, or its sliding window."""
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((limit for limit in limits if limit), default=UNLIMITED)


def _end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    sources = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    found: set[int] = set()
    for source in sources:
        ends = getattr(source, "eos_token_id", None)
        found.update([ends] if isinstance(ends, int) else ends or [])
    if "<|endoftext|>" in tokenizer.all_special_tokens:
        found.add(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    return tuple(sorted(i for i in found if 0 <= i < model.get_output_embeddings().weight.shape[0]))


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


def _agreeing_decoder(model: HFModel) -> Decoder:
    """Return the fastest decoder that agrees with the model's own uncached forward.

    Raises:
        ModelError: none does.
    """
    kinds = (LlamaDecoder, GenericDecoder) if LlamaDecoder.fits(model.model) else (GenericDecoder,)
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
    """Return how far two short ragged rows are from the uncached forward, relative to its spread.

    The texts are plain language: on special tokens, half precision differs from itself.
    """
    ids = [*model.encode("The old man went down to the"), *range(8)][:6]
    lengths = [3, 1]
    slots = HFSlots(model, decoder, rows=2, length=len(ids), k=None)
    rows, free = np.arange(2), np.zeros(2, bool)
    gaps = []
    try:
        # Both texts are beginnings of one, so its forward gives what each is compared with.
        uncached = model.model(input_ids=torch.tensor([ids], device=decoder.shape.device)).logits[0]
        expected = uncached.float().log_softmax(-1).cpu().numpy()
        slots.start(rows, [ids[:length] for length in lengths])
        for step in range(3):
            found = slots.propose(rows, free).logprobs
            for row, length in enumerate(lengths):
                target = expected[length + step - 1]
                spread = float(np.linalg.norm(target - target.mean()))
                gaps.append(float(np.linalg.norm(found[row] - target)) / max(spread, 1e-6))
            slots.advance(rows, np.array([ids[length + step] for length in lengths]))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(model.model).__name__} cannot run on a cache with a row for each text: {error}"
        ) from error
    return max(gaps)
