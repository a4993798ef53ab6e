"""The table in docs/determinism.md, line by line: what is equal to the last bit, and under which conditions.

Run as a program, this file prints what a fresh process gets.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import PROMPTS, Worth, letters

from agents.baselines.one_step import SampleAgent
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from textgen_env import TextGenEnv, TextGenVectorEnv
from textgen_env.evaluation import roll_out
from textgen_env.models import load_pretrained
from textgen_env.models.hf import HFModel

ROOT = Path(__file__).parents[1]
TEXTS = ["The film was", "Once", "In the old house there was a", "She said"]
STEPS = 6
TOLERANCE = 1e-4  # nats, float32


def open_model(dtype=torch.float32, memo_bytes=1 << 20):
    return HFModel(*load_pretrained("tiny", dtype), memo_bytes=memo_bytes)


def written(model, rows=4, barrier=None):
    """Log-probabilities and hidden states of every step of ``rows`` texts, along forced actions; (steps, rows, .)."""
    env = TextGenVectorEnv(
        rows, model, TEXTS, "length", top_k=5, max_new_tokens=STEPS, min_new_tokens=STEPS, observation="full"
    )
    observation, _ = env.reset(seed=0, options={"prompt": TEXTS[:rows]})
    seen = [observation]
    for step in range(STEPS - 1):
        if step == barrier:
            env.episodes.rebuild()
        seen.append(env.step((np.arange(rows) + step) % 3)[0])
    return {key: np.stack([observation[key] for observation in seen]) for key in ("candidates", "logprobs", "hidden")}


def learned():
    """The weights of an agent after a short training."""
    env = TextGenVectorEnv(4, letters(), PROMPTS, Worth(), top_k=4, max_new_tokens=4, observation=NEEDED_KEYS)
    agent = TextDQN("CandidatePolicy", env, learning_starts=0, steps_per_update=16, buffer_size=400, seed=3)
    return {name: tensor.numpy() for name, tensor in agent.learn(160).policy.state_dict().items()}


def digest(arrays):
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()


def digests():
    """What must come out the same in every process with one thread."""
    return {
        "episodes, float32": digest(written(open_model())),
        "episodes, bfloat16": digest(written(open_model(torch.bfloat16))),
        "training": digest(learned()),
    }


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def here(one_thread):
    return digests()


def assert_close(first, second):
    np.testing.assert_array_equal(first["candidates"], second["candidates"])
    np.testing.assert_allclose(first["logprobs"], second["logprobs"], atol=TOLERANCE, rtol=0)


# --- equal to the last bit


@pytest.mark.slow
def test_determinism_the_same_process_writes_and_learns_the_same_again(here):
    assert digests() == here


@pytest.mark.slow
def test_determinism_another_process_with_another_hash_seed_writes_and_learns_the_same(here):
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == here


def test_determinism_another_seed_writes_something_else(one_thread):
    env = TextGenEnv(letters(), PROMPTS, Worth(), top_k=4, max_new_tokens=4)
    drawn = [tuple(env.reset(seed=seed)[0]["tokens"]) for seed in range(8)]
    assert len(set(drawn)) > 1
    assert drawn == [tuple(env.reset(seed=seed)[0]["tokens"]) for seed in range(8)]


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 3])
def test_determinism_runs_that_pass_the_same_barrier_are_equal(one_thread, step):
    assert digest(written(open_model(), barrier=step)) == digest(written(open_model(), barrier=step))


def test_determinism_row_i_of_a_vector_is_the_single_environment_with_seed_plus_i():
    """Exact on ``TableModel``, whose rows share no matrix product."""
    arguments = {"top_k": 4, "max_new_tokens": 4, "on_illegal": "last_legal", "observation": "full"}
    envs = TextGenVectorEnv(3, letters(), PROMPTS, Worth(), **arguments)
    single = [TextGenEnv(letters(), PROMPTS, Worth(), **arguments) for _ in range(3)]
    rows, _ = envs.reset(seed=5)
    for i, env in enumerate(single):
        alone, _ = env.reset(seed=5 + i)
        after = env.step(1)[0]
        for key in alone:
            np.testing.assert_array_equal(rows[key][i], alone[key])
        single[i] = after
    rows = envs.step(np.ones(3, int))[0]
    for i, after in enumerate(single):
        np.testing.assert_array_equal(rows["tokens"][i], after["tokens"])


def test_determinism_an_evaluation_does_not_depend_on_the_number_of_rows():
    """Exact on ``TableModel``: text i has random numbers of its own."""
    found = []
    for rows in (1, 3, 8):
        env = TextGenVectorEnv(rows, letters(), PROMPTS, Worth(), top_k=4, max_new_tokens=4)
        prompts = [env.episodes.prompts[i % 4] for i in range(12)]
        found.append(roll_out(SampleAgent(), env, prompts, 7).completions)
    assert found[0] == found[1] == found[2]


# --- equal within rounding


@pytest.fixture(scope="module")
def reference(one_thread):
    return written(open_model())


def test_determinism_another_number_of_rows_is_within_rounding(reference):
    alone = written(open_model(), rows=2)
    assert_close({key: value[:, :2] for key, value in reference.items()}, alone)


def test_determinism_without_a_memo_it_is_within_rounding(reference):
    assert_close(reference, written(open_model(memo_bytes=0)))


def test_determinism_after_a_barrier_it_is_within_rounding(reference):
    assert_close(reference, written(open_model(), barrier=3))


def test_determinism_another_number_of_threads_is_within_rounding(reference):
    torch.set_num_threads(2)
    try:
        assert_close(reference, written(open_model()))
    finally:
        torch.set_num_threads(1)


def test_determinism_bfloat16_is_near_float32(reference):
    """On the tokens that both propose at the first step; texts part where ranks change."""
    half = written(open_model(torch.bfloat16))
    for row in range(len(TEXTS)):
        known = dict(zip(reference["candidates"][0, row], reference["logprobs"][0, row], strict=True))
        ids, logprobs = half["candidates"][0, row], half["logprobs"][0, row]
        pairs = [(known[token], logprob) for token, logprob in zip(ids, logprobs, strict=True) if token in known]
        assert len(pairs) >= 3
        assert max(abs(a - b) for a, b in pairs) < 0.1


def test_every_line_of_the_table_of_determinism_names_a_test_that_exists():
    page = (ROOT / "docs" / "determinism.md").read_text()
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) >= 11
    here = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [name for name in named if not any(f"def {name}(" in text for text in here.values())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(digests()))
