"""What the documentation says about the code is so."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import re
import shlex
import subprocess
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


# --- what a reader would type

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^ {4}(?:\$ )?|`)((?:textgen|make|python -m) +[^`\n]*?)(?:  +#.*)?(?:`|$)", re.MULTILINE)
SMALLER = {  # what takes minutes is run for a moment, on the small model
    r'"smollm2"': '"tiny"',
    r"num_envs=\d+": "num_envs=4",
    r"\.learn\([\d_]+\)": ".learn(64)",
    r"\bsteps=[\d_]+": "steps=64, envs=4, eval_prompts=2, eval_texts=4, eval_samples=2, prune=None",
}


def commands():
    found = {command.strip(): path for path in PAGES for command in COMMAND.findall(path.read_text())}
    return [pytest.param(command, id=f"{path.name}: {command}") for command, path in found.items()]


@pytest.mark.parametrize("command", commands())
def test_a_command_in_the_documentation_exists_and_takes_its_arguments(command):
    words = shlex.split(command)
    if words[0] == "make":
        made = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    elif words[0] == "python":
        assert importlib.util.find_spec(words[2]) or words[2] in ("pytest", "build")
    else:
        import typer

        from agents.cli.app import app

        group = typer.main.get_command(app)
        assert words[1] in group.commands
        if words[2:]:  # otherwise it is a mention
            group.commands[words[1]].make_context(words[1], words[2:])  # parsed, not run


@pytest.mark.slow
def test_the_python_blocks_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    known = {}
    for block in blocks:
        for pattern, smaller in SMALLER.items():
            block = re.sub(pattern, smaller, block)
        exec(compile(block, "README.md", "exec"), known)
