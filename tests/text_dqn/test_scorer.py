"""The learned scorer: what it finds, what it leaves alone, and that prefixes and texts are scored alike."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from toys import PROMPTS, TABLE, letters

from agents.text_dqn.agent import TextDQN
from agents.text_dqn.echoes import Echoes, echoed
from agents.text_dqn.features import FOLDS, JudgedTexts, KnownTokens
from agents.text_dqn.networks import NEEDED_KEYS
from agents.text_dqn.outlook import Visited
from agents.text_dqn.replay import Acted, EpisodeReplay
from agents.text_dqn.ridge import Design, Logistic, Problem, bent, best_curve, cross_fit, rising_curve, weigh_groups
from agents.text_dqn.scorer import TextScorer
from agents.text_dqn.scores import fit_scores, scored_batch
from agents.text_dqn.validation import LANGUAGE_MODEL, best_supported
from textgen_env import TableModel
from textgen_env.errors import ConfigError
from textgen_env.policies import sample

VOCABULARY, LENGTH, TEXTS, BETA = 12, 6, 1500, 0.1


def judged(tokens, reward):
    rewards = np.array([reward(row) for row in tokens], np.float64)
    count, none = len(tokens), np.zeros(tokens.shape, bool)
    lengths, folds = np.full(count, tokens.shape[1]), np.arange(count) % FOLDS
    return JudgedTexts(tokens, lengths, rewards, folds, np.ones(count, bool), none)


def texts(reward, seed=0, count=TEXTS):
    return judged(np.random.default_rng(seed).integers(1, VOCABULARY, (count, LENGTH)), reward)


def visited(found):
    count, k = min(200, len(found.tokens)), 4
    tokens = torch.from_numpy(found.tokens[:count])
    candidates = torch.from_numpy(np.random.default_rng(1).integers(1, VOCABULARY, (count, LENGTH, k)))
    return Visited(tokens, candidates, torch.full((count, LENGTH, k), 1 / k), *of_texts(tokens, candidates))


def of_texts(tokens, candidates):
    """All tokens were drawn by the language model, none occurs in the prompt; the folds of ``texts``."""
    there = torch.ones_like(tokens, dtype=torch.bool)
    return there, there, Echoes.none(tokens, candidates), torch.arange(len(tokens)) % FOLDS


def fitted(found):
    scorer = TextScorer(VOCABULARY, LENGTH)
    scorer.characters.copy_(torch.arange(VOCABULARY) % 4 + 1.0)
    known = KnownTokens(np.random.default_rng(2).normal(size=(VOCABULARY, 3)), np.zeros((VOCABULARY, 1)))
    return scorer, scorer.fit(found, known, visited(found), BETA)


def finished_scores(scorer, found):
    """What the scorer says of whole texts: the candidate is the last token."""
    tokens = torch.from_numpy(found.tokens)
    steps = torch.full((len(tokens), 1), tokens.shape[1] - 1)
    return scorer(tokens, steps, tokens[:, -1:].unsqueeze(1))[1][:, 0, 0].numpy()


JUDGES = {
    "a token": lambda row: float((row == 3).sum()),
    "a token at all": lambda row: float(3 in row),
    "a pair": lambda row: float(sum(a == 3 and b == 5 for a, b in pairwise(row))),
    "the first token": lambda row: float(row[0] in (2, 7)),
    "the last token": lambda row: float(row[-1] in (2, 7)),
    "a token late rather than early": lambda row: float((row[3:] == 3).sum() - (row[:3] == 3).sum()),
    "a pair for the second time": lambda row: float(len(set(pairwise(row.tolist()))) < LENGTH - 1),
    "a length": lambda row: -abs(float((row % 4 + 1).sum()) - 15) / 10,
    "different tokens": lambda row: float(len(set(row.tolist()))),
    "saturating": lambda row: 1 / (1 + np.exp(-2.0 * float(np.isin(row, (2, 4, 6)).sum() - 2))),
}


@pytest.mark.slow
@pytest.mark.parametrize("judge", JUDGES)
def test_it_finds_what_the_judge_looks_at_and_predicts_new_texts(judge):
    scorer, held_out = fitted(texts(JUDGES[judge]))
    fresh = texts(JUDGES[judge], seed=5)
    errors = finished_scores(scorer, fresh) - fresh.rewards
    assert 1 - (errors**2).mean() / fresh.rewards.var() > 0.75
    assert held_out > 0.75


def test_a_random_judge_is_scored_alike_everywhere():
    luck = np.random.default_rng(3)
    scorer, held_out = fitted(texts(lambda row: luck.random()))
    score, candidates = scorer(*arguments(texts(JUDGES["a token"])))
    assert held_out <= 0.02
    assert float((candidates - score).abs().max()) < 0.05  # of rewards between 0 and 1


def test_what_cannot_be_learned_from_silences_the_scorer():
    scorer, _ = fitted(texts(JUDGES["a token"]))
    alone = texts(JUDGES["a token"])._replace(folds=np.zeros(TEXTS, np.int64))  # nothing is left out
    known = KnownTokens(*np.zeros((2, VOCABULARY, 1)))
    assert scorer.fit(alone, known, visited(alone), BETA) == 0.0
    score, candidates = scorer(*arguments(alone))
    assert bool((candidates == score).all())


def test_few_finished_texts_beside_many_prefixes_are_fitted_to():
    found = texts(JUDGES["a token"], count=100)._replace(finished=np.arange(100) < 3)
    scorer, held_out = fitted(found)
    score, candidates = scorer(*arguments(found))
    assert bool(torch.isfinite(torch.cat([score, candidates], -1)).all())
    assert np.isfinite(held_out)


def test_a_constant_judge_is_scored_alike_everywhere():
    scorer, held_out = fitted(texts(lambda row: 0.5))
    score, candidates = scorer(*arguments(texts(JUDGES["a token"])))
    assert held_out == 0
    assert bool((candidates == score).all())


@pytest.mark.parametrize("outlier", [1e6, -1e30])
def test_one_wild_reward_leaves_numbers(outlier):
    found = texts(JUDGES["saturating"], count=200)
    found.rewards[7] = outlier
    scorer, held_out = fitted(found)
    score, candidates = scorer(*arguments(texts(JUDGES["a token"])))
    assert np.isfinite(held_out)
    assert bool(torch.isfinite(torch.cat([score, candidates], -1)).all())


def arguments(found, count=50):
    tokens = torch.from_numpy(found.tokens[:count])
    steps = torch.arange(LENGTH).expand(tokens.shape)
    candidates = torch.from_numpy(np.random.default_rng(4).integers(1, VOCABULARY, (count, LENGTH, 4)))
    return tokens, steps, candidates


@pytest.mark.slow
def test_the_candidate_that_was_taken_has_the_score_of_the_next_prefix():
    scorer, _ = fitted(texts(JUDGES["saturating"]))
    tokens, steps, _ = arguments(texts(JUDGES["saturating"], seed=6))
    score, taken = scorer(tokens, steps, tokens.unsqueeze(-1))
    torch.testing.assert_close(taken[:, :-1, 0], score[:, 1:, 0])


@pytest.mark.slow
def test_before_a_text_the_score_is_the_soft_value_of_all_texts():
    """Tokens add up and are drawn alike, so that the exact one is a sum over the places."""
    scorer, _ = fitted(texts(lambda row: float(row.sum()) / 30))
    found = scorer(
        torch.ones(1, LENGTH, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, 1).long()
    )
    worth = np.arange(1, VOCABULARY) / 30
    assert float(found[0]) == pytest.approx(
        LENGTH * BETA * np.log(np.exp(worth / BETA).mean()), abs=0.1
    )  # its law is taken as normal
    assert float(found[0]) > LENGTH * worth.mean() + 0.15


def test_a_prefix_is_scored_without_what_follows_it():
    scorer, _ = fitted(texts(JUDGES["different tokens"]))
    tokens, steps, candidates = arguments(texts(JUDGES["a token"], seed=7))
    whole = scorer(tokens, steps, candidates)
    for step in range(LENGTH):
        other = tokens.clone()
        other[:, step:] = 1
        alone = scorer(other, torch.full((len(tokens), 1), step), candidates[:, step : step + 1])
        torch.testing.assert_close(alone[0][:, 0], whole[0][:, step])
        torch.testing.assert_close(alone[1][:, 0], whole[1][:, step])


def scores_in_language(found, mu, step):
    """Scores of all ids from 1 on as candidates at a step, (11,), learned where their chances were mu (n, T, 11)."""
    everything, tokens = torch.arange(1, VOCABULARY).expand(mu.shape), torch.from_numpy(found.tokens)
    states = Visited(tokens, everything, torch.from_numpy(mu).float(), *of_texts(tokens, everything))
    scorer = TextScorer(VOCABULARY, LENGTH)
    scorer.characters.fill_(1.0)
    scorer.fit(found, KnownTokens(*np.zeros((2, VOCABULARY, 1))), states, 100.0)  # warm: the soft value is the mean
    _, scores = scorer(torch.ones(1, LENGTH, dtype=torch.long), torch.full((1, 1), step), everything[:1, :1])
    return scores[0, 0].numpy()


ENDING = VOCABULARY - 1
ENDINGS = {
    "another token": lambda row: float((row == 3).sum()),
    "the length": lambda row: float((row != ENDING).sum()) / 5,
    "ended by itself": lambda row: float(row[-1] == ENDING),
    "the last token": lambda row: float(row[-1] == 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(("judge", "ends"), [*((judge, 0.3) for judge in ENDINGS), ("the last token", 0.0)])
def test_a_prefix_is_worth_what_is_written_until_the_text_ends(judge, ends):
    """Each token is the end with the same chance. What is to come is taken as normal, which costs up to 0.13 here."""
    rng, places = np.random.default_rng(14), np.arange(LENGTH)
    mu = np.full(VOCABULARY - 1, (1 - ends) / (VOCABULARY - 2))
    mu[ENDING - 1] = ends
    tokens = 1 + rng.choice(VOCABULARY - 1, (TEXTS, LENGTH), p=mu)
    ended = tokens == ENDING
    lengths = np.where(ended.any(1), ended.argmax(1) + 1, LENGTH)
    inside = places < lengths[:, None]
    rewards = [ENDINGS[judge](row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    found = texts(JUDGES["a token"])._replace(tokens=tokens, lengths=lengths, rewards=np.array(rewards))
    everything = torch.arange(1, VOCABULARY).expand(TEXTS, LENGTH, -1)
    chances = torch.from_numpy(mu).float().expand(everything.shape)
    there, _, echoes, folds = of_texts(torch.from_numpy(tokens), everything)
    states = Visited(
        torch.from_numpy(tokens), everything, chances, there & torch.from_numpy(inside), there, echoes, folds
    )
    scorer = TextScorer(VOCABULARY, LENGTH)
    scorer.characters.fill_(1.0)
    scorer.ends[ENDING] = 1.0
    scorer.fit(found, KnownTokens(*np.zeros((2, VOCABULARY, 1))), states, 100.0)  # warm: the soft value is the mean
    begun = torch.ones(1, LENGTH, dtype=torch.long)
    score, candidates = scorer(begun, torch.tensor([[0]]), everything[:1, :1])
    expected = np.mean(rewards)
    assert float(score) == pytest.approx(expected, abs=0.15)
    assert float((candidates[0, 0] * chances[0, 0]).sum()) == pytest.approx(expected, abs=0.1)


def test_tokens_that_only_ever_came_last_and_early_are_taken_for_stop_strings():
    found = judged(np.array([[1, 2, 9, 0], [2, 3, 4, 9], [5, 8, 0, 0], [1, 8, 2, 7], [7, 3, 6, 2]]), np.sum)
    found = found._replace(lengths=np.array([3, 4, 2, 4, 3]), finished=np.array([True, True, True, True, False]))
    scorer = TextScorer(VOCABULARY, 4)
    scorer.find_stops(found)  # 8 has come within a text, 7 and 4 at the end of the budget, 6 in a prefix
    assert torch.nonzero(scorer.stops).flatten().tolist() == [9]
    assert scorer.goes_on(torch.tensor([9, 8])).tolist() == [0.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("left", [1, 2])
def test_a_token_is_worth_what_it_lets_expect(left):
    """A judge counts token 5, which always follows 3; the chances of what comes next are powers of a matrix."""
    rng = np.random.default_rng(11)
    follows = rng.dirichlet(np.ones(VOCABULARY - 1), VOCABULARY - 1)  # [a, b], ids from 1 on
    follows[2] = np.eye(VOCABULARY - 1)[4]  # after 3 comes 5
    found = texts(lambda row: float((row == 5).sum()))
    mu = np.full((TEXTS, LENGTH, VOCABULARY - 1), 1 / (VOCABULARY - 1))
    mu[:, 1:] = follows[found.tokens[:, :-1] - 1]
    scores = scores_in_language(found, mu, LENGTH - 1 - left)
    counted = np.arange(1, VOCABULARY) == 5
    exact = sum(np.linalg.matrix_power(follows, n) @ counted for n in range(left + 1))
    np.testing.assert_allclose(scores - scores.mean(), exact - exact.mean(), atol=0.12)
    assert exact[2] - exact.mean() > 0.4


@pytest.mark.slow
def test_what_was_said_early_counts_for_what_it_makes_likely_later():
    """The more often token 5 has occurred, the likelier it comes again: its chance is 0.1, and 0.12 more each time."""
    rng, often = np.random.default_rng(12), np.arange(1, VOCABULARY) == 5
    mu = np.zeros((TEXTS, LENGTH, VOCABULARY - 1))
    tokens = np.zeros((TEXTS, LENGTH), np.int64)
    for step in range(LENGTH):
        chance = 0.1 + 0.12 * (tokens[:, :step] == 5).sum(1, keepdims=True)
        mu[:, step] = np.where(often, chance, (1 - chance) / (VOCABULARY - 2))
        tokens[:, step] = 1 + sample(mu[:, step], rng.random(TEXTS))
    found = texts(JUDGES["a token"])._replace(tokens=tokens, rewards=(tokens == 5).sum(1).astype(float))
    scores = scores_in_language(found, mu, 0)
    more = float(scores[4] - scores[:3].mean())
    assert more == pytest.approx(1.12 ** (LENGTH - 1), abs=0.25)  # each step that follows multiplies by 1.12


@pytest.mark.slow
def test_what_the_prompt_has_is_told_from_what_it_has_not():
    """A judge counts the different tokens of a text that the prompt has: any ones, each in every second prompt."""
    found = texts(lambda row: 0.0)
    prompts = np.random.default_rng(13).random((TEXTS, VOCABULARY)) < 0.5
    echoes = np.take_along_axis(prompts, found.tokens, 1)
    different = [len(set(row[held])) for row, held in zip(found.tokens, echoes, strict=True)]
    scorer, held_out = fitted(found._replace(rewards=np.array(different, float), echoes=echoes))
    assert held_out > 0.97
    tokens, steps, candidates = arguments(found)
    own = torch.from_numpy(echoes[: len(tokens)])
    scores = [
        scorer(tokens, steps, candidates, Echoes(own, torch.full(candidates.shape, held)))[1] for held in (False, True)
    ]
    fresh = (tokens[:, None, :, None] != candidates[:, :, None]) | (torch.arange(LENGTH) >= steps[..., None])[..., None]
    fresh = fresh.all(2)  # (n, T, k) the candidate has not occurred
    more = (scores[1] - scores[0])[:, 1:-1]
    assert float(more[fresh[:, 1:-1]].mean()) == pytest.approx(1, abs=0.1)
    assert float(more[~fresh[:, 1:-1]].mean()) == pytest.approx(0, abs=0.1)


def test_what_occurs_in_the_prompt_is_found_alike_for_the_replay_and_for_acting():
    rng, count, k = np.random.default_rng(14), 20, 4
    prompts, generated = rng.integers(1, 6, count), rng.integers(0, LENGTH, count)  # lengths
    tokens = rng.integers(0, VOCABULARY, (count, 12))
    candidates = rng.integers(0, VOCABULARY, (count, k))
    own = rng.integers(0, VOCABULARY, (count, LENGTH))
    observation = {"tokens": tokens, "length": (prompts + generated)[:, None], "candidates": candidates}
    held = [set(row[:length].tolist()) for row, length in zip(tokens, prompts, strict=True)]
    expected = [[token in ids for token in row] for row, ids in zip(candidates.tolist(), held, strict=True)]
    np.testing.assert_array_equal(echoed(observation, generated), expected)
    lengths, *ids = map(torch.from_numpy, (prompts[:, None], tokens, own, candidates[:, None]))
    found = Echoes.of_prompt(ids[0], lengths, *ids[1:])
    np.testing.assert_array_equal(found.candidates[:, 0], expected)
    np.testing.assert_array_equal(
        found.own, [[t in ids for t in row] for row, ids in zip(own.tolist(), held, strict=True)]
    )
    assert not echoed({**observation, "speaker": tokens}, generated).any()  # a conversation


@pytest.mark.slow
def test_prefixes_that_were_judged_count_as_texts():
    found = texts(JUDGES["a token"], count=60)
    lengths = np.random.default_rng(8).integers(1, LENGTH, 600)
    more = texts(JUDGES["a token"], seed=9, count=600)
    rewards = [float((row[:n] == 3).sum()) for row, n in zip(more.tokens, lengths, strict=True)]
    fresh = texts(JUDGES["a token"], seed=10)
    of_prefixes = more._replace(lengths=lengths, rewards=np.array(rewards), finished=np.zeros(600, bool))
    both = together(found, of_prefixes)
    few, more_ = (((finished_scores(fitted(x)[0], fresh) - fresh.rewards) ** 2).mean() for x in (found, both))
    assert more_ < few


@pytest.mark.slow
def test_prefixes_that_mislead_are_left_out():
    found = texts(JUDGES["a token"], count=300)
    of_prefixes = texts(lambda row: -float((row == 3).sum()), seed=9, count=600)  # half of a text that needs its end
    both = together(found, of_prefixes._replace(lengths=np.full(600, LENGTH - 2), finished=np.zeros(600, bool)))
    (alone, r2), (misled, r2_misled) = fitted(found), fitted(both)
    assert (float(alone.prefixes), float(misled.prefixes)) == (1.0, 0.0)
    assert r2_misled == r2
    for name, values in alone.state_dict().items():
        if name != "prefixes":
            torch.testing.assert_close(misled.state_dict()[name], values, rtol=0, atol=0, msg=name)


def together(*parts):
    return JudgedTexts(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def problem(design, rewards, folds):
    return Problem(design, rewards, folds, np.ones(len(rewards), bool))


def test_weights_are_those_of_ridge_regression():
    rng = np.random.default_rng(0)
    index, dense = rng.integers(0, 9, (80, 3)), rng.normal(size=(80, 2))
    design = Design.of({"a": index}, {"b": dense}, 9)
    rewards, folds = rng.normal(size=80), np.arange(80) % 2
    found = cross_fit(problem(design, rewards, folds), 2, [0.1])
    full = np.zeros((80, 9 + 2))
    for row in range(80):
        for number in index[row]:
            full[row, number] += design.scales[number]
    full[:, 9:] = dense * design.scales[9:]
    for fold in range(2):
        seen = folds != fold
        x, y = full[seen] - full[seen].mean(0), rewards[seen] - rewards[seen].mean()
        exact = np.linalg.solve(x.T @ x + 0.1 * seen.sum() * np.eye(x.shape[1]), x.T @ y)
        np.testing.assert_allclose(found.weights[fold], exact, atol=1e-3)


def test_larger_features_are_those_of_a_larger_block():
    rng = np.random.default_rng(0)
    index, dense = rng.integers(0, 9, (80, 3)), rng.normal(size=(80, 2))
    design = Design.of({"a": index}, {"b": dense}, 9)
    larger = design._replace(dense=design.dense * 3.0)
    weights = rng.normal(size=9 + 2)
    np.testing.assert_allclose(design.sized(b=3.0).times(weights), larger.times(weights))
    errors = rng.normal(size=80)
    np.testing.assert_allclose(
        design.sized(b=6.0).sized(b=3.0).transposed_times(errors), larger.transposed_times(errors)
    )


def test_features_that_matter_are_shrunk_less():
    rng = np.random.default_rng(0)
    folds = np.arange(300) % 5
    groups = {"noise": rng.normal(size=(300, 100)), "signal": rng.normal(size=(300, 100))}
    rewards = groups["signal"] @ rng.normal(size=100) + rng.normal(size=300)
    design = Design.of({"none": np.full((300, 1), 1)}, groups, 1)
    whole = problem(design, rewards, folds)
    first = cross_fit(whole, 5)
    relevance = weigh_groups(whole, 5, first.penalty, first.weights)
    assert relevance["noise"] < 1.0 <= relevance["signal"]
    found = cross_fit(whole.sized(**relevance), 5)
    signal = Design.of({"none": np.full((300, 1), 1)}, {"signal": groups["signal"]}, 1)
    alone = cross_fit(problem(signal, rewards, folds), 5)
    assert alone.error < found.error < 0.7 * first.error + 0.3 * alone.error


def noisy_sums(count, spread, seed=0):
    """Sums of 100 features with random weights, their law normal with this deviation."""
    rng = np.random.default_rng(seed)
    features, worth = rng.normal(size=(count, 100)), rng.normal(size=100) / 10 * spread
    return Design.of({"none": np.full((count, 1), 1)}, {"all": features}, 1), features @ worth


def test_a_judge_that_saturates_is_fitted_through_its_bend():
    design, sums = noisy_sums(600, spread=4.0)
    rewards, folds = 1 / (1 + np.exp(-sums)), np.arange(600) % 5
    straight = cross_fit(problem(design, rewards, folds), 5)
    found = bent(problem(design, rewards, folds), 5, straight)
    assert np.corrcoef(found.index, sums)[0, 1] ** 2 > 0.97 > np.corrcoef(straight.index, sums)[0, 1] ** 2
    assert ((found.left_out - rewards) ** 2).mean() < 0.3 * ((straight.left_out - rewards) ** 2).mean()
    np.testing.assert_allclose(found.left_out, 1 / (1 + np.exp(-found.index)), atol=0.01)  # the same link
    low = sums < np.quantile(sums, 0.8)  # what is above is predicted, too
    x, y = found.link.curve(0.5 * found.index[low], rewards[low])
    np.testing.assert_allclose(np.interp(0.5 * found.index[~low], x, y), rewards[~low], atol=0.08)


def test_a_tangent_is_a_step_of_newtons_method():
    """Towards the smallest cross-entropy of a share of the range; derivatives by differences."""
    link, z, rewards = Logistic(2.0, 6.0), np.array([-1.5, 0.0, 2.0]), np.array([2.0, 5.0, 4.5])
    np.testing.assert_allclose(link.expected(np.array([-50.0, 0.0, 50.0])), [2, 4, 6])

    def loss(at):
        chance, share = 1 / (1 + np.exp(-at)), (rewards - 2.0) / 4.0
        return -share * np.log(chance) - (1 - share) * np.log(1 - chance)

    slope = (loss(z + 1e-4) - loss(z - 1e-4)) / 2e-4
    curvature = (loss(z + 1e-4) - 2 * loss(z) + loss(z - 1e-4)) / 1e-8
    targets, weights = link.tangent(z, rewards)
    np.testing.assert_allclose(targets, z - slope / curvature, rtol=1e-4)
    np.testing.assert_allclose(weights, curvature / curvature.mean(), rtol=1e-4)


def test_a_judge_that_adds_up_is_fitted_straight():
    design, sums = noisy_sums(600, spread=1.0)
    rewards, folds = sums + 0.3 * np.random.default_rng(2).normal(size=600), np.arange(600) % 5
    straight = cross_fit(problem(design, rewards, folds), 5)
    assert bent(problem(design, rewards, folds), 5, straight) is straight
    low, top = sums < np.quantile(sums, 0.8), sums > np.quantile(sums, 0.9)
    x, y = best_curve(straight, low, rewards)  # of what was seen
    missed, flat = (
        sums[top].mean() - np.interp(straight.index[top], *knots).mean()
        for knots in ((x, y), rising_curve(straight.index[low], rewards[low]))
    )
    assert missed < 0.5 * flat
    assert y.max() == rewards[low].max()  # but no higher than any text was judged


def test_a_judge_with_a_ceiling_is_not_taken_for_a_line():
    design, sums = noisy_sums(600, spread=1.0)
    rewards, folds = np.minimum(sums, 0.3), np.arange(600) % 5
    straight = cross_fit(problem(design, rewards, folds), 5)
    x, y = best_curve(straight, np.ones(600, bool), rewards)
    assert len(x) > 2
    np.testing.assert_allclose(y.max(), 0.3, atol=0.02)


def test_features_that_never_differ_have_no_part_in_a_fit():
    rng = np.random.default_rng(3)
    varied, rewards = rng.normal(size=(80, 2)), rng.normal(size=80)
    both = Design.of({"none": np.full((80, 1), 1)}, {"a": varied, "b": np.full((80, 1), 7.0)}, 1)
    alone = Design.of({"none": np.full((80, 1), 1)}, {"a": varied}, 1)
    found, expected = (cross_fit(problem(d, rewards, np.arange(80) % 2), 2, [0.1]) for d in (both, alone))
    np.testing.assert_allclose(found.left_out, expected.left_out)


def test_the_curve_rises_and_bends_where_the_rewards_do():
    x = np.random.default_rng(0).normal(size=4_000)
    knots, heights = rising_curve(x, np.clip(x, -1.0, 1.0))
    assert (np.diff(heights) >= 0).all()
    np.testing.assert_allclose(heights, np.clip(knots, -1, 1), atol=0.06)


# --- in an agent


def agent(reward, **settings):
    env = gym.make_vec(
        "textgen_env:TextGen-v0", num_envs=8, model=letters(), prompts=PROMPTS, reward=reward, top_k=4,
        max_new_tokens=4, observation=NEEDED_KEYS,
    )  # fmt: skip
    defaults = {"learning_starts": 400, "steps_per_update": 100, "buffer_size": 8_000, "seed": 0, "unjudged": 0.0}
    return TextDQN(env=env, **(defaults | settings))


def worth(text):
    return float(text.count("b")) / 4


@pytest.mark.slow
def test_scores_of_the_replay_are_those_of_acting():
    learner = agent(worth).learn(800).learner
    scorer = learner.network.scorer
    scorer.echo.copy_(torch.randn(scorer.echo.shape, generator=torch.Generator().manual_seed(0)) / 10)
    env = gym.make_vec(
        "textgen_env:TextGen-v0", num_envs=8, model=letters(), prompts=PROMPTS, reward=worth, top_k=4,
        max_new_tokens=4, min_new_tokens=4, observation=NEEDED_KEYS,
    )  # fmt: skip
    replay, seen = EpisodeReplay(64, env.single_observation_space, n_envs=8), []
    observation, _ = env.reset(seed=0)
    for _ in range(4):
        seen.append(observation)
        actions = np.random.default_rng(len(seen)).integers(0, 2, 8)
        observation, rewards, done, *_ = env.step(actions)
        acted = Acted(actions, np.zeros(8), np.zeros(8, bool), 0.0)
        replay.add(seen[-1], observation, acted, rewards, done, np.zeros(8, bool))
    batch = replace(replay.batch([(row, 0, 4) for row in range(8)]), folds=None)
    assert 0 < batch.echoes.float().mean() < 1
    scored = scored_batch(learner.network, batch).observations
    for step, observation in enumerate(seen):
        single = learner.network.scored({key: torch.as_tensor(value) for key, value in observation.items()})
        for key in ("score", "candidate_scores"):
            torch.testing.assert_close(scored[key][:, step], single[key])


def test_before_the_first_update_the_policy_is_the_language_model():
    fresh = agent(worth)
    observation = fresh.env.reset()
    expected = np.exp(observation["logprobs"] - np.logaddexp.reduce(observation["logprobs"], -1, keepdims=True))
    np.testing.assert_allclose(fresh.probabilities(observation), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["learned", "judge"])
def test_the_scorer_alone_leads_to_reward(score):
    learned = agent(worth, score=score, learning_rate=0.0).learn(1_200)
    assert learned.learner.scorer_r2 > 0.8
    observation = learned.env.reset()
    gains = learned.probabilities(observation) * (observation["candidates"] == letters().encode("b")[0])
    before = np.exp(observation["logprobs"]) * (observation["candidates"] == letters().encode("b")[0])
    assert (gains.sum(-1) > before.sum(-1)).all()


@pytest.mark.slow
def test_judged_prefixes_are_counted():
    asked, calls = agent(worth, score="judge"), agent(worth, score="learned")
    asked.learn(1_000)
    calls.learn(1_000)
    assert calls.learner.judge_calls == calls.replay_buffer.episodes_seen > 225
    there = agent(worth, score="learned")
    there.learner.put(*calls.replay_buffer.take(), counted=1_000)  # texts that were written, and judged, elsewhere
    assert there.learner.judge_calls == calls.learner.judge_calls
    assert calls.learner.judge_calls < asked.learner.judge_calls <= 1_000


@pytest.mark.slow
def test_a_saved_agent_scores_as_before(tmp_path):
    learned = agent(worth).learn(1_200)
    learned.save_pretrained(tmp_path / "folder")
    loaded = TextDQN.from_pretrained(tmp_path / "folder", learned.env)
    observation = learned.env.reset()
    assert (learned.q_net_target.scorer.potential != 0).any()
    np.testing.assert_array_equal(loaded.probabilities(observation), learned.probabilities(observation))


@pytest.mark.slow
def test_a_model_that_is_bound_later_is_the_one_that_is_read():
    replay = agent(worth).learn(800).replay_buffer
    other = TableModel((" by", "the", "a", " ", ".", "<end>"), TABLE)
    again, once = agent(worth).q_net, agent(worth).q_net
    fit_scores(again, replay, BETA)
    again.scorer.load_state_dict(once.scorer.state_dict())
    for network in (again, once):
        network.bind(other)
        fit_scores(network, replay, BETA)
    for name, values in once.scorer.state_dict().items():
        torch.testing.assert_close(again.scorer.state_dict()[name], values, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_the_temperature_is_the_language_models_where_nothing_was_learned():
    luck = np.random.default_rng(0)
    useless = agent(lambda text: luck.random(), learning_rate=0.0)
    for head in useless.q_net_target.heads:
        torch.nn.init.normal_(head.value.weight, std=5.0)  # noise that costs KL and gains nothing
    chosen = useless.choose_beta(useless.env.env, 64)
    assert str(chosen).startswith("the language model, chosen by J of 64 validation texts each")
    assert chosen.values[chosen.beta] == max(chosen.values.values())


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ({0.1: 0.5, 0.14: 0.9}, 0.14),  # by four standard errors
        ({0.1: 0.5, 0.14: 0.7}, 0.1),  # by two
        ({0.1: 0.02, 0.14: 0.0}, 0.1),
        ({0.1: -0.05, 0.14: -0.03}, LANGUAGE_MODEL),
        ({0.1: -0.5, 0.14: 0.3}, 0.14),
    ],
)
def test_another_temperature_than_the_one_learned_for_is_chosen_on_evidence_only(gains, chosen):
    noise = {beta: np.tile(signs, 25) for beta, signs in ((0.1, [-0.7, 0.7] * 2), (0.14, [-0.7, -0.7, 0.7, 0.7]))}
    values = {beta: gain + noise[beta] for beta, gain in gains.items()}  # standard error of the difference 0.1
    values[LANGUAGE_MODEL] = np.zeros(100)
    assert best_supported(values, 0.1) == chosen


def test_an_unknown_way_to_score_is_named():
    with pytest.raises(ConfigError, match="score must be one of"):
        agent(worth, score="guess")


def test_scores_that_are_not_there_cannot_be_given():
    with pytest.raises(ConfigError, match="score='given' needs running scores"):
        agent(worth, score="given")
