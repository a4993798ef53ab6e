"""The page of samples and the figures of texts: each text beside those of its own prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agents.baselines.one_step import GreedyAgent, SampleAgent
from agents.runs.report import Yardstick, evaluate_agent
from agents.runs.samples import samples_page, text_metrics
from textgen_env.errors import ConfigError
from textgen_env.evaluation import evaluate
from textgen_env.models.table import TableModel
from textgen_env.prompts import Prompt
from textgen_env.vector_env import TextGenVectorEnv

WORDS = ["aa ", "bb ", "cc ", "dd ", "ee ", "ff ", "gg ", "hh "]
SIZES = {"top_k": 8, "max_new_tokens": 3, "max_prompt_tokens": 4}


@pytest.fixture
def env():
    """Eight prompts, each of which goes on with itself; its reference is that."""
    model = TableModel(WORDS, np.eye(8) * 0.9999 + 0.0001 / 8, end=None)
    prompts = [Prompt(word, reference=(word * 3).strip()) for word in WORDS]
    return TextGenVectorEnv(4, model, prompts, lambda text: float(ord(text[0]) - ord("a")), **SIZES)


def test_fewer_texts_than_prompts_leave_each_prompt_its_own_text_and_share(env):
    """Rewards are 0 to 7 by prompt, and the policy is the language model: no gain, whatever the texts are."""
    prompts = env.episodes.prompts
    yardstick = Yardstick.measure(env, prompts, beta=0.5, texts=4, samples=8, seed=0)
    evaluations = evaluate_agent(SampleAgent(), env, prompts, texts=4, seed=0)
    assert [evaluation.prompts for evaluation in evaluations] == [tuple(WORDS)]
    assert evaluations[0].reward == pytest.approx(3.5, abs=0.2)
    rows = [line.split(" | ") for line in samples_page(yardstick.samples, evaluations[0]).splitlines()[-8:]]
    assert [[row[1][:2], row[3][:2]] for row in rows] == [[row[0][2:4]] * 2 for row in rows]


def test_other_temperatures_are_measured_on_all_prompts_too(env):
    agent = SampleAgent()
    agent.beta = 1.0
    found = evaluate_agent(agent, env, env.episodes.prompts, texts=10, seed=0)
    assert [evaluation.num_prompts for evaluation in found] == [8, 8, 8]


def test_texts_of_other_prompts_and_other_references_are_refused(env):
    prompts = env.episodes.prompts
    whole, some = (evaluate(GreedyAgent(), env, texts, 0, prompts) for texts in (8, 4))
    with pytest.raises(ConfigError, match=r"same prompts, got 8 and 4"):
        samples_page(whole, some)
    references = [prompt.reference for prompt in prompts]
    with pytest.raises(ConfigError, match=r"one a prompt, 4 here .* got 8"):
        text_metrics(some, references, 4)
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    assert text_metrics(whole, references, 8)["chrf"] == pytest.approx(100)
    swapped = replace(whole, completions=whole.completions[::-1])
    assert text_metrics(swapped, references, 8)["chrf"] == 0
