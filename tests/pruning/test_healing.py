"""Healing: the loss by hand, the recovery of a model from its own damage, and stops in between."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from agents.pruning.healing import distil, prune_and_heal
from agents.pruning.model import PrunedTransformerModel, prune_
from textgen_env.errors import ConfigError, ModelError, RunFolderError

VOCAB = 31


def model(seed: int = 0, dtype: torch.dtype = torch.float32, vocab: int = VOCAB):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,  # distributions far from uniform
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def ids():
    return torch.randint(3, VOCAB, (16, 10), generator=torch.Generator().manual_seed(0))


def kl(student, teacher, ids):
    """KL(teacher || student) a position, summed out by hand in numpy."""
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().softmax(-1).numpy() for m in (teacher, student))
    return float((p * np.log(p / q)).sum(-1).mean())


def test_the_loss_is_the_kl_to_the_teacher(ids):
    student, teacher = model(1), model(0)
    expected = kl(student, teacher, ids)

    losses = distil(student, teacher, ids, steps=1, batch_size=16, progress=False)

    assert losses == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healing_takes_back_most_of_the_damage(dtype, ids):
    teacher = model(0, dtype)
    student, _ = prune_(copy.deepcopy(teacher), "ffn", 0.25, calibration=ids)
    damage = kl(student, teacher, ids)

    distil(student, teacher, ids, steps=60, batch_size=16, learning_rate=1e-2, progress=False)

    assert kl(student, teacher, ids) < 0.3 * damage
    assert student.dtype == dtype


def test_steps_too_small_for_bfloat16_still_add_up(ids):
    teacher = model(0, torch.bfloat16)
    student, _ = prune_(copy.deepcopy(teacher), "ffn", 0.25, calibration=ids)
    before = copy.deepcopy(student.state_dict())
    norm = "model.layers.0.input_layernorm.weight"  # ones, where bfloat16's steps are 0.004 and 0.008

    distil(student, teacher, ids, steps=40, batch_size=16, learning_rate=1e-3, progress=False)

    assert not torch.equal(student.state_dict()[norm], before[norm])


def test_zeros_and_embeddings_stay(ids):
    teacher = model(0)
    student = PrunedTransformerModel(copy.deepcopy(teacher), 0.5)
    embedding = student.model.get_input_embeddings().weight.clone()
    damage = kl(student.model, teacher, ids)

    distil(student, teacher, ids, steps=20, batch_size=16, learning_rate=1e-2, progress=False)

    assert student.sparsity() == pytest.approx(0.5, abs=1e-3)
    assert kl(student.model, teacher, ids) < damage
    assert torch.equal(student.model.get_input_embeddings().weight, embedding)
    assert all(p.requires_grad for p in student.model.parameters())  # given back as they came


def test_the_teacher_does_not_change(ids):
    teacher = model(0)
    before = copy.deepcopy(teacher.state_dict())

    distil(model(1), teacher, ids, steps=3, learning_rate=1e-2, progress=False)

    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


class Stopped(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stopped_run_goes_on_to_the_same_weights(dtype, ids, tmp_path, monkeypatch):
    teacher = model(0, dtype)
    options = {"steps": 9, "batch_size": 5, "learning_rate": 1e-2, "checkpoint_every": 2, "progress": False}
    straight = model(1, dtype)
    expected = distil(straight, teacher, ids, **options)

    stopped, calls = model(1, dtype), []
    forward = teacher.forward

    def stops_in_step_6(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise Stopped
        return forward(*args, **kwargs)

    monkeypatch.setattr(teacher, "forward", stops_in_step_6)
    with pytest.raises(Stopped):
        distil(stopped, teacher, ids, folder=tmp_path, **options)
    resumed = model(1, dtype)  # a new process starts from the same pruned model
    losses = distil(resumed, teacher, ids, folder=tmp_path, **options)

    assert losses == expected
    assert len(calls) == 6 + 5  # steps 5 to 9: the checkpoint after step 4 was used
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["distil.pt"]


def test_a_checkpoint_of_another_run_is_refused(ids, tmp_path):
    distil(model(1), model(0), ids, steps=2, folder=tmp_path, progress=False)

    for student, text, steps in ((model(1), ids, 3), (model(2), ids, 2), (model(1), ids.flip(0), 2)):
        with pytest.raises(RunFolderError, match="another run"):
            distil(student, model(0), text, steps=steps, folder=tmp_path, progress=False)
        assert all(p.requires_grad for p in student.parameters())


def test_without_text_the_teacher_writes_it_once(tmp_path):
    options = {"steps": 2, "batch_size": 3, "length": 8, "folder": tmp_path, "progress": False}
    first = distil(model(1), model(0), **options)
    (tmp_path / "distil.pt").unlink()
    written = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}

    assert distil(model(1), model(0), **options) == first
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in written} == written


def test_texts_are_joined_with_end_tokens_and_cut_into_rows(monkeypatch):
    seen = []

    class Letters:
        def __call__(self, text, **kwargs):
            return {"input_ids": torch.tensor([[ord(c) - ord("a") + 3 for c in text]])}

    teacher = model(0)
    forward = teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda **kw: seen.append(kw["input_ids"]) or forward(**kw))

    distil(model(1), teacher, ["abcd", "", "ef"], 1, tokenizer=Letters(), batch_size=2, length=4, progress=False)

    assert sorted(seen[0].tolist()) == [[2, 7, 8, 2], [3, 4, 5, 6]]  # abcd, then end, e, f, end


def test_a_text_beyond_the_context_is_read_to_its_end(tiny_lm):
    lm, tokenizer = tiny_lm
    text = " ".join(f"the cat sat on {i} mats" for i in range(300))
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert len(ids) > lm.config.max_position_embeddings
    seen = []
    teacher = copy.deepcopy(lm)
    teacher.register_forward_pre_hook(lambda module, inputs, named: seen.append(named["input_ids"]), with_kwargs=True)
    count = len(ids) // 16
    distil(copy.deepcopy(lm), teacher, [text], 1, tokenizer=tokenizer, batch_size=count, length=16, progress=False)
    assert sorted(seen[0].tolist()) == sorted(ids[16 * i : 16 * i + 16] for i in range(count))


@pytest.mark.parametrize("given", ["ids", "nothing"])
def test_rows_are_cut_to_the_context(given):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2
    )
    short = GPT2LMHeadModel(config).eval()
    ids = torch.randint(3, VOCAB, (4, 20)) if given == "ids" else None
    expected = None if ids is None else kl(short, model(0), ids[:, :12])
    losses = distil(copy.deepcopy(short), model(0), ids, 1, batch_size=4, progress=False)
    assert expected is None or losses == [pytest.approx(expected, rel=1e-4)]
    assert len(losses) == 1


def test_a_model_without_a_last_position_learns_from_texts(tiny_lm):
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=tiny_lm[0].config.vocab_size, hidden_size=16, n_layer=1, n_head=2))
    texts = ["hello there my friend, how are you today"] * 2
    losses = distil(bloom, copy.deepcopy(bloom), texts, 1, tokenizer=tiny_lm[1], length=8, progress=False)
    assert losses == [pytest.approx(0, abs=1e-6)]  # its own teacher


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"length": 1}, "length must be at least 2"),
        ({"learning_rate": 0.0}, "learning_rate above 0"),
        ({"texts": []}, "empty"),
        ({"texts": ["some text"]}, "tokenizer"),
        ({"teacher": model(0, vocab=40)}, "share a vocabulary"),
    ],
)
def test_bad_input_is_refused(options, message, ids):
    given = {"student": model(1), "teacher": model(0), "texts": ids, **options}

    with pytest.raises(ConfigError, match=message):
        distil(**given, progress=False)


def test_an_encoder_has_nothing_to_distil(ids):
    from transformers import BertConfig, BertModel

    encoder = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=VOCAB)
    )
    with pytest.raises(ConfigError, match="no next-token logits"):
        distil(encoder, model(0), ids, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(ids):
    student = model(1)
    student.model.norm.weight.data.fill_(torch.inf)

    with pytest.raises(ModelError, match="lower the learning rate"):
        distil(student, model(0), ids, progress=False)


def stop(*args):
    raise Stopped


@pytest.mark.slow
def test_a_kill_while_the_model_is_saved_or_just_after_is_made_good_by_the_same_command(tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path / "dense")
    options = {"cuts": [("ffn", 0.25)], "steps": 2, "progress": False}
    save = PrunedTransformerModel.save_pretrained

    def half_saved(self, folder):
        save(self, folder)
        (folder / "model.safetensors").write_bytes(b"half")
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(PrunedTransformerModel, "save_pretrained", half_saved)
        with pytest.raises(Stopped):
            prune_and_heal(tmp_path / "dense", tmp_path / "out", **options)
    assert (tmp_path / "out" / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("agents.pruning.healing.shutil.rmtree", lambda *_, **__: stop())
        with pytest.raises(Stopped):
            prune_and_heal(tmp_path / "dense", tmp_path / "out", **options)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(RunFolderError, match="holds a model already"):
        prune_and_heal(tmp_path / "dense", tmp_path / "out", **options)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".") or path.is_dir()]


@pytest.mark.slow
def test_from_a_folder_to_a_healed_folder_and_on_after_a_stop(tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path / "dense")
    options = {"cuts": [("layers", 0.5), ("ffn", 0.25)], "steps": 4, "progress": False}
    report = prune_and_heal(tmp_path / "dense", tmp_path / "straight", **options)
    with monkeypatch.context() as patch:
        patch.setattr(PrunedTransformerModel, "save_pretrained", stop)
        with pytest.raises(Stopped):
            prune_and_heal(tmp_path / "dense", tmp_path / "stopped", **options)
    with monkeypatch.context() as patch:
        patch.setattr("agents.pruning.healing._Run.update", stop)  # not one step is done again
        assert prune_and_heal(tmp_path / "dense", tmp_path / "stopped", **options) == report

    straight, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("straight", "stopped"))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert (straight.config.num_hidden_layers, straight.config.intermediate_size) == (1, 18)
    assert report.dense_parameters == sum(p.numel() for p in model(0).parameters())
    assert report.parameters == sum(p.numel() for p in straight.parameters())
    assert "layers 50% + ffn 25%" in str(report)
    assert not (tmp_path / "stopped" / "healing").exists()
    with pytest.raises(RunFolderError, match="holds a model already"):
        prune_and_heal(tmp_path / "dense", tmp_path / "stopped", **options)
