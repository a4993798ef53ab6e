"""A run from configuration to folder, on an exact model whose best policy is known."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from weather import CONFIG, RUN_FILES, read_csv, weather

from agents.baselines.one_step import LookaheadAgent, SampleAgent
from agents.runs.config import RunConfig
from agents.runs.optimum import TextTree
from agents.runs.parts import split_prompts
from agents.runs.report import table
from agents.runs.run import load_run, open_run, train
from agents.runs.samples import samples_page
from agents.zoo import AGENTS, MASK_AWARE
from textgen_env.errors import ConfigError, RewardError, RunFolderError, TextGenError
from textgen_env.evaluation import evaluate
from textgen_env.prompts import FunctionPrompts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder and its result."""
    folder = tmp_path_factory.mktemp("runs") / "weather"
    return folder, train(CONFIG, folder, model=weather())


@pytest.mark.slow
def test_a_run_leaves_everything_it_promises(run):
    folder, result = run
    assert sorted(path.name for path in folder.iterdir()) == RUN_FILES
    assert result.finished
    assert result.steps == 1504  # the first multiple of 8 rows that reaches 1500
    assert [path.name.split(".")[0] for path in (folder / "tensorboard").iterdir()] == ["events"]
    for picture in ("learning.png", "plane.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_metrics_go_from_the_first_steps_to_the_last(run):
    rows = read_csv(run[0] / "metrics.csv")
    steps = [float(row["steps"]) for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] == 1504
    assert 50 <= len(rows) <= 102
    last = rows[-1]
    assert float(last["episodes"]) >= 1504 / 3 - 8  # a text has at most 3 tokens
    assert 0 <= float(last["reward"]) <= 1
    assert math.isfinite(float(last["loss"]))
    assert float(last["seconds"]) == pytest.approx(run[1].seconds, rel=0.2)


@pytest.mark.slow
def test_the_parts_of_a_mix_are_in_the_metrics(tmp_path):
    mix = {"length": 1.0, "repetition": -0.5}
    train(replace(CONFIG, reward=mix, steps=400, eval_texts=8, eval_samples=4), tmp_path / "mix", model=weather())
    for row in read_csv(tmp_path / "mix" / "metrics.csv"):
        parts = float(row["reward_length"]) - 0.5 * float(row["reward_repetition"])
        assert float(row["reward"]) == pytest.approx(parts, abs=1e-4)


def test_the_summary_holds_the_table(run):
    folder, result = run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert [row["name"] for row in summary["report"]["rows"]] == [row.name for row in result.report.rows]
    assert summary["report"]["rows"][0]["details"]["parts"].keys() == {"keywords"}
    console = Console(width=200, file=io.StringIO())
    console.print(table(result.report))
    shown = console.file.getvalue()
    for row in result.report.rows:
        assert row.name in shown
        assert f"{row.reward:.2f}" in shown


def test_the_report_is_near_the_exact_values(run):
    folder, result = run
    opened = load_run(folder, model=weather())
    rows = {row.name: row for row in result.report.rows}
    trees = [TextTree(opened.env, prompt) for prompt in opened.test_prompts]
    optimum = np.mean([tree.optimum(0.1).value[0] for tree in trees])
    mu = np.mean([tree.point(np.exp(tree.log_mu)).reward for tree in trees])
    assert rows["language model, sampled"].reward == pytest.approx(mu, abs=0.04)  # 800 samples: 4 standard errors
    assert rows["language model, sampled"].share == 0
    assert rows["best possible policy"].value == pytest.approx(optimum, abs=0.05)
    assert rows["best possible policy"].share == pytest.approx(1, abs=1e-6)
    agent = np.mean([tree.point(opened.agent.probabilities(tree.observations)).reward for tree in trees])
    assert rows["text_dqn, trained"].reward == pytest.approx(agent, abs=0.16)  # 64 texts


@pytest.mark.slow
def test_the_agent_has_learned(run):
    """It begins as a look one token ahead, by the candidates' scores, and ends above the language model."""
    opened, untrained = load_run(run[0], model=weather()), open_run(CONFIG, model=weather())
    agents = (untrained.agent, LookaheadAgent(beta=CONFIG.beta), SampleAgent(), opened.agent)
    measured = [evaluate(agent, opened.env, 400, seed=1, prompts=opened.test_prompts) for agent in agents]
    before, ahead, sampled, after = measured
    assert before.completions == ahead.completions
    assert before.mean_kl == pytest.approx(ahead.mean_kl, abs=1e-4)
    assert after.values(CONFIG.beta).mean() > sampled.values(CONFIG.beta).mean() + 0.1
    assert after.values(CONFIG.beta).mean() > before.values(CONFIG.beta).mean() - 0.05


def test_the_page_of_samples_has_texts_of_every_prompt_several_where_there_are_few(run):
    rows = [line for line in (run[0] / "samples.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["prompt", *["the"] * 4, *["fog"] * 4]
    assert all(row.count(" | ") == 4 for row in rows)


def test_generated_text_cannot_break_the_page(run):
    opened = load_run(run[0], model=weather())
    texts = evaluate(opened.agent, opened.env, 2, seed=0, prompts=opened.test_prompts)
    nasty = replace(texts, completions=("a|b\n# no *heading*", "<script>alert(1)</script>"))
    page = samples_page(nasty, nasty)
    assert "a\\|b # no \\*heading\\*" in page
    assert "<script" not in page


@pytest.mark.slow
def test_the_stored_configuration_repeats_the_run(run, tmp_path):
    folder, _ = run
    config = RunConfig.from_json((folder / "config.json").read_text())
    train(config, tmp_path / "again", model=weather())
    first, second = (read_csv(path / "metrics.csv") for path in (folder, tmp_path / "again"))
    assert [(row["steps"], row["reward"]) for row in first] == [(row["steps"], row["reward"]) for row in second]


@pytest.mark.slow
@pytest.mark.parametrize("agent", sorted(set(AGENTS) - {"text_dqn"}))
def test_every_agent_runs_and_loads(agent, tmp_path):
    if agent in ("qrdqn", "maskable_ppo"):
        pytest.importorskip("sb3_contrib")
    settings = {} if agent.endswith("ppo") else {"batch_size": 16, "gradient_steps": 1}
    config = replace(CONFIG, agent=agent, agent_settings=settings, steps=200, eval_texts=8, eval_samples=8)
    result = train(config, tmp_path / "run", model=weather())
    assert f"{agent}, trained" in [row.name for row in result.report.rows]
    with pytest.raises(ConfigError, match=f"holds a {agent!r}, which Stable-Baselines3 unpickles.*--trust"):
        load_run(tmp_path / "run", model=weather())
    opened = load_run(tmp_path / "run", model=weather(), trust=True)
    assert opened.env.episodes.config.on_illegal == ("raise" if agent in MASK_AWARE else "last_legal")
    observation, _ = opened.env.reset(seed=0)
    assert opened.agent.predict(observation, deterministic=True)[0].shape == (8,)


# --- what can go wrong


def test_a_report_says_what_the_agent_sees_of_the_reward():
    config = RunConfig(env={"observation": "full"})
    assert open_run(config).seen_of_reward == "sees each candidate's score"
    judged = open_run(config, reward=lambda text: float(len(text)))
    assert judged.seen_of_reward == "has learned a score from finished texts"
    learned = open_run(replace(config, agent_settings={**config.agent_settings, "score": "learned"}))
    assert learned.seen_of_reward == judged.seen_of_reward  # though its environment shows other scores


@pytest.mark.parametrize(
    ("worth", "advised"),
    [
        (1.0, None),
        (100.0, "next to no price. For texts that stay close to the language: --beta 10 or so"),
        (
            0.1,
            "a high price, at which the language model is nearly the best. For more reward: --beta 0.01 or so",
        ),
        (0.0, "All texts of the language model have the same reward: there is nothing to learn from"),
    ],
)
def test_a_beta_that_does_not_suit_the_reward_is_told(worth, advised):
    """About half of the texts have the word, so the standard deviation is near half of its worth."""
    run = open_run(CONFIG, model=weather(), reward=lambda text: worth * ("rain" in text))
    yardstick = run.yardstick()
    notes = run.report(yardstick, [yardstick.samples]).notes
    told = [note for note in notes if "Rewards vary" in note or "nothing to learn" in note]
    assert [advised in note for note in told] == ([] if advised is None else [True])


def test_a_folder_that_holds_something_is_never_touched(run, tmp_path):
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(RunFolderError, match="already holds a run"):
        train(CONFIG, folder, model=weather())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not an empty folder"):
        train(CONFIG, tmp_path, model=weather())


def test_bad_input_leaves_no_folder(tmp_path):
    with pytest.raises(TextGenError, match="Did you mean 'keywords'"):
        train(replace(CONFIG, reward="keyword"), tmp_path / "run", model=weather())
    with pytest.raises(ConfigError, match="refuses its settings"):
        train(replace(CONFIG, agent_settings={"learning": 1}), tmp_path / "run", model=weather())
    assert not (tmp_path / "run").exists()


def failing_after(calls, error):
    """A reward that raises ``error`` once it has scored so many texts."""
    left = iter(range(calls))

    def reward(completion):
        if next(left, None) is None:
            raise error
        return float(len(completion))

    return reward


@pytest.mark.slow
def test_ctrl_c_saves_what_there_is(tmp_path):
    # 800 and 2 texts are measured before the training.
    result = train(CONFIG, tmp_path / "run", model=weather(), reward=failing_after(1000, KeyboardInterrupt()))
    assert not result.finished
    assert 0 < result.steps < 1500
    assert float(read_csv(tmp_path / "run" / "metrics.csv")[-1]["steps"]) == result.steps
    assert not json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
    assert load_run(tmp_path / "run", model=weather(), reward=len).agent.num_timesteps > 0


def test_ctrl_c_before_learning_leaves_the_configuration(tmp_path):
    result = train(CONFIG, tmp_path / "run", model=weather(), reward=failing_after(10, KeyboardInterrupt()))
    assert (result.finished, result.steps) == (False, 0)
    with pytest.raises(RunFolderError, match="before it had learned"):
        load_run(tmp_path / "run", model=weather(), reward=len)


@pytest.mark.slow
def test_an_error_in_the_middle_is_raised_and_the_run_so_far_kept(tmp_path):
    with pytest.raises(RewardError, match="lost its nerve"):
        train(CONFIG, tmp_path / "run", model=weather(), reward=failing_after(1000, OSError("lost its nerve")))
    assert {"agent.zip", "metrics.csv", "summary.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_with_python_objects_says_which_it_needs(run):
    with pytest.raises(ConfigError, match=r"Python objects.*: model\. .*load_run\(folder, model=\.\.\.\)"):
        load_run(run[0])


@pytest.mark.slow
def test_a_reward_object_with_plain_settings_is_stored_as_such(tmp_path):
    from textgen_env.rewards import Keywords

    config = replace(CONFIG, reward="sentiment", steps=8, eval_texts=2, eval_samples=2)
    train(config, tmp_path / "run", model=weather(), reward=Keywords(words=["sun"]))
    stored = RunConfig.from_json((tmp_path / "run" / "config.json").read_text())
    assert stored.reward == {"name": "keywords", "words": ["sun"]}
    assert stored.objects == ("model",)


def test_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no config\.json"):
        load_run(tmp_path)


# --- configuration


def test_a_configuration_survives_json():
    config = replace(CONFIG, prune="wanda:0.3", objects=("reward",), reward=None)
    again = RunConfig.from_json(config.to_json())
    assert again == config
    assert again.env_config() == config.env_config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent": "text_dqnn"}, "Did you mean 'text_dqn'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"envs": 1.5}, "envs must be"),
        ({"eval_samples": 1}, "at least 2"),
        ({"beta": 0.0}, "above 0"),
        ({"prune": "wanda"}, "METHOD:AMOUNT"),
        ({"prune": "wandaa:0.1"}, "Did you mean 'wanda'"),
        ({"prune": "wanda:1.5"}, r"\[0, 1\)"),
        ({"env": {"topk": 3}}, "Did you mean 'top_k'"),
        ({"env": {"max_new_tokens": 5, "min_new_tokens": 6}}, "min_new_tokens must be at most"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "must be JSON"), ("[]", "must be a mapping .*, got list"), ('{"stepps": 1}', "Did you mean 'steps'")],
)
def test_a_configuration_that_is_none_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_json(text)


# --- prompts


def test_test_prompts_are_of_other_templates():
    train_prompts, test_prompts, note = split_prompts(None, most=32, seed=0)
    templates = [{prompt.metadata["template"] for prompt in part} for part in (train_prompts, test_prompts)]
    assert not templates[0] & templates[1]
    assert len(train_prompts) == 190
    assert f"{len(test_prompts)} others" in note


def test_few_prompts_are_used_for_both_and_it_is_said():
    train_prompts, test_prompts, note = split_prompts([f"prompt {i}" for i in range(19)], most=32, seed=0)
    assert len(train_prompts) == len(test_prompts) == 19
    assert "too few" in note
    assert len(split_prompts([f"prompt {i}" for i in range(40)], most=3, seed=0)[1]) == 3


def test_the_prompts_of_a_function_are_measured_on_fixed_ones():
    source = FunctionPrompts(lambda rng: f"number {rng.integers(1000)}")
    first, second = (split_prompts(source, most=5, seed=0) for _ in range(2))
    assert [p.text for p in first[1]] == [p.text for p in second[1]]
    assert len(first[1]) == 5
