"""A yardstick is measured once for what it depends on, and again for anything else."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest

from agents.runs import yardsticks
from agents.runs.config import RunConfig
from agents.runs.run import open_run
from agents.runs.yardsticks import read_yardstick, write_yardstick, yardstick_file
from textgen_env.models.hf import HFModel
from textgen_env.rewards import REWARDS, Reward

CONFIG = RunConfig(
    model=None,
    prompts=["the film", "the long film"],
    env={"top_k": 4, "max_new_tokens": 3, "min_new_tokens": 0, "max_prompt_tokens": 8},
    envs=4,
    steps=100,
    eval_texts=8,
    eval_samples=4,
    objects=("model",),
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(yardsticks, "cache_folder", lambda: tmp_path)
    return tmp_path / "yardsticks"


@pytest.fixture(scope="module")
def model(tiny_lm):
    return HFModel(*tiny_lm, name="tiny")


def opened(model, reward="sentiment", **changes):
    return open_run(replace(CONFIG, **changes), model=model, reward=reward)


def same(first, second):
    pairs = [(first.samples, second.samples), (first.greedy, second.greedy)]
    pairs += zip(first.lookahead, second.lookahead, strict=True)
    return all(
        a.completions == b.completions
        and a.prompts == b.prompts
        and a.lengths.dtype == b.lengths.dtype
        and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("rewards", "kl", "logprobs", "outside"))
        and a.figures() == b.figures()
        for a, b in pairs
    )


def test_the_second_one_is_read_and_equal_to_the_bit(model, folder, monkeypatch):
    first = opened(model).yardstick()
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr("agents.runs.report.Yardstick.measure", lambda *args, **settings: pytest.fail("measured again"))
    assert same(first, opened(model).yardstick())


def test_each_thing_that_it_depends_on_gives_another_file(model, tiny_lm):
    def path(run, **settings):
        return yardstick_file(run.scoring_env(), run.test_prompts, beta=0.1, **settings)

    paths = [
        path(opened(model)),
        path(opened(model, reward="length")),
        path(opened(model, prompts=["the film", "the bad film"])),
        path(opened(model, env={**CONFIG.env, "top_k": 3})),
        path(opened(model), seed=1),
    ]
    weight = tiny_lm[0].model.layers[0].mlp.up_proj.weight
    kept = weight.data.clone()
    try:
        weight.data[0, 0] += 1e-3
        paths.append(path(opened(model)))
    finally:
        weight.data.copy_(kept)
    assert len(set(paths)) == len(paths)
    assert path(opened(model)) == paths[0]


@pytest.mark.slow
def test_a_setting_of_the_model_gives_another_file_and_its_origin_does_not(tiny_lm):
    """With the same weights, these change the texts, or the tokens that are proposed."""
    lm, tokenizer = tiny_lm

    def path(**changes):
        same = copy.deepcopy(lm)
        for name, value in changes.items():
            owner = same.generation_config if name == "suppress_tokens" else same.config
            setattr(owner, name, value)
        run = opened(HFModel(same, tokenizer, name="tiny"))
        return yardstick_file(run.scoring_env(), run.test_prompts, beta=0.1)

    rope = {"rope_type": "default", "rope_theta": 10.0}
    paths = [path(), path(rope_parameters=rope), path(rms_norm_eps=0.1), path(suppress_tokens=[5])]
    assert len(set(paths)) == len(paths)
    assert path(_name_or_path="elsewhere", transformers_version="4.0") == paths[0]


def test_a_function_as_reward_or_a_file_in_it_is_measured_anew(model, tmp_path, monkeypatch):
    run = opened(model, reward=lambda text: float(len(text)))
    assert yardstick_file(run.scoring_env(), run.test_prompts) is None
    run = opened(model, reward={"name": "keywords", "words": ["film"]})
    assert yardstick_file(run.scoring_env(), run.test_prompts) is not None
    (tmp_path / "film").write_text("a file that a reward may read")
    monkeypatch.chdir(tmp_path)
    assert yardstick_file(run.scoring_env(), run.test_prompts) is None


def test_a_reward_that_the_user_registered_is_measured_anew(model, monkeypatch):
    monkeypatch.setattr(REWARDS, "_entries", {**REWARDS})
    REWARDS.register("mine")(Mine)
    for reward in ("mine", {"mine": 1.0, "length": 0.5}):
        run = opened(model, reward=reward)
        assert yardstick_file(run.scoring_env(), run.test_prompts) is None


@dataclass(frozen=True)
class Mine(Reward):
    name = "mine"

    def __call__(self, generations):
        return np.array([len(generation.completion) for generation in generations], float)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"beta": 1}', '{"beta": 1, "samples": {}, "greedy": 3, "lookahead": []}']
)
def test_a_damaged_file_is_measured_again(content, model, folder):
    first = opened(model).yardstick()
    (path,) = folder.iterdir()
    path.write_text(content)
    assert read_yardstick(path) is None
    assert same(first, opened(model).yardstick())
    assert read_yardstick(path) is not None


def test_only_the_newest_are_kept(model, folder, monkeypatch):
    monkeypatch.setattr(yardsticks, "MOST", 2)
    yardstick = opened(model).yardstick()
    for name in ("b", "c", "d"):
        write_yardstick(folder / f"{name}.json", yardstick)
    assert len(list(folder.iterdir())) == 2
