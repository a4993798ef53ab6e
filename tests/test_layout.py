"""Who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("textgen_env", "agents")
OUTSIDE = {"examples", "tests", "benchmarks", "scripts", "toys", "conftest", "golden", "my_agents", "fuzzing"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module that ``path`` imports, within functions too, but not for type checkers only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes = node.orelse
        else:
            nodes = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
        for child in nodes:
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_that_stands_above_it(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not roots & OUTSIDE
    if module.startswith("textgen_env"):
        assert "agents" not in roots


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_it_needs_and_not_its_own_package_s_root(module):
    assert module.split(".")[0] not in imports(MODULES[module])


def test_imports_have_no_cycle():
    graph = {module: imports(path) & set(MODULES) for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def loaded_by(program: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after ``program``."""
    program += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


HEAVY = {"torch", "transformers", "sklearn", "evaluate", "datasets", "stable_baselines3", "matplotlib", "PIL"}


def test_the_environment_loads_no_framework_before_a_model_needs_one():
    assert not HEAVY & loaded_by("import textgen_env")
    assert not HEAVY & loaded_by(
        "import gymnasium as gym, textgen_env\n"
        "coin = textgen_env.TableModel(['H', 'T'], [0.5, 0.5], end=None)\n"
        "env = gym.make('TextGen-v0', model=coin, prompts=['H'], reward='length', top_k=2)\n"
        "env.reset(seed=0), env.step(1)"
    )


def test_every_public_name_is_found_and_no_other():
    import textgen_env

    assert {name: getattr(textgen_env, name).__name__ for name in textgen_env.__all__} == {
        name: name for name in textgen_env.__all__
    }
    assert set(textgen_env.__all__) <= set(dir(textgen_env))
    with pytest.raises(AttributeError, match="no attribute 'TextgenEnv'"):
        textgen_env.TextgenEnv  # noqa: B018
