"""How tokens are written: what the scorer reads of it, and that rare tokens are worth what common ones teach."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from agents.text_dqn.echoes import Echoes
from agents.text_dqn.features import FOLDS, Described, JudgedTexts
from agents.text_dqn.outlook import Visited
from agents.text_dqn.scorer import TextScorer
from agents.text_dqn.spelling import CLASSES, CLASSINGS, classes, spelling

TOKENS = [f"{blank}{a}{b}{c}" for blank, a, b, c in product(("", " "), "bcdfgst", "aeiou", ("", "n", "r"))]  # 210
LENGTH, TEXTS, BETA = 8, 400, 0.1
ODD = ["", " ", "  ", "\n", " The", "the", "THE", "9", " 42", ",", ' "', "'s", "ß", "İ", "\ud800", "é" * 40, "日本"]


def test_the_numbers_of_a_token_count_its_letters_and_say_how_it_is_written():
    found = spelling([*ODD, *TOKENS])
    assert np.isfinite(found).all()
    traits = {
        0: [1.0 for _ in found],
        1: [len(text.strip().lower()) for text in [*ODD, *TOKENS]],
        2: [text[:1].isspace() for text in [*ODD, *TOKENS]],
    }
    traits |= {6 + place: [text.lower().count(c) for text in [*ODD, *TOKENS]] for place, c in enumerate("abcde")}
    for column, expected in traits.items():
        numbers = np.array(expected, float)
        np.testing.assert_allclose(found[:, column] / found[:, column].max(), numbers / numbers.max(), atol=1e-6)
    assert not (found[ODD.index(" The")] == found[ODD.index("the")]).all()


def test_tokens_are_of_a_class_by_blank_and_first_and_last_letter_and_size():
    found = classes(TOKENS)
    keys = (
        lambda word: word[0],
        lambda word: word[-1],
        len,
    )
    for of, key in zip(found, keys, strict=True):
        groups = Counter(zip(of.tolist(), [(text[0] == " ", key(text.strip())) for text in TOKENS], strict=True))
        assert len(groups) == len(set(of.tolist())) == len({pair for _, pair in groups})  # one class, one key
    odd = classes(ODD)
    assert odd.shape == (len(CLASSINGS), len(ODD))
    assert ((odd >= 0) & (odd < CLASSES)).all()


def judged(reward, allowed, seed=0, count=TEXTS):
    rng = np.random.default_rng(seed)
    tokens = rng.choice(np.asarray(allowed), (count, LENGTH))
    rewards = np.array([reward([TOKENS[token] for token in row]) for row in tokens])
    none = np.zeros(tokens.shape, bool)
    return JudgedTexts(tokens, np.full(count, LENGTH), rewards, np.arange(count) % FOLDS, np.ones(count, bool), none)


def scores_of(scorer, tokens):
    whole = torch.from_numpy(tokens)
    return scorer(whole, torch.full((len(whole), 1), LENGTH - 1), whole[:, -1:].unsqueeze(1))[1][:, 0, 0].numpy()


def fitted(found):
    scorer = TextScorer(len(TOKENS), LENGTH)
    scorer.characters.copy_(torch.tensor([float(len(text)) for text in TOKENS]))
    scorer.classes.copy_(torch.from_numpy(classes(TOKENS)))
    tokens = torch.from_numpy(found.tokens[:100])
    candidates = tokens.unsqueeze(-1).repeat(1, 1, 2)
    there = torch.ones_like(tokens, dtype=torch.bool)
    states = Visited(
        tokens, candidates, torch.full(candidates.shape, 0.5), there, there, Echoes.none(tokens, candidates),
        torch.arange(len(tokens)) % FOLDS,
    )  # fmt: skip
    scorer.fit(found, Described(np.zeros((len(TOKENS), 1)), spelling(TOKENS)), states, BETA)
    return scorer


SURFACE = {
    "a letter": lambda words: sum("e" in word for word in words) / LENGTH,
    "letters": lambda words: sum(len(word.strip()) for word in words) / LENGTH,
    "different words": lambda words: len(set(words)) / LENGTH,
}


@pytest.mark.parametrize("judge", SURFACE)
def test_tokens_that_were_never_seen_are_worth_what_those_spelled_alike_are(judge):
    mixed = np.random.default_rng(7).permutation(len(TOKENS))
    scorer, fresh = fitted(judged(SURFACE[judge], mixed[70:])), judged(SURFACE[judge], mixed[:70], seed=5)
    errors = scores_of(scorer, fresh.tokens) - fresh.rewards
    assert 1 - (errors**2).mean() / fresh.rewards.var() > 0.6


NEIGHBOURS = {
    "begin alike": lambda a, b: a.strip()[0] == b.strip()[0],
    "in order": lambda a, b: a.strip()[0] < b.strip()[0],
    "rhyme": lambda a, b: a[-1] == b[-1],
    "grow": lambda a, b: len(b.strip()) > len(a.strip()),
}


@pytest.mark.parametrize("judge", NEIGHBOURS)
def test_neighbours_that_were_never_seen_together_are_worth_what_others_of_their_classes_are(judge):
    def share(words):
        return sum(NEIGHBOURS[judge](a, b) for a, b in pairwise(words)) / (LENGTH - 1)

    everything = range(len(TOKENS))  # 44,100 pairs, of which 2,800 places show at most 6%
    scorer, fresh = fitted(judged(share, everything)), judged(share, everything, seed=5)
    errors = scores_of(scorer, fresh.tokens) - fresh.rewards
    assert 1 - (errors**2).mean() / fresh.rewards.var() > 0.5
