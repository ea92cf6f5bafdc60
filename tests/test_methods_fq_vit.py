"""FQ-ViT: factors, integer softmax, and what it quantizes beside matrix products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import quietvit
import zoo
from quietvit.quantization.methods.fq_vit import (
    FQViT,
    IntegerSoftmax,
    _why_not_integer,
    factor_quantizer,
)
from quietvit.quantization.nonuniform import LogQuantizer
from quietvit.quantization.quantizers import AffineQuantizer
from quietvit.quantization.ranges import Stream
from quietvit.quantization.slot import Slot


def stream_of(x):
    stream = Stream(-1, exact=True)
    stream.update(x)
    return stream


def test_factors_are_the_best_of_all_for_each_channel():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) * torch.tensor([0.01, 0.3, 1.0, 2.0, 5.0, 30.0])
    found = factor_quantizer(stream_of(x), x.min(), x.max(), 8)
    smallest = (x.max() - x.min()) / 255 / 8
    ratio = torch.log2(found.scale / smallest)
    torch.testing.assert_close(ratio, ratio.round())
    assert bool(((ratio >= -1e-4) & (ratio <= 3.0001)).all())
    error = (found(x) - x).square().sum(0)
    for exponent in range(4):
        steps = torch.full((6,), float(smallest) * 2**exponent)
        other = AffineQuantizer(steps, found.zero_point, bits=8, signed=False, axis=-1)
        assert bool((error <= (other(x) - x).square().sum(0) * 1.0001).all())
    assert ratio[1] < ratio[-1]


def test_a_constant_channel_and_an_all_constant_tensor_are_exact_or_close():
    x = torch.tensor([[0.5, 1.0, -2.0]]).repeat(9, 1)
    found = factor_quantizer(stream_of(x), x.min(), x.max(), 8)
    torch.testing.assert_close(found(x), x, atol=3 / 255, rtol=0)
    zeros = torch.zeros(4, 3)
    assert torch.equal(
        factor_quantizer(stream_of(zeros), zeros.min(), zeros.max(), 8)(zeros), zeros
    )


@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
def test_the_integer_softmax_is_a_softmax(spread):
    x = spread * torch.randn(5, 7, 30, generator=torch.Generator().manual_seed(1))
    found = IntegerSoftmax()((x,), None)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, 7))
    torch.testing.assert_close(found, x.softmax(-1), atol=3e-3, rtol=0)
    assert bool((found >= 0).all())


def test_its_exponential_is_the_published_polynomial():
    x = torch.tensor([[0.0, -0.5, -0.8, -3.0]])

    def exponential(value):
        n = math.floor(-value / math.log(2))
        p = value + n * math.log(2)
        return (0.3585 * (p + 1.353) ** 2 + 0.344) * 2.0**-n

    wanted = torch.tensor([[exponential(v) for v in (0.0, -0.5, -0.8, -3.0)]])
    torch.testing.assert_close(IntegerSoftmax()((x,), None), wanted / wanted.sum())


def test_the_integer_softmax_computes_in_float32_for_bfloat16():
    x = 8 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, wide = IntegerSoftmax()((x,), None), IntegerSoftmax()((x.float(),), None)
    assert torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize("inner", [None, torch.float32])
def test_a_softmax_in_float32_of_bfloat16_scores_is_one_over_the_last_dim(inner):
    scores = torch.randn(2, 4, 50, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert not _why_not_integer(scores, scores.softmax(-1, dtype=inner))
    assert "another dim" in _why_not_integer(scores, scores.softmax(-2, dtype=inner))


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "tv-vit", "timm-swin"])
def test_everything_means_norms_softmax_and_residual_adds(name):
    model, example = zoo.build(name)
    images = example["pixel_values"] if isinstance(example, dict) else example
    whole = quietvit.quantize(model, FQViT(), images, example=example, progress=False)
    slots = {slot.key: slot for slot in whole.slots()}
    for site in whole.trace.sites:
        if site.kind == "norm" or site.kind == "add":
            assert Slot(site, 0).key in slots
            assert whole.method.slot_bits(Slot(site, 0)) == 8
        if site.kind == "softmax" and Slot(site, 0).key in slots:
            assert isinstance(whole.adjusted()[site.name], IntegerSoftmax)
    maps = [q for q in whole.quantizers.values() if isinstance(q, LogQuantizer)]
    assert len(maps) == sum(site.role == "attention_value" for site in whole.trace.sites)
    assert {q.bits for q in maps} == {4}
    assert "norm inputs" in whole.report()
    assert not whole.deployable


def test_without_everything_only_matrix_products_are_touched():
    model, images = zoo.build("timm-vit")
    plain = quietvit.quantize(model, FQViT(everything=False), images, progress=False)
    assert {slot.site.kind for slot in plain.slots()} == {"linear", "conv", "matmul"}
    assert not plain.adjusted()
    assert plain.coverage.fraction == 1


def test_factors_run_along_channels_only():
    model, images = zoo.build("timm-hybrid")
    whole = quietvit.quantize(model, FQViT(), images, progress=False)
    adds = [slot for slot in whole.slots() if slot.site.kind == "add"]
    by_rank = {rank: [] for rank in (3, 4)}
    for slot in adds:
        shape = slot.site.operands[slot.index].shape
        by_rank[len(shape)].append(whole.quantizers[slot.key].axis)
    assert set(by_rank[4]) == {None}
    assert -1 in by_rank[3]


def test_float_attention_maps_are_put_down_to_their_own_field():
    model, images = zoo.build("timm-vit")
    whole = quietvit.quantize(model, FQViT(attention_bits=None), images, progress=False)
    assert {reason for _, reason in whole.coverage.untouched} == {"left float: attention_bits=None"}


class MixedHeads(nn.Module):
    """Attention maps go through a linear before they meet the values."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.mix, self.values = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(6, 4)
        nn.init.constant_(self.mix.bias, -0.5)

    def forward(self, x):
        x = x.flatten(2)
        return self.mix(torch.softmax(self.scores(x), -1)) @ self.values(x.mT)


