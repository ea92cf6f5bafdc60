"""Quantizers of convolutions' outputs, so that a runtime computes these convolutions in integers.

Methods decide which operands are quantized; ``deployment`` writes the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quietvit.quantization.calibration import Calibration, run_model
from quietvit.quantization.quantized import QuantizedModel
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer
from quietvit.quantization.ranges import MinMaxRange
from quietvit.quantization.slot import OUTPUT, Slot
from quietvit.tracing import MATMUL_KINDS, Site, Trace

RECTIFIERS = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_"})


def outputs_to_quantize(trace: Trace, quantizers: Mapping[Slot, Quantizer]) -> list[Site]:
    """Return the sites whose outputs need a quantizer.

    Each is a convolution with both operands quantized, or the BatchNorm or ReLU right after it that
    folds into it. Two kinds are left out, since they run in integers anyway: convolutions of
    separate patches, and outputs that are read only by products with one common quantizer.
    """
    sites = []
    for site in trace.sites:
        operands = (Slot(site, 0), Slot(site, 1))
        if site.kind != "conv" or any(slot not in quantizers for slot in operands):
            continue
        if _separate_patches(site) or "transpose" in site.function:
            continue
        last = _last_folded(trace, site)
        if last.name in trace.outputs or not _quantized_at_once(trace, last, quantizers):
            sites.append(last)
    return sites


def with_quantized_outputs(
    quantized: QuantizedModel, calibration: Calibration, bits: int
) -> QuantizedModel:
    """Return the same model with a quantizer at each of ``outputs_to_quantize``.

    It runs one more pass over the images. Each output gets one affine scale for the whole tensor,
    for its extremes in the quantized model.
    """
    quantizers: dict[Slot, Quantizer] = {
        slot: quantizer
        for slot in quantized.slots()
        if isinstance(quantizer := quantized.quantizers[slot.key], Quantizer)
    }
    chosen = outputs_to_quantize(quantized.trace, quantizers)
    ranges = {Slot(site, OUTPUT): MinMaxRange() for site in chosen}
    blank = AffineQuantizer(
        torch.ones(()), torch.zeros((), dtype=torch.int32), bits=bits, signed=False
    )
    watched = _remade(quantized, quantizers | dict.fromkeys(ranges, blank))

    def look(slot: Slot, x: Tensor) -> Tensor:
        if slot in ranges:
            ranges[slot].update(x)
            return x
        result: Tensor = quantizers[slot](x)
        return result

    images = calibration.images
    with torch.no_grad(), watched.replacing(look):
        for batch in calibration.track(images, images.batches_expected(), "outputs"):
            run_model(watched, batch)
    fitted: dict[Slot, Quantizer] = {
        slot: AffineQuantizer.from_range(*stream.finish(), bits=bits, symmetric=False)
        for slot, stream in ranges.items()
    }
    return _remade(quantized, quantizers | fitted)


def _remade(quantized: QuantizedModel, quantizers: Mapping[Slot, Quantizer]) -> QuantizedModel:
    return QuantizedModel(
        quantized.model,
        quantized.trace,
        quantized.method,
        quantizers,
        input_shape=quantized.input_shape,
        adjustments=quantized.adjusted(),
        compensations=quantized.compensated(),
        notes=quantized.notes,
        origin=quantized.origin,
    )


def _separate_patches(site: Site) -> bool:
    """Whether the convolution reads each input value once, as a matrix product of patches does."""
    weight, input_shape, output_shape = site.weight_shape, site.operands[0].shape, site.output_shape
    if weight is None or weight[1] != input_shape[1]:
        return False
    pairs = zip(weight[2:], input_shape[2:], output_shape[2:], strict=True)
    return all(out * kernel == size for kernel, size, out in pairs)


def _last_folded(trace: Trace, site: Site) -> Site:
    """Return the last site of the chain convolution, BatchNorm, ReLU, as far as it exists.

    Each must be the only reader of the one before. BatchNorm folds into one scale and shift per
    channel, and ReLU into a limit of the codes.
    """
    for kind, functions in (("norm", {"batch_norm"}), ("activation", RECTIFIERS)):
        if len(site.feeds) != 1 or site.name in trace.outputs:
            break
        reader = trace[site.feeds[0]]
        alone = reader.operands[0].fed_by == (site.name,)
        same = reader.operands[0].shape == site.output_shape
        if reader.kind == kind and reader.function in functions and alone and same:
            site = reader
    return site


def _quantized_at_once(trace: Trace, site: Site, quantizers: Mapping[Slot, Quantizer]) -> bool:
    """Whether only products with one common quantizer read a site's output."""
    readers = []
    for name in site.feeds:
        reader = trace[name]
        for index, operand in enumerate(reader.operands):
            if site.name not in operand.fed_by:
                continue
            slot = Slot(reader, index)
            same = math.prod(operand.shape) == math.prod(site.output_shape)  # reshaped at most
            same = same and operand.fed_by == (site.name,)
            if reader.kind not in MATMUL_KINDS or not same or slot not in quantizers:
                return False
            readers.append(quantizers[slot])
    if not readers:
        return False
    first, *others = readers
    return isinstance(first, AffineQuantizer) and all(
        isinstance(other, AffineQuantizer)
        and other.config() == first.config()
        and torch.equal(other.scale, first.scale)
        and torch.equal(other.zero_point, first.zero_point)
        for other in others
    )
