"""Encoder-decoders: the encoder reads the prompt once, and the decoder writes the text.

A row's prompt is its source; the row itself begins with the decoder's first token (and a forced one behind it, such
as the language of a translation). Forks and saved rows share what the encoder has read.

    source (S,)  ->  encoder, once  ->  hidden states, keys and values of each layer  ->  decoder, a token at a time
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from textgen_env.errors import CapacityError, ModelError, PromptError
from textgen_env.models.agreement import Reach
from textgen_env.models.base import Rows
from textgen_env.models.forward import no_cache
from textgen_env.models.hf import HFModel, positions_of
from textgen_env.models.own_cache import Lengths, OwnBatch
from textgen_env.models.packing import Decoder
from textgen_env.models.slots import HFSlots
from textgen_env.models.stateful import RowsToRun, StatefulDecoder, Way

SEQ2SEQ_WAYS = (
    Way("own cache", cached=True, ragged=True, batched=True, padded=True),
    Way("own cache, equal lengths", cached=True, ragged=False, batched=True, padded=True),
    Way("own cache, equal lengths and sources", cached=True, ragged=False, batched=True),
    Way("own cache, row by row", cached=True, ragged=False, batched=False),
    Way("uncached", cached=False, ragged=False, batched=True),
    Way("uncached, row by row", cached=False, ragged=False, batched=False),
)


class Seq2SeqDecoder(StatefulDecoder):
    """An encoder-decoder on its own cache. See ``StatefulDecoder``."""

    POSITIONS = "decoder_position_ids"
    _reads_apart = False  # True: the encoder runs on its own, because the model's forward hands it what it refuses

    def _probe(self) -> None:
        try:
            super()._probe()
        except (TypeError, ValueError):
            self._reads_apart = True
            super()._probe()

    def _small_forward(self, rows: int, tokens: int, source: int) -> tuple[Tensor, Tensor, Any]:
        ids = [torch.ones((rows, n), dtype=torch.long, device=self.device) for n in (tokens, source)]
        return self._first_forward(*ids)

    def _first_forward(self, ids: Tensor, sources: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        if self._reads_apart:
            with self.forward.running():
                read = {"encoder_outputs": self.model.get_encoder()(input_ids=sources)}
        else:
            read = {"input_ids": sources}
        return self.forward({**read, "decoder_input_ids": ids, **self._use_cache()})

    def _keep(self, found: Any) -> Any:
        if found.past_key_values is None:
            raise ModelError(f"{type(self.model).__name__} returns no cache that it takes back")
        return {"past": found.past_key_values, "encoder": found.encoder_last_hidden_state}

    def _layers(self, kept: Any) -> list[Any]:
        past = kept["past"]
        return [*past.self_attention_cache.layers, *past.cross_attention_cache.layers]

    def _next_inputs(self, ids: Tensor, own: OwnBatch) -> dict[str, Any]:
        encoder = own.cache["encoder"]
        inputs = {
            "decoder_input_ids": ids,
            "encoder_outputs": BaseModelOutput(last_hidden_state=encoder),
            "past_key_values": own.cache["past"],
            "use_cache": True,
        }
        most = int(own.sources.max())
        if (own.sources < most).any():
            read = torch.from_numpy(own.sources).to(self.device)[:, None]
            inputs["attention_mask"] = (torch.arange(encoder.shape[1], device=self.device) < read).long()
        padding = self._padding(own.lengths)
        return inputs | {f"decoder_{name}": value for name, value in padding.items()}


class SourceSlots(HFSlots):
    """Rows of text that an encoder-decoder writes. See ``Slots`` for the contract."""

    model: Seq2SeqModel

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sources: dict[int, tuple[int, ...]] = {}

    def start(self, rows: Rows, prompts: Sequence[Sequence[int]]) -> None:
        self._check_rows(rows)
        for prompt in prompts:
            if not len(prompt):
                raise PromptError("a prompt needs at least one token")
            if len(prompt) > self.model.max_source:
                raise CapacityError(
                    f"the encoder reads at most {self.model.max_source} tokens, got a prompt of {len(prompt)}"
                )
            self._check_ids(np.asarray(prompt, np.int64))
        self.set_prompts(rows, prompts)
        super().start(rows, [self.model.begin] * len(rows))

    def set_prompts(self, rows: Rows, prompts: Sequence[Sequence[int]]) -> None:
        for row, prompt in zip(rows.tolist(), prompts, strict=True):
            self._sources[row] = tuple(map(int, prompt))

    def prompt_of(self, row: int) -> tuple[int, ...]:
        return self._sources.get(int(row), ())

    def _copy_cache(self, src: Rows, dst: Rows) -> None:
        super()._copy_cache(src, dst)
        self.set_prompts(dst, [self.prompt_of(row) for row in src])

    def _read_cache(self, row: int) -> Any:
        return self.prompt_of(row), super()._read_cache(row)

    def _write_cache(self, row: int, saved: Any) -> None:
        source, kept = saved
        self.set_prompts(np.array([row]), [source])
        super()._write_cache(row, kept)

    def _batch(self, rows: Rows, first: Lengths, end: Lengths) -> RowsToRun:
        return RowsToRun(self.tokens, rows, first, end, self._sources)

    def _key(self, row: int, length: int) -> bytes:
        return self._source_key(row) + super()._key(row, length)

    def _keys(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> list[bytes]:
        keys = super()._keys(rows, block_end)
        return [self._source_key(row) + key for row, key in zip(rows.tolist(), keys, strict=True)]

    def _source_key(self, row: int) -> bytes:
        source: npt.NDArray[np.int32] = np.array(self.prompt_of(row), np.int32)
        return len(source).to_bytes(4, "little") + source.tobytes()


class Seq2SeqModel(HFModel):
    """An encoder-decoder and its tokenizer, as loaded by ``from_pretrained``. See ``HFModel``.

    A row holds the decoder's tokens. Its prompt is what the encoder reads, with the tokens that the tokenizer puts
    around it; ``prompt_lengths`` counts the decoder's first tokens, ``decoder_start_token_id`` and, if there is one,
    ``forced_bos_token_id``.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.begin = _first_tokens(model)
        encoder = model.get_encoder()
        configs = [
            own.get_text_config(encoder=True) for own in (model.config, getattr(encoder, "config", model.config))
        ]
        self.max_source = min(positions_of(encoder, config) for config in configs)  # an encoder may have its own
        super().__init__(model, *args, **kwargs)  # opens rows, to check a decoder
        self._appends_end = False  # the encoder reads the end token of its text

    def _written_embedding(self, model: Any) -> Any:
        decoder = model.get_decoder()
        found = getattr(decoder, "embed_tokens", None)  # not all decoders have the method
        return decoder.get_input_embeddings() if found is None else found

    def open_slots(self, decoder: Decoder, rows: int, length: int, k: int | None, memo_bytes: int) -> SourceSlots:
        return SourceSlots(self, decoder, rows, length, k, memo_bytes)

    def candidate_decoders(self, reach: Reach) -> Iterator[partial[Any]]:
        ways = [way for way in SEQ2SEQ_WAYS if reach is not Reach.UNCACHED or not way.cached]
        return (partial(Seq2SeqDecoder, self._forward, way) for way in ways)

    def check_prompt(self, ids: Sequence[int], length: int) -> list[int]:
        return list(ids[::-1][:length])

    @torch.inference_mode()
    def uncached(self, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        source, text = (torch.tensor([list(given)], device=self.model.device) for given in (prompt, ids))
        found = self.model(input_ids=source, decoder_input_ids=text, **no_cache(self.model))
        logits: torch.Tensor = found.logits[0, -1]
        return logits


def _first_tokens(model: Any) -> tuple[int, ...]:
    """Return the tokens that begin each text of the decoder.

    Raises:
        ModelError: there are none.
    """
    configs = [getattr(model, "generation_config", None), model.config]
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        starts = [getattr(config, name, None) for config in configs]
        if start := [ids for ids in starts if ids is not None]:
            first = start[0] if isinstance(start[0], list) else [start[0]]
            forced = [getattr(config, "forced_bos_token_id", None) for config in configs]
            return (*first[:1], *[i for i in forced if i is not None][:1])
    raise ModelError(
        f"{type(model).__name__} has no first token for its decoder: set model.generation_config.decoder_start_token_id"
    )
