"""Where texts begin: prompts from a list, a file, a dataset, or a function.

A ``PromptSource`` is indexed, so that evaluation can go through it, and drawn from with the
environment's own generator, so that a seed fixes the order. It splits into train, validation and
test by template, since two fillings of one template are nearly the same prompt.

    make_prompts("reviews.jsonl:train").draw(rng)  ->  Prompt(text, reference, metadata)
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from textgen_env.config import check_unicode
from textgen_env.errors import PromptError
from textgen_env.files import parse_json
from textgen_env.openings import OPENINGS
from textgen_env.registry import unknown_name
from textgen_env.time_limit import time_limit

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
"""Parts of a source; they hold 80, 10 and 10% of its templates."""

ROWS_AT_A_TIME = 1000
"""Rows of a dataset that are read at a time when it is opened."""

TEMPLATE_SECONDS = 10
"""What a chat template may take for one text."""

PROMPT_NAMES = ("openings", *OPENINGS)
"""Prompts in the box: all openings, or those of one topic."""


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text, and data for the reward to compare its completion with.

    ``metadata["template"]``, where it is given, names the prompts that a split keeps together.

    Raises:
        PromptError: the text is empty or blank, or a part has the wrong type or is no Unicode text.
    """

    text: str
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise PromptError(f"a prompt must be a string, got {type(self.text).__name__}")
        if not self.text.strip():
            raise PromptError(f"a prompt must not be empty, got {self.text!r}")
        if not isinstance(self.reference, str | None):
            raise PromptError(f"a reference must be a string or None, got {type(self.reference).__name__}")
        if not isinstance(self.metadata, Mapping):
            raise PromptError(f"metadata must be a mapping, got {type(self.metadata).__name__}")
        for name, value in (("prompt", self.text), ("reference", self.reference), ("metadata", self.metadata)):
            check_unicode(name, value, PromptError)


class PromptSource(ABC):
    """A sequence of prompts that may be larger than memory.

    Sources are read-only: environments share them, and each draws with its own generator.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return how many prompts there are.

        Raises:
            PromptError: there is no end to them (a function).
        """

    @abstractmethod
    def __getitem__(self, index: int) -> Prompt:
        """Return prompt ``index``, 0 <= index < len."""

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def draw(self, rng: np.random.Generator) -> Prompt:
        """Return a prompt drawn uniformly; one generator state, one prompt."""
        return self[int(rng.integers(len(self)))]

    def split(self, part: str) -> PromptSource:
        """Return the ``"train"``, ``"validation"`` or ``"test"`` part: 80, 10 and 10% of the templates.

        A template is ``metadata["template"]``, or the text where there is none. Which part it falls
        into depends on its hash only, so neither order nor seed matter. Reads every prompt once.

        Raises:
            UnknownName: no such part.
            PromptError: too few templates to give every part one, or no end to them.
        """
        if part not in SPLITS:
            raise unknown_name("split", part, SPLITS)
        templates = np.fromiter((_hash(prompt) for prompt in self), np.uint64, len(self))
        ordered = np.unique(templates)
        if ordered.size < len(SPLITS):
            raise PromptError(
                f"cannot split {ordered.size} template(s) into {len(SPLITS)} parts; "
                f"give at least {len(SPLITS)} different prompts"
            )
        train = min(int(0.8 * ordered.size), ordered.size - 2)  # validation and test get one at least
        validation = (train + ordered.size) // 2
        ranges = {"train": (0, train), "validation": (train, validation), "test": (validation, None)}
        chosen = ordered[slice(*ranges[part])]
        return _Selection(self, np.flatnonzero(np.isin(templates, chosen)))


def make_prompts(spec: Any = None) -> PromptSource:
    """Return the prompts that ``spec`` means.

    =====================================  ==============================================================
    None, ``"openings"``                   the 240 openings in the box; a topic ("food") gives 30 of them
    ``"file.txt"``                         one prompt a line
    ``"file.jsonl"``                       one object a line: prompt, reference (optional), other metadata
    any of these and ``":train"``          that split; also ``":validation"`` and ``":test"``
    a list                                 of strings, ``Prompt`` objects, or dicts like a line of JSONL
    ``{"dataset": "name", ...}``           a ``datasets`` folder or hub name; see ``load_dataset_prompts``
    a ``datasets.Dataset``                 columns prompt, reference (optional), other metadata
    a function                             a ``numpy`` generator in, a string or ``Prompt`` out
    a ``PromptSource``                     itself
    =====================================  ==============================================================

    Files are indexed by line offset and never loaded whole, but checked once from end to end.

    Raises:
        PromptError: a missing, empty, or malformed file (with the line number), an empty prompt, or a
            value that means no prompts.
    """
    if isinstance(spec, PromptSource):
        return spec
    spec = "openings" if spec is None else spec
    if isinstance(spec, str | os.PathLike):
        name = os.fspath(spec)
        source, colon, part = name.rpartition(":")
        if colon and part in SPLITS:
            return make_prompts(source).split(part)
        return _openings(name) if name in PROMPT_NAMES else FilePrompts(name)
    if isinstance(spec, Mapping) and "dataset" in spec:
        settings = ("dataset", "split", "prompt", "reference")
        for name in spec:
            if name not in settings:
                raise unknown_name("setting of a dataset of prompts", name, settings)
        return load_dataset_prompts(**spec)
    if isinstance(spec, Sequence):
        return ListPrompts([as_prompt(item, f"prompt {index}") for index, item in enumerate(spec)])
    if hasattr(spec, "column_names") and hasattr(spec, "features"):
        return DatasetPrompts(spec)
    if callable(spec):
        return FunctionPrompts(spec)
    raise PromptError(
        f"{spec!r} gives no prompts; give a name ({', '.join(PROMPT_NAMES)}), a .txt or .jsonl file, a list, "
        "a datasets.Dataset, or a function of a numpy Generator"
    )


