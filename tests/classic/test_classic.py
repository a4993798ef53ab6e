"""The classic loop: losses by hand, a corridor with known Q-values, choices from text by brute force."""

from __future__ import annotations

import copy
import math
from collections import Counter
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BertConfig, BertModel, BloomConfig, BloomForCausalLM, LlamaConfig

from agents.classic.data import TextDataset, text_loader
from agents.classic.loop import LabelledBatch, custom_loss, train_model
from agents.classic.model import DeepQLearningModel, ExperienceReplay
from agents.pruning.model import PrunedTransformerModel
from textgen_env.errors import ConfigError, PromptError

# ---------------------------------------------------------------- DeepQLearningModel


def test_the_short_call_answers_ten_q_values():
    model = DeepQLearningModel(input_dim=768, action_dim=10)

    q_values = model(torch.randn(1, 768, generator=torch.Generator().manual_seed(0)))

    assert q_values.shape == (1, 10)
    assert torch.isfinite(q_values).all()
    assert (q_values < 0).any()  # a Q-value may have any sign: the last layer has no activation
    assert (q_values > 0).any()


def test_leading_shapes_are_kept():
    model = DeepQLearningModel(input_dim=4, action_dim=3)
    states = torch.randn(2, 5, 4)

    torch.testing.assert_close(model(states)[1, 2], model(states[1, 2]))


@pytest.mark.parametrize("sizes", [(0, 10), (768, 0), (768, 10, 0)])
def test_a_network_needs_dimensions(sizes):
    with pytest.raises(ConfigError, match="at least 1"):
        DeepQLearningModel(*sizes)


def test_a_state_of_another_width_is_refused():
    with pytest.raises(ConfigError, match="768 numbers"):
        DeepQLearningModel()(torch.zeros(1, 384))


# ---------------------------------------------------------------- ExperienceReplay


def test_push_and_sample_with_three_arguments():
    buffer = ExperienceReplay(capacity=100)
    for i in range(50):
        buffer.push(torch.full((1, 8), float(i)), i % 10, float(i))

    sample = buffer.sample(10)

    assert len(buffer) == 50
    assert len(sample) == 10
    assert sample.states.shape == (10, 1, 8)
    for state, action, reward in zip(sample.states, sample.actions, sample.rewards, strict=True):
        assert state[0, 0] == reward
        assert action == int(reward) % 10
    assert sample.dones.all()  # no next state: the episode ended


def test_a_full_buffer_forgets_the_oldest():
    buffer = ExperienceReplay(capacity=100)
    for i in range(150):
        buffer.push(torch.zeros(3), 0, float(i))

    assert len(buffer) == 100
    assert sorted(buffer.sample(100).rewards.tolist()) == list(range(50, 150))


