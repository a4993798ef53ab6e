"""Targets against exact soft values, and against sums written out by hand."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from toys import Worth, letters

import textgen_env  # noqa: F401  (registers the environment)
from agents.runs.optimum import TextTree
from agents.text_dqn.replay import EpisodeBatch
from agents.text_dqn.targets import TRACES, ObjectiveSettings, lambda_targets, log_policy, soft_value

BETA = 0.3


def tree(**settings) -> TextTree:
    env = gym.make_vec("TextGen-v0", model=letters(), prompts=["a"], reward=Worth(), top_k=4, **settings)
    return TextTree(env, "a")


def random_episodes(toy: TextTree, count: int, seed: int = 0) -> tuple[EpisodeBatch, np.ndarray]:
    """Return episodes of a uniformly random policy, and which node each step stood at (-1: padding)."""
    rng = np.random.default_rng(seed)
    paths = []
    for _ in range(count):
        node, path = 0, []
        while node >= 0:
            action = int(rng.choice(np.flatnonzero(np.isfinite(toy.log_mu[node]))))
            path.append((node, action))
            node = int(toy.child[node, action])
        paths.append(path)
    longest = max(map(len, paths))
    nodes, actions = np.full((2, count, longest), -1)
    for i, path in enumerate(paths):
        nodes[i, : len(path)], actions[i, : len(path)] = zip(*path, strict=True)
    at, chosen = np.maximum(nodes, 0), np.maximum(actions, 0)
    legal = np.isfinite(toy.log_mu)
    batch = EpisodeBatch(
        observations={key: torch.from_numpy(toy.observations[key][at]) for key in ("logprobs", "action_mask")},
        actions=torch.from_numpy(chosen),
        tokens=torch.zeros(nodes.shape, dtype=torch.int64),
        rewards=torch.from_numpy(toy.rewards[at, chosen]),
        behaviour=torch.from_numpy(-np.log(legal[at].sum(-1))),
        ended=torch.from_numpy((toy.child[at, chosen] < 0) & (nodes >= 0)),
        acted=torch.from_numpy(nodes >= 0),
        by_language_model=torch.zeros(nodes.shape, dtype=torch.bool),
        echoes=torch.zeros(legal[at].shape, dtype=torch.bool),
    )
    return batch, nodes


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.7}, {"reward_at": "step"}, {"min_new_tokens": 2}], ids=str)
@pytest.mark.parametrize("trace", ["td", "retrace", "path"])
def test_the_exact_soft_q_is_a_fixed_point_whoever_acted(trace, settings):
    """With the optimal Q every target is Q again, at every step of every episode, on any behaviour."""
    toy = tree(max_new_tokens=4, **settings)
    _, exact = toy.soft_values(BETA)
    batch, nodes = random_episodes(toy, 64)
    q = torch.from_numpy(np.where(np.isfinite(exact), exact, 0.0)[np.maximum(nodes, 0)])

    target = lambda_targets(batch, q, ObjectiveSettings(BETA), trace)

    expected = q.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(target[batch.acted], expected[batch.acted], atol=1e-5, rtol=0)


@pytest.mark.parametrize("trace", sorted(TRACES))
def test_a_target_never_reads_an_illegal_candidate(trace):
    toy = tree(max_new_tokens=4, top_p=0.7)
    batch, _ = random_episodes(toy, 32)
    q = torch.randn(*batch.actions.shape, 4, generator=torch.Generator().manual_seed(0))
    illegal = ~batch.observations["action_mask"].bool()
    assert illegal.any()

    before = lambda_targets(batch, q, ObjectiveSettings(BETA, 0.5), trace)
    after = lambda_targets(batch, q + 1e3 * illegal, ObjectiveSettings(BETA, 0.5), trace)

    torch.testing.assert_close(before[batch.acted], after[batch.acted])


def two_steps(behaviour: float = np.log(0.5)) -> EpisodeBatch:
    """One text of two tokens, two equally likely candidates, rewards 0.5 and 2."""
    return EpisodeBatch(
        observations={
            "logprobs": torch.full((1, 2, 2), np.log(0.5)),
            "action_mask": torch.ones(1, 2, 2, dtype=torch.int8),
        },
        actions=torch.tensor([[0, 1]]),
        tokens=torch.tensor([[0, 1]]),
        rewards=torch.tensor([[0.5, 2.0]]),
        behaviour=torch.full((1, 2), behaviour),
        ended=torch.tensor([[False, True]]),
        acted=torch.tensor([[True, True]]),
        by_language_model=torch.tensor([[False, False]]),
        echoes=torch.zeros(1, 2, 2, dtype=torch.bool),
    )


def test_targets_of_a_text_of_two_tokens_worked_by_hand():
    q = torch.tensor([[[0.0, 0.0], [1.0, 3.0]]])
    value = np.log((np.e + np.e**3) / 2)  # V of the second state at beta 1
    pi = np.e**3 / (np.e + np.e**3)  # of its second candidate
    expected = {
        ("td", 1.0): 0.5 + value,
        ("path", 1.0): 0.5 + value + (2.0 - 3.0),
        ("peng", 1.0): 0.5 + 2.0,  # the return that followed
        ("peng", 0.5): 0.5 + 0.5 * value + 0.5 * 2.0,
        ("retrace", 1.0): 0.5 + value + (2.0 - 3.0),  # pi/b = 0.88/0.5 is cut at 1
    }
    for (trace, lam), y in expected.items():
        got = lambda_targets(two_steps(), q, ObjectiveSettings(1.0, lam), trace)
        np.testing.assert_allclose(got.numpy(), [[y, 2.0]], rtol=1e-6)
    often = lambda_targets(two_steps(behaviour=0.0), q, ObjectiveSettings(1.0), "retrace")  # b = 1: pi/b = pi
    np.testing.assert_allclose(often.numpy(), [[0.5 + value + pi * (2.0 - 3.0), 2.0]], rtol=1e-6)
    half = lambda_targets(two_steps(), q, ObjectiveSettings(1.0, gamma=0.5), "peng")
    np.testing.assert_allclose(half.numpy(), [[0.5 + 0.5 * 2.0, 2.0]], rtol=1e-6)


def test_a_text_cut_off_from_outside_bootstraps_from_its_last_state():
    cut = two_steps()
    cut.ended[0, 1] = False
    cut.acted[0, 1] = False  # the last state has a value and no action
    q = torch.tensor([[[0.0, 0.0], [1.0, 3.0]]])

    got = lambda_targets(cut, q, ObjectiveSettings(1.0), "path")

    assert got[0, 0].item() == pytest.approx(0.5 + np.log((np.e + np.e**3) / 2))


def test_soft_value_and_policy_agree_with_their_definitions():
    rng = np.random.default_rng(1)
    log_mu = torch.log_softmax(torch.from_numpy(rng.normal(size=(5, 7))), -1)
    q = torch.from_numpy(rng.normal(size=(5, 7)))

    pi = log_policy(log_mu, q, 0.2).exp()

    entropy_form = (pi * (q - 0.2 * (pi.log() - log_mu))).sum(-1)  # V = E[Q] - beta KL at the optimum
    torch.testing.assert_close(soft_value(log_mu, q, 0.2), entropy_form)
