"""A module's linear layers on other products, while a forward of ours runs."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

from textgen_env.models import fast_linears, projections
from textgen_env.models.fast_linears import FastLinears
from textgen_env.models.projections import ColumnProjection, PackedProjection, can_pack

KINDS = [(ColumnProjection, torch.float32)]
KINDS += [
    (PackedProjection, dtype) for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.zeros(1, dtype=dtype))
]


@pytest.fixture(params=KINDS, ids=str)
def dtype(request, monkeypatch):
    """The dtype of a kind of product that every layer takes, however small it is."""
    kind, dtype = request.param
    monkeypatch.setattr(fast_linears, "best_projection", lambda model, weight: kind)
    monkeypatch.setattr(fast_linears, "LEAST", {dtype: 0})
    return dtype


class Layers(nn.Module):
    """A layer of each kind, and what they have computed."""

    def __init__(self, dtype):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(24, 40), nn.Linear(24, 8, bias=False), Conv1D(16, 24)]).to(dtype)

    def forward(self, x):
        return [layer(x) for layer in self.parts]


def expected(layers, x):
    """By plain products in double precision."""
    first, second, third = layers.parts
    x = x.double()
    return [
        x @ first.weight.double().t() + first.bias.double(),
        x @ second.weight.double().t(),
        x @ third.weight.double() + third.bias.double(),
    ]


@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (3, 2, 24), (2, 1, 3, 24)])
def test_layers_compute_the_same_in_any_shape(shape, dtype):
    torch.manual_seed(0)
    layers, x = Layers(dtype), torch.randn(shape, dtype=dtype)
    with torch.inference_mode(), FastLinears(layers).in_place():
        found = layers(x)
    for own, wanted in zip(found, expected(layers, x), strict=True):
        assert own.dtype == dtype
        assert own.shape == wanted.shape
        torch.testing.assert_close(own.double(), wanted, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2)


def test_a_turned_input_is_read_right(dtype):
    """Its places in memory are not in order, and axes of length 1 have strides of any size."""
    layers, x = Layers(dtype), torch.randn(4, 24, 1, dtype=dtype).transpose(1, 2)
    assert x.stride() == (24, 1, 1)
    with torch.inference_mode(), FastLinears(layers).in_place():
        found = layers(x)
    for own, wanted in zip(found, expected(layers, x), strict=True):
        torch.testing.assert_close(own.double(), wanted, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2)


def test_the_module_is_its_owner_s_again_afterwards_after_an_error_too(dtype):
    layers, x = Layers(dtype), torch.randn(3, 24, dtype=dtype)
    before, own = copy.deepcopy(layers.state_dict()), layers(x)
    fast = FastLinears(layers)
    with fast.in_place():
        assert all("forward" in vars(layer) for layer in layers.parts)
    with pytest.raises(TypeError), fast.in_place():
        layers(None, None)
    assert not any("forward" in vars(layer) for layer in layers.parts)
    assert all(torch.equal(a, b) for a, b in zip(layers(x), own, strict=True))
    sum(part.float().sum() for part in layers(x)).backward()
    assert all(parameter.grad is not None for parameter in layers.parameters())
    for name, value in layers.state_dict().items():
        assert torch.equal(value, before[name])


def test_layers_with_something_of_their_own_keep_it(dtype):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, hooked, prepared, other, moved = layers = [
        nn.Linear(24, 8).to(dtype),
        nn.Linear(24, 8).to(dtype),
        nn.utils.parametrizations.weight_norm(nn.Linear(24, 8)).to(dtype),
        Doubled(24, 8).to(dtype),
        nn.Linear(24, 8).to(dtype),
    ]
    hooked.register_forward_hook(lambda *_: None)
    moved.forward = lambda x: x
    with FastLinears(nn.ModuleList(layers)).in_place():
        assert "forward" in vars(plain)
        assert not any("forward" in vars(layer) for layer in (hooked, prepared, other))
        assert moved.forward(1) == 1
    assert moved.forward(1) == 1


def test_a_forward_that_the_owner_sets_later_is_used_and_stays(dtype):
    layers = Layers(dtype)
    fast, x = FastLinears(layers), torch.randn(2, 24, dtype=dtype)
    own = layers.parts[1].forward = lambda x: x
    with torch.inference_mode(), fast.in_place():
        assert layers(x)[1] is x
    assert vars(layers.parts[1])["forward"] is own
    with fast.in_place(), FastLinears(layers).in_place():  # of another model with the same layers, in another thread
        pass
    assert "forward" not in vars(layers.parts[0])


@pytest.mark.parametrize("shape", [(0, 24), (0, 5, 24), (2, 0, 24)])
def test_a_layer_may_be_called_with_no_rows(shape, dtype):
    """As an expert is that nobody has chosen."""
    layers, x = Layers(dtype), torch.zeros(shape, dtype=dtype)
    with torch.inference_mode(), FastLinears(layers).in_place():
        assert [part.shape for part in layers(x)] == [(*shape[:-1], outputs) for outputs in (40, 8, 16)]


def test_autocast_chooses_precisions_itself(dtype):
    layers, x = Layers(dtype), torch.randn(2, 24, dtype=dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        own = layers(x)
        with FastLinears(layers).in_place():
            assert all(torch.equal(a, b) for a, b in zip(layers(x), own, strict=True))


@pytest.mark.slow
def test_a_module_that_its_owner_has_compiled_is_left_alone(dtype):
    layers = Layers(dtype)
    whole = torch.compile(layers, backend="eager")
    with FastLinears(whole).in_place():
        assert not any("forward" in vars(layer) for layer in layers.parts)
    layers.parts[0].compile(backend="eager")
    with FastLinears(layers).in_place():
        assert not any("forward" in vars(layer) for layer in layers.parts)


def test_an_input_in_another_precision_takes_the_layer_s_own_way(dtype):
    layer = nn.Linear(24, 8).to(dtype)
    other = torch.randn(2, 24, dtype=torch.float64)
    with FastLinears(layer).in_place(), pytest.raises(RuntimeError, match="dtype"):
        layer(other)


def test_only_layers_that_are_called_are_copied(dtype, monkeypatch):
    copied = []
    kind = fast_linears.best_projection(None, None)

    class Counted(kind):
        def __init__(self, linears):
            copied.extend(linears)
            super().__init__(linears)

    monkeypatch.setattr(fast_linears, "best_projection", lambda model, weight: Counted)
    layers = Layers(dtype)
    fast = FastLinears(layers)
    with torch.inference_mode():
        for _ in range(2):
            with fast.in_place():
                layers.parts[1](torch.randn(2, 24, dtype=dtype))
    (one,) = copied
    assert one.weight.data_ptr() == layers.parts[1].weight.data_ptr()


def test_small_layers_and_other_precisions_are_left_alone():
    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(512, 512).half(), nn.Linear(512, 512).double()])
    with FastLinears(layers).in_place():
        assert not any("forward" in vars(layer) for layer in layers)


def test_nothing_is_copied_without_memory_for_it(monkeypatch):
    monkeypatch.setattr(projections, "available_bytes", lambda device: 1000)
    layer = nn.Linear(512, 512)
    with FastLinears(layer).in_place():
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_a_model_s_own_forward_is_what_it_was(name, dtype):
    sizes = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2))
    else:
        blocks = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = hf.BartForConditionalGeneration(
            hf.BartConfig(**sizes, **blocks, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24)
        )
    model, ids = model.eval().to(dtype), torch.randint(2, 50, (3, 7))
    with torch.inference_mode():
        own = model(input_ids=ids).logits
        with FastLinears(model).in_place():
            found = model(input_ids=ids).logits
    torch.testing.assert_close(found, own, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-2)