@pytest.mark.parametrize("sizes", [(7, 7, 7), (3, 20), (10,), (25,), (1, 9, 1)])
def test_many_at_once_equal_one_by_one(sizes):
    one, many = ExperienceReplay(capacity=10), ExperienceReplay(capacity=10)
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        states, following = torch.rand(2, size, 3, generator=generator)
        actions = torch.randint(5, (size,), generator=generator)
        rewards, dones = torch.rand(size, generator=generator), torch.rand(size, generator=generator) < 0.5
        many.extend(states, actions, rewards, following, dones)
        for row in zip(states, actions, rewards, following, dones, strict=True):
            one.push(*row)

    a, b = one.sample(len(one)), many.sample(len(many))
    for name in ("states", "actions", "rewards", "next_states", "dones"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_what_is_pushed_is_copied():
    buffer, state = ExperienceReplay(capacity=2), torch.ones(3)
    buffer.push(state, 0, 1.0, next_state=state, done=False)
    state.zero_()

    assert buffer.sample(1).states.sum() == 3
    assert buffer.sample(1).next_states.sum() == 3


def test_sampling_is_uniform_without_repetition_and_seeded():
    def filled(seed):
        buffer = ExperienceReplay(capacity=5, seed=seed)
        for i in range(5):
            buffer.push(torch.zeros(1), i, 0.0)
        return buffer

    buffer = filled(0)
    draws = [tuple(buffer.sample(3).actions.tolist()) for _ in range(2000)]

    assert all(len(set(draw)) == 3 for draw in draws)
    counts = Counter(action for draw in draws for action in draw)
    deviation = math.sqrt(2000 * 0.6 * 0.4)  # of a binomial count
    assert all(abs(counts[action] - 1200) < 5 * deviation for action in range(5))
    assert [tuple(filled(1).sample(3).actions.tolist())] * 2 == [tuple(filled(1).sample(3).actions.tolist())] * 2
    np.random.seed(0)
    again = filled(0)
    assert [tuple(again.sample(3).actions.tolist()) for _ in range(5)] == draws[:5]  # global randomness plays no part


@pytest.mark.parametrize("size", [0, 4, -1])
def test_more_than_is_held_cannot_be_sampled(size):
    buffer = ExperienceReplay(capacity=10)
    with pytest.raises(ConfigError, match="1 to 0"):
        buffer.sample(1)
    for i in range(3):
        buffer.push(torch.zeros(2), i, 0.0)

    with pytest.raises(ConfigError, match="1 to 3"):
        buffer.sample(size)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((torch.zeros(3), 0, 0.0), "need"),
        ((torch.zeros(2), -1, 0.0), "integers from 0"),
        ((torch.zeros(2), 0.5, 0.0), "integers from 0"),
        ((torch.zeros(2), 0, float("nan")), "finite"),
        ((torch.zeros(2), 0, 0.0, torch.zeros(3)), "need"),
        ((torch.zeros(2), 0, 0.0, None, False), "next_state"),
    ],
)
def test_a_transition_that_does_not_fit_is_refused(row, message):
    buffer = ExperienceReplay(capacity=10)
    buffer.push(torch.zeros(2), 0, 0.0)

    with pytest.raises(ConfigError, match=message):
        buffer.push(*row)

    assert len(buffer) == 1


def test_a_buffer_needs_a_capacity():
    with pytest.raises(ConfigError, match="capacity"):
        ExperienceReplay(capacity=0)


# ---------------------------------------------------------------- custom_loss

PREDICTED = torch.tensor([[0.5, 0.5], [0.25, 1.0]])


def test_the_short_form_compares_with_the_reward():
    loss = custom_loss(PREDICTED, torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))

    assert loss.item() == pytest.approx((0.5**2 + 1.0**2) / 2)


def test_the_long_form_bootstraps_unless_done():
    loss = custom_loss(
        PREDICTED,
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.5]),
        gamma=0.9,
        next_q_values=torch.tensor([[2.0, 3.0], [torch.nan, 9.0]]),  # past the end nothing is read
        dones=torch.tensor([False, True]),
    )

    assert loss.item() == pytest.approx(((1 + 0.9 * 3 - 0.5) ** 2 + (0.5 - 0.25) ** 2) / 2)


def test_values_of_next_states_do_as_well_as_their_q_values():
    actions, rewards, following = torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 4.0], [3.0, 2.0]])

    full = custom_loss(PREDICTED, actions, rewards, 0.5, following)

    assert full == custom_loss(PREDICTED, actions, rewards, 0.5, torch.tensor([4.0, 3.0]))