class ListPrompts(PromptSource):
    """Prompts in memory."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        if not prompts:
            raise PromptError("a list of prompts must not be empty")
        self._prompts = tuple(prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]


class FilePrompts(PromptSource):
    """Prompts in a text or JSONL file: 8 bytes of memory a line.

    Blank lines are errors rather than prompts; a byte order mark is skipped.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).expanduser()
        if self._path.suffix not in (".txt", ".jsonl"):
            raise PromptError(
                f"prompts come from .txt (one a line) or .jsonl files, got {str(self._path)!r}; "
                f"prompts in the box: {', '.join(PROMPT_NAMES)}"
            )
        if not self._path.is_file():
            raise PromptError(f"no file of prompts at {str(self._path)!r}; check the path")
        self._path = self._path.absolute()  # the process may change its folder
        self._stamp = self._current_stamp()
        self._offsets = array("q")
        with self._path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                self._offsets.append(offset)
                self._parse(line, number)
                offset += len(line)
        if not self._offsets:
            raise PromptError(f"the file of prompts {str(self._path)!r} is empty")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Prompt:
        self._check_unchanged()
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline(), index % len(self) + 1)

    def __iter__(self) -> Iterator[Prompt]:
        self._check_unchanged()
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield self._parse(line, number)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if not self._path.is_file() or self._current_stamp() != self._stamp:
            raise PromptError(f"{str(self._path)!r} has changed since it was indexed; open it again")

    def _parse(self, line: bytes, number: int) -> Prompt:
        place = f"{self._path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PromptError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if self._path.suffix == ".txt" or not text.strip():
            return as_prompt(text, place)
        try:
            row = parse_json(text, "it", PromptError, allow_nan=True)
        except PromptError as error:
            raise PromptError(f"{place}: not JSON ({error}); give one object a line") from error
        if not isinstance(row, dict):
            raise PromptError(f'{place}: expected an object like {{"prompt": ...}}, got {text[:40]!r}')
        return as_prompt(row, place)

    def _current_stamp(self) -> tuple[int, int]:
        stat = self._path.stat()
        return stat.st_size, stat.st_mtime_ns


class DatasetPrompts(PromptSource):
    """Prompts in a ``datasets.Dataset``, read row by row.

    Args:
        dataset: A map-style dataset (one split, not a ``DatasetDict``).
        prompt: The column of the prompts.
        reference: The column of the references; there need not be one of the name "reference".

    The other columns become metadata.
    """

    def __init__(self, dataset: Dataset, prompt: str = "prompt", reference: str = "reference") -> None:
        if not hasattr(dataset, "__len__"):
            raise PromptError("a streaming dataset has no length; load it without streaming=True")
        columns = list(dataset.column_names)
        if prompt not in columns:
            raise PromptError(f"the dataset has no column {prompt!r} of prompts; it has {', '.join(columns)}")
        if reference not in columns and reference != "reference":
            raise PromptError(f"the dataset has no column {reference!r}; it has {', '.join(columns)}")
        if not len(dataset):
            raise PromptError("the dataset of prompts has no rows")
        self._dataset = dataset
        self._prompt = prompt
        self._reference = reference
        self._check_cells()

    def _check_cells(self) -> None:
        """Read the texts once: an empty cell is found now and not in the middle of a run."""
        columns = [name for name in (self._prompt, self._reference) if name in self._dataset.column_names]
        texts = self._dataset.select_columns(columns)
        for start in range(0, len(texts), ROWS_AT_A_TIME):
            cells = texts[start : start + ROWS_AT_A_TIME]
            references = cells.get(self._reference) or [None] * len(cells[self._prompt])
            for index, pair in enumerate(zip(cells[self._prompt], references, strict=True), start):
                as_prompt(dict(zip(("prompt", "reference"), pair, strict=True)), f"row {index} of the dataset")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Prompt:
        metadata = dict(self._dataset[index])
        text, reference = metadata.pop(self._prompt), metadata.pop(self._reference, None)
        return as_prompt({**metadata, "prompt": text, "reference": reference}, f"row {index} of the dataset")


