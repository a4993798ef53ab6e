"""Measure how the project is built, and hold it within limits.

    python scripts/check_house.py        # prints every measure; ends with 1 if a limit is broken

A reader should find one file for one idea, in an order that can be read, with names that mean one thing. Each
measure below is a function from the parsed sources to a table or a list of breaches; ``tests/test_layout.py``
calls the same functions.
"""

from __future__ import annotations

import ast
import io
import itertools
import sys
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("textgen_env", "agents")

P90_LINES, MAX_FUNCTION_LINES, MAX_MODULE_LINES = 25, 70, 450
MAX_CORE_LINES = 6_715
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
CORE = (
    *(f"textgen_env/{name}.py" for name in ("episode", "conversation", "rows", "observation")),
    *(f"textgen_env/{name}.py" for name in ("env", "vector_env", "spec", "policies")),
    "textgen_env/models/*.py",
    "agents/text_dqn/*.py",
)
BESIDE_CORE = ("textgen_env/models/hub.py", "agents/text_dqn/offline.py")
"""The environment, the engine and TextDQN: a reader should grasp them in an hour. Where models come from and recorded
datasets stand beside that. Counted are lines of code: blank lines, comments and docstrings help the reader."""

LONG_MODULES: dict[str, str] = {
    "textgen_env.episode": "the rules of an episode are one class, to be read from above to below",
    "agents.text_dqn.agent": "the whole interface of an SB3 algorithm is one class: constructor, learn, save and load",
}
"""Modules that may be longer than ``MAX_MODULE_LINES``, each with its reason."""

REWARD_TO_UPDATE = (
    "textgen_env/rewards/base.py",  # a function becomes a checked reward
    "textgen_env/episode.py",  # pays it when a text ends
    "textgen_env/vector_env.py",  # N texts as an environment
    "agents/text_dqn/learner.py",  # acts, remembers the step, updates Q
    "agents/text_dqn/replay.py",  # keeps whole episodes
    "agents/text_dqn/targets.py",  # what Q learns from them
)
"""The files that a reward passes on its way to a Q update, in a loop of one's own (``LOOP``). Each imports the next or
is imported by one before it; environment and learner meet in the loop. Under SB3, ``sb3_vec``, ``agent`` and
``sources`` stand between the two."""
LOOP = "examples/learner.py"
MEET_IN_LOOP = ("textgen_env.vector_env", "agents.text_dqn.learner")
MAX_PATH_FILES = 6


# --- sources