def test_no_gradient_reaches_the_target_or_other_actions():
    predicted = PREDICTED.clone().requires_grad_()
    following = torch.ones(2, 2, requires_grad=True)

    custom_loss(predicted, torch.tensor([0, 1]), torch.zeros(2), 0.5, following).backward()

    # d/dq of the mean of (q - 0.5)^2 is (q - 0.5)
    torch.testing.assert_close(predicted.grad, torch.tensor([[0.0, 0.0], [0.0, 0.5]]))
    assert following.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PREDICTED, torch.tensor([0, 2]), torch.zeros(2)), r"0\.\.1"),
        ((PREDICTED, torch.tensor([0, -1]), torch.zeros(2)), r"0\.\.1"),
        ((PREDICTED, torch.tensor([0.0, 1.0]), torch.zeros(2)), "integers"),
        ((PREDICTED, torch.tensor([0]), torch.zeros(2)), "need predicted"),
        ((PREDICTED, torch.tensor([0, 1]), torch.zeros(2, 1)), "need predicted"),
        ((PREDICTED[0], torch.tensor([0, 1]), torch.zeros(2)), "need predicted"),
        ((PREDICTED, torch.tensor([0, 1]), torch.zeros(2), 1.5), "gamma"),
        ((PREDICTED, torch.tensor([0, 1]), torch.zeros(2), 0.9, torch.zeros(3, 2)), "next_q_values"),
        ((PREDICTED, torch.tensor([0, 1]), torch.zeros(2), 0.9, None, torch.tensor([True, False])), "not done"),
    ],
)
def test_a_loss_that_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        custom_loss(*arguments)


# ---------------------------------------------------------------- train_model

CELLS, GAMMA = 5, 0.9
CORRIDOR_Q = [  # columns: left, right. Reward 1 for stepping out on the right; left of cell 0 is cell 0.
    [GAMMA**5, GAMMA**4],
    [GAMMA**5, GAMMA**3],
    [GAMMA**4, GAMMA**2],
    [GAMMA**3, GAMMA**1],
    [GAMMA**2, 1.0],
]


class Cells(nn.Module):
    """A transformer whose hidden state is the last token, one-hot."""

    def forward(self, input_ids, attention_mask):
        return nn.functional.one_hot(input_ids, CELLS)


def corridor(texts: bool):
    """Every step once, as logged transitions."""
    steps = [(cell, action) for cell in range(CELLS) for action in (0, 1)]
    ends = [step == (CELLS - 1, 1) for step in steps]
    following = [min(max(cell + (1 if action else -1), 0), CELLS - 1) for cell, action in steps]
    here, there = [cell for cell, _ in steps], following
    actions, rewards = torch.tensor([a for _, a in steps]), torch.tensor(ends).float()
    if texts:
        return [
            LabelledBatch(
                [f"cell {c}" for c in here],
                None,
                actions,
                rewards,
                [f"cell {c}" for c in there],
                None,
                torch.tensor(ends),
            )
        ]
    here, there = torch.tensor(here)[:, None], torch.tensor(there)[:, None]
    return [(here, torch.ones_like(here), actions, rewards, there, torch.ones_like(there), torch.tensor(ends))]


def read_cell(texts, **kwargs):
    """A tokenizer: two tokens a text, and a third of padding."""
    ids = torch.tensor([[0, int(text.split()[1]), 0] for text in texts])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0]]).repeat(len(texts), 1)}


@pytest.mark.slow
@pytest.mark.parametrize("texts", [False, True])
def test_the_corridors_q_values_are_found(texts):
    torch.manual_seed(0)
    model = DeepQLearningModel(CELLS, 2, hidden_dim=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    history = train_model(
        Cells(),
        model,
        optimizer,
        1500,
        read_cell,
        corridor(texts),
        ExperienceReplay(1000),
        "cpu",
        gamma=GAMMA,
        target_update=20,
    )

    with torch.no_grad():
        q_values = model(torch.eye(CELLS))
    torch.testing.assert_close(q_values, torch.tensor(CORRIDOR_Q), atol=0.02, rtol=0)
    assert history[-1].loss < history[0].loss
    assert history[0].transitions == 10
    assert history[0].reward == pytest.approx(0.1)


@pytest.mark.slow
def test_the_loop_chooses_where_every_actions_reward_is_known():
    torch.manual_seed(0)
    model = DeepQLearningModel(CELLS, 3, hidden_dim=32)
    rewards = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [0.2, 0.1, 0.3], [0.0, 0.0, 1.0], [0.6, 0.7, 0.0]])
    ids = torch.arange(CELLS)[:, None]
    loader = [LabelledBatch(ids, torch.ones_like(ids), None, rewards)] * 20

    history = train_model(
        Cells(),
        model,
        torch.optim.Adam(model.parameters(), lr=3e-3),
        40,
        None,
        loader,
        ExperienceReplay(500),
        "cpu",
        epsilon=0.5,
    )

    with torch.no_grad():
        torch.testing.assert_close(model(torch.eye(CELLS)), rewards, atol=0.03, rtol=0)
    # half the time the best (0.8 on average over the cells), else one of three at random
    assert history[-1].reward == pytest.approx(0.5 * 0.8 + 0.5 * rewards.mean().item(), abs=0.1)


