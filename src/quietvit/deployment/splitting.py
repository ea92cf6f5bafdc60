"""Split a quantized detector of torchvision into quantized models of its static parts.

``detection.static_parts`` cuts the float modules. ``exporting`` and ``checking`` use the parts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from quietvit.detection.static_parts import (
    DENSE,
    HEADS,
    has_static_parts,
    most_rows,
    pooled_shape,
    static_parts,
)
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.quantizers import Quantizer
from quietvit.quantization.slot import Slot
from quietvit.tracing import trace


def split(quantized: QuantizedModel) -> dict[str, QuantizedModel] | None:
    """Return the quantized parts by name, None for a model that is exported as a whole.

    The parts share weights and quantizers with ``quantized``, and their sites have the same names.
    The multiply-accumulates of a head are those of the most proposals, or boxes, that an image can
    have.

    Raises QuietvitError for a detector without static parts, or a quantizer outside of all parts.
    """
    model = quantized.model
    if not has_static_parts(model):
        return None
    cut = static_parts(model)
    parts = {DENSE: _part(quantized, cut[DENSE], quantized.input_shape, 1)}
    for name in HEADS:
        if name in cut:
            rows = most_rows(model, name)
            parts[name] = _part(quantized, cut[name], pooled_shape(model, name), rows)
    kept = {slot.key for part in parts.values() for slot in part.slots()}
    outside = [slot for slot in quantized.slots() if slot.key not in kept]
    if outside:
        raise QuietvitError(
            f"{outside[0].site.name} ({outside[0].operand}) is quantized, but it lies between the "
            f"networks of {type(model).__name__}, where proposals and boxes are computed. That "
            "code runs in float beside the file. Quantize again with this site in exclude."
        )
    return parts


def _part(
    quantized: QuantizedModel, module: nn.Module, shape: tuple[int, ...], rows: int
) -> QuantizedModel:
    device = next(module.parameters()).device
    traced = trace(module, torch.zeros(1, *shape, device=device))
    traced = replace(traced, sites=tuple(replace(s, macs=s.macs * rows) for s in traced.sites))
    sites = {site.name: site for site in traced.sites}
    quantizers: dict[Slot, Quantizer] = {
        Slot(sites[slot.site.name], slot.index): quantizer
        for slot in quantized.slots()
        if slot.site.name in sites
        and isinstance(quantizer := quantized.quantizers[slot.key], Quantizer)
    }
    modules = dict(module.named_modules())
    return QuantizedModel(
        module.eval(),
        traced,
        quantized.method,
        quantizers,
        input_shape=shape,
        adjustments={k: a for k, a in quantized.adjusted().items() if k in sites},
        compensations={k: c for k, c in quantized.compensated().items() if k in modules},
        notes=quantized.notes,
        origin=quantized.origin,
    )
