"""Floating-point formats: equal to torchao's casts bit for bit, and laws of their quantizers."""

from __future__ import annotations

import pytest
import torch

import quietvit
from quietvit.errors import QuietvitError
from quietvit.quantization import (
    BlockFloatQuantizer,
    ScaledFloatQuantizer,
    SmoothQuant,
    TwinQuantizer,
)
from quietvit.quantization.floating import ELEMENTS
from test_methods_table import built, logits, quantized

ROWS, COLUMNS = 24, 96
FORMATS = {
    "fp8_e4m3": "W8A8",
    "fp8_e5m2": "W8A8",
    "mx": "W4A6",
    "mx_wide": "W6A8",
    "nvfp4": "W4A4",
}


def values(dtype=torch.float32):
    """Values over many exponents, ties, subnormal ones, zeros, and a block of zeros."""
    x = torch.randn(ROWS, COLUMNS) * torch.exp2(torch.randint(-12, 12, (ROWS, COLUMNS)).float())
    x[0, :32], x[1, 5], x[2, 1:32] = 0.0, 0.0, 0.0
    x[3] = torch.arange(COLUMNS) / 4 - 12  # ties of every element
    x[4], x[5] = x[4] * 2.0**-120, x[5] * 2.0**100
    return x.to(dtype)


@pytest.mark.parametrize("element", ELEMENTS)
def test_codes_enumerate_the_numbers_and_rounding_takes_the_nearest(element):
    form = ELEMENTS[element]
    codes = torch.arange(-form.last_code, form.last_code + 1, dtype=torch.int32)
    numbers = form.numbers(codes)
    assert numbers[-1] == form.largest
    assert bool((numbers.diff() > 0).all())
    assert torch.equal(form.codes(numbers), codes)
    assert torch.equal(form.round(numbers), numbers)
    x = torch.cat([torch.randn(2000) * s for s in (form.largest, 1.0, 2.0**form.smallest_exponent)])
    nearest = (x[:, None] - numbers).abs().amin(1)
    assert torch.equal((form.round(x) - x).abs(), nearest)
    middles = (numbers[1:] + numbers[:-1]) / 2
    assert not bool((form.codes(form.round(middles)) % 2).any())  # ties to even
    assert bool(form.round(torch.tensor(float("nan"))).isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("axis", [None, 0])
def test_fp8_is_torchaos(element, axis, dtype):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    target = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[element]
    x = values(dtype)
    if axis == 0:
        x[0, 0], x[4] = 1.0, x[6]  # ours treats a row below 2^-100 as zeros, torchao's divides by 0
    block = [ROWS, COLUMNS] if axis is None else [1, COLUMNS]
    scale = primitives._choose_scale_float8(x.float(), block, target)
    largest = x.float().abs().amax() if axis is None else x.float().abs().amax(1)
    mine = ScaledFloatQuantizer.from_largest(largest, element=element, axis=axis)
    assert torch.equal(mine.scale.flatten(), scale.flatten())
    codes = primitives._quantize_affine_float8(x, scale, target)
    assert torch.equal(mine.form.numbers(mine.codes(x)), codes.float())
    theirs = primitives._dequantize_affine_float8(codes, scale, dtype)
    assert torch.equal(mine(x), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_formats_are_torchaos(element, dtype):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    target = {
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e2m3": "fp6_e2m3",
        "e3m2": "fp6_e3m2",
        "e2m1": torch.float4_e2m1fn_x2,
    }[element]
    x = values(dtype)
    scales, data = mx.to_mx(x, target, 32)
    mine = BlockFloatQuantizer(element=element, axis=-1)
    assert torch.equal(mine(x), mx.to_dtype(data, scales, target, 32, dtype))
    own = mine.codes(x).unflatten(-1, (-1, 32))[..., 0] >> 8
    assert torch.equal(own, scales.view(torch.uint8).int())
    turned = BlockFloatQuantizer(element=element, axis=0)
    assert torch.equal(turned(x.T), mine(x).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_torchaos(dtype):
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = values(dtype)
    x[5] = x[6]  # torchao's own scale overflows where a block is 2^100 times the others
    largest = x.float().abs().amax()
    scale = nvfp4.per_tensor_amax_to_scale(largest)
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)
    mine = BlockFloatQuantizer.nvfp4(largest, axis=-1)
    assert torch.equal(mine.tensor_scale, scale)
    own = mine.codes(x).unflatten(-1, (-1, 16))[..., 0] >> 8
    assert torch.equal(own, theirs.scale.view(torch.uint8).int())
    assert torch.equal(mine(x), theirs.dequantize(dtype))


def quantizers():
    largest = torch.tensor(3.0)
    made = [BlockFloatQuantizer(element=element, axis=-1) for element in ELEMENTS]
    made += [BlockFloatQuantizer.nvfp4(largest, axis=-1)]
    channels = torch.linspace(1, 3, 50)
    made += [ScaledFloatQuantizer.from_largest(largest, element="e5m2")]
    return [*made, ScaledFloatQuantizer.from_largest(channels, element="e4m3", axis=-1)]


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda q: q.extra_repr())
def test_laws_of_every_floating_quantizer(quantizer):
    """A last block that is not full behaves as one filled up with zeros."""
    x = torch.randn(7, 50)
    fake = quantizer(x)
    assert torch.equal(quantizer(fake), fake)
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int32
    low, high = quantizer.code_range
    assert low <= int(codes.min())
    assert int(codes.max()) <= high
    assert torch.equal(quantizer.dequantize(codes), fake)
    assert torch.equal(quantizer(-x), -fake)
    assert not quantizer.deployable
    y = x.clone().requires_grad_()
    with_gradient = quantizer(y)
    assert torch.equal(with_gradient, fake)
    with_gradient.sum().backward()
    inside = (quantizer._clipped(x) == x).float()
    assert torch.equal(y.grad, inside)
    again = type(quantizer).from_config(quantizer.config())
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(x), fake)
    if isinstance(quantizer, BlockFloatQuantizer):
        filled = torch.nn.functional.pad(x, (0, 14))
        assert torch.equal(quantizer(filled)[:, :50], fake)
    assert torch.equal(quantizer(torch.zeros(2, 50)), torch.zeros(2, 50))