def test_every_position_decides_and_leads_to_the_next():
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rewards = torch.arange(12.0).view(2, 3, 2)
    model, buffer = DeepQLearningModel(CELLS, 2), ExperienceReplay(10)

    train_model(
        Cells(),
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        1,
        None,
        [LabelledBatch(ids, mask, None, rewards)],
        buffer,
        "cpu",
        epsilon=0.0,
    )

    sample = buffer.sample(5)
    seen = {
        int(state.argmax()): (None if done else int(following.argmax()), float(reward), int(action))
        for state, action, reward, following, done in zip(
            sample.states, sample.actions, sample.rewards, sample.next_states, sample.dones, strict=True
        )
    }
    best = model(torch.eye(CELLS)).argmax(1).tolist()
    places = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1)}
    leads_to = {0: 1, 1: 2, 2: None, 3: 4, 4: None}
    assert seen == {
        cell: (leads_to[cell], float(rewards[places[cell]][best[cell]]), best[cell]) for cell in range(CELLS)
    }


def test_the_original_mocks_work_on_an_empty_loader():
    history = train_model(
        MagicMock(),
        MagicMock(),
        MagicMock(),
        1,
        MagicMock(),
        DataLoader([]),
        ExperienceReplay(capacity=100),
        torch.device("cpu"),
    )

    assert [(epoch.transitions, epoch.updates) for epoch in history] == [(0, 0)]
    assert math.isnan(history[0].loss)


def test_a_batch_of_four_steps_the_optimizer_and_leaves_the_transformer_alone():
    transformer = nn.Embedding(10, 6)
    hidden = MagicMock(side_effect=lambda ids, mask: transformer(ids))
    hidden.parameters.return_value = transformer.parameters()
    model = DeepQLearningModel(6, 4)
    before, target = copy.deepcopy(transformer.state_dict()), copy.deepcopy(model.state_dict())
    batch = (torch.randint(10, (16, 10)), torch.ones(16, 10), torch.randint(4, (16,)), torch.rand(16))

    train_model(hidden, model, torch.optim.Adam(model.parameters()), 1, None, [batch], ExperienceReplay(100), "cpu")

    assert torch.equal(transformer.weight, before["weight"])
    assert transformer.weight.grad is None
    assert not torch.equal(model.layers[0].weight, target["layers.0.weight"])


