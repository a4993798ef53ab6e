"""Optional packages: one feature, one extra, and one error that says which extra to install.

The hard requirements serve the main job. A package that serves a single feature is imported where the feature
is used, after ``require`` has found it, so the feature fails with an instruction and everything else works.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from types import ModuleType

from textgen_env.errors import ConfigError


def require(module: str, *, extra: str, for_: str) -> ModuleType:
    """Import and return an optional package.

    Args:
        module: Its import name, such as ``"sklearn"``.
        extra: The extra of this project that installs it, such as ``"classifier"``.
        for_: The feature that needs it, as the subject of the error.

    Raises:
        ConfigError: the package, or one that it imports, is not installed. Names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"{for_} needs {module} ({error}): pip install 'textgen-env[{extra}]'") from error


def is_installed(module: str) -> bool:
    """Return True if ``module`` can be found, without importing it."""
    return importlib.util.find_spec(module) is not None
