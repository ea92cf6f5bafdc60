"""Compiled and otherwise wrapped models are read, measured and quantized as the plain model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quietvit
from quietvit.decay.activations import largest_activation
from quietvit.errors import QuietvitError
from quietvit.measure.sqnr import sqnr
from quietvit.pairs import find_pairs
from zoo import build

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def compiled(what):
    return torch.compile(what, backend="eager")


class Compiled(nn.Module):
    """An activation that calls a compiled function."""

    def forward(self, x):
        return _gelu(x)


@torch.compile(backend="eager")
def _gelu(x):
    return nn.functional.gelu(x)


def nested(model):
    """Compiled blocks in a compiled model in DataParallel."""
    model.blocks[0] = compiled(model.blocks[0])
    model.blocks[1].compile(backend="eager")
    return nn.DataParallel(compiled(model))


def methods(model):
    """Compiled methods and functions, and the model compiled in place."""
    model.blocks[0].attn.forward = compiled(model.blocks[0].attn.forward)
    model.forward_head = compiled(model.forward_head)
    model.blocks[1].mlp.act = Compiled()
    model.compile(backend="eager")
    return model


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("wrap", [nested, methods, averaged])
def test_a_wrapped_model_is_what_is_inside(wrap, tmp_path):
    plain, example = build("timm-vit")
    wrapped = wrap(copy.deepcopy(plain))
    with torch.no_grad():
        expected = wrapped(IMAGES)  # compiled by now, where it is compiled
    traced = quietvit.trace(wrapped, example)
    assert traced == quietvit.trace(plain, example)
    pairs = find_pairs(wrapped, example)
    assert list(pairs) == list(find_pairs(plain, example))
    assert torch.equal(pairs[0].first.read(wrapped), pairs[0].first.read(plain))
    assert str(quietvit.diagnose(wrapped, IMAGES)) == str(quietvit.diagnose(plain, IMAGES))
    assert largest_activation(wrapped, IMAGES) == largest_activation(plain, IMAGES)

    reference = quietvit.quantize(plain, quietvit.RepQViT(), IMAGES)
    quantized = quietvit.quantize(wrapped, quietvit.RepQViT(), IMAGES)
    with torch.no_grad():
        wanted = reference(IMAGES)
        assert torch.equal(quantized(IMAGES), wanted)
        torch.testing.assert_close(wrapped(IMAGES), expected)  # it is compiled as before
    assert sqnr(wrapped, compiled(quantized), IMAGES) == sqnr(plain, reference, IMAGES)
    path = quantized.save(tmp_path / "x.qvit")
    with torch.no_grad():
        assert torch.equal(quietvit.load(path, model=wrapped)(IMAGES), wanted)
    with pytest.raises(QuietvitError, match="quantized already"):
        quietvit.quantize(compiled(quantized), quietvit.RepQViT(), IMAGES)


@pytest.mark.parametrize("wrap", [nested, methods, averaged])
def test_weights_decay_through_wrappers(wrap):
    plain, example = build("timm-vit")
    wrapped = wrap(copy.deepcopy(plain))
    for model in (plain, wrapped):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        quietvit.ColinearityDecay(model, example, strength=0.5).step(optimizer)
    assert all(map(torch.equal, plain.parameters(), wrapped.parameters()))


def test_a_copy_runs_its_own_weights():
    model, _ = build("timm-vit")
    own = quietvit.tracing.plain_copy(methods(model))
    with torch.no_grad():
        before = own(IMAGES)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(own(IMAGES), before)
