"""Laws of the quantizers: idempotent, monotone, zero exact, codes in range, straight-through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quietvit import QuietvitError
from quietvit.quantization import AffineQuantizer, Quantizer
from quietvit.quantization.quantizers import QUANTIZERS, build_quantizer

BITS = [2, 3, 4, 6, 8, 12, 16]
CASES = [(bits, symmetric) for bits in BITS for symmetric in (False, True)]


def fitted(x: torch.Tensor, bits: int, symmetric: bool, axis: int | None = None) -> AffineQuantizer:
    dims = list(range(x.dim())) if axis is None else [d for d in range(x.dim()) if d != axis]
    return AffineQuantizer.from_range(
        x.amin(dims), x.amax(dims), bits=bits, symmetric=symmetric, axis=axis
    )


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_idempotent_bit_for_bit(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(64, 64) * torch.logspace(-3, 3, 64)).to(dtype)
    for axis in (None, 1):
        quantizer = fitted(x.float(), bits, symmetric, axis)
        once = quantizer(x)
        assert once.dtype == dtype
        assert torch.equal(quantizer(once), once)


@settings(max_examples=200, deadline=None)
@given(
    low=st.floats(-(2.0**100), 2.0**100, width=32),
    width=st.floats(0, 2.0**100, width=32),
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    probe=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
)
def test_laws_on_any_range(
    low: float, width: float, bits: int, symmetric: bool, probe: list[float]
) -> None:
    minimum, maximum = torch.tensor(low), torch.tensor(low) + width
    quantizer = AffineQuantizer.from_range(minimum, maximum, bits=bits, symmetric=symmetric)
    x = torch.tensor([*probe, low, low + width, 0.0]).sort().values
    fake = quantizer(x)
    assert torch.isfinite(fake).all()
    assert torch.equal(quantizer(fake), fake)
    assert (fake.diff() >= 0).all()
    codes = quantizer.codes(x)
    assert codes.min() >= quantizer.code_range[0]
    assert codes.max() <= quantizer.code_range[1]
    assert torch.equal(quantizer.dequantize(codes), fake)
    assert quantizer(torch.zeros(())) == 0


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_error_is_half_a_step_inside_the_range(bits: int, symmetric: bool) -> None:
    x = torch.randn(10_000).double()
    quantizer = fitted(x.float(), bits, symmetric)
    worst = (quantizer(x) - x).abs().max() / quantizer.scale.double()
    # rounding the zero point may move each end of the range by half a step more
    assert worst <= (0.5 if symmetric else 1.0) + 1e-3


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_per_channel_is_the_tensor_law_on_each_channel(bits: int, symmetric: bool) -> None:
    x = torch.randn(5, 7, 3) * torch.tensor([1e-3, 1.0, 50.0])
    whole = fitted(x, bits, symmetric, axis=2)
    for channel in range(3):
        # signedness is one decision for the tensor; here every channel has negative values
        own = fitted(x[..., channel], bits, symmetric)
        assert torch.equal(whole(x)[..., channel], own(x[..., channel]))
    assert torch.equal(whole.dequantize(whole.codes(x)), whole(x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_straight_through_gradient(symmetric: bool) -> None:
    quantizer = AffineQuantizer.from_range(
        torch.tensor(-1.0), torch.tensor(2.0), bits=4, symmetric=symmetric
    )
    low, high = quantizer(torch.tensor([-100.0, 100.0]))
    x = torch.linspace(-4, 4, 1001, requires_grad=True)
    fake = quantizer(x)
    with torch.no_grad():
        assert torch.equal(fake, quantizer(x))
    (gradient,) = torch.autograd.grad(fake.sum(), x)
    inside = (x > low) & (x < high)
    torch.testing.assert_close(gradient, inside.float(), rtol=1e-6, atol=1e-6)


def test_gradient_of_the_scale_is_that_of_lsq() -> None:
    quantizer = AffineQuantizer.from_range(
        torch.tensor(-1.0), torch.tensor(1.0), bits=3, symmetric=True
    )
    quantizer.scale.requires_grad_()
    x = torch.randn(500)
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), quantizer.scale)
    steps = x / quantizer.scale.detach()
    clipped = steps.clamp(-4, 3)
    expected = torch.where(clipped == steps, steps.round() - steps, clipped).sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)


def test_symmetric_without_negatives_uses_every_code() -> None:
    x = torch.rand(1000)
    quantizer = fitted(x, 4, True)
    assert quantizer.code_range == (0, 15)
    assert set(quantizer.codes(x).tolist()) == set(range(16))


@pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-38])
def test_constant_tensors_survive(value: float) -> None:
    x = torch.full((8,), value)
    for symmetric in (False, True):
        torch.testing.assert_close(fitted(x, 8, symmetric)(x), x, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bits", [1, 0, 17, -8, True, 8.0, "8"])
def test_bits_outside_2_to_16_are_refused(bits: object) -> None:
    with pytest.raises(QuietvitError, match="2 to 16"):
        AffineQuantizer(torch.ones(()), torch.zeros(()), bits=bits, signed=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (1.0, 0.0)])
def test_ranges_that_are_none_are_refused(low: float, high: float) -> None:
    with pytest.raises(QuietvitError, match="range"):
        AffineQuantizer.from_range(torch.tensor(low), torch.tensor(high), bits=8, symmetric=False)


def test_another_tensors_channels_are_refused() -> None:
    quantizer = fitted(torch.randn(4, 6), 8, False, axis=1)
    with pytest.raises(QuietvitError, match="6 channels on axis 1"):
        quantizer(torch.randn(4, 5))


@pytest.mark.parametrize("axis", [None, 0])
def test_config_and_buffers_rebuild_a_quantizer(axis: int | None) -> None:
    x = torch.randn(4, 9)
    quantizer = fitted(x, 5, False, axis)
    other = build_quantizer(quantizer.kind, quantizer.config())
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))


def test_registered_quantizers_are_quantizers() -> None:
    assert QUANTIZERS["affine"] is AffineQuantizer
    assert all(issubclass(cls, Quantizer) and cls.kind == n for n, cls in QUANTIZERS.items())
    with pytest.raises(QuietvitError, match="did you mean 'affine'"):
        build_quantizer("afine", {})
