"""Agents on the Hugging Face Hub: two files of plain data come down, three go up.

    TextDQN.push_to_hub  ->  folder of save_pretrained, its card with results  ->  repository "user/agent"
    TextDQN.from_pretrained("user/agent")  ->  agent.json, model.safetensors  ->  the checks of any other folder

A repository is a stranger's: nothing but these two files is downloaded, each only if it is small enough, and neither
can run code. Endpoint, token, cache and offline mode are those of ``huggingface_hub`` (``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HOME``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from textgen_env.errors import ConfigError, TextGenError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""``user/agent``, the form of a repository's id."""

MOST_WEIGHT_BYTES = 4 * 2**30
"""Of the weights of an agent that is downloaded. Those of SmolLM2's have 20 MB."""


def is_repository(source: Any) -> bool:
    """Return True if ``source`` can only mean a repository: ``user/agent``, and no folder ``user`` is here."""
    if isinstance(source, Path):
        source = source.as_posix()
    return isinstance(source, str) and bool(REPOSITORY.fullmatch(source)) and not Path(source).parent.exists()


def fetched(source: Any, files: Mapping[str, int], revision: str | None = None, token: str | None = None) -> Path:
    """Return the folder that holds an agent's files: ``source`` itself, or the cached copy of a repository.

    Args:
        source: A folder, or a repository's id.
        files: Names of the files to download, with the most bytes that each may have.
        revision: Branch, tag or commit of the repository. None: its main branch.
        token: Of the hub. None: that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ConfigError: no such repository or file, one that is too large, or the hub cannot be reached.
    """
    if not is_repository(source):
        return Path(source)
    from huggingface_hub import hf_hub_download

    repository = Path(source).as_posix()
    with _reporting(f"no folder {repository!r} is here, and the agent cannot be read from the hub"):
        for name, most in files.items():
            found = hf_hub_download(repository, name, revision=revision, token=token, dry_run=True)
            size = math.inf if found.file_size is None else found.file_size
            if size > most:
                raise ConfigError(f"{name} of {repository!r} has {size:,} bytes, more than {most:,}")
            folder = Path(hf_hub_download(repository, name, revision=revision, token=token)).parent
            revision = found.commit_hash  # all files of one commit
    return folder


def push(
    folder: Path, repository: str, results: Mapping[str, Any], *, private: bool | None, token: str | None, message: str
) -> str:
    """Upload the files of ``folder`` in one commit, with ``results`` in the card; return the commit's address.

    Raises:
        ConfigError: no repository's id, no right to write there, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"repo_id must have the form 'user/agent', got {repository!r}")
    card = folder / "README.md"
    card.write_text(card_with_results(card.read_text(encoding="utf-8"), repository, results), encoding="utf-8")
    with _reporting(f"the agent cannot be written to {repository!r} on the hub"):
        api = HfApi(token=token, library_name="textgen-env")
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url)


def card_with_results(card: str, repository: str, results: Mapping[str, Any]) -> str:
    """Return a model card that names its repository and has the numbers among ``results`` in the hub's metadata."""
    from huggingface_hub import EvalResult, ModelCard

    page = ModelCard(card.replace('"this folder"', f'"{repository}"'))
    data: Any = page.data
    if not REPOSITORY.fullmatch(str(data.base_model)):
        data.base_model = None  # a name or path of this machine says nothing to the hub
    numbers = {name: float(value) for name, value in results.items() if _is_number(value)}
    if numbers:
        task: dict[str, Any] = {
            "task_type": "text-generation",
            "dataset_type": "textgen-env",
            "dataset_name": "test prompts",
        }
        data.model_name = repository.split("/")[1]
        data.eval_results = [
            EvalResult(metric_type=name, metric_value=value, **task) for name, value in numbers.items()
        ]
    return str(page)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)  # numpy's, too


@contextmanager
def _reporting(problem: str) -> Iterator[None]:
    """Turn the errors of the hub's client into ``ConfigError``."""
    try:
        yield
    except TextGenError:
        raise
    except Exception as error:  # of huggingface_hub, of its HTTP client, and of the disk
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{problem}: {reason}") from error
