"""Who may import whom, what an import may cost, and the limits of ``scripts/check_house.py``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {"examples", "tests", "benchmarks", "scripts", "toys", "conftest", "golden", "my_agents", "fuzzing"}
SPEC = importlib.util.spec_from_file_location("check_house", ROOT / "scripts" / "check_house.py")
house = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(house)


@pytest.mark.slow
@pytest.mark.parametrize("limit", house.CHECKS)
def test_the_house_is_within_its_limits(limit):
    breaches = house.CHECKS[limit]()
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize("module", house.MODULES)
def test_a_module_imports_nothing_that_stands_above_it(module):
    roots = {name.split(".")[0] for name in house.imports(module)}
    assert not roots & OUTSIDE
    if module.startswith("textgen_env"):
        assert "agents" not in roots


@pytest.mark.parametrize("module", house.MODULES)
def test_a_module_imports_what_it_needs_and_not_its_own_package_s_root(module):
    assert module.split(".")[0] not in house.imports(module)


# --- the measures themselves, on sources with known breaches


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Replace the project by a few modules: ``sources({"agents/a.py": "..."})``."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(house, "ROOT", tmp_path)
        monkeypatch.setattr(house, "MODULES", {house.module_name(tmp_path / name): tmp_path / name for name in files})
        monkeypatch.setattr(house, "LONG_MODULES", {})
        house.parsed.cache_clear()

    yield write
    monkeypatch.undo()
    house.parsed.cache_clear()


def test_a_circle_through_an_import_for_type_checkers_is_found(sources):
    sources(
        {
            "agents/a.py": "from agents import b\n",
            "agents/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from agents.a import A\n",
        }
    )
    assert set(house.import_circle()) == {"agents.a", "agents.b"}


def test_private_names_of_another_module_are_found_and_one_s_own_are_not(sources):
    sources(
        {
            "agents/a.py": "class A:\n    def __init__(self, other):\n        self._x = other._x\n\ndef _f(): ...\n",
            "agents/b.py": (
                "from agents.a import A, _f\n\n"
                "class B(A):\n    def g(self, a, sb3):\n        return a._x, self._x, super()._x, sb3._last_obs\n"
            ),
        }
    )
    assert house.private_accesses() == ["agents/b.py:1: import _f", "agents/b.py:5: a._x"]


def test_identical_aliases_are_one_meaning_and_two_classes_are_two(sources):
    sources(
        {
            "agents/a.py": "T = int\nU = int\nclass Row: ...\ndef main(): ...\n",
            "agents/b.py": "T = int\nU = str\nclass Row: ...\ndef main(): ...\n",
        }
    )
    assert house.ambiguous_names() == ["Row: agents.a, agents.b", "U: agents.a, agents.b"]


def test_long_functions_and_modules_are_found(sources, monkeypatch):
    monkeypatch.setattr(house, "LONG_MODULES", {})

    def body(lines):
        return "def f():\n" + "    1\n" * (lines - 1)

    sources({"agents/a.py": body(70), "agents/b.py": body(71), "textgen_env/c.py": body(3) + "\n" * 448})
    assert house.long_functions() == ["agents.b.f: 71 lines"]
    assert house.long_modules() == ["textgen_env.c: 451 lines"]
    assert house.function_lines("agents") == {"p50": 71, "p90": 71, "max": 71}
    assert house.long_packages() == ["agents: p90 is 71 lines"]


def test_a_path_from_reward_to_update_has_at_most_six_files_that_import_each_other(sources, monkeypatch):
    sources({"agents/a.py": "", "agents/b.py": "import agents.a\n", "agents/c.py": ""})
    monkeypatch.setattr(house, "REWARD_TO_UPDATE", ("agents/a.py", "agents/b.py", "agents/c.py"))
    assert house.broken_path() == ["agents.b and agents.c: neither imports the other"]
    monkeypatch.setattr(house, "REWARD_TO_UPDATE", ("agents/a.py", "agents/b.py") * 4)
    assert house.broken_path() == ["8 files, at most 6"]
    monkeypatch.setattr(house, "REWARD_TO_UPDATE", ("agents/d.py",))
    assert house.broken_path() == ["agents/d.py does not exist"]


# --- imports


def loaded_by(program: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after ``program``."""
    program += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


HEAVY = {"torch", "transformers", "sklearn", "evaluate", "datasets", "stable_baselines3", "matplotlib", "PIL"}


@pytest.mark.slow
def test_the_environment_loads_no_framework_before_a_model_needs_one():
    assert not HEAVY & loaded_by("import textgen_env")
    assert not HEAVY & loaded_by(
        "import gymnasium as gym, textgen_env\n"
        "coin = textgen_env.TableModel(['H', 'T'], [0.5, 0.5], end=None)\n"
        "env = gym.make('TextGen-v0', model=coin, prompts=['H'], reward='length', top_k=2)\n"
        "env.reset(seed=0), env.step(1)"
    )


def test_the_agents_load_no_framework_before_one_is_used():
    assert not HEAVY & loaded_by("import agents")


@pytest.mark.parametrize("package", house.PACKAGES)
def test_every_public_name_is_found_and_no_other(package):
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__))
    assert {name: getattr(module, name).__name__ for name in module.__all__} == {name: name for name in module.__all__}
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'TextgenEnv'"):
        module.TextgenEnv  # noqa: B018


def test_the_classic_names_and_the_agents_are_public():
    from agents import __all__ as public

    classic = {"PrunedTransformerModel", "DeepQLearningModel", "ExperienceReplay", "custom_loss", "train_model"}
    assert set(public) >= classic | {"TextDQN", "PrunedTransformerExtractor", "SB3VecEnv"}