@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
@pytest.mark.parametrize("number_format", FORMATS)
def test_a_model_in_a_number_format_is_reported_and_saved(number_format, method, tmp_path):
    model, example, images = built("timm-vit")
    bits = {
        "weight_bits": int(FORMATS[number_format][1]),
        "activation_bits": int(FORMATS[number_format][3]),
    }
    whole = quantized(model, method, images, example, number_format=number_format, **bits)
    assert whole.coverage.quantized_macs == whole.trace.macs
    labels = {q.label for q in whole.quantizers.values()}
    text = whole.report()
    assert all(label in text for label in labels)
    assert f"simulated: values are rounded to {', '.join(sorted(labels))}" in text
    assert f"number format {number_format}" in text
    assert not whole.deployable
    wanted, got = logits(model, images), logits(whole, images)
    assert 0 < float((wanted - got).norm() / wanted.norm()) < 0.3
    loaded = quietvit.load(whole.save(tmp_path / "m.qvit"), model)
    assert torch.equal(logits(loaded, images), got)
    with pytest.raises(QuietvitError, match="a floating-point format"):
        quietvit.export(whole, tmp_path / "m.onnx", as_="uniform")


def test_blocks_lie_along_the_axis_that_the_product_sums_over():
    model, example, images = built("timm-hybrid")
    whole = quantized(model, "rtn", images, example, number_format="mx")
    for slot in whole.slots():
        axis = whole.quantizers[slot.key].axis
        shape = slot.site.weight_shape if slot.is_weight else slot.site.operands[slot.index].shape
        if slot.site.kind == "conv":
            groups = slot.site.operands[0].shape[1] // slot.site.weight_shape[1]
            expected = slot.site.weight_shape[1] * (1 if slot.is_weight else groups)
        else:
            expected = slot.site.operands[0].shape[-1]
        assert shape[axis] == expected, slot


def test_overrides_and_edges_choose_the_element():
    method = quietvit.RTN(
        weight_bits=4,
        activation_bits=4,
        number_format="mx_wide",
        overrides={"post_softmax": 8, "*.fc1": 6},
    )
    model, _, images = built("timm-vit")
    whole = quietvit.quantize(model, method, images, progress=False)
    names = {
        ("blocks.0.mlp.fc1", "weight"): "MXFP6-E3M2",
        ("blocks.0.mlp.fc2", "weight"): "MXFP4",
        ("head", "input"): "MXFP8-E5M2",
    }
    for (site, operand), label in names.items():
        assert whole.quantizer(site, operand).label == label
    assert "A MXFP8-E5M2 A MXFP4" in whole.coverage.shares()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"number_format": "fp8"}, "number_format='fp8'"),
        ({"number_format": "nvfp4", "weight_bits": 6}, "'nvfp4' has 4 or 8 bits, not 6"),
        ({"number_format": "fp8_e4m3", "overrides": {"query": 4}}, "has 8 bits, not 4"),
        ({"number_format": "mx", "head_bits": 5}, "has 4 or 6 or 8 bits, not 5"),
        ({"number_format": "mx", "activation_range": "omse"}, "omse fits integer codes"),
        ({"number_format": "mx", "weight_range": "percentile"}, "percentile has no effect"),
        ({"number_format": "mx", "conv_output_bits": 8}, "conv_output_bits is for integer kernels"),
    ],
)
def test_settings_that_a_number_format_does_not_have(fields, told):
    for method in (quietvit.RTN, SmoothQuant):
        with pytest.raises(QuietvitError, match=told):
            method(**fields)


def test_a_model_in_a_number_format_trains():
    model, example, images = built("timm-vit")
    whole = quantized(model, "rtn", images, example, number_format="nvfp4", weight_bits=4)
    with pytest.raises(QuietvitError, match="no step that can be learned"):
        quietvit.learn_steps(whole)
    whole.train()(images).square().sum().backward()
    assert all(bool(p.grad.any()) for p in whole.parameters() if p.ndim > 1)


def test_twin_quantizers_have_bits_as_label():
    assert TwinQuantizer.softmax(0.25, bits=4).label == "4"
