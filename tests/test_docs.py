"""What the documentation says about the code is so."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
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

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted(
        path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "task"
    ),  # which the site's build writes
]
COMMAND = re.compile(r"(?:^ {4}(?:\$ )?|`)((?:textgen|make|python -m) +[^`\n]*?)(?:  +#.*)?(?:`|$)", re.MULTILINE)
SMALLER = {  # what takes minutes is run for a moment, on the small model
    r'"smollm2"': '"tiny"',
    r"num_envs=\d+": "num_envs=4",
    r"\.learn\([\d_]+\)": ".learn(64)",
    r"\.fit\([\d_]+\)": ".fit(8)",
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


def test_the_first_program_of_the_readme_prints_the_text_below_it(capsys):
    page = (ROOT / "README.md").read_text()
    program, printed = re.search(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL
    ).groups()
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one_and_every_anchor_to_a_heading(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_every_file_that_a_page_names_exists(page):
    named = re.findall(
        r"`((?:textgen_env|agents|tests|examples|benchmarks|scripts|docs)/[\w/.]+\.\w+)`", page.read_text()
    )
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_name_that_a_page_imports_is_there(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        imported = re.findall(r"^from ((?:textgen_env|agents)[\w.]*) import (.+)$", block, re.MULTILINE)
        for module, names in imported:
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(ROOT / "README.md", marks=pytest.mark.slow), *TUTORIALS, ROOT / "docs" / "conversations.md"],
    ids=lambda path: path.name,
)
def test_the_python_blocks_of_a_page_run_and_print_what_it_shows(page, tmp_path, monkeypatch, capsys):
    """Blocks that are run for a moment only may print something else."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    known = {}
    for block, printed in blocks:
        run = block
        for pattern, smaller in SMALLER.items():
            run = re.sub(pattern, smaller, run)
        capsys.readouterr()
        exec(compile(run, page.name, "exec"), known)
        assert not printed or run != block or capsys.readouterr().out == printed


ALONE = """
import json, os, sys, traceback

for name, block in json.loads(sys.argv[1]).items():
    os.makedirs(name)
    os.chdir(name)
    said = ""
    try:
        exec(compile(block, name, "exec"), {"__name__": "__main__"})
    except ImportError as error:
        ours = (error.name or "").partition(".")[0] in ("textgen_env", "agents")
        said = traceback.format_exc() if ours else f"missing: {error}"
    except BaseException as error:
        missing = isinstance(error.__cause__, ImportError)  # an extra that is not installed
        said = f"missing: {error}" if missing else traceback.format_exc()
    os.chdir("..")
    with open("said.jsonl", "a") as file:
        print(json.dumps([name, said]), file=file)
"""
"""Runs blocks one after the other, each in a namespace and a folder of its own."""


def blocks_of_pages():
    """The Python blocks of all pages but the tutorials, which go on from block to block: (page, number) to text."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = {}
    for page in pages:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        found |= {f"{page.stem}-{number}": block for number, block in enumerate(blocks)}
    return found


@pytest.fixture(scope="module")
def said_alone(tmp_path_factory):
    """The traceback of each block that failed, by name; of the others nothing."""
    blocks = blocks_of_pages()
    for pattern, smaller in SMALLER.items():
        blocks = {name: re.sub(pattern, smaller, block) for name, block in blocks.items()}
    folder = tmp_path_factory.mktemp("alone")
    done = subprocess.run(  # one process, since imports take most of the time
        [sys.executable, "-c", ALONE, json.dumps(blocks)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, (folder / "said.jsonl").read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks_of_pages())
def test_a_python_block_runs_alone(block, said_alone):
    said = said_alone[block]
    if said.startswith("missing: "):
        pytest.skip(said)
    assert not said, said


# --- the site: `make docs` builds it, without a warning


def test_every_page_is_in_the_index_once():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = [name for tree in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for name in tree.split("\n")]
    listed = sorted(name for name in listed if name and not name.startswith(":"))
    pages = [page for page in PAGES if page.parent != ROOT]
    found = [path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in [*pages, *ROOT.glob("docs/*.rst")]]
    assert sorted([*listed, "index"]) == sorted([*found, "task/*"])


def test_the_reference_names_what_there_is_and_every_public_name():
    page = (ROOT / "docs" / "api.rst").read_text()
    for kind, name in re.findall(r"^\.\. auto(\w+):: (\S+)$", page, re.MULTILINE):
        if kind == "module":
            module = importlib.import_module(name)
        else:
            module, _, name = name.rpartition(".")
            module = getattr(importlib.import_module(module), name)
        for members in re.findall(rf"auto{kind}:: \S*{re.escape(name)}\n   :members: (.+)$", page, re.MULTILINE):
            assert all(hasattr(module, member) for member in members.split(", "))
    for package in ("textgen_env", "agents"):
        public = importlib.import_module(package).__all__
        assert not [name for name in public if f":: {package}.{name}\n" not in page]