def test_attention_maps_that_are_no_probabilities_are_uniform_and_named():
    images = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = quietvit.quantize(MixedHeads(), FQViT(), images, progress=False)
    product = next(site for site in whole.trace.sites if site.role == "attention_value")
    assert isinstance(whole.quantizer(product.name, "left"), AffineQuantizer)
    assert isinstance(whole.quantizer("mix", "input"), LogQuantizer)
    assert any(note.startswith(f"{product.name}: attention maps outside") for note in whole.notes)


def test_masked_scores_stay_float_and_are_named():
    model, images = zoo.build("timm-swin")
    whole = quietvit.quantize(model, FQViT(), images, progress=False)
    assert "2 softmaxes stay float: its scores are masked" in whole.notes


class OtherDim(nn.Module):
    """A softmax over the tokens, whose dim is not the last."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.two(torch.softmax(self.one(x.flatten(2).mT), 1))


def test_a_softmax_over_another_dim_stays_float_and_is_named():
    whole = quietvit.quantize(OtherDim(), FQViT(), torch.randn(4, 6, 3, 3), progress=False)
    assert any("another dim" in note for note in whole.notes)


def test_excluded_norms_stay_float():
    model, images = zoo.build("timm-vit")
    whole = quietvit.quantize(model, FQViT(exclude="blocks.0.norm1"), images, progress=False)
    assert whole.quantizer("blocks.0.norm1", "input") is None
    assert whole.quantizer("blocks.0.norm2", "input") is not None


def test_adjusted_softmaxes_are_saved_and_loaded(tmp_path):
    model, images = zoo.build("timm-vit")
    whole = quietvit.quantize(model, FQViT(), images, progress=False)
    loaded = quietvit.load(whole.save(tmp_path / "m.qvit"), model=model)
    with torch.no_grad():
        assert torch.equal(loaded(images), whole(images))


def test_a_method_on_top_excludes_what_its_base_can_exclude():
    model, images = zoo.build("timm-vit")
    base = FQViT(exclude=("blocks.0.norm1",))
    whole = quietvit.quantize(model, quietvit.QwT(base=base), images, progress=False)
    assert whole.quantizer("blocks.0.norm1", "input") is None
