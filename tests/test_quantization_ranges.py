"""Laws of the range estimators: exact on little data, bounded on much, within min and max."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quietvit import QuietvitError
from quietvit.quantization.quantizers import AffineQuantizer
from quietvit.quantization.ranges import EXACT_VALUES, RANGES, OmseRange, make_range

SETTINGS = {"bits": 4, "symmetric": False}


def values(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return x * torch.tensor([0.01, 0.1, 1, 1, 1, 1, 3, 20.0]) + 0.3


def error(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool):
    axis = None if low.dim() == 0 else -1
    fake = AffineQuantizer.from_range(low, high, bits=bits, symmetric=symmetric, axis=axis)(x)
    return (fake - x).double().square().sum(0 if axis else None)


@pytest.mark.parametrize("axis", [None, -1])
def test_minmax_is_the_extremes(axis: int | None) -> None:
    x = values(1000)
    watched = make_range("minmax", axis=axis, **SETTINGS)
    for batch in x.split(300):
        watched.update(batch)
    low, high = watched.finish()
    expected = (x.min(), x.max()) if axis is None else (x.amin(0), x.amax(0))
    assert torch.equal(low, expected[0])
    assert torch.equal(high, expected[1])


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("name", RANGES)
def test_batches_and_their_order_do_not_matter(name: str, axis: int | None) -> None:
    x = values(20_000)
    found = []
    for batches in (x.split(7000), x.flip(0).split(911), (x,)):
        watched = make_range(name, axis=axis, percentile=0.999, **SETTINGS)
        for batch in batches:
            watched.update(batch)
        found.append(watched.finish())
    for low, high in found[1:]:
        assert torch.equal(low, found[0][0])
        assert torch.equal(high, found[0][1])


@pytest.mark.parametrize("count", [10, 4000, 50_000])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("percentile", [0.9, 0.999, 0.99999, 1.0])
def test_percentile_is_numpys(percentile: float, axis: int | None, count: int) -> None:
    x = values(count)
    watched = make_range("percentile", axis=axis, percentile=percentile, **SETTINGS)
    for batch in x.split(3000):
        watched.update(batch)
    low, high = watched.finish()
    over = None if axis is None else 0
    expected = np.quantile(x.double().numpy(), [1 - percentile, percentile], axis=over)
    exact = x.numel() <= EXACT_VALUES
    absmax = x.abs().amax() if axis is None else x.abs().amax(0)
    # between two extreme order statistics far apart a bin may shift the rank by one
    tail = np.sort(x.double().numpy(), axis=over)
    gaps = np.diff(tail.ravel() if axis is None else tail, axis=0)
    slack = absmax.double().numpy() * (1e-6 if exact else 1 / 2048)
    if not exact and percentile > 0.999:
        slack = slack + gaps.max(0)
    assert (np.abs(low.double().numpy() - expected[0]) <= slack).all()
    assert (np.abs(high.double().numpy() - expected[1]) <= slack).all()
    assert (low >= (x.min() if axis is None else x.amin(0))).all()
    assert (high <= (x.max() if axis is None else x.amax(0))).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [None, -1])
def test_omse_is_the_best_of_its_candidates(bits: int, symmetric: bool, axis: int | None) -> None:
    x = values(900)
    watched = OmseRange(bits, symmetric=symmetric, axis=axis)
    watched.update(x)
    low, high = watched.finish()
    minimum, maximum = (x.min(), x.max()) if axis is None else (x.amin(0), x.amax(0))
    candidates = torch.stack(
        [
            error(x, minimum * (1 - 0.01 * i), maximum * (1 - 0.01 * i), bits, symmetric)
            for i in range(90)
        ]
    )
    found = error(x, low, high, bits, symmetric)
    torch.testing.assert_close(found, candidates.amin(0), rtol=1e-4, atol=1e-12)
    assert (found <= candidates[0]).all()


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("axis", [None, -1])
def test_omse_of_a_stream_is_close_to_the_exact_one(bits: int, axis: int | None) -> None:
    x = values(60_000)
    errors = []
    for exact in (True, False):
        watched = OmseRange(bits, symmetric=False, axis=axis, exact=exact)
        for batch in x.split(5000):
            watched.update(batch)
        errors.append(error(x, *watched.finish(), bits, False))
    assert (errors[1] <= errors[0] * 1.01).all()


@pytest.mark.parametrize("axis", [None, -1])
def test_memory_does_not_grow_with_the_stream(axis: int | None) -> None:
    watched = OmseRange(4, symmetric=False, axis=axis)

    def held() -> int:
        tensors = [watched.stream.counts, *watched.stream.kept]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    sizes = []
    for step in range(30):
        watched.update(values(2000, seed=step) * 2**step)
        sizes.append(held())
    assert len(set(sizes[5:])) == 1
    assert watched.stream.counts is not None
    assert int(watched.stream.counts.sum()) == 30 * 2000 * 8


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [0.0, 5.0])
def test_all_constant_values_have_a_range(name: str, value: float) -> None:
    watched = make_range(name, **SETTINGS)
    for _ in range(3):
        watched.update(torch.full((20_000,), value))
    low, high = watched.finish()
    assert low <= high
    assert high == value


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    watched = make_range(name, **SETTINGS)
    with pytest.raises(QuietvitError, match="NaN or inf"):
        watched.update(torch.tensor([1.0, bad]))


def test_misuse_is_refused() -> None:
    with pytest.raises(QuietvitError, match="did you mean 'omse'"):
        make_range("omes", **SETTINGS)
    with pytest.raises(QuietvitError, match="before any value"):
        make_range("minmax", **SETTINGS).finish()
    with pytest.raises(QuietvitError, match="empty"):
        make_range("minmax", **SETTINGS).update(torch.zeros(0))
    watched = make_range("minmax", axis=-1, **SETTINGS)
    watched.update(torch.zeros(2, 3))
    with pytest.raises(QuietvitError, match="4 channels"):
        watched.update(torch.zeros(2, 4))
    with pytest.raises(QuietvitError, match="percentile"):
        make_range("percentile", percentile=0.2, **SETTINGS)
