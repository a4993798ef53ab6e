"""The suite: exact bounds against brute force, planted policies, sizes, and what a wrong size is answered."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import textgen_env
from agents.baselines.one_step import SampleAgent
from agents.runs.optimum import TextTree
from benchmarks.bounds import tables
from textgen_env import make_task
from textgen_env.errors import ConfigError, PromptError, UnknownName
from textgen_env.evaluation import evaluate
from textgen_env.prompts import Prompt
from textgen_env.rewards import Generation, make_reward
from textgen_env.tasks import TASKS, Bounds, OptimalAgent
from textgen_env.tasks.language import FIRST_LINES

DIAGNOSTIC = [f"TextGen/{name}-v0" for name in textgen_env.DIAGNOSTIC_TASKS]
CONVERSATION = [f"TextGen/{name}-v0" for name in textgen_env.CONVERSATION_TASKS]

SMALL = [
    ("Needle", {"depth": 4}),
    ("Needle", {"depth": 3, "branches": 3, "deceptive": True, "seed": 1}),
    ("DelayedKey", {"delay": 2}),
    ("DelayedKey", {"delay": 0, "keys": 2, "prior": 0.6}),
    ("NoisyBandit", {}),
    ("NoisyBandit", {"arms": 5, "noise": 0.3, "scale": 0.1, "contexts": 2, "seed": 3}),
    ("Dyck", {"depth": 2, "length": 4}),
    ("Dyck", {"depth": 1, "length": 5, "graded": False}),
    ("Dyck", {"depth": 0, "length": 6, "kinds": 1}),
    ("StarGraph", {"degree": 3, "length": 4}),
    ("StarGraph", {"degree": 2, "length": 3, "prior": 0.7, "slip": 0.4}),
    ("RandomWalks", {"nodes": 6, "degree": 2, "length": 7}),
]


@pytest.fixture(params=DIAGNOSTIC)
def task(request):
    return make_task(request.param)


def test_every_task_is_registered_with_gymnasium_under_its_id():
    ours = {id for id in gym.registry if id.startswith("TextGen/")}
    assert ours == set(TASKS)


@pytest.mark.parametrize(("name", "sizes"), SMALL)
def test_exact_bounds_equal_brute_force_over_all_texts(name, sizes):
    task = make_task(f"TextGen/{name}-v0", **sizes)
    trees = [TextTree(task.make_vec(1, observation=("logprobs",)), prompt) for prompt in task.test_prompts]
    sampled = np.mean([tree.values(np.exp(tree.log_mu))[0][0] for tree in trees])
    if name == "NoisyBandit":  # the best arm of a machine is best on average over luck, not text by text
        rewards = np.stack([tree.rewards[0] for tree in trees]).reshape(task.sizes["contexts"], -1, task.sizes["arms"])
        best = rewards.mean(1).max(-1).mean()
    else:
        best = np.mean([tree.soft_values(1e-9)[0][0] for tree in trees])
    bounds = task.bounds()
    assert bounds.language_model == pytest.approx(sampled, abs=1e-7)
    assert bounds.best == pytest.approx(best, abs=1e-7)


@pytest.mark.slow
def test_the_planted_optimal_policy_scores_1_and_the_language_model_0(task):
    vec = task.make_vec(32)
    bounds = task.bounds()
    planted = evaluate(OptimalAgent(task), vec, len(task.test_prompts), seed=0, prompts=task.test_prompts)
    assert bounds.normalise(planted.reward) == pytest.approx(1.0, abs=1e-12)
    sampled = evaluate(SampleAgent(), vec, 3000, seed=0, prompts=task.test_prompts)
    error = sampled.rewards.std() / len(sampled.rewards) ** 0.5
    assert abs(sampled.reward - bounds.language_model) < 4 * error + 1e-9


def test_the_planted_policy_also_predicts_one_action_for_a_single_environment():
    task = make_task("TextGen/StarGraph-v0")
    env, agent = task.make_env(), OptimalAgent(task)
    observation, _ = env.reset(seed=0)
    ended, reward = False, 0.0
    while not ended:
        action, _ = agent.predict(observation, deterministic=True)
        observation, reward, ended, _, _ = env.step(action)
    assert reward == 1.0


def test_rewards_are_within_0_and_1_and_the_same_for_the_same_seed_and_actions(task):
    def played():
        vec = task.make_vec(16)
        observation, _ = vec.reset(seed=3)
        rng, rewards = np.random.default_rng(0), []
        for _ in range(40):
            mask = observation["action_mask"] * rng.random(observation["action_mask"].shape)
            observation, reward, *_ = vec.step(mask.argmax(-1))
            rewards.append(reward)
        return np.array(rewards)

    first = played()
    assert ((first >= 0) & (first <= 1)).all()
    assert np.array_equal(first, played())


def test_features_determine_the_value_of_a_state(task):
    """Two prefixes with the same features and as many tokens left are worth the same under the best policy."""
    process = task.reward.process
    agent = OptimalAgent(task)
    known = {}
    vec = task.make_vec(64, observation="full")
    observation, _ = vec.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        for ids, length, hidden in zip(
            observation["tokens"], observation["length"][:, 0], observation["hidden"], strict=True
        ):
            left = process.steps + len(process.prompts[0]) - length
            value = agent._values.of_state(agent._state(tuple(ids[:length].tolist())), left)
            assert known.setdefault((left, hidden.tobytes()), value) == pytest.approx(value, abs=1e-12)
        mask = observation["action_mask"] * rng.random(observation["action_mask"].shape)
        observation, *_ = vec.step(mask.argmax(-1))
    assert len(known) > 3


def test_gymnasium_s_own_checker_accepts_every_task(task):
    check_env(gym.make(task.id).unwrapped, skip_render_check=True)


def test_sizes_and_settings_are_keywords_of_gym_make():
    env = gym.make("textgen_env:TextGen/Needle-v0", depth=3, observation=("hidden", "action_mask"))
    assert env.observation_space["hidden"].shape == (6,)
    assert env.unwrapped.max_new_tokens == 3
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.max_new_tokens == 3
    vec = gym.make_vec("TextGen/Dyck-v0", num_envs=3, length=6, depth=2, kinds=1, autoreset_mode="Disabled")
    assert vec.single_action_space.n == 2
    assert vec.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED


def test_the_noise_of_the_bandit_leaves_its_bounds_alone():
    quiet, loud = (make_task("TextGen/NoisyBandit-v0", noise=noise) for noise in (0.0, 1.0))
    assert quiet.bounds() == loud.bounds()
    vec = loud.make_vec(64)
    rewards = evaluate(OptimalAgent(loud), vec, 360, seed=0, prompts=loud.test_prompts).rewards
    assert set(rewards) == {0.0, 1.0}


def test_the_scale_of_the_bandit_is_that_of_its_bounds():
    whole, tenth = (make_task("TextGen/NoisyBandit-v0", scale=scale).bounds() for scale in (1.0, 0.1))
    assert [tenth.language_model, tenth.best, tenth.ceiling] == pytest.approx(
        [whole.language_model / 10, whole.best / 10, 0.1]
    )


def test_a_deceptive_needle_pays_most_next_to_the_worst_text():
    task = make_task("TextGen/Needle-v0", depth=3, deceptive=True)
    needle = task.reward.process.needle
    tree = TextTree(task.make_vec(1), ">")
    worth = {
        (*prefix, int(candidate)): reward
        for prefix, candidates, rewards in zip(
            tree.prefixes, tree.observations["candidates"], tree.rewards, strict=True
        )
        if len(prefix) == 2
        for candidate, reward in zip(candidates, rewards, strict=True)
    }
    off = {text: sum(a != b for a, b in zip(text, needle, strict=True)) for text in worth}
    assert worth == {text: 1.0 if text == needle else off[text] / 6 for text in worth}


@pytest.mark.parametrize(
    ("name", "sizes", "says"),
    [
        ("Needle", {"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ("Needle", {"depth": 65}, "depth must be a whole number in 1..64, got 65"),
        ("Needle", {"branches": True}, "branches"),
        ("Needle", {"deceptive": "very"}, "deceptive must be one of"),
        ("DelayedKey", {"delay": -1}, "delay"),
        ("DelayedKey", {"prior": 1.0}, "prior must be a number in"),
        ("NoisyBandit", {"noise": 1.5}, "noise must be a number in"),
        ("NoisyBandit", {"scale": 0.0}, "scale"),
        ("Dyck", {"length": 7}, "make both even or both odd"),
        ("Dyck", {"length": 2}, "length must be a whole number of at least 4"),
        ("StarGraph", {"degree": 1}, "degree"),
        ("StarGraph", {"slip": float("nan")}, "slip"),
        ("RandomWalks", {"degree": 21}, "degree must be a whole number in 2..20"),
        ("RandomWalks", {"length": 3}, "so length must be more, got 3"),
    ],
)
def test_a_size_out_of_range_says_what_is_allowed(name, sizes, says):
    with pytest.raises(ConfigError, match=says):
        make_task(f"TextGen/{name}-v0", **sizes)


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(UnknownName, match="Did you mean 'TextGen/Needle-v0'"):
        make_task("TextGen/Needel-v0")
    with pytest.raises(UnknownName, match="Did you mean 'depth'"):
        make_task("TextGen/Needle-v0", dept=3)
    with pytest.raises(UnknownName, match="Did you mean 'observation'"):
        gym.make("TextGen/Needle-v0", observations="full")


def test_a_prompt_that_is_none_of_the_task_s_is_refused():
    env = make_task("TextGen/StarGraph-v0").make_env()
    with pytest.raises(PromptError, match="is no prompt of StarGraph"):
        env.reset(options={"prompt": "a1"})


@pytest.mark.parametrize("bounds", [(0.5, 0.5, 1.0), (0.5, 1.1, 1.0), (0.0, float("nan"), 1.0)])
def test_bounds_that_do_not_rise_are_refused(bounds):
    with pytest.raises(ConfigError, match="must rise"):
        Bounds(*bounds)


def test_normalising_takes_arrays():
    np.testing.assert_allclose(Bounds(0.2, 0.6, 1.0).normalise([0.2, 0.4, 0.6]), [0.0, 0.5, 1.0])


# --- language tasks


@pytest.fixture(params=sorted(set(TASKS) - set(DIAGNOSTIC) - set(CONVERSATION)))
def language(request):
    return make_task(request.param)


def test_no_template_is_both_trained_and_tested_on(language):
    def templates(prompts):
        return {prompt.metadata.get("template", prompt.text) for prompt in prompts}

    assert templates(language.train_prompts)
    assert templates(language.test_prompts)
    assert not templates(language.train_prompts) & templates(language.test_prompts)


def test_language_tasks_play_on_the_model_in_the_box(language):
    texts = evaluate(SampleAgent(), language.make_vec(8), 16, seed=0, prompts=language.test_prompts)
    assert ((texts.rewards >= -1) & (texts.rewards <= 1)).all()
    assert len(set(texts.completions)) > 8


def test_a_language_task_takes_any_model(tiny_lm):
    vec = gym.make_vec("TextGen/Sentiment-v0", num_envs=2, model=tiny_lm, length=3, top_k=4)
    assert vec.reset(seed=0)[0]["logprobs"].shape == (2, 4)
    assert gym.make_vec(vec.spec).single_action_space.n == 4


def test_the_search_has_beaten_the_language_model_on_every_language_task(language):
    bounds = language.bounds()
    assert bounds.language_model < bounds.best <= bounds.ceiling == 1.0


@pytest.mark.slow
def test_the_documentation_has_the_tables_that_its_command_prints():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert [line for line in tables().splitlines() if line not in page.splitlines()] == []


def test_bounds_that_nobody_has_searched_say_how_to():
    with pytest.raises(ConfigError, match=r"benchmarks.bounds --tasks TextGen/Sentiment-v0 --sizes .*length=7"):
        make_task("TextGen/Sentiment-v0", length=7).bounds()


@pytest.mark.parametrize(
    ("name", "completion", "reward"),
    [
        ("Keywords", " a day with a friend", 0.5),
        ("Keywords", " a day with a friend a day with a friend", 0.5 - 2 / 7),
        ("Json", 'glad"', 0.5),
        ("Json", 'glad"}', 0.5),
        ("Json", 'glad", "job": "cook"', 1.0),
        ("Json", 'glad", "job": "cook"}', 1.0),
        ("Json", "glad", 0.0),
        ("Json", 'glad" and', 0.0),
        ("Couplet", "and so the day will go to bed\n", 1.0),  # eight syllables, "bread" before
        ("Couplet", "and so the day will sleep\n", 0.375),  # six
        ("LeadRouge", " a boy found the dog", 2 * 1.0 * 0.5 / 1.5),  # half of ten words
    ],
)
def test_language_rewards_on_worked_cases(name, completion, reward):
    task = make_task(f"TextGen/{name}-v0")
    prompt = {
        "Keywords": Prompt("It was"),
        "Json": Prompt('{"name": "Ann", "mood": "'),
        "Couplet": Prompt("The baker sings and bakes his bread,\n"),
        "LeadRouge": Prompt("A dog was lost.", reference="A boy found the dog and took it back home."),
    }[name]
    generation = Generation(prompt.text, completion, reference=prompt.reference)
    assert task.reward([generation])[0] == pytest.approx(reward)


def test_the_keys_that_a_json_object_needs_are_a_size():
    begun, end = '{"name": "Ann", "mood": "', 'glad"'
    worth = [make_task("TextGen/Json-v0", keys=keys).reward([Generation(begun, end)])[0] for keys in (2, 3)]
    assert worth == [1.0, 0.5]


def test_first_lines_of_couplets_have_eight_syllables():
    reward = make_reward({"name": "metre", "syllables": 8})
    assert set(reward([Generation("", line) for line in FIRST_LINES])) == {1.0}


@pytest.mark.parametrize(
    ("name", "sizes", "says"),
    [
        ("Sentiment", {"length": 0}, "length"),
        ("Keywords", {"count": 13}, "count must be a whole number in 1..12"),
        ("Readability", {"grade": 31}, "grade must be a number in"),
        ("Json", {"keys": 5}, "keys"),
        ("Couplet", {"length": 257}, "length"),
        ("LeadRouge", {"length": 3}, "length"),
    ],
)
def test_a_language_size_out_of_range_says_what_is_allowed(name, sizes, says):
    with pytest.raises(ConfigError, match=says):
        make_task(f"TextGen/{name}-v0", **sizes)


def test_lead_rouge_takes_no_other_model():
    with pytest.raises(UnknownName, match="unknown size of TextGen/LeadRouge-v0 'model'"):
        make_task("TextGen/LeadRouge-v0", model="smollm2")
