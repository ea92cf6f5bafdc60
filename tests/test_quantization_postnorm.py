"""Percentile ranges of least error, and the way from a step a channel to one for all."""

from __future__ import annotations

import pytest
import torch

from quietvit.errors import QuietvitError
from quietvit.quantization.fitting.postnorm import (
    BLOCK,
    PERCENTILES,
    ChannelSteps,
    layerwise,
    percentile_range,
    quantiles,
)
from quietvit.quantization.methods.dopq_vit import DopQViT
from quietvit.quantization.methods.repq_vit import RepQViT
from quietvit.quantization.nonuniform import squared_error
from quietvit.quantization.quantizers import AffineQuantizer


def rows_of(values=5000):
    """Channels of very different widths and offsets, two of them constant, one all zero."""
    generator = torch.Generator().manual_seed(5)
    widths = torch.logspace(-2, 2, 12)[:, None]
    rows = torch.randn(12, values, generator=generator) * widths
    rows += torch.linspace(-30, 30, 12)[:, None]
    rows[4], rows[7] = 2.5, 0.0
    return rows


# Ranges.


@pytest.mark.parametrize("values", [1, 2, 3, 999, 1000, 1001, 5000])
def test_quantiles_are_those_of_torch(values):
    rows = torch.randn(3, values, dtype=torch.float64)
    for (low, high), p in zip(quantiles(rows), PERCENTILES, strict=True):
        torch.testing.assert_close(low, rows.quantile(1 - p, dim=1))
        torch.testing.assert_close(high, rows.quantile(p, dim=1))


def test_long_rows_are_looked_at_in_parts_and_give_the_same():
    row = torch.randn(1, 3 * BLOCK + 17)
    (low, high), *_ = quantiles(row)
    order = row.sort().values[0].double()
    place = 0.999 * (row.shape[1] - 1)
    wanted = order[int(place)].lerp(order[int(place) + 1], place - int(place))
    assert float(high) == pytest.approx(float(wanted), rel=1e-5)
    assert -2.5 > float(low) > -3.5


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_candidate_of_least_error_is_taken_for_each_channel(bits):
    rows = torch.randn(6, 4000)
    rows[1, 0], rows[2, :3], rows[3, :40] = 30, 9, 6
    low, high = percentile_range(rows, bits, axis=0)
    for channel in range(6):
        errors = {}
        for p in PERCENTILES:
            row = rows[channel].double()
            ends = row.quantile(1 - p).float(), row.quantile(p).float()
            quantizer = AffineQuantizer.from_range(*ends, bits=bits, symmetric=False)
            errors[ends] = float(squared_error(quantizer, rows[channel]))
        wanted = min(errors, key=lambda ends: errors[ends])
        torch.testing.assert_close(torch.stack(wanted), torch.stack((low, high))[:, channel])
    assert percentile_range(rows, bits)[0].shape == ()


def test_ranges_hold_zero_only_where_asked():
    x = torch.rand(4, 500) + 3
    assert percentile_range(x, 4)[0] == 0
    low, high = percentile_range(x, 4, hold_zero=False)
    assert 3 <= low < high <= 4
    assert percentile_range(-x, 4)[1] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_ranges_of_what_is_not_finite_are_refused(bad):
    x = torch.randn(3, 5000)
    x[1, 7] = bad
    with pytest.raises(QuietvitError, match="NaN or inf"):
        percentile_range(x, 8, axis=0)


def test_a_spike_in_a_constant_channel_is_not_taken_for_a_constant():
    rows = torch.full((1, 5000), 2.0)
    rows[0, 0] = 50.0
    low, high = percentile_range(rows, 4, axis=0, hold_zero=False)
    assert high - low > 10


# From a quantizer for each channel to one for all.


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("centre", [torch.mean, torch.median])
def test_the_layer_wise_codes_are_the_channel_wise_ones(bits, centre):
    rows = rows_of().double()
    steps = ChannelSteps.of(*percentile_range(rows, bits, axis=0, hold_zero=False), bits)
    moved = layerwise(steps, scale_centre=centre, zero_centre=centre)
    own = torch.round(rows / steps.scale[:, None]) + steps.zero_point[:, None]
    own = own.clamp(0, (1 << bits) - 1)[~steps.constant]
    joint = moved.quantizer.codes(moved.gain[:, None] * rows + moved.shift[:, None])
    assert float((joint[~steps.constant] != own).double().mean()) < 1e-4
    assert own.unique().numel() > 0.9 * (1 << bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_channels_are_exact_and_take_no_part_in_the_centres(bits):
    rows = rows_of()
    low, high = percentile_range(rows, bits, axis=0, hold_zero=False)
    steps = ChannelSteps.of(low, high, bits)
    assert steps.constant.nonzero()[:, 0].tolist() == [4, 7]
    moved = layerwise(steps)
    scales = steps.scale[~steps.constant]
    torch.testing.assert_close(moved.quantizer.scale.double(), scales.mean())
    assert moved.gain[4] == moved.gain[7] == moved.quantizer.scale / scales.median()
    back = moved.quantizer(moved.gain[:, None] * rows.double() + moved.shift[:, None])
    back = (back - moved.shift[:, None]) / moved.gain[:, None]
    torch.testing.assert_close(back[[4, 7]], rows[[4, 7]].double(), rtol=1e-12, atol=0)


def test_channels_that_are_all_constant_stay_so():
    value = torch.tensor([1.5, 0.0, -1e-30])
    moved = layerwise(ChannelSteps.of(value, value, 4))
    assert torch.equal(moved.gain, torch.ones(3, dtype=torch.float64))
    assert torch.equal(moved.shift, -value.double())
    assert moved.quantizer.scale == 1


def test_the_scale_of_the_layer_cancels():
    """Why the median of the scales alone changes nothing where weights follow the channels."""
    rows, weight = rows_of().double(), torch.randn(8, 12, dtype=torch.float64)
    steps = ChannelSteps.of(*percentile_range(rows, 4, axis=0, hold_zero=False), 4)
    products = []
    for centre in (torch.mean, torch.median):
        moved = layerwise(steps, scale_centre=centre)
        x = moved.quantizer(moved.gain[:, None] * rows + moved.shift[:, None])
        scaled = weight / moved.gain
        low, high = percentile_range(scaled, 4, axis=0)
        fake = AffineQuantizer.from_range(low, high, bits=4, symmetric=False, axis=0)(scaled)
        products.append(fake @ x - scaled @ moved.shift[:, None])
    means, medians = products
    assert steps.scale.mean() > 1.5 * steps.scale.median()
    torch.testing.assert_close(means, medians, rtol=1e-4, atol=1e-4)


def test_zero_points_stay_among_the_codes():
    low = torch.tensor([100.0, 200.0, -1.0])
    moved = layerwise(ChannelSteps.of(low, low + 1, 4))
    assert moved.quantizer.zero_point == 0


def test_median_scales_are_the_median():
    rows = rows_of()
    steps = ChannelSteps.of(*percentile_range(rows, 4, axis=0, hold_zero=False), 4)
    scales = steps.scale[~steps.constant]
    moved = DopQViT().layerwise(steps)
    torch.testing.assert_close(moved.quantizer.scale.double(), scales.quantile(0.5))
    assert RepQViT().layerwise(steps).quantizer.scale > moved.quantizer.scale
