"""A promise of the contract."""

from __future__ import annotations

from typing import Any

from textgen_env.errors import ContractError


def promise(kept: Any, words: str) -> None:
    """Raise ``ContractError`` with ``words`` unless ``kept``."""
    if not kept:
        raise ContractError(words)
