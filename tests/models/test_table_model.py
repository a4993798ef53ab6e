"""The exact model: what is written down is what it proposes, and what cannot be a table is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import TABLE, TOKENS, letters

from textgen_env import TableModel
from textgen_env.errors import CapacityError, ConfigError, ModelError, PromptError
from textgen_env.models.base import MASKED_LOGPROB

FREE, BLOCKED = np.array([False]), np.array([True])
ROW = np.array([0])


def proposals(model, ids, k, block_end=FREE):
    slots = model.slots(rows=1, length=10, k=k)
    slots.start(ROW, [ids])
    return slots.propose(ROW, block_end)


@pytest.mark.parametrize("last", range(len(TOKENS)))
@pytest.mark.parametrize("k", [1, 3, 5])
def test_candidates_equal_a_sort_of_the_table(last, k):
    got = proposals(letters(), [1, last], k)
    expected = sorted(range(len(TOKENS)), key=lambda t: (-TABLE[last, t], t))[:k]
    assert got.candidates.tolist() == [expected]
    logs = [math.log(TABLE[last, t]) if TABLE[last, t] else MASKED_LOGPROB for t in expected]
    np.testing.assert_allclose(got.logprobs, [logs], rtol=1e-6)
    assert got.hidden.tolist() == [np.eye(len(TOKENS))[last].tolist()]


def test_the_whole_vocabulary_comes_in_id_order():
    got = proposals(letters(), [0], None)
    assert got.candidates.tolist() == [[0, 1, 2, 3, 4, 5]]
    np.testing.assert_allclose(np.exp(got.logprobs), [TABLE[0]], rtol=1e-6)


def test_a_blocked_end_is_renormalised_away_before_the_best_are_chosen():
    got = proposals(letters(), [4], 5, BLOCKED)  # after "." the end has probability 0.6
    assert got.candidates.tolist() == [[0, 1, 3, 4, 2]]
    np.testing.assert_allclose(np.exp(got.logprobs[0, :4]), 0.25, rtol=1e-6)
    assert got.logprobs[0, 4] == MASKED_LOGPROB


def test_a_text_that_can_only_end_cannot_be_made_longer():
    model = TableModel(["a", "!"], [0.0, 1.0], end="!")
    with pytest.raises(ModelError, match="after 'aa' only the end is possible"):
        proposals(model, [0, 0], 1, BLOCKED)


@pytest.mark.parametrize("table", [[0.25, 0.75], [[0.25, 0.75]] * 2, lambda ids: [0.25, 0.75]])
def test_a_row_rows_and_a_function_say_the_same(table):
    model = TableModel(["a", "b"], table, end=None)
    np.testing.assert_array_equal(model.probabilities([1, 0]), [0.25, 0.75])
    assert proposals(model, [0], 2).candidates.tolist() == [[1, 0]]


def test_a_function_sees_the_prompt_and_all_tokens():
    seen = []

    def table(ids):
        seen.append(ids)
        return [0.5, 0.5]

    slots = TableModel(["a", "b"], table, end=None).slots(1, 4, 2)
    slots.start(ROW, [[1, 0]])
    slots.advance(ROW, np.array([1]))
    slots.propose(ROW, FREE)
    assert seen == [(1, 0, 1)]


def test_features_replace_the_one_hot_token():
    model = TableModel(["a", "b"], [0.5, 0.5], end=None, features=lambda ids: [len(ids), sum(ids), 7.0])
    assert model.hidden_size == 3
    assert proposals(model, [1, 0, 1], 1).hidden.tolist() == [[3.0, 2.0, 7.0]]


def test_encoding_takes_the_longest_token_and_decoding_drops_the_end():
    model = letters()
    assert model.encode("aab b.") == [0, 2, 3, 1, 4]
    assert model.decode([0, 2, 3, 1, 4, 5]) == "aab b."
    assert model.continuations([0], [0, 1], [2, 5]) == ["abab", "ab"]
    assert model.embed(np.array([[0, 5]])).shape == (1, 2, 6)
    with pytest.raises(PromptError, match="no token of model 'letters' spells 'xb'"):
        model.encode("axb")


def test_the_caller_s_table_and_the_model_s_stay_apart():
    table = np.array([0.25, 0.75])
    model = TableModel(["a", "b"], table, end=None)
    table[:] = 0.5
    np.testing.assert_array_equal(model.probabilities([0]), [0.25, 0.75])
    with pytest.raises(ValueError, match="read-only"):
        model.probabilities([0])[0] = 1.0


@pytest.mark.parametrize(
    ("tokens", "table", "end", "words"),
    [
        ([], [], None, "at least one"),
        (["a", "a"], [0.5, 0.5], None, "distinct"),
        (["a", ""], [0.5, 0.5], None, "non-empty"),
        (["a", "b"], [0.5, 0.5], "!", "end='!' must be one of the tokens"),
        (["a", "b"], [0.5, 0.4], None, "sum to 1"),
        (["a", "b"], [1.5, -0.5], None, "probabilities"),
        (["a", "b"], [np.nan, 1.0], None, "sum to 1"),
        (["a", "b"], [1.0], None, r"shape \(2,\) or \(2, 2\), got \(1,\)"),
        (["a", "b"], [[0.5, 0.5]], None, r"got \(1, 2\)"),
    ],
)
def test_an_invalid_table_is_refused(tokens, table, end, words):
    with pytest.raises(ModelError, match=words):
        TableModel(tokens, table, end=end)


@pytest.mark.parametrize("answer", [[0.5, 0.4], [1.0], [[0.5, 0.5]] * 2])
def test_a_function_that_answers_no_probabilities_is_refused_when_it_does(answer):
    with pytest.raises(ModelError, match=r"sum to 1|shape \(2,\)"):
        TableModel(["a", "b"], lambda ids: answer, end=None).probabilities([0])


@pytest.mark.parametrize("k", [0, 6, -1])
def test_more_candidates_than_tokens_besides_the_end_are_refused(k):
    with pytest.raises(ConfigError, match=rf"top_k must be in 1\.\.5 .*, got {k}"):
        letters().slots(1, 4, k)


def test_rows_hold_no_more_than_their_length_and_are_of_one_model():
    slots, others = letters().slots(1, 2, 1), letters().slots(1, 2, 1)
    with pytest.raises(CapacityError, match="at most 2 tokens, got a prompt of 3"):
        slots.start(ROW, [[0, 0, 0]])
    slots.start(ROW, [[0, 0]])
    with pytest.raises(CapacityError, match="row 0 is full: it holds all of its 2 tokens"):
        slots.advance(ROW, np.array([0]))
    with pytest.raises(ModelError, match="'letters'"):
        others.load(0, slots.save(0))
