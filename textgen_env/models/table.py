"""An exact, tiny language model given by a table or a function.

Its probabilities are known, so optima can be enumerated and tests have exact expected values.
It has the same interface as a transformer.

    ids of a row  ->  table  ->  probabilities (V,)  ->  k best, ties by smaller id
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError, ModelError, PromptError
from textgen_env.models.base import MASKED_LOGPROB, LanguageModel, Proposals, Rows, Slots

TokenTable = npt.ArrayLike | Callable[[tuple[int, ...]], npt.ArrayLike]


class TableModel(LanguageModel):
    """A language model with given next-token probabilities.

    Args:
        tokens: The text of each token id; V of them, distinct and non-empty.
        table: (V,) probabilities that ignore the context, (V, V) rows by the last token, or a
            function from the ids so far (prompt included) to (V,) probabilities.
        end: The token that ends a text, one of ``tokens``; decoded as nothing. None: no such token.
        features: From the ids so far to a (d,) float vector, the ``hidden`` of the observation.
            By default the last token, one-hot (d = V).
        hidden_size: d; asked of ``features`` with the text of token 0 alone if not given.
        name: Shown in error messages and logs.

    Raises:
        ModelError: tokens repeat, or a table whose rows are not probabilities over V tokens.

    >>> coin = TableModel(["H", "T"], [0.5, 0.5], end=None)
    >>> coin.decode([0, 1, 0])
    'HTH'
    """

    def __init__(
        self,
        tokens: Sequence[str],
        table: TokenTable,
        *,
        end: str | None = "<end>",
        features: Callable[[tuple[int, ...]], npt.ArrayLike] | None = None,
        hidden_size: int | None = None,
        name: str = "table",
    ) -> None:
        are_texts = isinstance(tokens, Sequence) and all(isinstance(token, str) and token for token in tokens)
        if not are_texts or not tokens or len(set(tokens)) != len(tokens):
            raise ModelError(f"tokens must be distinct and non-empty strings, at least one, got {tokens!r}")
        if end is not None and end not in tokens:
            raise ModelError(f"end={end!r} must be one of the tokens {list(tokens)}, or None")
        self.name = name
        self.tokens = tuple(tokens)
        self.vocab_size = len(tokens)
        self.embedding_size = self.vocab_size
        self.max_context = 1 << 20
        self.end_ids = () if end is None else (self.tokens.index(end),)
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)), re.DOTALL)
        self._next = _lookup(table, self.vocab_size)
        self._features = features
        if hidden_size is None:
            hidden_size = self.vocab_size if features is None else np.asarray(features((0,))).shape[-1]
        self.hidden_size = hidden_size

    def probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Return p(next token | ids), shape (V,)."""
        return self._next(tuple(ids))

    def features(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the hidden state of ``ids``, shape (d,)."""
        if self._features is not None:
            return np.asarray(self._features(tuple(ids)), dtype=np.float32)
        hidden = np.zeros(self.vocab_size, dtype=np.float32)
        hidden[ids[-1]] = 1.0
        return hidden

    def encode(self, text: str) -> list[int]:
        """Return token ids, longest match first.

        Raises:
            PromptError: a stretch of ``text`` that no token spells.
        """
        ids, at = [], 0
        while at < len(text):
            match = self._pattern.match(text, at)
            if match is None:
                raise PromptError(f"no token of model {self.name!r} spells {text[at : at + 20]!r}")
            ids.append(self._ids[match.group()])
            at = match.end()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.tokens[i] for i in ids if i not in self.end_ids)

    def continuations(self, prompt_ids: Sequence[int], ids: Sequence[int], candidates: Sequence[int]) -> list[str]:
        prefix = self.decode(ids)
        return [prefix + self.decode((c,)) for c in candidates]

    def embed(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Return one-hot rows."""
        return np.eye(self.vocab_size, dtype=np.float32)[ids]

    def slots(self, rows: int, length: int, k: int | None) -> TableSlots:
        most = self.vocab_size - len(self.end_ids)
        if k is not None and not 1 <= k <= most:
            raise ConfigError(f"top_k must be in 1..{most} (vocabulary without end tokens), got {k}")
        return TableSlots(self, rows, length, k)


class TableSlots(Slots):
    """Rows on a table; nothing is cached."""

    model: TableModel

    def propose(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> Proposals:
        self._check_rows(rows, started=True)
        texts = [self.ids_of(row) for row in rows]
        probabilities = np.stack([self.model.probabilities(text) for text in texts])
        for end in self.model.end_ids:
            probabilities[block_end, end] = 0.0
        total = probabilities.sum(-1, keepdims=True)
        if not total.all():
            text = self.model.decode(texts[int(np.argmin(total))])
            raise ModelError(f"after {text!r} only the end is possible, and min_new_tokens forbids it")
        probabilities /= total
        with np.errstate(divide="ignore"):
            logprobs = np.maximum(np.log(probabilities), MASKED_LOGPROB)
        if self.k is None:
            ids = np.broadcast_to(np.arange(self.model.vocab_size), logprobs.shape)
        else:
            ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, : self.k]
        return Proposals(
            ids.astype(np.int32),
            np.take_along_axis(logprobs, ids, axis=-1).astype(np.float32),
            np.stack([self.model.features(text) for text in texts]),
        )


def _lookup(table: TokenTable, vocab: int) -> Callable[[tuple[int, ...]], npt.NDArray[np.float64]]:
    if callable(table):
        return lambda ids: _probabilities(table(ids), (vocab,))
    values = _probabilities(table, (vocab,), (vocab, vocab))
    if values.ndim == 1:
        return lambda ids: values
    return lambda ids: values[ids[-1]]


def _probabilities(table: npt.ArrayLike, *shapes: tuple[int, ...]) -> npt.NDArray[np.float64]:
    try:
        values = np.array(table, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"a table must be numbers: {error}") from error
    if values.shape not in shapes:
        raise ModelError(f"a table must have shape {' or '.join(map(str, shapes))}, got {values.shape}")
    if (values < 0).any() or not (np.abs(values.sum(-1) - 1.0) <= 1e-6).all():
        raise ModelError("each row of a table must be probabilities that sum to 1")
    values.flags.writeable = False
    return values
