"""A model whose weights change while environments use it, copies of environments, and suppressed tokens."""

from __future__ import annotations

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.utils.prune as prune
from conftest import WORDS
from toys import letters

from textgen_env.errors import ConfigError, ModelError
from textgen_env.models import fast_linears
from textgen_env.models.hf import HFModel
from textgen_env.models.parts import ModuleParts


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    sizes = {"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.6, bos_token_id=0, eos_token_id=0)).eval()


@pytest.fixture(params=["llama", "gpt2", "gpt2 on fast products"])
def pair(request, tiny_lm, monkeypatch):
    model, tokenizer = tiny_lm
    if "fast" in request.param:
        monkeypatch.setattr(fast_linears, "LEAST", {torch.float32: 0})
    return (copy.deepcopy(model) if request.param == "llama" else gpt2()), tokenizer


def make(model, **settings):
    settings = {"top_k": len(WORDS) - 1, "max_new_tokens": 6, "reward": len, "min_new_tokens": 6} | settings
    return gym.make("TextGen-v0", model=model, prompts=["the film was"], **settings)


def uncached(model, observation):
    """The model's own log-probabilities of all tokens but the end, (V - 1,), by token id."""
    ids = observation["tokens"][: int(observation["length"][0])].astype(np.int64)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1].clone()
    logits[0] = -torch.inf
    return logits.log_softmax(-1)[1:].numpy()


def shown(observation):
    found = np.empty(len(WORDS) - 1)
    found[observation["candidates"] - 1] = observation["logprobs"]
    return found


