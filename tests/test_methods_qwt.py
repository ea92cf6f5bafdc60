"""QwT: the streamed least squares, and the compensations it keeps."""

from __future__ import annotations

import pytest
import torch

from block_cases import Doubling, Narrowing, built, quantize
from quietvit.quantization import RTN
from quietvit.quantization.blocks import find_blocks
from quietvit.quantization.methods.qwt import LinearFit, QwT
from quietvit.tracing.block_modules import first_tensor, watching_modules


def test_the_streamed_fit_is_that_of_lstsq():
    x, y = torch.randn(50, 6).double() + 3, torch.randn(50, 4).double()
    fitted = LinearFit()
    for start in range(0, 50, 7):
        fitted.update(x[start : start + 7], y[start : start + 7])
    weight, bias, r2 = fitted.finish()
    ones = torch.ones(50, 1).double()
    wanted = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    torch.testing.assert_close(weight.mT, wanted[:6])
    torch.testing.assert_close(bias, wanted[6])
    left = (y - x @ weight.mT - bias).square().sum()
    plain = 1 - left / (y - y.mean(0)).square().sum()
    assert r2 == pytest.approx(float(1 - (1 - plain) * 49 / 43))


def test_the_fit_survives_dead_and_doubled_channels():
    x = torch.randn(40, 3).double()
    x = torch.cat([x, x[:, :1], torch.full((40, 1), 2.0).double()], 1)
    y = x[:, :2] @ torch.tensor([[1.0, 2], [3, 4]]).double() + 5
    fitted = LinearFit()
    fitted.update(x, y)
    weight, bias, r2 = fitted.finish()
    torch.testing.assert_close(x @ weight.mT + bias, y)
    assert r2 == pytest.approx(1)


def test_an_error_that_the_input_does_not_explain_has_no_positive_r2():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 20, generator=generator).double() for _ in range(2))
    fitted = LinearFit()
    fitted.update(x, y)
    assert fitted.finish()[2] <= 0.01
    few = LinearFit()
    few.update(x[:21], y[:21])  # it fits these exactly, and tells nothing
    assert few.finish()[2] <= 0


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "hf-vit", "tv-vit", "hf-swin"])
def test_each_kept_compensation_brings_its_block_nearer_to_float(name):
    model, images = built(name, 24)
    quantized = quantize(model, QwT(weight_bits=4, activation_bits=4), images)
    assert quantized.compensated()
    blocks = {block.name: block for block in find_blocks(quantized.trace) if block.residual}
    assert quantized.compensated().keys() <= blocks.keys()
    seen = {}

    def look(name, args, kwargs, output):
        seen[name] = args, kwargs, first_tensor(output).clone()

    with torch.no_grad(), watching_modules(quantized.model, blocks, look):
        quantized(images)
    for block, compensation in quantized.compensated().items():
        args, kwargs, output = seen[block]
        with torch.no_grad():
            wanted = first_tensor(model.get_submodule(block)(*args, **kwargs))
            after = compensation(first_tensor((args, kwargs)), output)
        assert (after - wanted).square().mean() < (output - wanted).square().mean()


def test_a_linear_error_is_taken_back_exactly():
    model = Doubling().eval()
    images = torch.randn(12, 3, 4, 4)
    base = RTN(weight_bits=3, activation_bits=None, head_bits=None, patch_embed_bits=None)
    quantized = quantize(model, QwT(base=base), images)
    assert len(quantized.compensated()) == 2
    with torch.no_grad():
        torch.testing.assert_close(quantized(images), model(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(quantize(model, base, images)(images), model(images), atol=1e-3)


def test_blocks_without_a_compensation_are_named():
    model, images = built("timm-vit", 1)  # 17 tokens of 32 channels
    quantized = quantize(model, QwT(weight_bits=4, activation_bits=4), images)
    assert not quantized.compensated()
    assert "no compensation after blocks.0" in quantized.report()
    report = quantize(Narrowing().eval(), QwT(weight_bits=4), torch.randn(4, 3, 8, 8)).report()
    assert "after blocks.0: it has output shape (1, 8, 4, 4) for input shape (1, 4, 8, 8)" in report


def test_channels_of_convolutions_are_compensated_along_their_dim():
    model = Narrowing().eval()
    images = torch.randn(6, 3, 8, 8)
    quantized = quantize(model, QwT(weight_bits=3, activation_bits=None), images)
    compensation = quantized.compensated()["blocks.1"]
    assert (compensation.axis, compensation.positions) == (-3, 16)
