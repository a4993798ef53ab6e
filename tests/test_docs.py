"""What the documentation says about the code is so."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

from textgen_env import TextGenEnv
from textgen_env.config import OBSERVATION_KEYS

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("textgen_env", "agents") for path in (ROOT / package).rglob("*.py"))


def modules_with_examples():
    for path in SOURCES:
        if ">>> " in path.read_text():
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", [*modules_with_examples()])
def test_examples_in_docstrings_run(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_classes_and_functions_longer_than_a_statement_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and len(node.body) == 1
            assert ast.get_docstring(node) or short, node.name


def test_the_environment_documents_each_key_of_its_observation():
    assert tuple(re.findall(r"^\s*\| `(\w+)` \|", TextGenEnv.__doc__ or "", re.MULTILINE)) == OBSERVATION_KEYS
