"""HPTQ: power-of-two thresholds by every error measure, outlier filter, shift, bias correction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quietvit
import zoo
from quietvit.errors import QuietvitError
from quietvit.quantization.fitting import thresholds
from quietvit.quantization.fitting.thresholds import (
    ERRORS,
    Points,
    Statistics,
    search,
    without_outliers,
)
from quietvit.quantization.methods.hptq import HPTQ, mean_error
from quietvit.quantization.quantizers import AffineQuantizer


def points_of(x):
    """Points of one channel, as a stream collects them."""
    statistics = Statistics(channels=None)
    for part in x.split(1000):
        statistics.update(part)
    return statistics.points()


def quantized(model, images, **fields):
    return quietvit.quantize(model, HPTQ(**fields), images, progress=False)


def images_of(count=4, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def all_sixteen(**fields):
    bits = dict.fromkeys(("weight_bits", "activation_bits", "patch_embed_bits", "head_bits"), 16)
    return bits | fields


class Net(nn.Module):
    """Convolution, an activation, a second convolution with zero padding, a head."""

    def __init__(self, activation):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 6, 3), activation
        self.conv, self.head = nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.conv(self.act(self.stem(x))).mean((2, 3)))


# Thresholds.


@pytest.mark.parametrize("name", ["timm-vit", "timm-hybrid", "hf-detr"])
@pytest.mark.parametrize("bits", [3, 8])
def test_every_threshold_is_a_power_of_two_and_only_shifts_have_zero_points(name, bits):
    model, example = zoo.build(name)
    shape = (example["pixel_values"] if isinstance(example, dict) else example).shape[1:]
    images = torch.randn(3, *shape)
    method = HPTQ(weight_bits=bits, activation_bits=bits)
    whole = quietvit.quantize(model, method, images, example=example, progress=False)
    assert whole.coverage.quantized_macs == whole.trace.macs
    for slot in whole.slots():
        quantizer = whole.quantizer(slot.site.name, slot.operand)
        assert isinstance(quantizer, AffineQuantizer)
        mantissa, _ = torch.frexp(quantizer.scale)
        assert bool((mantissa == 0.5).all()), slot.key
        if slot.is_weight:
            assert quantizer.signed
            assert quantizer.axis == 0
            assert not quantizer.zero_point.any()
        elif quantizer.zero_point.any():
            assert not quantizer.signed
            assert slot.site.role == "post_gelu"


def brute_force(x, bits, signed, measure, candidates):
    """The candidate of least error on the values themselves, written down once more."""
    largest = float(x.abs().max())
    exponent = 1 + int(torch.tensor(largest).log2().ceil())
    best, found = float("inf"), None
    for i in range(candidates):
        t = max(2.0 ** (exponent - i), 2.0**-16)
        step = t / 2 ** (bits - signed)
        q = (x / step).round().clamp(-t / step * signed, t / step - 1) * step
        if measure == "noclip":
            error = float((x.abs() > t).sum())
        else:
            error = float(measure((q - x).double()).sum())
        if error <= best:
            best, found = error, t
    return found


MEASURES = {
    "mse": lambda off: off.square(),
    "mae": lambda off: off.abs(),
    "lp": lambda off: off.abs() ** 4,
    "noclip": "noclip",
}


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("error", MEASURES)
@pytest.mark.parametrize("spread", [0.003, 1.0, 300.0])
def test_the_search_finds_what_brute_force_finds(bits, error, spread):
    generator = torch.Generator().manual_seed(bits)
    for size in (200, 60_000):  # kept as they are; a histogram
        x = spread * torch.randn(size, generator=generator) ** 3
        for signed, values in ((True, x), (False, x.abs())):
            found = search(
                points_of(values), bits=bits, signed=signed, error=error, p=4.0, candidates=20
            )
            assert found.item() == brute_force(values, bits, signed, MEASURES[error], 20)


def test_each_channel_of_a_weight_is_searched_for_itself():
    weight = torch.randn(5, 4, 3, 3) * torch.tensor([1e-3, 0.1, 1.0, 8.0, 0.0]).view(-1, 1, 1, 1)
    found = search(Points.of(weight, 0), bits=4, signed=True, error="mse", candidates=10)
    for channel in range(4):
        expected = brute_force(weight[channel], 4, True, MEASURES["mse"], 10)
        assert found[channel].item() == expected
    assert found[4].item() == 2.0**-16


def test_error_measures_rank_thresholds_by_how_much_clipping_counts():
    x = torch.cat([torch.randn(60_000), torch.tensor([60.0])])
    found = {
        error: search(points_of(x), bits=4, signed=True, error=error, p=4.0, candidates=20).item()
        for error in ERRORS
    }
    assert found["noclip"] == 64.0
    assert found["mae"] <= found["mse"] < found["lp"] <= found["noclip"]
    assert found["kl"] <= 8.0


def test_kl_keeps_what_is_even_and_clips_tails():
    even = torch.linspace(-1, 1 - 2**-11, 4096)
    tails = torch.randn(100_000) ** 3
    found = [
        search(points_of(x), bits=4, signed=True, error="kl", candidates=20).item()
        for x in (even, tails)
    ]
    assert found[0] >= 1.0
    assert 1.0 < found[1] < tails.abs().max().item() / 2


def test_an_unknown_error_measure_is_named():
    with pytest.raises(QuietvitError, match="mse"):
        search(points_of(torch.ones(3)), bits=8, signed=False, error="msee")
    with pytest.raises(QuietvitError, match="weight_error"):
        HPTQ(weight_error="msee")


def test_power_of_two_above_is_exact():
    x = torch.tensor([0.0, 2.0**-20, 2.0**-20 * 1.0000001, 0.5, 0.75, 1.0, 3.0, 4.0])
    expected = torch.tensor([0.0, 2.0**-20, 2.0**-19, 0.5, 1.0, 1.0, 4.0, 4.0])
    assert torch.equal(thresholds.power_of_two_above(x), expected)


# Outliers, means.


def test_the_outlier_filter_takes_out_what_is_z_deviations_away():
    x = torch.cat([torch.randn(50_000), torch.tensor([100.0, -300.0])])
    points = points_of(x)
    kept = without_outliers(points, 16.0)
    assert kept.counts.sum() == 50_000
    assert -6 < kept.minimum.item() < kept.maximum.item() < 6
    assert without_outliers(points, 1e6).counts.sum() == len(x)
    found = [
        search(p, bits=8, signed=True, error="noclip", candidates=20).item() for p in (points, kept)
    ]
    assert found == [512.0, 8.0 if kept.maximum.item() > 4 or kept.minimum.item() < -4 else 4.0]


def test_a_constant_has_no_outliers():
    points = points_of(torch.full((70_000,), 0.1))
    assert without_outliers(points, 1.5).counts.sum() == 70_000


def test_the_filter_changes_the_thresholds_of_a_model_with_outliers():
    model, images = Net(nn.ReLU()).eval(), images_of(16)
    images[0, 0, 0, 0] = 1000.0
    found = [
        quantized(model, images, z_threshold=z, activation_error="noclip")
        .quantizer("stem", "input")
        .scale.item()
        for z in (None, 8.0)
    ]
    assert found[1] < found[0] / 32


@pytest.mark.parametrize("z", [0.5, 1, True, "16", float("inf"), float("nan")])
def test_a_useless_z_threshold_is_refused(z):
    with pytest.raises(QuietvitError, match="z_threshold"):
        HPTQ(z_threshold=z)


def test_channel_means_do_not_depend_on_the_batches():
    x = torch.randn(7, 5, 4, 4) + 3
    for parts in ([x], x.split(2), x.split([1, 6])):
        statistics = Statistics(channels=-3, histogram=False)
        for part in parts:
            statistics.update(part)
        torch.testing.assert_close(statistics.means(), x.double().mean((0, 2, 3)))


# Signs and the shift.


def test_what_is_never_negative_has_unsigned_codes():
    model, images = Net(nn.ReLU()).eval(), images_of()
    whole = quantized(model, images)
    assert not whole.quantizer("conv", "input").signed
    assert whole.quantizer("stem", "input").signed
    vit, _ = zoo.build("timm-vit")
    whole = quantized(vit, images_of(size=32))
    signed = {}
    for slot in whole.slots():
        index = 1 if slot.operand == "right" else 0
        role = "" if slot.is_weight else slot.site.operands[index].role
        signed.setdefault(role, set()).add(whole.quantizer(slot.site.name, slot.operand).signed)
    assert signed["post_softmax"] == {False}
    assert signed["query"] == signed["key"] == signed["value"] == {True}


SMALL_NEGATIVE = {"gelu": nn.GELU, "silu": nn.SiLU, "hardswish": nn.Hardswish}


@pytest.mark.parametrize("name", SMALL_NEGATIVE)
def test_the_zero_point_is_the_papers_shift_padding_and_bias(name):
    model = Net(SMALL_NEGATIVE[name]()).eval()
    model.stem.weight.data *= 4
    images = images_of()
    whole = quantized(model, images, weight_bits=None, exclude=("stem", "head"))
    quantizer = whole.quantizer("conv", "input")
    step, zero = quantizer.scale, int(quantizer.zero_point)
    shift = step * zero
    assert not quantizer.signed
    with torch.no_grad():
        x = model.act(model.stem(images))
        lowest = -x.min()
        assert shift >= lowest > shift - step
        codes = ((x + shift) / step).round().clamp(0, 255)
        shifted = F.pad(codes * step, (1, 1, 1, 1), value=shift.item())
        bias = model.conv.bias - shift * model.conv.weight.sum((1, 2, 3))
        expected = model.head(F.conv2d(shifted, model.conv.weight, bias).mean((2, 3)))
        torch.testing.assert_close(whole(images), expected, rtol=1e-4, atol=1e-5)
    assert any("shifted the negative part of 1" in note for note in whole.notes)


@pytest.mark.parametrize(
    ("activation", "fields", "word"),
    [
        (nn.GELU(), {"shift_negative": False}, None),
        (nn.ELU(), {"shift_ratio": 0.01}, "signed"),
        (nn.LeakyReLU(0.3), {}, None),
    ],
)
def test_without_a_shift_the_input_is_signed(activation, fields, word):
    whole = quantized(Net(activation).eval(), images_of(), **fields)
    quantizer = whole.quantizer("conv", "input")
    assert quantizer.signed
    assert int(quantizer.zero_point) == 0
    assert any("inputs signed" in note for note in whole.notes) is (word is not None)


def test_the_shift_makes_the_error_of_a_gelu_input_smaller():
    x = F.gelu(3 * torch.randn(100_000))
    points = points_of(x)
    errors = []
    for signed, shifted in ((True, False), (False, True)):
        t = search(points, bits=6, signed=signed, candidates=20, shifted=shifted)
        quantizer = thresholds.quantizer(
            points, t, bits=6, signed=signed, axis=None, shifted=shifted
        )
        errors.append((quantizer(x) - x).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


# Bias correction.


@pytest.mark.parametrize("bias", [True, False])
def test_bias_correction_removes_the_mean_error_of_a_linear(bias):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7, bias=bias), nn.Linear(7, 5))
    images = images_of(12) + 1.0
    off = {}
    for corrected in (True, False):
        whole = quantized(
            model.eval(),
            images,
            weight_bits=3,
            patch_embed_bits="same",
            activation_bits=None,
            exclude=("2",),
            bias_correction=corrected,
        )
        with torch.no_grad():
            hidden = {}
            with whole.observe(lambda s, o, run, kept=hidden: kept.setdefault(s.name, run(*o))):
                whole(images)
            off[corrected] = (hidden["1"] - model[1](model[0](images))).mean(0).abs().max().item()
    assert off[True] < 1e-4 < 1e-2 < off[False]


def test_the_mean_error_of_a_grouped_convolution_is_what_constant_channels_give():
    conv = nn.Conv2d(6, 4, 3, groups=2, bias=False)
    means = torch.randn(6)
    image = means.view(1, 6, 1, 1).expand(1, 6, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(mean_error(conv.weight, means), conv(image).flatten())


def test_bias_correction_stands_in_front_of_a_batchnorms_scale():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    model[1].weight.data.copy_(torch.tensor([0.2, -3.0, 1.0, 9.0]))
    model[1].running_mean.normal_()
    images = images_of(6) + 2.0
    off = {}
    for corrected in (True, False):
        whole = quantized(
            model,
            images,
            weight_bits=3,
            patch_embed_bits="same",
            activation_bits=None,
            exclude=("2",),
            bias_correction=corrected,
        )
        with torch.no_grad():
            error = (whole(images) - model(images)).mean((0, 2, 3)).abs().max()
            off[corrected] = error.item()
    assert off[True] < 1e-4 < 1e-2 < off[False]


# Whole models.


def test_wide_bits_give_the_float_model():
    for name in ("timm-vit", "timm-hybrid"):
        model, example = zoo.build(name)
        images = torch.randn(2, *example.shape[1:])
        whole = quantized(model, images, **all_sixteen())
        with torch.no_grad():
            torch.testing.assert_close(whole(images), model(images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.PReLU(), nn.SiLU()])
def test_constant_images_and_one_image_are_survived(activation):
    model = Net(activation).eval()
    for images in (torch.zeros(1, 3, 16, 16), torch.full((2, 3, 16, 16), 0.3), images_of(1)):
        whole = quantized(model, images)
        assert bool(whole(images).isfinite().all())


def test_nan_inside_the_model_names_the_site():
    model = Net(nn.ReLU()).eval()
    model.conv.bias.data[0] = float("nan")
    with pytest.raises(QuietvitError, match=r"head \(input\)"):
        quantized(model, images_of())


def test_a_generator_of_batches_is_enough():
    model, images = Net(nn.SiLU()).eval(), images_of()
    once = quantized(model, (images[i : i + 2] for i in (0, 2)))
    assert torch.equal(once(images), quantized(model, images)(images))


def test_steps_switch_off():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    ).eval()
    model[1].weight.data.fill_(5.0)
    images = images_of()
    plain = quantized(model, images, batchnorm_folding=False, bias_correction=False)
    assert plain.adjusted() == {}
    assert torch.equal(plain.model[0].weight, model[0].weight)
    folded = quantized(model, images, equalization=False, bias_correction=False)
    assert list(folded.adjusted()) == ["0"]
    assert list(quantized(model, images, bias_correction=False).adjusted()) == ["0", "1"]
    assert set(quantized(model, images).adjusted()) == {"0", "1", "3", "6"}


def test_transposed_convolutions_are_quantized_per_output_and_not_corrected():
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 2, 2), nn.GELU(), nn.ConvTranspose2d(4, 6, 2, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    ).eval()
    whole = quantized(model, images_of())
    assert whole.quantizer("2", "weight").scale.shape == (6,)
    assert "2" not in whole.adjusted()
    assert any("transposed" in note for note in whole.notes)
