"""GPTQ and ERQ on whole models: grids, weights that stay, convolutions, odd channels, configs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quietvit
import zoo
from quietvit.errors import QuietvitError
from quietvit.quantization import RTN
from quietvit.quantization.fitting.least_squares import (
    damped,
    grouped,
    nearest,
    round_with_feedback,
)
from quietvit.quantization.method import get_method
from quietvit.quantization.methods import erq
from quietvit.quantization.methods.erq import ERQ
from quietvit.quantization.methods.gptq import GPTQ
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import read_weight
from quietvit.tracing import intercept, trace


class Mixer(nn.Module):
    """Patches, a depthwise convolution, a bias-less linear, and one linear used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.plain = nn.Linear(8, 16, bias=False)
        self.narrow = nn.Linear(16, 8)
        self.shared = nn.Linear(8, 8)

    def forward(self, x):
        x = self.patch(x)
        x = self.grouped(torch.relu(self.depthwise(x))).flatten(2).mT
        x = self.narrow(torch.relu(self.plain(x)))
        return self.shared(torch.relu(self.shared(x))).mean(1)


class PostNorm(nn.Module):
    """Images as tokens of an encoder whose norms stand behind the residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 8, stride=8)
        one = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=False)
        self.encoder = nn.TransformerEncoder(one, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.patch(x).flatten(2).mT).mean(1)


def small(kind):
    torch.manual_seed(0)
    return kind().eval(), torch.randn(6, 3, 32, 32)


def method(name, **fields):
    return get_method(name)(base=RTN(**{"weight_bits": 4, "activation_bits": 8} | fields))


def error(model, quantized, images):
    with torch.no_grad():
        wanted, got = zoo.outputs(model(images))[0], zoo.outputs(quantized(images))[0]
    return float((wanted - got).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["gptq", "erq"])
@pytest.mark.parametrize("kind", [Mixer, PostNorm])
def test_the_model_comes_closer_than_rounded_to_nearest(kind, name):
    model, images = small(kind)
    quantized = quietvit.quantize(model, method(name), images, progress=False)
    base = RTN(weight_bits=4, activation_bits=8, weight_symmetric=False, weight_range="omse")
    nearest_one = quietvit.quantize(model, base, images, progress=False)
    assert error(model, quantized, images) < error(model, nearest_one, images)


@pytest.mark.parametrize("name", ["gptq", "erq"])
def test_written_weights_lie_on_their_grids(name):
    model, images = small(Mixer)
    quantized = quietvit.quantize(model, method(name), images, progress=False)
    moved = 0
    for site in quantized.trace.matmuls:
        if site.name.startswith("shared"):
            continue
        grid = quantized.quantizers[Slot(site, 1).key]
        weight = read_weight(quantized.model, site)
        assert torch.equal(grid(weight), weight)
        assert torch.equal(grid.codes(grid(weight)), grid.codes(weight))
        moved += not torch.equal(weight, grid(read_weight(model, site)))
    assert moved >= 4


@pytest.mark.parametrize("name", ["gptq", "erq"])
def test_shared_weights_are_left_alone_and_named(name):
    model, images = small(Mixer)
    quantized = quietvit.quantize(model, method(name), images, progress=False)
    assert torch.equal(quantized.model.shared.weight, model.shared.weight)
    note = next(note for note in quantized.notes if "kept the base's rounding" in note)
    assert "of 2 weights" in note
    assert "shared" in note


@pytest.mark.parametrize("name", ["gptq", "erq"])
@pytest.mark.parametrize("model_name", ["hf-detr", "timm-hybrid"])
def test_it_is_deterministic(name, model_name):
    model, example = zoo.build(model_name)
    batch = example["pixel_values"] if isinstance(example, dict) else example
    images = torch.randn(9, *batch.shape[1:], generator=torch.Generator().manual_seed(2))
    given = example if isinstance(example, dict) else None
    one, other = (
        quietvit.quantize(model, method(name), images, example=given, progress=False)
        for _ in range(2)
    )
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sums_of_large_models_come_in_lots(monkeypatch):
    model, images = small(Mixer)
    one = quietvit.quantize(model, method("erq"), images, progress=False)
    monkeypatch.setattr(erq, "BUDGET", 1)
    other = quietvit.quantize(model, method("erq"), images, progress=False)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("in_sequence", [True, False])
def test_gptq_sees_what_quantized_blocks_hand_on(in_sequence):
    model, images = small(Mixer)
    fields = {"base": RTN(weight_bits=2, activation_bits=None), "in_sequence": in_sequence}
    quantized = quietvit.quantize(model, GPTQ(**fields), images, progress=False)
    traced = trace(model, images[:1])
    seen = {}

    def look(site, operands, run):
        seen[site.name] = (operands[0], run)
        return run(*operands)

    source = quantized.model if in_sequence else model
    with torch.no_grad(), intercept(traced, look):
        source(images)
    site = next(site for site in traced.matmuls if site.name.startswith("narrow"))
    inputs = seen[site.name][0].reshape(1, -1, 16).double()
    grid = quantized.quantizers[Slot(site, 1).key]
    hessian = damped(inputs.mT @ inputs * (2 / inputs.shape[1]), 0.01)
    columns = grouped(model.narrow.weight.detach(), 1)
    wanted = round_with_feedback(columns, hessian, lambda w: nearest(grid, w))
    assert torch.allclose(wanted[0].float(), quantized.model.narrow.weight, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_bits", [None, 4])
def test_erq_makes_up_for_coarse_activations(weight_bits, bias):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Linear(32, 16, bias=bias)).eval(), torch.randn(2, 3, 32, 32)
    images = images @ torch.randn(32, 32) + 1
    bits = {"weight_bits": weight_bits, "activation_bits": 3}
    base = RTN(patch_embed_bits="same", head_bits="same", **bits)
    methods = [ERQ(base=base, ridge=1e-3), ERQ(base=base, ridge=1e12), base]
    solved, not_solved, plain = (
        error(model, quietvit.quantize(model, method, images, progress=False), images)
        for method in methods
    )
    assert solved < 0.9 * min(not_solved, plain)
    if weight_bits is None:
        assert not_solved == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("name", ["gptq", "erq"])
def test_constant_and_dead_channels(name):
    model, images = small(Mixer)
    with torch.no_grad():
        model.patch.weight[0] = 0
        model.patch.bias[0] = 0
        model.plain.weight[:] = 0
    quantized = quietvit.quantize(model, method(name), images[:1], progress=False)
    assert all(tensor.isfinite().all() for tensor in quantized.state_dict().values())
    flat = torch.zeros(2, 3, 32, 32)
    assert quietvit.quantize(model, method(name), flat, progress=False)(flat).isfinite().all()


@pytest.mark.parametrize("fields", [{"damp": 0.0}, {"block": 0}, {"weight_range": "max"}])
def test_gptq_refuses_bad_config(fields):
    with pytest.raises(QuietvitError, match=next(iter(fields))):
        GPTQ(**fields)


def test_erq_refuses_bad_config():
    with pytest.raises(QuietvitError, match="ridge"):
        ERQ(ridge=0)


def test_a_spent_generator_is_refused():
    model, images = small(Mixer)
    with pytest.raises(QuietvitError, match="more than once"):
        quietvit.quantize(model, method("gptq"), (images for _ in range(1)), progress=False)
