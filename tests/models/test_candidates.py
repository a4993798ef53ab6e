"""Candidates against a full sort, and the nucleus against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen_env.errors import ConfigError, ModelError
from textgen_env.models.base import MASKED_LOGPROB
from textgen_env.models.candidates import nucleus, top_candidates


def logits_with_ties(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """In bfloat16, some 300 distinct values: nearly every row has ties around any k."""
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def log_softmax(logits: torch.Tensor, blocked: dict[int, list[int]]) -> np.ndarray:
    exact = logits.double().numpy().copy()
    for row, ids in blocked.items():
        exact[row, ids] = -np.inf
    top = exact.max(-1, keepdims=True)
    return exact - top - np.log(np.exp(exact - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "vocab", "k"),
    [
        *[(1, 5, 5), (3, 64, 1), (4, 130, 2), (4, 1000, 16), (2, 4096, 16), (2, 4096, 64), (2, 50257, 40)],
        pytest.param(23, 49152, 16, marks=pytest.mark.slow),
    ],
)
def test_candidates_equal_a_full_sort(rows, vocab, k, dtype):
    logits = logits_with_ties(rows, vocab, dtype)
    before = logits.clone()

    ids, logprobs = top_candidates(logits, k)

    assert ids.dtype == np.int32
    assert logprobs.dtype == np.float32
    exact = log_softmax(logits, {})
    for row in range(rows):
        values = logits[row].tolist()
        order = sorted(range(vocab), key=lambda t: (-values[t], t))[:k]
        assert ids[row].tolist() == order
        np.testing.assert_allclose(logprobs[row], exact[row, order], atol=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_candidates_of_few_values_equal_a_full_sort(data):
    vocab = data.draw(st.integers(1, 400))
    k = data.draw(st.integers(1, vocab))
    values = data.draw(st.lists(st.sampled_from([-40.0, -1.0, -0.0, 0.0, 2.5]), min_size=vocab, max_size=vocab))

    ids, _ = top_candidates(torch.tensor([values]), k)

    assert ids[0].tolist() == sorted(range(vocab), key=lambda t: (-values[t], t))[:k]


@pytest.mark.parametrize("k", [3, None])
def test_blocked_tokens_get_no_probability_and_the_others_share_it(k):
    logits = logits_with_ties(3, 200, torch.float32)
    ends = [int(logits[1].argmax()), 7]
    exact = log_softmax(logits, {1: ends})

    ids, logprobs = top_candidates(logits, k, ends, np.array([False, True, False]))

    expected = exact if k is None else np.take_along_axis(exact, ids.astype(np.int64), -1)
    np.testing.assert_allclose(logprobs, np.maximum(expected, MASKED_LOGPROB), atol=1e-5)
    if k is None:
        assert np.array_equal(ids, np.tile(np.arange(200), (3, 1)))
        assert (logprobs[1, ends] == MASKED_LOGPROB).all()
    else:
        assert not set(ends) & set(ids[1].tolist())
        assert ends[0] == top_candidates(logits, 1)[0][1, 0]  # not blocked, it leads


def test_a_wrong_k_and_a_broken_model_are_refused():
    logits = torch.zeros(2, 10)
    for k in (0, 11):
        with pytest.raises(ConfigError, match=r"1\.\.10"):
            top_candidates(logits, k)
    logits[1, 3] = torch.nan
    for k in (4, None):
        with pytest.raises(ModelError, match="NaN in row 1"):
            top_candidates(logits, k)


def test_the_nucleus_by_hand():
    logprobs = np.log(np.array([[0.5, 0.25, 0.125, 0.0625], [0.9, 0.05, 0.02, 0.01]], np.float32))

    assert nucleus(logprobs, 0.49).tolist() == [[True, False, False, False], [True, False, False, False]]
    assert nucleus(logprobs, 0.51).tolist() == [[True, True, False, False], [True, False, False, False]]
    assert nucleus(logprobs, 0.93).tolist() == [[True, True, True, True], [True, True, False, False]]
    assert nucleus(logprobs, 1.0).all()
    assert nucleus(logprobs, 1e-9).sum(-1).tolist() == [1, 1]


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.1])
def test_a_nucleus_of_nothing_or_too_much_is_refused(top_p):
    with pytest.raises(ConfigError, match="top_p"):
        nucleus(np.zeros((1, 2), np.float32), top_p)