def module_name(path: Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def parsed(module: str) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def line_count(path: Path) -> int:
    """Return the number of lines of a file, blank ones and comments included."""
    return len(path.read_text(encoding="utf-8").splitlines())


# --- imports


def imports(module: str) -> set[str]:
    """Return every module that ``module`` imports: at its top, in functions, and for type checkers.

    ``from package import name`` counts as an import of ``package.name`` where that is a module, of ``package``
    otherwise. Python also runs the ``__init__`` of every package on the way; that is no import of the module's own.
    """
    found: set[str] = set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{MODULES[module]}:{node.lineno}: imports are absolute")
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return found


def import_circle() -> list[str]:
    """Return the modules of one import circle, in order, or an empty list."""
    graph = {module: imports(module) & set(MODULES) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


# --- sizes


def functions(module: str) -> Iterator[tuple[str, int]]:
    """Yield each function of a module, methods and nested ones too, with its lines from ``def`` to the end."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{module}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def function_lines(package: str) -> dict[str, int]:
    """Return the median, the 90th percentile and the largest length of a package's functions, in lines."""
    lengths = sorted(lines for module in MODULES if in_package(module, package) for _, lines in functions(module))
    return {"p50": lengths[len(lengths) // 2], "p90": lengths[len(lengths) * 9 // 10], "max": lengths[-1]}


def in_package(module: str, package: str) -> bool:
    """Return True if ``module`` is ``package`` or lies in it."""
    return module == package or module.startswith(f"{package}.")


def long_functions() -> list[str]:
    """Return the functions above ``MAX_FUNCTION_LINES``."""
    found = [item for module in MODULES for item in functions(module)]
    return [f"{name}: {lines} lines" for name, lines in found if lines > MAX_FUNCTION_LINES]


def long_packages() -> list[str]:
    """Return the packages whose functions are above ``P90_LINES`` at the 90th percentile."""
    p90 = {package: function_lines(package)["p90"] for package in PACKAGES}
    return [f"{package}: p90 is {lines} lines" for package, lines in p90.items() if lines > P90_LINES]


def long_modules() -> list[str]:
    """Return the modules above ``MAX_MODULE_LINES`` that give no reason, and reasons that nothing needs."""
    lengths = {module: line_count(path) for module, path in MODULES.items()}
    above = {module: lines for module, lines in lengths.items() if lines > MAX_MODULE_LINES}
    unneeded = [f"{module}: its reason to be long is not needed" for module in set(LONG_MODULES) - set(above)]
    return [f"{module}: {lines} lines" for module, lines in above.items() if module not in LONG_MODULES] + unneeded


def code_lines(path: Path) -> int:
    """Return the number of lines that hold code: no blank lines, comments or docstrings."""
    source = path.read_text(encoding="utf-8")
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - texts)


def core_files() -> list[Path]:
    """Return the files of environment, engine and TextDQN."""
    beside = {ROOT / path for path in BESIDE_CORE}
    return [path for pattern in CORE for path in sorted(ROOT.glob(pattern)) if path not in beside]


def core_lines() -> int:
    """Return the lines of code of environment, engine and TextDQN together."""
    return sum(code_lines(path) for path in core_files())


def core_size() -> list[str]:
    """Return a breach if the core is above ``MAX_CORE_LINES``."""
    lines = core_lines()
    return [f"{lines:,} lines, {lines - MAX_CORE_LINES:,} too many"] if lines > MAX_CORE_LINES else []


# --- names


NAMED_TUPLE = ("_asdict", "_field_defaults", "_fields", "_make", "_replace")
"""The public interface of ``typing.NamedTuple``, underscored so that it meets no field."""


def is_private(name: str) -> bool:
    """Return True for ``_name``, but not for ``_``, ``__name__`` and the interface of named tuples."""
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__") and name not in NAMED_TUPLE


def private_accesses() -> list[str]:
    """Return the accesses to another module's private names.

    The rule, decided on one file at a time:

    - ``from ours import _name`` is an access.
    - ``object._name`` is an access, unless ``object`` is ``self``, ``cls`` or ``super()``, or the module itself
      defines ``_name``: as a function, a class, a variable, a field, or an attribute of ``self``. Two objects of
      one class may know each other.
    - Only names that some module of ours defines count. ``model._last_obs`` belongs to Stable-Baselines3, which
      hands such names to subclasses; they are its interface, not ours.
    """
    defined = {module: set(defined_private(module)) for module in MODULES}
    ours = set().union(*defined.values())
    found = []
    for module, path in MODULES.items():
        place = path.relative_to(ROOT)
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                found += [f"{place}:{node.lineno}: import {a.name}" for a in node.names if is_private(a.name)]
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                name = node.attr
                if name in ours and name not in defined[module] and not is_own(node.value):
                    found.append(f"{place}:{node.lineno}: {ast.unparse(node)}")
    return found


def is_own(value: ast.expr) -> bool:
    """Return True if an attribute of ``value`` is the class's own: of ``self``, ``cls`` or ``super()``."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def defined_private(module: str) -> Iterator[str]:
    """Yield the private names that a module defines, at any depth."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            names = [node.attr]
        else:
            continue
        yield from filter(is_private, names)


def top_level_names(module: str) -> Iterator[tuple[str, str]]:
    """Yield each public name that a module defines at its top, with its meaning.

    The meaning of a name assigned in one line is that line, so identical aliases are one meaning. The meaning of
    a class, a function or a longer assignment is the module.
    """
    for node in parsed(module).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, module
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            line = ast.unparse(node)
            for name in [target.id for target in targets if isinstance(target, ast.Name)]:
                yield name, line if node.lineno == node.end_lineno else module


def ambiguous_names() -> list[str]:
    """Return the top-level names that mean different things in different modules.

    Private names are a module's own. ``main`` is the entry point of whichever module is run.
    """
    homes: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for module in MODULES:
        for name, meaning in top_level_names(module):
            if not name.startswith("_") and name != "main":
                homes[name].setdefault(meaning, module)
    return [f"{name}: {', '.join(sorted(found.values()))}" for name, found in sorted(homes.items()) if len(found) > 1]


# --- the walk from a reward to an update


def broken_path() -> list[str]:
    """Return what is wrong with ``REWARD_TO_UPDATE``: too long, a file that is missing, a step without an import."""
    broken = []
    if len(REWARD_TO_UPDATE) > MAX_PATH_FILES:
        broken.append(f"{len(REWARD_TO_UPDATE)} files, at most {MAX_PATH_FILES}")
    missing = [path for path in REWARD_TO_UPDATE if not (ROOT / path).is_file()]
    if missing:
        return [*broken, *(f"{path} does not exist" for path in missing)]
    names = [module_name(ROOT / path) for path in REWARD_TO_UPDATE]
    for before, after in itertools.pairwise(names):
        if not meet(before, after):
            broken.append(f"{before} and {after}: neither imports the other")
    return broken


def meet(first: str, second: str) -> bool:
    """Return True if one module imports the other, or they meet in the loop."""
    return second in imports(first) or first in imports(second) or (first, second) == MEET_IN_LOOP


# --- the report

CHECKS: Mapping[str, Callable[[], list[str]]] = {
    "import circle (imports for type checkers included)": import_circle,
    f"functions: p90 at most {P90_LINES} lines": long_packages,
    f"functions: none above {MAX_FUNCTION_LINES} lines": long_functions,
    f"modules: none above {MAX_MODULE_LINES} lines but by a stated reason": long_modules,
    "accesses to another module's private names": private_accesses,
    "top-level names with two meanings": ambiguous_names,
    f"environment, engine and TextDQN: at most {MAX_CORE_LINES:,} lines": core_size,
    f"from a reward to a Q update: at most {MAX_PATH_FILES} files": broken_path,
}
"""Each limit with the function that returns its breaches."""


def main() -> int:
    """Print every measure, and return 1 if a limit is broken."""
    for package in PACKAGES:
        lines = function_lines(package)
        print(f"{package}: function p50 / p90 / max lines {lines['p50']} / {lines['p90']} / {lines['max']}")
    print(f"longest module: {max(line_count(path) for path in MODULES.values())} lines")
    print(f"environment, engine and TextDQN: {core_lines():,} lines of code")
    print(f"from a reward to a Q update: {' -> '.join(REWARD_TO_UPDATE)}\n")
    broken = {limit: check() for limit, check in CHECKS.items()}
    for limit, breaches in broken.items():
        print(f"{'ok  ' if not breaches else 'FAIL'} {limit}{f': {len(breaches)}' if breaches else ''}")
        for breach in breaches:
            print(f"       {breach}")
    return 1 if any(broken.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
