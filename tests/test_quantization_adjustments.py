"""Adjusted sites and compensated blocks in a quantized model: run, observed, saved and loaded."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import quietvit
import zoo
from quietvit.measure.sqnr import sqnr
from quietvit.quantization import load
from quietvit.quantization.adjustments import ChannelAffine, Compensation
from quietvit.quantization.blocks import find_blocks
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.method import Method
from quietvit.quantization.quantized import QuantizedModel
from quietvit.quantization.reparametrize import norm_links, reparametrize
from quietvit.tracing import trace

NAME = "timm-vit"


class Moved(Method):
    """Re-parametrizes at random, quantizes nothing."""

    name: ClassVar[str] = "rtn"
    shift: bool = True
    block: bool = False

    def calibrate(self, calibration):
        calibrated = Calibrated(notes=["moved"])
        generator = torch.Generator().manual_seed(0)
        for link in norm_links(calibration.model, calibration.trace).links:
            gain = torch.rand(link.channels, generator=generator) + 0.5
            shift = torch.randn(link.channels, generator=generator)
            reparametrize(calibration.model, link, calibrated, gain=gain, shift=shift)
        if self.block:
            weight = 0.1 * torch.randn(32, 32, generator=generator)
            calibrated.compensations["blocks.0"] = Compensation(
                weight, torch.ones(32), positions=17
            )
        return calibrated


@pytest.fixture
def model_and_images():
    model, _ = zoo.build(NAME)
    return model, torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_a_reparametrized_model_computes_the_same(model_and_images):
    model, images = model_and_images
    moved = quietvit.quantize(model, Moved(), images, progress=False)
    assert not torch.equal(moved.model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    with torch.no_grad():
        torch.testing.assert_close(moved(images), model(images), rtol=1e-4, atol=1e-5)
    assert "moved" in moved.report()


def test_a_large_gain_on_small_values_does_not_overflow_half_precision():
    affine = ChannelAffine(torch.tensor([1e6]), torch.tensor([0.5]), -1)
    found = affine.apply_to(torch.tensor([[0.0], [6e-8]], dtype=torch.float16))
    torch.testing.assert_close(
        found, torch.tensor([[0.5], [0.5596]], dtype=torch.float16), atol=1e-3, rtol=0
    )


def test_observers_see_the_float_models_own_activations(model_and_images):
    model, images = model_and_images
    moved = quietvit.quantize(model, Moved(), images, progress=False)
    noise = sqnr(model, moved, images, local=True)
    assert all(value > 80 for value in noise.values()), noise


def test_a_compensation_is_added_to_its_blocks_output_and_counted(model_and_images):
    model, images = model_and_images
    moved = quietvit.quantize(model, Moved(block=True), images, progress=False)
    compensation = moved.compensated()["blocks.0"]
    with torch.no_grad():
        x = model.patch_embed(images)
        x = model.norm_pre(model.pos_embed + torch.cat([model.cls_token.expand(3, -1, -1), x], 1))
        y = model.blocks[0](x) + x @ compensation.weight.T + compensation.bias
        wanted = model.forward_head(model.norm(model.blocks[1](y)))
        torch.testing.assert_close(moved(images), wanted, rtol=1e-4, atol=1e-4)
    assert ("blocks.0", "compensation of a block, float") in moved.coverage.untouched
    assert moved.coverage.total_macs == moved.trace.macs + 32 * 32 * 17


@pytest.mark.parametrize("block", [False, True])
def test_they_are_saved_and_loaded_bit_for_bit(model_and_images, tmp_path, block):
    model, images = model_and_images
    quantizing = quietvit.RTN().calibrate

    class Both(Moved):
        def calibrate(self, calibration):
            moved = super().calibrate(calibration)
            moved.quantizers |= quantizing(calibration).quantizers
            return moved

    whole = quietvit.quantize(model, Both(block=block), images, progress=False)
    plain = QuantizedModel(
        whole.model,
        whole.trace,
        quietvit.RTN(),
        {slot: whole.quantizers[slot.key] for slot in whole.slots()},
        adjustments=whole.adjusted(),
        compensations=whole.compensated(),
        input_shape=whole.input_shape,
    )
    loaded = load(plain.save(tmp_path / "m.qvit"), model=model)
    with torch.no_grad():
        assert torch.equal(loaded(images), plain(images))
    assert loaded.adjusted().keys() == whole.adjusted().keys() != set()
    assert loaded.compensated().keys() == whole.compensated().keys()


def test_compensations_work_on_modules_with_other_signatures():
    model, example = zoo.build("hf-swin")
    images = example["pixel_values"]
    traced = trace(model, example)
    block = next(block for block in find_blocks(traced) if block.residual)
    width = block.sites[0].output_shape[-1]
    # A bias that is the same in every channel would vanish in the next LayerNorm.
    compensation = Compensation(torch.zeros(width, width), torch.randn(width), positions=1)
    moved = QuantizedModel(
        model,
        traced,
        quietvit.RTN(),
        {},
        compensations={block.name: compensation},
        input_shape=(3, 64, 64),
    )
    with torch.no_grad():
        plain, changed = model(images).logits, moved(images).logits
    assert plain.shape == changed.shape
    assert (changed - plain).abs().max() > 0.01 * plain.abs().max()