class FunctionPrompts(PromptSource):
    """Prompts without end, made by a function of a ``numpy`` generator.

    Prompt ``index`` is the function's answer to a generator seeded with ``index``.
    """

    def __init__(self, function: Callable[[np.random.Generator], str | Prompt]) -> None:
        self._function = function

    def __len__(self) -> int:
        raise PromptError("a function makes prompts without end: it has no length and no splits")

    def __getitem__(self, index: int) -> Prompt:
        return self.draw(np.random.default_rng(index))

    def draw(self, rng: np.random.Generator) -> Prompt:
        return as_prompt(self._function(rng), "the prompt function's answer")


def load_dataset_prompts(
    dataset: str, split: str = "train", prompt: str = "prompt", reference: str = "reference"
) -> PromptSource:
    """Return the prompts of a dataset that ``datasets.load_dataset`` loads.

    Args:
        dataset: A hub name, or a folder of data files (JSONL, CSV, Parquet ...).
        split: The dataset's own split.
        prompt: The column of the prompts.
        reference: The column of the references.

    Raises:
        PromptError: ``datasets`` cannot load it, or a column is missing.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # the library has a dozen kinds, from the hub's to the parsers'
        raise PromptError(f"datasets cannot load {dataset!r}, split {split!r}: {error}") from error
    return DatasetPrompts(loaded, prompt, reference)


def chat(source: Any, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> PromptSource:
    """Return ``source`` with every prompt as a user's turn in the tokenizer's chat template.

    The text ends where the assistant's turn begins, so the completion is the answer. The plain
    prompt is kept as ``metadata["prompt"]``.

    Args:
        source: Anything that ``make_prompts`` takes.
        tokenizer: A tokenizer with a chat template.
        system: A system message in front.

    Raises:
        PromptError: the tokenizer has no chat template, or one that fails.
    """
    opening = [] if system is None else [{"role": "system", "content": system}]
    # A template that writes the begin token would have it twice once the tokenizer adds its own.
    begin = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("")["input_ids"] else ""

    def in_template(prompt: Prompt) -> Prompt:
        text = apply_template(tokenizer, [*opening, {"role": "user", "content": prompt.text}]).removeprefix(begin)
        return replace(prompt, text=text, metadata={**prompt.metadata, "prompt": prompt.text})

    in_template(Prompt("Hello"))  # a template that fails is found now, and not in the middle of a run
    return _Mapped(make_prompts(source), in_template)


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Return messages in the tokenizer's chat template, with the assistant's turn opened behind them.

    Raises:
        PromptError: the tokenizer has no chat template, or one that fails or takes long.
    """
    if not tokenizer.chat_template:
        raise PromptError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template")
    try:
        with time_limit(TEMPLATE_SECONDS):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever the template does: it is a program of its author, in a sandbox
        raise PromptError(
            f"the chat template of tokenizer {tokenizer.name_or_path!r} fails: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True, eq=False)
class _Selection(PromptSource):
    """Some prompts of another source."""

    source: PromptSource
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Prompt:
        return self.source[int(self.indices[index])]


@dataclass(frozen=True, eq=False)
class _Mapped(PromptSource):
    """Another source's prompts, each changed by a function."""

    source: PromptSource
    function: Callable[[Prompt], Prompt]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Prompt:
        return self.function(self.source[index])

    def draw(self, rng: np.random.Generator) -> Prompt:
        return self.function(self.source.draw(rng))

    def split(self, part: str) -> PromptSource:
        return _Mapped(self.source.split(part), self.function)


def _openings(name: str) -> PromptSource:
    topics = OPENINGS if name == "openings" else {name: OPENINGS[name]}
    return ListPrompts(
        [
            Prompt(template.format(filling), metadata={"topic": topic, "template": template})
            for topic, templates in topics.items()
            for template, fillings in templates.items()
            for filling in fillings
        ]
    )


def as_prompt(item: Any, place: str) -> Prompt:
    """Return ``item`` (a string, a ``Prompt``, or a dict) as a prompt; ``place`` is for the error."""
    try:
        if isinstance(item, Prompt):
            return item
        if isinstance(item, Mapping):
            metadata = dict(item)
            if "prompt" not in metadata:
                raise PromptError(f'no "prompt" among the keys {", ".join(map(str, metadata)) or "(none)"}')
            return Prompt(metadata.pop("prompt"), metadata.pop("reference", None), metadata)
        return Prompt(item)
    except PromptError as error:
        raise PromptError(f"{place}: {error}") from error


def _hash(prompt: Prompt) -> int:
    template = str(prompt.metadata.get("template", prompt.text))
    return int.from_bytes(hashlib.blake2b(template.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
