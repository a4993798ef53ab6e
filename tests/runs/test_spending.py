"""What more tokens buy, against sums over all texts of a small environment."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import toys

from agents.runs.optimum import best_of_n
from agents.runs.spending import (
    GUIDED,
    MAXIMUM,
    PARTICLES,
    TEMPERED_FILE,
    WEIGHTED,
    check_counts,
    choices,
    draw_tokens,
    keep_tempered,
    spend,
    spending_table,
    tempered_settings,
)
from textgen_env.errors import ConfigError, RunFolderError
from textgen_env.prompts import Prompt
from textgen_env.vector_env import TextGenVectorEnv


@pytest.mark.slow
def test_choices_among_samples_are_worth_what_all_pairs_are():
    values, beta = np.array([0.0, 0.3, 1.0]), 0.25
    rewards = np.random.default_rng(0).choice(values, (4, 4_000))
    best, weighted = choices(rewards, 2, beta, length=5.0)
    pairs = np.array(list(itertools.product(values, repeat=2)))
    weights = np.exp(pairs / beta)
    assert (best.way, best.n, best.tokens, best.judge_calls) == (MAXIMUM, 2, 10.0, 2)
    assert best.reward == pytest.approx(pairs.max(1).mean(), abs=0.02)
    assert best.value == pytest.approx(best.reward - beta * best_of_n(rewards, 2).kl)
    assert weighted.way == WEIGHTED
    assert weighted.reward == pytest.approx(np.mean((pairs * weights).sum(1) / weights.sum(1)), abs=0.02)
    assert weighted.value == pytest.approx(beta * np.log(weights.mean(1)).mean(), abs=0.02)
    assert weighted.value_low < weighted.value < weighted.value_high
    one = choices(rewards, 1, beta, length=5.0)
    assert [point.value for point in one] == pytest.approx([rewards.mean()] * 2)
    with pytest.raises(ConfigError, match=r"n must be in 1\.\.4000 .*got 4001"):
        choices(rewards, 4_001, beta, length=5.0)


def test_ways_are_measured_tempered_and_shown(tmp_path):
    settings = {"top_k": 3, "max_new_tokens": 4, "min_new_tokens": 4, "max_prompt_tokens": 4}
    env = TextGenVectorEnv(2, toys.letters(), toys.PROMPTS, toys.Worth(), **settings)
    prompts, said = [Prompt(text) for text in toys.PROMPTS], []
    points = spend("lookahead", env, prompts, prompts, 4, beta=0.5, texts=64, seed=0, say=said.append)
    guided, particles = points
    assert (guided.way, particles.way) == (GUIDED, PARTICLES)
    assert said == ["4 guided best of n", "4 particles: tempering", "4 particles"]
    for point in points:
        assert (point.n, point.tokens) == (4, 16)
        assert point.value_low <= point.value <= point.value_high
    assert (guided.trust, guided.threshold) == (None, None)
    assert particles.trust in (1.0, 0.8, 0.6)  # lookahead is nearly right here
    assert particles.value > guided.value
    grid = spending_table(points, 1.0, 2.0)
    assert [column.header for column in grid.columns][2:4] == ["tokens", "calls"]
    assert grid.row_count == 2
    assert "–" not in list(grid.columns[-1].cells)
    assert list(spending_table(points, 1.0, None).columns[-1].cells) == ["–", "–"]  # a gain within its error
    for optimal in (2.0, None):
        draw_tokens(points, 1.0, optimal, tmp_path / f"{optimal}.png")
        assert (tmp_path / f"{optimal}.png").read_bytes().startswith(b"\x89PNG")
    keep_tempered(points, tmp_path)
    kept = {"pick": particles.pick, "trust": particles.trust, "threshold": particles.threshold}
    assert tempered_settings(tmp_path, 4) == kept
    assert tempered_settings(tmp_path, 5) == {}
    keep_tempered([replace(particles, n=5, trust=0.4)], tmp_path)  # another evaluation leaves what it does not measure
    assert tempered_settings(tmp_path, 5) == kept | {"trust": 0.4}
    assert tempered_settings(tmp_path, 4) == kept


@pytest.mark.parametrize(("change", "error"), [({"trust": "much"}, "trust must be"), ({"pick": 1}, "pick must be")])
def test_stored_settings_are_checked(change, error, tmp_path):
    path = tmp_path / TEMPERED_FILE.format(n=4)
    path.write_text(json.dumps({"pick": "best", "trust": 1.0, "threshold": 0.5} | change))
    with pytest.raises(ConfigError, match=error):
        tempered_settings(tmp_path, 4)
    path.write_text("[3]")
    with pytest.raises(RunFolderError):
        tempered_settings(tmp_path, 4)


def test_what_cannot_be_measured_is_told_before_anything_is():
    env = TextGenVectorEnv(2, toys.letters(), toys.PROMPTS, toys.Worth(), top_k=3)
    check_counts("zero", env, [1, 4], samples=4)
    with pytest.raises(ConfigError, match="particles must be at most 4, the samples of a prompt, got 5"):
        check_counts("zero", env, [1, 5], samples=4)
    with pytest.raises(ConfigError, match="values must come from a TextDQN"):
        check_counts(object(), env, [1], samples=4)
    check_counts(object(), env, [], samples=4)