def test_texts_are_read_with_a_tokenizer_that_has_no_padding(tiny_lm):
    """Texts of different lengths are worth what they are alone."""
    lm, tokenizer = tiny_lm
    assert tokenizer.pad_token is None
    texts = ["a film", "the long film that I saw again", "bad"]
    seen = []
    transformer = PrunedTransformerModel(copy.deepcopy(lm), 0.0)
    model = DeepQLearningModel(transformer.hidden_size, 3)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = LabelledBatch(texts, None, None, torch.zeros(3, 3))
    train_model(
        transformer, model, torch.optim.Adam(model.parameters()), 1, tokenizer, [batch], ExperienceReplay(9), "cpu"
    )
    alone = [transformer(torch.tensor([tokenizer(text)["input_ids"]]))[0, -1] for text in texts]
    torch.testing.assert_close(seen[0], torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_optimising_the_frozen_transformer_is_warned_about():
    transformer, model = nn.Embedding(10, 6), DeepQLearningModel(6, 4)
    optimizer = torch.optim.Adam([*transformer.parameters(), *model.parameters()])

    with pytest.warns(UserWarning, match="frozen"):
        train_model(transformer, model, optimizer, 0, None, [], ExperienceReplay(100), "cpu")


def test_errors_in_the_data_are_not_swallowed():
    model = DeepQLearningModel(CELLS, 2)
    ids = torch.zeros(3, 1, dtype=torch.long)
    bad = [
        (ids, None, torch.tensor([0, 1, 7]), torch.zeros(3)),  # an action that the network does not have
        (ids, None, torch.tensor([0, 1]), torch.zeros(3)),
        (ids, None, None, torch.zeros(3)),
        (ids, None, None, torch.zeros(3, 1)),
        (ids, None, None, torch.zeros(3, 2, 2)),
    ]
    for batch in bad:
        with pytest.raises(ConfigError):
            train_model(
                Cells(),
                model,
                torch.optim.SGD(model.parameters(), lr=0.1),
                1,
                None,
                [batch],
                ExperienceReplay(10),
                "cpu",
                epsilon=1.0,
            )


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"target_update": 0}, {"epsilon": 1.5}, {"updates_per_batch": -1}]
)
def test_settings_out_of_range_are_refused(options):
    model = DeepQLearningModel(CELLS, 2)
    with pytest.raises(ConfigError):
        train_model(
            Cells(),
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            1,
            None,
            [],
            ExperienceReplay(10),
            "cpu",
            **options,
        )


# ---------------------------------------------------------------- text files

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"


class Letters:
    def __call__(self, text, **kwargs):
        return {"input_ids": [LETTERS.index(c) for c in text]}


@pytest.fixture(scope="module")
def letter_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("the quick brown fox.\n")
    (tmp_path / "deep" / "b.txt").write_text("it was a dark night")
    (tmp_path / "notes.md").write_text("not read")
    return tmp_path


@pytest.mark.parametrize("block", [1, 4, 65536])
def test_every_token_but_each_files_first_is_a_target_once(folder, letter_model, monkeypatch, block):
    monkeypatch.setattr("agents.classic.data.BLOCK", block)
    dataset = TextDataset(folder, letter_model, Letters(), action_dim=len(LETTERS), window=6)

    targets = "".join(
        LETTERS[int(c[r == 1])] for row in dataset for c, r in zip(row.candidates, row.rewards, strict=True)
    )

    assert targets == "he quick brown fox.\n" + "t was a dark night"
    assert (dataset.rows, dataset.missed) == (len(targets), 0)


def test_choices_equal_a_forward_of_each_prefix_alone(folder, letter_model):
    windows = list(TextDataset(folder, letter_model, Letters(), action_dim=4, window=6))
    dataset = TextDataset(folder, letter_model, Letters(), action_dim=4, window=6, prefixes=True)

    missed = 0
    for row in dataset:
        with torch.no_grad():
            logits = letter_model(row.ids[None]).logits[0, -1]
        assert row.candidates.tolist() == sorted(range(len(LETTERS)), key=lambda i: -logits[i])[:4]
        missed += int(row.rewards.sum() == 0)
        if row.next_ids is not None:
            assert torch.equal(row.next_ids[:-1], row.ids)
            assert row.rewards.tolist() == (row.candidates == row.next_ids[-1]).float().tolist()

    assert (dataset.rows, dataset.missed) == (sum(len(w.ids) for w in windows), missed)
    assert 0 < missed < dataset.rows
    torch.testing.assert_close(
        torch.cat([w.rewards for w in windows]), torch.stack([row.rewards for row in dataset]), rtol=0, atol=0
    )


