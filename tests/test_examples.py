"""Each example runs as its docstring says, with less learning where it takes a number of steps.

Examples that other tests run are left to them: those of adapters, clients, classic, games and the learner.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ELSEWHERE = {
    *("any_model", "classic", "cleanrl_dqn", "guess_the_number", "learner", "my_partner", "my_reward"),
    *("openenv_partner", "trl_environment", "trl_grpo"),
}
RUNS = {
    "classifier_reward": ((), r"score weighs 20\.0: mean reward 0\.[1-9]"),
    "custom_reward": ((), r"the best, with 0\.[1-9]"),
    "evaluate_reward": ((), r"the best, with [1-9]"),
    "own_judge": (("300",), r"agent: reward 0\.\d+ at"),
    "sb3_dqn": (("800",), r"[+-][01]\.\d\d  The movie was "),
    "steer_generate": (("2500",), r"steered: mean sentiment of \d+ texts 0\.[2-9]"),
    "summarise": ((), r"score weighs 20\.0: mean ROUGE-L 0\.[2-9]"),
}


def test_every_example_is_run_by_some_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == ELSEWHERE | set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name, tmp_path):
    arguments, printed = RUNS[name]
    command = [sys.executable, "-W", "error::UserWarning:textgen_env", str(EXAMPLES / f"{name}.py"), *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert re.search(printed, ran.stdout), ran.stdout[-2000:]
