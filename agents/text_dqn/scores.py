"""Scores of prefixes: an agent learns them, or is given some and learns what they are worth.

replay  ->  fit_scores    ->  the network's scorer, or its lines of what a given score is worth
batch   ->  scored_batch  ->  the same batch with them in its observations, and as potentials in its rewards
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from agents.text_dqn.echoes import Echoes
from agents.text_dqn.networks import CandidateQNetwork, prior
from agents.text_dqn.outlook import Visited
from agents.text_dqn.replay import EpisodeBatch, EpisodeReplay
from agents.text_dqn.score_value import ScoredTexts, ScoreValue
from agents.text_dqn.scorer import LEAST_TEXTS
from agents.text_dqn.targets import of_actions

VISITED = 2_000
"""Texts of 20 tokens from which the scorer takes what the language model adds on average; fewer longer ones."""

VALUED = 5_000
"""Texts of 20 tokens from which it is taken what a given score is worth; fewer longer ones."""


def fit_scores(network: CandidateQNetwork, replay: EpisodeReplay, beta: float) -> float | None:
    """Fit what ``network`` says of prefixes.

    Args:
        network: To be changed.
        replay: Its texts are learned from.
        beta: The trade between reward and KL, reward units a nat.

    Returns:
        R2 of a learned scorer on texts that were left out, 0 without one; None where nothing was fitted.
    """
    if network.scorer is not None:
        return _fit_scorer(network, replay, beta)
    if network.score_value is None:
        return None
    _fit_value(network.score_value, replay, network.max_new_tokens, beta)
    return 0.0


def _fit_scorer(network: CandidateQNetwork, replay: EpisodeReplay, beta: float) -> float | None:
    texts = replay.texts()
    if texts.finished.sum() < LEAST_TEXTS:
        return None
    some = replay.spread(_as_many(VISITED, network.max_new_tokens), ("candidates", "logprobs", "action_mask"))
    assert some.folds is not None  # the replay has set them
    mu = prior(some.observations).exp()
    candidates = some.observations["candidates"].long()
    echoes = Echoes.among(candidates, some.echoes, some.tokens)
    visited = Visited(some.tokens, candidates, mu, some.acted, some.by_language_model, echoes, some.folds)
    return network.fit_scorer(texts, visited, beta)


def _fit_value(value: ScoreValue, replay: EpisodeReplay, length: int, beta: float) -> None:
    texts = replay.spread(_as_many(VALUED, length), ("score", "logprobs", "action_mask"))
    ended = (texts.ended & texts.acted).any(-1)  # nobody knows what the others would have been worth
    scores = texts.observations["score"].squeeze(-1)
    rewards = scores[:, 0] + (texts.rewards * texts.acted).sum(-1)  # what is kept lacks the score of the start
    log_ratio = texts.behaviour - of_actions(prior(texts.observations), texts.actions)
    found = (values[ended].cpu().numpy() for values in (scores.double(), rewards.double(), log_ratio, texts.acted))
    value.fit(ScoredTexts(*found), beta)


def _as_many(texts: int, length: int) -> int:
    """Return how many texts of ``length`` tokens have as many as ``texts`` of 20, or ``texts`` if those are more."""
    return min(texts, texts * 20 // length + 1)


def scored_batch(network: CandidateQNetwork, batch: EpisodeBatch) -> EpisodeBatch:
    """Return the batch with what ``network`` says of prefixes in its observations, and as potentials in its rewards."""
    if network.scorer is not None:
        candidates = batch.observations["candidates"].long()
        steps = torch.arange(candidates.shape[1], device=candidates.device).expand(candidates.shape[:2])
        echoes = Echoes.among(candidates, batch.echoes, batch.tokens)
        score, scores = network.scorer(batch.tokens, steps, candidates, echoes, batch.folds)
        return _shaped(batch, score, score=score, candidate_scores=scores)
    if network.score_value is not None:
        given = batch.observations["score"]
        steps = torch.arange(given.shape[1], device=given.device).view(1, -1, 1)
        valued = network.valued(batch.observations, steps)
        return _shaped(batch, valued["score"] - given, **valued)  # the given scores' increments are in the rewards
    return batch


def _shaped(batch: EpisodeBatch, potential: torch.Tensor, **observations: torch.Tensor) -> EpisodeBatch:
    """Return the batch with these observations, and the differences of the potential (B, T, 1) in its rewards."""
    after = functional.pad(potential[:, 1:, 0], (0, 1))
    rewards = batch.rewards + torch.where(batch.ended, 0.0, after) - potential[..., 0]
    return replace(batch, observations={**batch.observations, **observations}, rewards=rewards)
