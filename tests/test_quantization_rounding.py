"""AdaRound and LSQ: where they start and end, their gradients, random masks."""

from __future__ import annotations

import pytest
import torch

from quietvit.quantization.fitting.rounding import LearnedScale, Rounding, random_keep, undecided
from quietvit.quantization.quantizers import AffineQuantizer


def rounded(axis=0, bits=3):
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    low, high = weight.amin(1) * 0.7, weight.amax(1) * 0.7
    quantizer = AffineQuantizer.from_range(low, high, bits=bits, symmetric=False, axis=axis)
    return weight, quantizer, Rounding(weight, quantizer)


def test_rounding_starts_at_the_float_weight_inside_the_range():
    weight, quantizer, rounding = rounded()
    clipped = weight.clamp(*((quantizer.dequantize(torch.full((4, 1), c))) for c in (0, 7)))
    torch.testing.assert_close(rounding.at(rounding.up()), clipped)


def test_hard_weights_lie_on_the_grid_within_one_step():
    weight, quantizer, rounding = rounded()
    with torch.no_grad():
        rounding.v.add_(3 * torch.randn(rounding.v.shape))
    hard = rounding.hard()
    assert torch.equal(quantizer(hard), hard)
    inside = quantizer.codes(weight) == quantizer.codes(weight).clamp(1, 6)
    off = (hard - weight).abs() / quantizer.scale[:, None]
    assert (off[inside] <= 1 + 1e-5).all()
    assert off[inside].max() > 0.5  # it does round the other way


def test_the_regularizer_ends_with_every_weight_decided():
    _, _, rounding = rounded()
    start = undecided(rounding.up(), 2).item()
    adam = torch.optim.Adam([rounding.v], 0.02)
    for step in range(300):
        loss = undecided(rounding.up(), 20 - 18 * step / 300)
        adam.zero_grad()
        loss.backward()
        adam.step()
    up = rounding.up()
    assert start > 10
    assert ((up < 0.01) | (up > 0.99)).all()
    assert undecided(up, 2) < 0.1
    torch.testing.assert_close(rounding.at(up), rounding.hard(), rtol=0, atol=0.02)


@pytest.mark.parametrize("axis", [None, -1])
def test_learned_scales_have_the_gradient_of_lsq(axis):
    x = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    low, high = (-torch.ones(4), torch.ones(4) * 2) if axis else (-torch.ones(()), torch.ones(()))
    quantizer = AffineQuantizer.from_range(low, high, bits=3, symmetric=False, axis=axis)
    learned = LearnedScale(quantizer)
    x.requires_grad_()
    out = learned(x)
    torch.testing.assert_close(out.detach(), quantizer(x).detach())
    weights = torch.randn(5, 4)
    (out * weights).sum().backward()
    v = (x / quantizer.scale).detach()
    ends = 0 - quantizer.zero_point, 7 - quantizer.zero_point
    inside = (v >= ends[0]) & (v <= ends[1])
    by_scale = torch.where(inside, v.round() - v, v.clamp(*ends))
    by_scale = (weights * by_scale).sum(() if axis is None else 0) * quantizer.scale
    torch.testing.assert_close(learned.t.grad, by_scale.view_as(learned.t))
    torch.testing.assert_close(x.grad, weights * inside)


def test_kept_entries_pass_and_leave_the_scale_alone():
    x = 3 * torch.randn(5, 4)
    quantizer = AffineQuantizer.from_range(-torch.ones(()), torch.ones(()), bits=3, symmetric=False)
    learned = LearnedScale(quantizer)
    x.requires_grad_()
    keep = random_keep(x, 0.5, torch.Generator().manual_seed(0))
    out = learned(x, keep)
    torch.testing.assert_close(out, torch.where(keep > 0, x, quantizer(x)))
    (out * keep).sum().backward()
    assert learned.t.grad == 0
    torch.testing.assert_close(x.grad, keep)


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_entries_are_kept_with_the_probability(probability):
    keep = random_keep(torch.empty(100, 103), probability, torch.Generator().manual_seed(0))
    assert ((keep == 0) | (keep == 1)).all()
    assert keep.mean().item() == pytest.approx(probability, abs=0.02)
