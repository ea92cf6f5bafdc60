"""Laws of every registered quantizer, and of the logarithmic, two-range and tangent ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quietvit import QuietvitError
from quietvit.quantization import (
    AffineQuantizer,
    LogQuantizer,
    Quantizer,
    TanQuantizer,
    TwinQuantizer,
)
from quietvit.quantization.floating import FloatingQuantizer
from quietvit.quantization.nonuniform import (
    GELU_SHIFT,
    LevelQuantizer,
    positive_scalar,
    power_of_two_factor,
    squared_error,
)
from quietvit.quantization.quantizers import QUANTIZERS, build_quantizer

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Make = Callable[[Tensor, int], Quantizer]


def affine(scale: Tensor, bits: int) -> AffineQuantizer:
    return AffineQuantizer.from_range(-scale / 3, scale, bits=bits, symmetric=False)


def unsigned_twin(scale: Tensor, bits: int) -> TwinQuantizer:
    return TwinQuantizer(scale / 2**bits / 16, scale / 2**bits, bits=bits, signed=False)


# By name: a quantizer for values up to about ``scale``, and whether it promises zero exact.
MAKE: dict[str, tuple[Make, bool]] = {
    "affine": (affine, True),
    "log base2": (lambda scale, bits: LogQuantizer.base2(scale, bits=bits), True),
    "log sqrt2": (lambda scale, bits: LogQuantizer.sqrt2(scale, bits=bits), True),
    "log sqrt2 last": (lambda s, bits: LogQuantizer.sqrt2(s, bits=bits, zero="last"), True),
    "log adalog": (lambda scale, bits: LogQuantizer.adalog(scale, 23, bits=bits), True),
    "log fine": (lambda scale, bits: LogQuantizer.adalog(scale, 1, bits=bits), True),
    "log shifted": (lambda s, b: LogQuantizer.adalog(s, 23, bits=b, shift=GELU_SHIFT), False),
    "twin unsigned": (unsigned_twin, True),
    "twin signed": (lambda scale, bits: TwinQuantizer.gelu(scale / 2**bits, bits=bits), True),
    "tan": (lambda scale, bits: TanQuantizer(scale, torch.tensor(1.2), bits=bits), True),
    "tan steep": (lambda scale, bits: TanQuantizer(scale, torch.tensor(1.5), bits=bits), True),
}
PREFIXES = {name.split()[0] for name in MAKE}
every = pytest.mark.parametrize("name", MAKE)


def make(name: str, scale: float, bits: int) -> Quantizer:
    return MAKE[name][0](torch.tensor(scale), bits)


def probes(scale: float, *more: float) -> Tensor:
    spread = torch.randn(2000) * torch.logspace(-6, 0.5, 2000) * scale
    return torch.cat((spread, torch.tensor([0.0, scale, -scale, *more]))).sort().values


def check_laws(quantizer: Quantizer, x: Tensor, zero_exact: bool) -> None:
    """``x`` ascending."""
    fake = quantizer(x)
    assert fake.dtype == x.dtype
    assert fake.shape == x.shape
    assert torch.isfinite(fake).all()
    assert torch.equal(quantizer(fake), fake)
    assert (fake.diff() >= 0).all()
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int32
    low, high = quantizer.code_range
    assert codes.min() >= low
    assert codes.max() <= high
    steps = codes.diff()
    assert (steps >= 0).all() or (steps <= 0).all()
    assert torch.equal(quantizer.dequantize(codes, x.dtype), fake)
    if zero_exact:
        assert quantizer(x.new_zeros(())) == 0


def test_every_quantizer_of_the_library_is_in_this_file() -> None:
    """Those of floating-point formats are in test_quantization_floating.py."""
    own = {
        kind
        for kind, cls in QUANTIZERS.items()
        if cls.__module__.startswith("quietvit.") and not issubclass(cls, FloatingQuantizer)
    }
    assert own == PREFIXES == {make(name, 1.0, 4).kind for name in MAKE}


@every
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_laws(name: str, bits: int, dtype: torch.dtype) -> None:
    for scale in (1.0, 0.37, 11.0):
        check_laws(make(name, scale, bits), probes(scale).to(dtype), MAKE[name][1])


@every
def test_laws_at_16_bits(name: str) -> None:
    check_laws(make(name, 1.0, 16), probes(1.0), MAKE[name][1])


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(MAKE)),
    scale=st.floats(0, 2.0**60, width=32),
    bits=st.integers(2, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    probe=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
)
def test_laws_on_any_scale(
    name: str, scale: float, bits: int, dtype: torch.dtype, probe: list[float]
) -> None:
    check_laws(make(name, scale, bits), probes(scale, *probe).to(dtype), MAKE[name][1])


@settings(max_examples=150, deadline=None)
@given(numerator=st.integers(1, 120), exponent=st.integers(-12, 3), bits=st.integers(2, 8))
def test_half_precision_levels_in_one_place_stay_idempotent(
    numerator: int, exponent: int, bits: int
) -> None:
    # Subtracting the shift leaves few digits near the lower end, subnormals few near zero: there
    # many levels round to few values.
    for shift in (0.0, GELU_SHIFT):
        scale = torch.tensor(2.0**exponent)
        quantizer = LogQuantizer.adalog(scale, numerator, bits=bits, shift=shift)
        for dtype in (torch.float16, torch.bfloat16):
            near = torch.logspace(-8, 0, 500).mul(scale).sub(shift).to(dtype)
            check_laws(quantizer, near.sort().values, zero_exact=False)


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_straight_through_gradient(name: str, dtype: torch.dtype) -> None:
    quantizer = make(name, 1.0, 4)
    low, high = quantizer(torch.tensor([-100.0, 100.0], dtype=dtype))
    x = torch.linspace(-3, 3, 1001).to(dtype).requires_grad_()
    fake = quantizer(x)
    with torch.no_grad():
        assert torch.equal(fake, quantizer(x))
    (gradient,) = torch.autograd.grad(fake.sum(), x)
    clear = ((x - low).abs() > 0.01) & ((x - high).abs() > 0.01)
    inside = (x > low) & (x < high)
    torch.testing.assert_close(gradient[clear], inside[clear].to(dtype), rtol=1e-2, atol=1e-6)
    assert inside.any()
    assert not inside.all()


@every
def test_config_and_buffers_rebuild_a_quantizer(name: str) -> None:
    quantizer = make(name, 0.73, 5)
    other = build_quantizer(quantizer.kind, quantizer.config())
    other.load_state_dict(quantizer.state_dict())
    x = probes(0.73)
    assert torch.equal(other(x), quantizer(x))
    assert torch.equal(other.codes(x), quantizer.codes(x))
    assert repr(other) == repr(quantizer)
    assert "5 bits" in repr(quantizer)


@every
def test_odd_inputs(name: str) -> None:
    quantizer = make(name, 1.0, 4)
    for shape in ((), (1,), (0,), (2, 0, 3), (1, 1, 1)):
        assert quantizer(torch.zeros(shape)).shape == quantizer.codes(torch.zeros(shape)).shape
    x = torch.rand(4, 5, 6)
    assert torch.equal(quantizer(x.transpose(0, 2)), quantizer(x).transpose(0, 2))
    before = x.clone()
    quantizer(x), quantizer.codes(x)
    assert torch.equal(x, before)
    ends = quantizer(torch.tensor([-torch.inf, torch.inf, torch.nan]))
    assert torch.equal(ends[:2], quantizer(torch.tensor([-1e6, 1e6])))
    assert ends[2].isnan()


@every
def test_scale_zero_stands_for_a_tensor_of_zeros(name: str) -> None:
    fake = make(name, 0.0, 4)(torch.zeros(7))
    if MAKE[name][1]:
        assert (fake == 0).all()
    assert torch.isfinite(fake).all()


@every
def test_output_range(name: str) -> None:
    quantizer = make(name, 1.0, 4)
    if isinstance(quantizer, LevelQuantizer):
        fake = quantizer(probes(100.0))
        assert fake.min() == quantizer.lower
        assert fake.max() == quantizer.upper
        assert quantizer.deployable is False


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", ["extra", "last"])
def test_base_2_gives_powers_of_two_and_one_zero(bits: int, zero: str) -> None:
    scale = 0.75
    quantizer = LogQuantizer.base2(torch.tensor(scale), bits=bits, zero=zero)  # type: ignore[arg-type]
    nonzero = 2**bits if zero == "extra" else 2**bits - 1
    values = quantizer.dequantize(torch.arange(nonzero + 1, dtype=torch.int32), torch.float64)
    assert values.tolist() == [scale * 2.0**-q for q in range(nonzero)] + [0.0]
    assert quantizer.code_range == (0, nonzero)


def test_log_codes_are_those_of_the_papers() -> None:
    x = torch.rand(5000, dtype=torch.float64).pow(6)
    for q, d, octaves in ((1, 1, 1.0), (1, 2, 0.5), (23, 37, 23 / 37)):
        quantizer = LogQuantizer(torch.tensor(0.5), q, d, bits=4)
        codes = torch.round(-torch.log2(x / 0.5) / octaves)
        assert torch.equal(quantizer.codes(x), codes.clamp(0, 16).int())
        values = torch.where(codes < 16, 0.5 * 2 ** (-codes.clamp(min=0) * octaves), 0)
        torch.testing.assert_close(quantizer(x), values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("zero", ["extra", "last"])
@pytest.mark.parametrize("denominator", [1, 2])
def test_codes_from_exponents_are_those_from_logarithms(
    bits: int, zero: str, denominator: int
) -> None:
    x = torch.cat((torch.logspace(-30, 2, 20_000), torch.linspace(-1, 1, 1001)))
    quantizer = LogQuantizer(
        torch.tensor(0.37),
        1,
        denominator,
        bits=bits,
        zero=zero,  # type: ignore[arg-type]
    )
    places = -(x.double() / quantizer.scale).clamp(min=0).log2() * denominator
    clear = ((places - places.floor()) - 0.5).abs() > 1e-4
    assert clear.sum() > 15_000
    assert torch.equal(quantizer.codes(x)[clear], quantizer.codes(x.double())[clear])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_levels_that_left_their_cell_are_settled(dtype: torch.dtype) -> None:
    every_value = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    x = every_value[every_value.isfinite() & (every_value.abs() < 64)].sort().values
    moved = 0
    for quantizer in (
        LogQuantizer.adalog(torch.tensor(0.0095), 118, bits=6, shift=GELU_SHIFT),
        LogQuantizer.adalog(torch.tensor(0.0119), 37, bits=2, shift=GELU_SHIFT),
        TanQuantizer(torch.tensor(0.0078), torch.tensor(0.7208), bits=7),
    ):
        check_laws(quantizer, x, zero_exact=False)
        unsettled = quantizer._levels().to(dtype)
        moved += int((quantizer.dequantize(quantizer.codes(unsettled), dtype) != unsettled).sum())
    assert moved > 0


def test_sqrt2_has_the_values_repq_vit_writes_down() -> None:
    q = torch.arange(16)
    written = 0.9 * 2.0 ** -torch.ceil(q / 2) * (1 + (math.sqrt(2) - 1) * (q % 2))
    values = LogQuantizer.sqrt2(torch.tensor(0.9), bits=4).dequantize(q)
    torch.testing.assert_close(values, written, rtol=1e-6, atol=0)


def test_adalog_of_37_is_base_2_and_negatives_become_zero() -> None:
    x = probes(1.0)
    scale = torch.ones(())
    assert torch.equal(
        LogQuantizer.adalog(scale, 37, bits=4)(x), LogQuantizer.base2(scale, bits=4)(x)
    )
    assert (LogQuantizer.adalog(scale, 20, bits=4)(x[x < 0]) == 0).all()


def test_shift_moves_input_and_output() -> None:
    x = torch.nn.functional.gelu(torch.randn(1000, dtype=torch.float64) * 2)
    scale = torch.tensor(4.0)
    shifted = LogQuantizer.adalog(scale, 15, bits=6, shift=GELU_SHIFT)
    plain = LogQuantizer.adalog(scale, 15, bits=6)
    torch.testing.assert_close(shifted(x), plain(x + GELU_SHIFT) - GELU_SHIFT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_twin_of_equal_steps_is_uniform(bits: int) -> None:
    x = probes(1.0, 5.0, -5.0)
    step = torch.tensor(0.043)
    zero = torch.zeros((), dtype=torch.int32)
    twin = TwinQuantizer(step, step, bits=bits, signed=True)
    uniform = AffineQuantizer(step, zero, bits=bits, signed=True)
    assert torch.equal(twin.codes(x), uniform.codes(x))
    torch.testing.assert_close(twin(x), uniform(x), rtol=1e-6, atol=0)
    half = TwinQuantizer.softmax(1.0, bits=bits)
    if bits > 2:
        uniform = AffineQuantizer(half.low_step, zero, bits=bits - 1, signed=False)
        torch.testing.assert_close(half(x), uniform(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("i", range(8))
def test_unsigned_twin_takes_the_nearest_level_of_both_ranges(bits: int, i: int) -> None:
    half = 2 ** (bits - 1)
    steps = torch.arange(half, dtype=torch.float64) / (half - 1)
    levels = torch.cat((steps * 2.0**-i, steps))
    x = torch.rand(4000, dtype=torch.float64).pow(3)
    nearest = (x[:, None] - levels).abs().amin(1)
    found = (TwinQuantizer.softmax(2.0**-i, bits=bits)(x) - x).abs()
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)


def test_gelu_twin_covers_gelu_with_the_sign_as_flag() -> None:
    x = torch.nn.functional.gelu(torch.linspace(-6, 3, 5000))
    quantizer = TwinQuantizer.gelu(torch.tensor(3 / 7), bits=4)
    codes = quantizer.codes(x)
    assert codes.min() == -8
    assert codes.max() == 7
    assert ((quantizer(x) - x)[x < 0].abs() <= GELU_SHIFT / 16 + 1e-5).all()


def test_tangent_tends_to_uniform_as_the_curvature_vanishes() -> None:
    x = torch.rand(3000)
    zero = torch.zeros((), dtype=torch.int32)
    uniform = AffineQuantizer(torch.tensor(0.8 / 15), zero, bits=4, signed=False)
    errors = []
    for c in (1.0, 0.1, 0.01, 0.0):
        tangent = TanQuantizer(torch.tensor(0.8), torch.tensor(c), bits=4)
        q = torch.arange(16)
        errors.append(float((tangent.dequantize(q) - uniform.dequantize(q)).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    torch.testing.assert_close(tangent(x), uniform(x), rtol=1e-5, atol=1e-6)


def test_tangent_follows_its_formula_and_meets_both_ends() -> None:
    s, c, n = 0.8, 1.2, 15
    x = torch.rand(3000, dtype=torch.float64) * s
    quantizer = TanQuantizer(torch.tensor(s), torch.tensor(c), bits=4)
    t = torch.tan(c * (2 * x / s - 1)) / math.tan(c)
    q = torch.round(n * (1 + t) / 2)
    torch.testing.assert_close(quantizer.codes(x), q.int())
    values = s * (1 + torch.atan((2 * q / n - 1) * math.tan(c)) / c) / 2
    torch.testing.assert_close(quantizer(x), values, rtol=1e-6, atol=1e-7)
    for curvature in torch.linspace(0, 1.57, 60):
        quantizer = TanQuantizer(torch.tensor(s), curvature, bits=4)
        assert quantizer.lower == 0
        assert quantizer.upper == quantizer.scale


def test_power_of_two_factor_is_fq_vits_formula() -> None:
    exponents = torch.tensor([0, 3, 1, 2])
    x = torch.randn(6, 4) * 2.0**exponents
    zero_point = torch.tensor(7, dtype=torch.int32)
    quantizer = power_of_two_factor(torch.tensor(0.2), zero_point, exponents, bits=4)
    steps = 0.2 * 2.0**exponents
    written = ((x / steps).round() + 7).clamp(0, 15).sub(7) * steps
    torch.testing.assert_close(quantizer(x), written)
    with pytest.raises(QuietvitError, match="exponents"):
        power_of_two_factor(torch.tensor(0.2), zero_point, torch.tensor([-1, 2]), bits=4)


def test_squared_error_counts_values() -> None:
    quantizer = LogQuantizer.base2(torch.ones(()), bits=4)
    x = torch.tensor([0.75, 0.3, 0.0])
    counts = torch.tensor([2.0, 3.0, 5.0])
    repeated = x.repeat_interleave(counts.long())
    torch.testing.assert_close(
        squared_error(quantizer, x, counts), squared_error(quantizer, repeated)
    )
    assert squared_error(quantizer, x).dtype == torch.float64


def test_what_makes_no_sense_is_refused() -> None:
    one = torch.ones(())
    for bad in (
        torch.tensor(-1.0),
        torch.tensor(torch.nan),
        torch.tensor(torch.inf),
        torch.ones(3),
    ):
        with pytest.raises(QuietvitError, match="finite number"):
            positive_scalar(bad, "scale")
    for q in (0, -3, 1.5):
        with pytest.raises(QuietvitError, match="whole numbers"):
            LogQuantizer.adalog(one, q, bits=4)  # type: ignore[arg-type]
    with pytest.raises(QuietvitError, match="write 12/8"):
        LogQuantizer(one, 3, 2, bits=4)
    with pytest.raises(QuietvitError, match="choose from extra, last"):
        LogQuantizer.base2(one, bits=4, zero="none")  # type: ignore[arg-type]
    with pytest.raises(QuietvitError, match="finer step"):
        TwinQuantizer(one, one / 2, bits=4, signed=False)
    with pytest.raises(QuietvitError, match="split"):
        TwinQuantizer.softmax(0.0, bits=4)
    for c in (-0.1, 1.6, math.nan):
        with pytest.raises(QuietvitError, match="curvature"):
            TanQuantizer(one, torch.tensor(c), bits=4)
