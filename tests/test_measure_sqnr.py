from __future__ import annotations

import contextlib
import copy
import math

import pytest
import timm
import torch
from torch import nn

import quietvit
from quietvit.errors import QuietvitError
from quietvit.measure import sqnr
from quietvit.tracing import intercept


class Rounded(nn.Module):
    """A stand-in quantized model: operands rounded to a grid while the model runs."""

    def __init__(self, model, images, step, sites=None):
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        self.trace = quietvit.trace(model, images)
        self.step, self.sites, self.observer = step, sites, None

    def handle(self, site, operands, run):
        if self.step and (self.sites is None or site.name in self.sites):
            return run(*(torch.round(x / self.step) * self.step for x in operands))
        return run(*operands)

    def forward(self, x):
        with intercept(self.trace, self.handle):
            return self.model(x)


class Observable(Rounded):
    @contextlib.contextmanager
    def observe(self, handler):
        self.observer = handler
        try:
            yield
        finally:
            self.observer = None

    def handle(self, site, operands, run):
        if self.observer is None:
            return super().handle(site, operands, run)
        inner = super().handle
        return self.observer(site, operands, lambda *given: inner(site, given, run))


@pytest.fixture
def images():
    return torch.randn(5, 3, 16, 16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)


@pytest.mark.parametrize("kind", [Rounded, Observable])
def test_a_model_against_itself_is_without_noise(model, images, kind):
    found = sqnr(model, kind(model, images, 0), images)
    assert list(found) == [site.name for site in quietvit.trace(model, images).matmuls]
    assert set(found.values()) == {math.inf}


@pytest.mark.parametrize("local", [False, True])
def test_the_number_agrees_with_its_definition(model, images, local):
    quantized = Observable(model, images, 0.05)
    held = {}

    def reading(which):
        def handler(site, operands, run):
            output = run(*operands)
            held[which, site.name] = (operands, output, run)
            return output

        return handler

    with torch.no_grad():
        with intercept(quantized.trace, reading("float")):
            model.eval()(images)
        with quantized.observe(reading("quantized")):
            quantized(images)
    found = sqnr(model, quantized, images, local=local, batch_size=2)
    for site in quantized.trace.matmuls:
        operands, wanted, _ = held["float", site.name]
        _, given, run = held["quantized", site.name]
        if local:
            with torch.no_grad():
                given = run(*operands)
        ratio = wanted.square().sum() / (wanted - given).square().sum()
        assert found[site.name] == pytest.approx(float(10 * ratio.log10()), abs=0.02)


def test_both_ways_of_watching_agree(model, images):
    a = sqnr(model, Rounded(model, images, 0.05), images)
    b = sqnr(model, Observable(model, images, 0.05), images)
    assert a == pytest.approx(b)


def test_a_step_half_as_large_gives_six_decibels(model, images):
    coarse = sqnr(model, Observable(model, images, 2.0**-8), images, local=True)
    fine = sqnr(model, Observable(model, images, 2.0**-9), images, local=True)
    gains = torch.tensor([fine[name] - coarse[name] for name in fine])
    assert gains.median() == pytest.approx(6.02, abs=0.5)


def test_noise_starts_where_quantization_does(model, images):
    names = [site.name for site in quietvit.trace(model, images).matmuls]
    first = names.index("blocks.1.attn.qkv")
    quantized = Observable(model, images, 0.05, sites={"blocks.1.attn.qkv"})
    accumulated = sqnr(model, quantized, images)
    assert all(accumulated[name] == math.inf for name in names[:first])
    assert all(math.isfinite(accumulated[name]) for name in names[first:])
    local = sqnr(model, quantized, images, local=True)
    assert [name for name in names if local[name] != math.inf] == ["blocks.1.attn.qkv"]


def test_the_batch_size_changes_nothing_and_modes_are_restored(model, images):
    quantized = Observable(model, images, 0.05)
    model.train()
    quantized.train()
    whole = sqnr(model, quantized, images)
    assert model.training
    assert quantized.model.training
    assert sqnr(model, quantized, images, batch_size=1) == pytest.approx(whole, abs=1e-2)


def test_a_dead_site_is_not_a_number(images, model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.zero_()
        model.blocks[0].mlp.fc2.bias.zero_()
    found = sqnr(model, Rounded(model, images, 0.05), images)
    assert math.isnan(found["blocks.0.mlp.fc2"])


def test_more_bits_give_more_decibels_with_the_library_s_own_quantizers(model, images):
    means = []
    for bits in (4, 6, 8):
        method = quietvit.RTN(weight_bits=bits, activation_bits=bits)
        quantized = quietvit.quantize(model, method, images, progress=False)
        found = sqnr(model, quantized, images)
        assert list(found) == [site.name for site in quantized.trace.matmuls]
        means.append(sum(found.values()) / len(found))
    assert means[0] + 6 < means[1] < means[2] - 6


def test_what_cannot_be_compared_is_refused(model, images):
    quantized = Rounded(model, images, 0.05)
    with pytest.raises(QuietvitError, match="has no trace"):
        sqnr(model, nn.Identity(), images)
    with pytest.raises(QuietvitError, match="has no observe"):
        sqnr(model, quantized, images, local=True)
    with pytest.raises(QuietvitError, match="no images"):
        sqnr(model, quantized, [])
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.blocks[1].mlp.fc1.weight.fill_(torch.nan)
    with pytest.raises(QuietvitError, match=r"float model's output of blocks\.1\.mlp\.fc1"):
        sqnr(broken, quantized, images)


def test_quantized_model_can_be_observed_locally(model, images):
    quantized = quietvit.quantize(model, quietvit.RTN(activation_bits=4), images, progress=False)
    accumulated, own = sqnr(model, quantized, images), sqnr(model, quantized, images, local=True)
    assert list(own) == [site.name for site in quantized.trace.matmuls]
    first, last = quantized.trace.matmuls[0].name, quantized.trace.matmuls[-1].name
    assert own[first] == accumulated[first]
    assert own[last] > accumulated[last]
    with torch.no_grad():
        before = quantized(images)
        with quantized.observe(lambda site, operands, run: run(*operands)):
            assert torch.equal(quantized(images), before)
            with pytest.raises(QuietvitError, match="observed already"):  # noqa: SIM117
                with quantized.observe(lambda site, operands, run: run(*operands)):
                    pass
        assert torch.equal(quantized(images), before)
