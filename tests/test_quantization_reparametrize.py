"""Re-parametrization behind norms: exact in float on the whole zoo, skipped with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from quietvit.errors import QuietvitError
from quietvit.quantization.adjustments import ChannelAffine
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.reparametrize import norm_links, reparametrize
from quietvit.quantization.weights import read_weight, write_weight
from quietvit.tracing import SITE_KINDS, call, intercept, trace


def moved(model, traced, seed=0):
    """Re-parametrize every link by random numbers; the links and what came of it."""
    generator = torch.Generator().manual_seed(seed)
    found, calibrated = norm_links(model, traced), Calibrated()
    for link in found.links:
        gain = torch.rand(link.channels, generator=generator) + 0.5
        shift = torch.randn(link.channels, generator=generator)
        reparametrize(model, link, calibrated, gain=gain, shift=shift)
    return found, calibrated


def double(example):
    leaves, spec = torch.utils._pytree.tree_flatten(example)
    wide = [leaf.double() if leaf.is_floating_point() else leaf for leaf in leaves]
    return torch.utils._pytree.tree_unflatten(wide, spec)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_it_is_exact_in_float_on_every_model(name):
    model, example = zoo.build(name)
    model, example = model.double(), double(example)
    traced = trace(model, example)
    with torch.no_grad():
        wanted = zoo.outputs(call(model, example))
    links, calibrated = moved(model, traced)
    with torch.no_grad(), intercept(traced, calibrated.handle, kinds=SITE_KINDS):
        got = zoo.outputs(call(model, example))
    for one, other in zip(wanted, got, strict=True):
        if one.is_floating_point():
            assert float((one - other).abs().max() / one.abs().max()) < 1e-6
    assert links.links or links.skipped


@pytest.mark.parametrize(
    ("name", "count"),
    [("timm-vit", 5), ("timm-swin", 10), ("hf-vit", 5), ("tv-swin", 10), ("hf-detr", 0)],
)
def test_links_are_found_wherever_there_are_any(name, count):
    model, example = zoo.build(name)
    assert len(norm_links(model, trace(model, example)).links) == count


def test_separate_projections_are_consumers_of_one_norm():
    model, example = zoo.build("hf-vit")
    found = norm_links(model, trace(model, example))
    assert sorted(len(link.consumers) for link in found.links) == [1, 1, 1, 3, 3]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nn-encoder-post-norm", "feeds the residual"),
        ("hf-yolos", "leaves the model"),
        ("hf-detr", "feeds the residual"),
    ],
)
def test_a_norm_that_feeds_more_than_linears_is_skipped_with_the_reason(name, reason):
    model, example = zoo.build(name)
    found = norm_links(model, trace(model, example))
    assert any(reason in why for _, why in found.skipped)
    assert any(reason in note for note in found.notes("it"))


class Padded(nn.Module):
    """A norm, then zero padding or a class token, then a linear."""

    def __init__(self, token: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 6)) if token else None

    def forward(self, x):
        x = self.norm(self.first(x))
        if self.token is None:
            x = nn.functional.pad(x, (0, 0, 0, 2))
        else:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.linear(x)


@pytest.mark.parametrize("token", [False, True])
def test_tokens_that_the_norm_did_not_make_are_not_shifted(token):
    model = Padded(token)
    found = norm_links(model, trace(model, torch.randn(1, 5, 6)))
    assert not found.links
    assert "padding or other tokens" in found.skipped[0][1]


class Tied(nn.Module):
    """Two norms before linears that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(6), nn.LayerNorm(6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.b(self.one(self.a(x))))


def test_a_tied_weight_is_not_scaled_for_one_of_its_readers():
    model = Tied()
    found = norm_links(model, trace(model, torch.randn(1, 5, 6)))
    assert not found.links
    assert all("tied" in why or "shared" in why for _, why in found.skipped)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_gain_that_cannot_be_undone_is_refused(bad):
    model, example = zoo.build("timm-vit")
    link = norm_links(model, trace(model, example)).links[0]
    gain = torch.ones(link.channels)
    gain[3] = bad
    with pytest.raises(QuietvitError, match=rf"{link.norm.name}: channel 3"):
        reparametrize(model, link, Calibrated(), gain=gain, shift=torch.zeros(link.channels))


def test_adjustments_follow_each_other_and_can_be_undone():
    torch.manual_seed(0)
    first = ChannelAffine(torch.rand(4) + 0.5, torch.randn(4), -1)
    second = ChannelAffine(torch.rand(4) + 0.5, torch.randn(4), -1)
    y = torch.randn(2, 3, 4)
    torch.testing.assert_close(first.then(second).apply_to(y), second.apply_to(first.apply_to(y)))
    torch.testing.assert_close(first.inverse().apply_to(first.apply_to(y)), y)


class Between(nn.Module):
    """A norm, then something done to its output, then a linear."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 4)
        self.gain = nn.Parameter(torch.rand(6) + 1)
        self.register_buffer("position", torch.randn(5, 6))
        self.between = between

    def forward(self, x):
        return self.linear(self.between(self, self.norm(self.first(x))))


BETWEEN = {
    "position added": lambda model, x: x + model.position,
    "position added in place": lambda model, x: x.add_(model.position),
    "number added": lambda model, x: x + 0.5,
    "number subtracted": lambda model, x: 0.5 - x,
    "number multiplied": lambda model, x: 0.5 * x,
    "number divided": lambda model, x: x / 3,
    "buffer multiplied": lambda model, x: x * model.position,
    "parameter multiplied": lambda model, x: model.gain * x,
    "masked": lambda model, x: x.masked_fill(model.position > 0, 0.0),
    "masked by where": lambda model, x: torch.where(model.position > 0, x, model.position),
    "clamped": lambda model, x: x.clamp(-1, 1),
    "summed": lambda model, x: x.sum(1),
    "gated": lambda model, x: x * x,
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_stands_between_is_seen_or_does_no_harm(name):
    model = Between(BETWEEN[name]).double()
    x = torch.randn(1, 5, 6, dtype=torch.double)
    traced = trace(model, x)
    with torch.no_grad():
        wanted = model(x)
    links, calibrated = moved(model, traced)
    with torch.no_grad(), intercept(traced, calibrated.handle, kinds=SITE_KINDS):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert bool(links.links) != bool(links.skipped)


def test_nothing_between_is_a_link():
    model = Between(lambda model, x: x.flip(1).reshape(1, 5, 6))
    assert len(norm_links(model, trace(model, torch.randn(1, 5, 6))).links) == 1


def test_weights_are_written_in_any_memory_format():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    site = trace(model, torch.randn(1, 3, 8, 8)).matmuls[0]
    wanted = 2 * read_weight(model, site)
    write_weight(model, site, wanted)
    assert torch.equal(model[0].weight, wanted)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


class Pointwise(nn.Module):
    """A channels-first norm, then a convolution of kernel size 1."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.conv = nn.Conv2d(6, 4, 1, **kwargs)

    def forward(self, x):
        return self.conv(self.norm(self.first(x)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("kwargs", "count"), [({}, 1), ({"padding": 1}, 0), ({"stride": 2}, 0)])
def test_a_pointwise_convolution_is_a_linear_unless_it_pads(kwargs, count):
    model, x = Pointwise(**kwargs), torch.randn(1, 5, 5, 6)
    traced = trace(model, x)
    with torch.no_grad():
        wanted = model(x)
    links, calibrated = moved(model, traced)
    with torch.no_grad(), intercept(traced, calibrated.handle, kinds=SITE_KINDS):
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert len(links.links) == count
