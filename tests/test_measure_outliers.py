from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quietvit.errors import QuietvitError
from quietvit.measure.outliers import PERCENTILE_ACCURACY, RunningStatistics


def measured(x, parts=1, axes=(-1,)):
    running = RunningStatistics(axes)
    first = 0
    for part in x.tensor_split(parts):
        running.update(part, images=len(part), first_image=first)
        first += len(part)
    return running.finish("a", "input", "other")


def plain_kurtosis(x):
    d = x.double() - x.double().mean()
    return float((d**4).mean() / (d**2).mean() ** 2)


def test_every_number_agrees_with_its_definition():
    x = torch.randn(24, 5, 300, dtype=torch.float64) * torch.linspace(0.1, 3, 300) + 0.3
    x[17, 2, 250] = -40
    s = measured(x.float(), parts=5)
    x = x.float().double()
    energy = x.square().sum((0, 1))
    assert s.count == x.numel()
    assert s.max == 40
    assert s.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-12)
    assert s.max_over_rms == pytest.approx(s.max / s.rms)
    assert s.kurtosis == pytest.approx(plain_kurtosis(x), rel=1e-10)
    assert (s.channels, s.top_channels) == (300, 4)
    assert s.top_share == pytest.approx(float(energy.topk(4).values.sum() / energy.sum()))
    assert (s.worst_channel, s.worst_value, s.worst_image) == (250, -40, 17)
    assert s.worst_index[1:] == (2, 250)
    assert s.channel_max == pytest.approx(x.abs().amax((0, 1)).tolist())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    parts=st.integers(1, 7),
    scale=st.floats(1e-6, 1e6),
    mean=st.floats(-100, 100),
)
def test_splitting_the_stream_changes_nothing(seed, parts, scale, mean):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(14, 3, 8, generator=generator, dtype=torch.float64) ** 3 + mean) * scale
    whole, split = measured(x), measured(x, parts)
    assert split.max == whole.max
    assert split.worst_image == whole.worst_image
    assert split.worst_channel == whole.worst_channel
    assert split.percentile_ratio == whole.percentile_ratio
    for name in ("rms", "kurtosis", "top_share"):
        assert getattr(split, name) == pytest.approx(getattr(whole, name), rel=1e-8)
    assert whole.kurtosis == pytest.approx(plain_kurtosis(x), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.floats(0.01, 1.0), exponent=st.integers(-30, 30))
def test_quantiles_keep_the_stated_accuracy(seed, p, exponent):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 997, generator=generator) * 10.0**exponent
    running = RunningStatistics()
    for part in x.split(3):
        running.update(part)
    exact = float(x.abs().flatten().kthvalue(max(1, math.ceil(p * x.numel()))).values)
    assert running.quantile(p) == pytest.approx(exact, rel=PERCENTILE_ACCURACY)


def test_ratios_do_not_depend_on_the_unit():
    x = torch.randn(8, 4, 64) ** 3
    a, b = measured(x), measured(x * 2.0**20)
    for name in ("max_over_rms", "kurtosis", "percentile_ratio", "top_share"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9)


def test_a_gaussian_has_kurtosis_three_and_spread_energy():
    s = measured(torch.randn(100, 50, 64))
    assert s.kurtosis == pytest.approx(3, abs=0.05)
    assert s.top_share == pytest.approx(4 / 64, abs=0.003)


def test_one_percent_of_many_channels():
    assert measured(torch.randn(2, 1000)).top_channels == 10
    assert measured(torch.randn(2, 3)).top_channels == 3


def test_channels_made_of_two_axes():
    x = torch.zeros(2, 3, 5, 7)
    x[1, 2, 4, 6] = 9
    s = measured(x, axes=(1, -1))
    assert (s.channels, s.worst_channel) == (21, 2 * 7 + 6)
    keys = measured(x, axes=(1, -2))
    assert (keys.channels, keys.worst_channel) == (15, 2 * 5 + 4)
    assert keys.channel_max[14] == 9
    reverse = measured(x, axes=(-1, 1))
    assert reverse.worst_channel == 6 * 3 + 2
    assert reverse.channel_max[20] == 9


def test_state_does_not_grow_with_the_number_of_images():
    def size(running):
        return sum(v.numel() for v in vars(running).values() if isinstance(v, torch.Tensor))

    running = RunningStatistics()
    running.update(torch.randn(4, 9, 16))
    before = size(running)
    for _ in range(20):
        running.update(torch.randn(4, 9, 16))
    assert size(running) == before


def test_zeros_are_no_division_by_zero():
    s = measured(torch.zeros(2, 4, 8))
    assert (s.max, s.rms, s.max_over_rms, s.percentile_ratio) == (0, 0, 0, math.inf)
    assert math.isnan(s.kurtosis)
    assert s.top_share == 0.5


def test_half_precision_does_not_overflow():
    s = measured(torch.full((64, 64), 60000.0, dtype=torch.float16))
    assert s.rms == s.max == pytest.approx(60000, rel=1e-3)


def test_nothing_seen_is_an_error():
    with pytest.raises(QuietvitError, match="nothing reached input of site a"):
        RunningStatistics().finish("a", "input", "other")
    with pytest.raises(QuietvitError, match="no quantile"):
        RunningStatistics().quantile(0.5)


def test_channels_of_another_size_are_refused():
    running = RunningStatistics()
    running.update(torch.randn(2, 8))
    with pytest.raises(QuietvitError, match="this batch has 9 channels, earlier ones had 8"):
        running.update(torch.randn(2, 9))