def optimiser_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=torch.tensor([[2, 3, 4]]), labels=torch.tensor([[2, 3, 4]])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fused_step(model):
    """It raises no counter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.2, fused=True)
    model(input_ids=torch.tensor([[2, 3, 4]]), labels=torch.tensor([[2, 3, 4]])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def written_behind_torch(model):
    for i, weight in enumerate(model.parameters()):
        if i % 2:
            weight.data.mul_(1.5)
        else:
            weight.detach().numpy()[...] *= 1.5


def load_others(model):
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})


def data_replaced(model):
    for weight in model.parameters():
        weight.data = weight.data * 1.5


def parameters_replaced(model):
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(-weight.detach()))


def one_module(model):
    """A module in the middle of a layer, its parent and its name there."""
    body = getattr(model, "model", None) or model.transformer
    layer = body.layers[1].mlp if hasattr(body, "layers") else body.h[1].mlp
    name = "down_proj" if hasattr(layer, "down_proj") else "c_proj"
    return layer, name


class Louder(torch.nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return 3.0 * self.inside(x)


def module_wrapped(model):
    parent, name = one_module(model)
    setattr(parent, name, Louder(getattr(parent, name)))


def pruned(model):
    parent, name = one_module(model)
    prune.l1_unstructured(getattr(parent, name), "weight", 0.9)


CHANGES = [
    optimiser_step,
    fused_step,
    written_behind_torch,
    load_others,
    data_replaced,
    parameters_replaced,
    module_wrapped,
    pruned,
]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_in_place_are_noticed_by_memo_cache_and_packed_copies(pair, change):
    model, _ = pair
    env = make(pair)
    env.reset(seed=0)
    for action in (0, 1):
        observation, *_ = env.step(action)
    before = shown(observation)
    saved = env.unwrapped.snapshot()
    change(model)
    for _ in range(2):
        observation, *_ = env.step(2)
        np.testing.assert_allclose(shown(observation), uncached(model, observation), atol=1e-4)
    env.unwrapped.restore(saved)  # keys and values of the old weights
    observation, *_ = env.step(2)
    np.testing.assert_allclose(shown(observation), uncached(model, observation), atol=1e-4)
    first, _ = env.reset()  # its proposals were in the memo
    np.testing.assert_allclose(shown(first), uncached(model, first), atol=1e-4)
    assert np.abs(before - shown(observation)).max() > 1e-3


def test_new_values_at_an_old_address_are_noticed():
    layer = torch.nn.Linear(64, 64)
    parts = ModuleParts(layer)
    assert not parts.have_changed()
    for _ in range(50):
        values = (layer.weight.detach() * 1.1).tolist()
        layer.weight.data = torch.empty(0)  # frees its memory, unless somebody keeps it
        layer.weight.data = torch.tensor(values)  # often where the last ones were
        assert parts.have_changed()


def test_pruning_once_more_changes_a_stored_mask_alone_and_is_noticed(pair):
    model, _ = pair
    parent, name = one_module(model)
    prune.l1_unstructured(getattr(parent, name), "weight", 0.5)
    env = make(pair)
    before, _ = env.reset(seed=0)
    prune.l1_unstructured(getattr(parent, name), "weight", 0.9)
    after, _ = env.reset(seed=0)
    np.testing.assert_allclose(shown(after), uncached(model, after), atol=1e-4)
    assert np.abs(shown(after) - shown(before)).max() > 1e-4
    getattr(parent, name).weight_mask.zero_()
    last, _ = env.reset(seed=0)
    np.testing.assert_allclose(shown(last), uncached(model, last), atol=1e-4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_peft_is_noticed_and_its_training_too(pair):
    peft = pytest.importorskip("peft")
    model, _ = pair
    env = make(pair)
    before, _ = env.reset(seed=0)
    layers = ["c_proj"] if hasattr(model, "transformer") else ["down_proj"]
    config = peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False, lora_dropout=0.5)
    adapted = peft.get_peft_model(model, config)  # its dropout is on: the environment goes without
    seen, _ = env.reset(seed=0)
    adapted.eval()
    np.testing.assert_allclose(shown(seen), uncached(model, seen), atol=1e-4)
    assert np.abs(shown(seen) - shown(before)).max() > 1e-3
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.mul_(2.0)
    seen, _ = env.reset(seed=0)
    np.testing.assert_allclose(shown(seen), uncached(model, seen), atol=1e-4)
    for move in (adapted.merge_adapter, adapted.unmerge_adapter):  # into the weights, and out again
        move()
        seen, _ = env.reset(seed=0)
        np.testing.assert_allclose(shown(seen), uncached(model, seen), atol=1e-4)


def test_embeddings_are_those_of_the_module_as_it_is_now(pair):
    language_model = HFModel(*pair)
    embedding = pair[0].get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.detach() + 1.0)
    ids = np.array([[2, 3], [4, 2]])
    np.testing.assert_array_equal(language_model.embed(ids), embedding(torch.from_numpy(ids)).detach().numpy())


def test_another_vocabulary_is_refused(pair):
    env = make(pair)
    env.reset(seed=0)
    pair[0].resize_token_embeddings(len(WORDS) + 3, mean_resizing=False)
    with pytest.raises(ModelError, match="has changed: make the environment anew"):
        env.reset(seed=0)


def test_a_model_that_nobody_changes_is_checked_once(pair, monkeypatch):
    env = make(pair)
    monkeypatch.setattr("textgen_env.models.hf.agreeing_decoder", None)  # would raise
    for seed in range(3):
        env.reset(seed=seed)
        for action in (0, 1, 2):
            env.step(action)


def test_all_environments_of_a_model_notice_and_it_is_checked_once(pair, monkeypatch):
    language_model = HFModel(*pair)
    envs = [make(language_model) for _ in range(3)]
    for env in envs:
        env.reset(seed=0)
    load_others(pair[0])
    for env in envs:
        observation, *_ = env.step(0)
        np.testing.assert_allclose(shown(observation), uncached(pair[0], observation), atol=1e-4)
    assert len({id(env.unwrapped.episodes.slots.decoder) for env in envs}) == 1


# --- copies


@pytest.mark.parametrize("kind", ["table", "llama"])
@pytest.mark.parametrize("vector", [False, True])
def test_a_copy_of_an_environment_goes_on_as_the_original_would(tiny_lm, kind, vector):
    prompts = ["a", "ab"] if kind == "table" else ["the film", "good"]
    settings = {"model": letters() if kind == "table" else tiny_lm, "prompts": prompts, "reward": len, "top_k": 4}
    env = gym.make_vec("TextGen-v0", num_envs=3, **settings) if vector else gym.make("TextGen-v0", **settings)
    action = np.zeros(3, np.int64) if vector else 0
    env.reset(seed=5)
    env.step(action)
    twin = copy.deepcopy(env)
    assert twin.unwrapped.language_model is env.unwrapped.language_model
    other = copy.deepcopy(twin)
    other.step(action + 1)  # touches neither
    for _ in range(40):
        first, second = env.step(action), twin.step(action)
        for key, value in first[0].items():
            np.testing.assert_allclose(value, second[0][key], atol=1e-4, err_msg=key)
        assert np.array_equal(first[1], second[1])
        if not vector and first[2]:
            env.reset(), twin.reset()  # the generators are in the same state as well
    with pytest.raises(ConfigError, match="another environment"):
        twin.unwrapped.episodes.load(0, env.unwrapped.episodes.save(0))


def test_a_pickled_environment_is_refused_with_the_way_out_and_a_model_is_not(pair):
    env = make(pair)
    with pytest.raises(ConfigError, match=r"not pickled.*gym\.make"):
        pickle.dumps(env)
    again = pickle.loads(pickle.dumps(env.unwrapped.language_model))
    ours, theirs = make(env.unwrapped.language_model).reset(seed=0)[0], make(again).reset(seed=0)[0]
    np.testing.assert_array_equal(ours["logprobs"], theirs["logprobs"])


# --- suppressed and forced tokens


def test_suppressed_tokens_are_proposed_neither_by_generate_nor_by_the_environment(pair):
    model, tokenizer = pair
    model.generation_config.suppress_tokens = [2, 5]
    model.generation_config.begin_suppress_tokens = [3, 4]
    env = make((model, tokenizer), top_k=5, min_new_tokens=0)
    greedy = model.generate(torch.tensor([tokenizer("the film was")["input_ids"]]), do_sample=False, max_new_tokens=6)
    observation, _ = env.reset(seed=0)
    assert not {2, 3, 4, 5} & set(observation["candidates"].tolist())
    seen, done = set(), False
    while not done:
        observation, _, done, _, _ = env.step(0)
        seen |= set(observation["candidates"].tolist()) if not done else set()
    assert not {2, 5} & seen
    assert seen & {3, 4}
    assert observation["tokens"][: int(observation["length"][0])].tolist() == greedy[0].tolist()


def test_a_prefix_in_memory_that_begins_one_text_may_go_on_with_any_token_in_another(pair):
    model, tokenizer = pair
    model.generation_config.begin_suppress_tokens = [3, 4]
    slots, free = HFModel(model, tokenizer).slots(2, 8, None), np.zeros(1, bool)
    first, second = np.array([0]), np.array([1])
    slots.start(np.arange(2), [[2, 5, 6], [2, 5]])
    for row in (first, second):
        assert (slots.propose(row, free).logprobs[0, [3, 4]] <= -1e4).all()
    slots.advance(second, np.array([6]))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[2, 5, 6]])).logits[0, -1].log_softmax(-1).numpy()
    np.testing.assert_allclose(slots.propose(second, free).logprobs[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["forced_eos_token_id", "forced_bos_token_id", "bad_words_ids"])
def test_tokens_that_a_generation_config_forces_or_forbids_are_refused_by_name(pair, name):
    model, tokenizer = pair
    setattr(model.generation_config, name, [[4, 5]] if name == "bad_words_ids" else 4)
    with pytest.raises(ModelError, match=f"{name}=.*does not follow"):
        make((model, tokenizer))


def test_a_forbidden_word_of_one_token_is_never_proposed(pair):
    model, tokenizer = pair
    model.generation_config.bad_words_ids = [[4], [6], [0]]  # 0 is the end token, which ``generate`` allows
    env = make((model, tokenizer), top_k=None, min_new_tokens=0)
    observation, _ = env.reset(seed=0)
    assert np.flatnonzero(observation["action_mask"] == 0).tolist() == [4, 6]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([env.unwrapped.episodes.ids_of(0)[0]])).logits[0, -1]
    logits[[4, 6]] = -torch.inf
    expected = logits.log_softmax(-1).numpy()
    allowed = [i for i in range(len(expected)) if i not in (4, 6)]
    np.testing.assert_allclose(observation["logprobs"][allowed], expected[allowed], atol=1e-4)


# --- seeds and sizes


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_a_seed_out_of_range_is_named(seed):
    env = gym.make("TextGen-v0", model=letters(), prompts=["a"], reward=len, top_k=4)
    with pytest.raises(ConfigError, match="seed must be a whole number of at least 0"):
        env.unwrapped.reset(seed=seed)
    vector = gym.make_vec("TextGen-v0", num_envs=2, model=letters(), prompts=["a"], reward=len, top_k=4)
    with pytest.raises(ConfigError, match="seed must be"):
        vector.reset(seed=[0, seed])


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 10**8}, {"max_prompt_tokens": 10**12}, {"top_k": 10**9}, {"num_envs": 10**7}]
)
def test_sizes_that_no_machine_has_are_refused_before_memory_is_asked_for(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=f"{name} must be a whole number in"):
        gym.make_vec("TextGen-v0", **{"num_envs": 2, "model": letters(), "prompts": ["a"], "reward": len} | settings)