@pytest.mark.parametrize("phrase", ["the same again. ", "nospaceatall"])
def test_a_file_is_never_read_whole(tmp_path, letter_model, monkeypatch, phrase):
    (tmp_path / "long.txt").write_text(phrase * 1000)
    monkeypatch.setattr("agents.classic.data.BLOCK", 64)
    seen = []

    class Spy(Letters):
        def __call__(self, text, **kwargs):
            seen.append(len(text))
            return super().__call__(text)

    next(iter(TextDataset(tmp_path, letter_model, Spy(), window=16)))

    assert len(seen) == 1
    assert seen[0] <= 64


def test_batches_are_padded_on_the_right(folder, letter_model):
    batch = next(iter(text_loader(folder, letter_model, Letters(), action_dim=3, window=16, batch_size=2)))

    assert batch.input_ids.shape == (2, 16)  # 20 targets in the first file: 16, then 4
    assert batch.attention_mask.sum(1).tolist() == [16, 4]
    assert batch.rewards.shape == (2, 16, 3)
    assert batch.rewards[1, 4:].sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("prefixes", [False, True])
def test_the_loop_learns_a_text_that_the_language_model_does_not_know(tmp_path, letter_model, prefixes):
    (tmp_path / "a.txt").write_text("abcabcabcabcabcabc" * 10)
    loader = text_loader(tmp_path, letter_model, Letters(), len(LETTERS), window=18, prefixes=prefixes, batch_size=16)
    transformer = PrunedTransformerModel(letter_model, 0.0)
    torch.manual_seed(0)
    model = DeepQLearningModel(transformer.hidden_size, len(LETTERS), hidden_dim=64)

    history = train_model(
        transformer,
        model,
        torch.optim.Adam(model.parameters(), lr=2e-3),
        30 if not prefixes else 8,
        None,
        loader,
        ExperienceReplay(5000),
        "cpu",
        gamma=0.0,
        epsilon=1.0,
        updates_per_batch=40 if not prefixes else 15,
        batch_size=128,
    )

    right = rank_1 = total = 0
    for batch in loader:
        with torch.no_grad():
            hidden = transformer(batch.input_ids, batch.attention_mask)
        last = batch.attention_mask.sum(1) - 1
        states = hidden[batch.attention_mask.bool()] if not prefixes else hidden[torch.arange(len(last)), last]
        rewards = batch.rewards[batch.attention_mask.bool()] if not prefixes else batch.rewards
        right += int(rewards.gather(1, model(states).argmax(1, keepdim=True)).sum())
        rank_1 += int(rewards[:, 0].sum())
        total += len(rewards)
    assert total == 179 == history[0].transitions
    assert right / total > 0.9
    assert rank_1 / total < 0.5


def test_an_encoder_cannot_decide_at_every_position(folder, letter_model):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = PrunedTransformerModel(BertModel(BertConfig(**shape, vocab_size=len(LETTERS))), 0.0)
    model = DeepQLearningModel(8, 3)
    loader = text_loader(folder, letter_model, Letters(), action_dim=3)

    with pytest.raises(ConfigError, match="sees the tokens to come"):
        train_model(
            encoder, model, torch.optim.SGD(model.parameters(), lr=0.1), 1, None, loader, ExperienceReplay(10), "cpu"
        )


def test_folders_and_files_that_cannot_be_read_are_refused(tmp_path, letter_model):
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(PromptError, match=r"\*\.txt"):
            TextDataset(place, letter_model, Letters())
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(PromptError, match=r"latin\.txt is not UTF-8"):
        list(TextDataset(tmp_path, letter_model, Letters()))


def test_a_model_without_a_last_position_has_windows_of_any_length(folder):
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(LETTERS), hidden_size=16, n_layer=1, n_head=2))
    choices = list(TextDataset(folder, bloom, Letters(), window=5_000))
    assert sorted(len(choice.ids) for choice in choices) == [18, 20]  # all of a file but its last letter


@pytest.mark.parametrize("options", [{"action_dim": 0}, {"action_dim": 99}, {"window": 0}, {"window": 65}])
def test_choices_out_of_range_are_refused(folder, letter_model, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TextDataset(folder, letter_model, Letters(), **options)
