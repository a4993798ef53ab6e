"""How tokens are written: what the scorer reads of it, and that rare tokens are worth what common ones teach."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from test_scorer import finished_scores, judged, of_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents.text_dqn.echoes import Echoes
from agents.text_dqn.features import FOLDS, KnownTokens, design_of, texts_of_tokens
from agents.text_dqn.outlook import Visited
from agents.text_dqn.ridge import Fitted
from agents.text_dqn.scorer import TextScorer
from agents.text_dqn.spelling import CLASSES, COUNTED, LETTERED, classes, counted, folded, last_word, spelling
from textgen_env.models.hf import HFModel

WORDS = ["".join(letters) for letters in product("bcdfgklmnprst", "aeiou", ("", "d", "k", "l", "m", "n", "r", "st"))]
HALF = len(WORDS)
TOKENS = [f" {word}" for word in WORDS] + WORDS  # those of the second half begin no word
LENGTH, TEXTS, BETA = 8, 400, 0.1  # 3,200 places for 1,040 tokens
ODD = [
    " “Hello”",
    "",
    " ",
    "  ",
    "\n",
    " The",
    "the",
    "THE",
    "9",
    " 42",
    ",",
    ' "',
    "'s",
    "ß",
    "İ",
    "\ud800",
    "é" * 40,
    "日本",
]


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


def test_a_blank_that_a_tokenizer_strips_at_the_beginning_is_part_of_the_token():
    pieces = ["<unk>", "<end>", "▁the", "the", "▁cat", "s", "▁", ",", "▁sat", "at"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(place)) for place, piece in enumerate(pieces)], 0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(pieces), eos_token_id=1, **sizes)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    found = texts_of_tokens(HFModel(LlamaForCausalLM(config), wrapped))
    assert found[2:] == [piece.replace("▁", " ") for piece in pieces[2:]]


def test_what_begins_a_word_is_of_a_class_by_first_and_last_letter_and_size():
    for vocabulary, words in ((TOKENS, range(HALF)), (WORDS, range(HALF))):
        found = classes(vocabulary)
        for of, key in zip(found, (lambda word: word[0], lambda word: word[-1], len), strict=True):
            groups = {(of[token], key(vocabulary[token].strip())) for token in words}
            assert len(groups) == len({of for of, _ in groups}) == len({key for _, key in groups})  # one to one
            assert all(of[words])
        assert not found[:, HALF:].any()
    odd = classes(ODD)
    assert ((odd >= 0) & (odd < CLASSES)).all()
    assert [text for text, of in zip(ODD, odd[0], strict=True) if of] == [" “Hello”", " The", " 42"]
    assert odd[:, 0].tolist() == classes([*ODD, " hello"])[:, -1].tolist()  # quotation marks are no part of it


def test_the_last_word_is_that_of_the_last_token_that_began_one():
    of = torch.tensor([[0, 1, 2], [0, 3, 4], [0, 5, 6]])
    found = last_word(torch.tensor([[0, 1, 0, 2, 1], [2, 0, 0, 0, 1]]), of)
    assert found[0].tolist() == [[0, 1, 1, 2, 1], [2, 2, 2, 2, 1]]
    assert found[2].tolist() == [[0, 5, 5, 6, 5], [6, 6, 6, 6, 5]]


def test_words_capitals_digits_and_signs_are_counted():
    found = dict(zip(ODD, counted(ODD, classes(ODD)[0]).tolist(), strict=True))
    words, capitals, digits, commas = np.array([found[text][:4] for text in ODD]).T
    assert [text for text, is_word in zip(ODD, words, strict=True) if is_word] == [" “Hello”", " The", " 42"]
    assert [text for text, has_one in zip(ODD, capitals, strict=True) if has_one] == [" “Hello”", " The", "THE", "İ"]
    assert [text for text, has_one in zip(ODD, digits, strict=True) if has_one] == ["9", " 42"]
    assert [text for text, has_one in zip(ODD, commas, strict=True) if has_one] == [","]
    signs = counted([".", "?", "!", "word"], np.zeros(4, np.int64))[:, 3:COUNTED]
    assert (signs[0] & signs[1] & signs[2]).any()  # all end a sentence
    assert len({tuple(row) for row in signs}) == 4
    assert not signs[3].any()


def test_letters_are_counted_and_those_that_words_begin_with():
    tokens = [" Abba", "abc", " été", " zoo!", "Z"]
    found = counted(tokens, classes(tokens)[0])[:, COUNTED:]
    letters, initials = (
        ["".join(chr(97 + place) for place in np.flatnonzero(row)) for row in part]
        for part in np.split(found, [LETTERED // 2], 1)
    )
    assert letters == ["ab", "abc", "t", "oz", "z"]
    assert initials == ["a", "", "", "z", ""]


def test_tokens_that_differ_in_case_and_blanks_alone_are_the_same_word():
    tokens = [" The", "the", "THE", ",", " ,", " ", "", " then"]
    found = folded(tokens)
    alike = {number: [token for token, of in zip(tokens, found, strict=True) if of == number] for number in found}
    assert list(alike.values()) == [[" The", "the", "THE"], [",", " ,"], [" "], [""], [" then"]]


def texts(reward, seed=0):
    rng = np.random.default_rng(seed)
    few = rng.integers(0, len(TOKENS), (TEXTS, LENGTH))  # a text repeats some of them
    tokens = np.take_along_axis(few, rng.integers(0, LENGTH, (TEXTS, LENGTH)), 1)
    return judged(tokens, lambda row: reward([TOKENS[token] for token in row]))


def described():
    """A scorer that knows how the tokens are written, and nothing of rewards."""
    scorer = TextScorer(len(TOKENS), LENGTH)
    scorer.characters.copy_(torch.tensor([float(len(text)) for text in TOKENS]))
    scorer.classes.copy_(torch.from_numpy(classes(TOKENS)))
    scorer.counted.copy_(torch.from_numpy(counted(TOKENS, classes(TOKENS)[0])))
    scorer.folded.copy_(torch.from_numpy(folded(TOKENS)))
    return scorer


def fitted(found, spelled=True):
    scorer = described()
    scorer.counted[:, COUNTED:] *= spelled
    tokens = torch.from_numpy(found.tokens[:100])
    candidates = tokens.unsqueeze(-1).repeat(1, 1, 2)
    states = Visited(tokens, candidates, torch.full(candidates.shape, 0.5), *of_texts(tokens, candidates))
    known = KnownTokens(np.zeros((len(TOKENS), 1)), spelled * spelling(TOKENS))
    for count in (TEXTS // 4, TEXTS // 2, TEXTS):  # as an agent does
        scorer.fit(found.rows(slice(count)), known, states, BETA)
    return scorer


@pytest.mark.parametrize("fold", range(FOLDS))
def test_a_text_token_by_token_is_worth_what_the_regression_says_whatever_its_weights(fold):
    """Two ways to one number: features of whole texts times weights, and what each token adds by what is before it."""
    rng, count, end = np.random.default_rng(7), 200, len(TOKENS) - 1
    tokens = rng.integers(0, end, (count, LENGTH))
    tokens = np.take_along_axis(tokens, rng.integers(0, LENGTH, tokens.shape), 1)  # a text repeats some of them
    lengths = rng.integers(1, LENGTH + 1, count)
    tokens[np.arange(count), lengths - 1] = np.where(lengths < LENGTH, end, tokens[:, -1])
    found = judged(tokens, np.sum)._replace(lengths=lengths, echoes=rng.random(tokens.shape) < 0.3)
    known = KnownTokens(rng.normal(size=(len(TOKENS), 80)).astype(np.float32), spelling(TOKENS))
    scorer = described()
    scorer.find_stops(found)
    scorer.middle.fill_(3)
    design, _ = design_of(found, known, scorer.characters.numpy(), scorer.kinds, 3)
    weights, biases = rng.normal(size=(FOLDS, len(design.scales))), rng.normal(size=FOLDS)
    weights[:, design.groups["length"]] = 0.0  # these go into the potential
    nothing = np.zeros(count)
    scorer.take_weights(design, Fitted(weights, biases, nothing, nothing, 0.1, 0.0), known)
    last = torch.from_numpy(lengths - 1)[:, None]
    everything, echoes = torch.from_numpy(tokens), torch.from_numpy(found.echoes)
    ids, echoed = (of.gather(1, last)[:, None] for of in (everything, echoes))
    index, _, more, _ = scorer.sums(torch.full((count,), fold), everything, last, ids, Echoes(echoes, echoed))
    expected = design.times(weights[fold]) + biases[fold]
    np.testing.assert_allclose(index[:, 0] + more[:, 0, 0], expected, atol=1e-4)
    assert np.abs(expected).max() > 10  # of 25 kinds of features


SURFACE = {
    "a letter": lambda words: sum("e" in word for word in words) / LENGTH,
    "sequences": lambda words: sum(any(of in word for of in ("ek", "or", "im", "ul")) for word in words) / LENGTH,
    "different words": lambda words: len(set(words)) / LENGTH,
}


@pytest.mark.slow
@pytest.mark.parametrize("judge", SURFACE)
def test_rare_tokens_are_worth_what_others_that_are_spelled_alike_are(judge):
    found, fresh = texts(SURFACE[judge]), texts(SURFACE[judge], seed=5)
    explained = []
    for spelled in (False, True):
        errors = finished_scores(fitted(found, spelled), fresh) - fresh.rewards
        explained.append(1 - (errors**2).mean() / fresh.rewards.var())
    assert explained[0] + 0.3 < 0.7 < explained[1]


NEIGHBOURS = {
    "begin alike": lambda a, b: a[0] == b[0],
    "in order": lambda a, b: a[0] < b[0],
    "rhyme": lambda a, b: a[-1] == b[-1],
    "grow": lambda a, b: len(b) > len(a),
}


@pytest.mark.slow
@pytest.mark.parametrize("judge", NEIGHBOURS)
def test_words_that_were_never_seen_together_are_worth_what_others_of_their_classes_are(judge):
    def share(tokens):
        words = [token[1:] for token in tokens if token[0] == " "]  # others may stand between
        return sum(NEIGHBOURS[judge](a, b) for a, b in pairwise(words)) / (LENGTH - 1)

    scorer, fresh = fitted(texts(share)), texts(share, seed=5)
    errors = finished_scores(scorer, fresh) - fresh.rewards
    assert 1 - (errors**2).mean() / fresh.rewards.var() > 0.6


NUMBERS = {
    "three words": lambda tokens: sum(token[0] == " " for token in tokens) == 3,
    "an odd number of words": lambda tokens: sum(token[0] == " " for token in tokens) % 2 == 1,
    "different letters": lambda tokens: len(set("".join(tokens)) - {" "}) / 20,
    "different initials": lambda tokens: len({token[1] for token in tokens if token[0] == " "}) / 8,
    "a second word from b to f": lambda tokens: (
        "b" <= [*(token[1] for token in tokens if token[0] == " "), "", ""][1] < "g"
    ),
    "a first word from b to f": lambda tokens: next((token[1] < "g" for token in tokens if token[0] == " "), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("judge", NUMBERS)
def test_what_is_to_occur_so_many_times_is_counted(judge):
    scorer, fresh = fitted(texts(NUMBERS[judge])), texts(NUMBERS[judge], seed=5)
    errors = finished_scores(scorer, fresh) - fresh.rewards
    assert 1 - (errors**2).mean() / fresh.rewards.var() > 0.7
