"""The size of a quantized model in bytes, and its mean bits over all products (derived here).

``quietvit.quantization.coverage`` counts the quantized products.
"""

from __future__ import annotations

import math
from typing import Any

from quietvit.quantization import Method, QuantizedModel, Slot
from quietvit.tracing import MATMUL_KINDS, Trace, WeightView

FLOAT_BITS = 32


def average_bits(trace: Trace, method: Method) -> float:
    """Return the mean bits of both operands over all multiply-accumulates. Float operands have 32.

    W6A6 with the patch embedding and head at 6 bits gives 6.
    """
    total = bits = 0.0
    for site in trace.matmuls:
        for index in (0, 1):
            own = method.slot_bits(Slot(site, index)) if _quantizes(method, site.kind) else None
            bits += site.macs * (own or FLOAT_BITS) / 2
        total += site.macs
    return bits / total if total else float(FLOAT_BITS)


def weight_size(trace: Trace, method: Method) -> float:
    """Return the bytes of the weights of all matrix products at the method's bits. Float has 32."""
    bits: dict[Any, tuple[int, int]] = {}
    for site in trace.matmuls:
        if site.weight_shape is not None:
            quantizes = _quantizes(method, site.kind)
            own = (method.slot_bits(Slot(site, 1)) if quantizes else None) or FLOAT_BITS
            key = site.weight or site.name
            bits[key] = max(own, bits.get(key, (0, 0))[0]), math.prod(site.weight_shape)
    return sum(own * entries for own, entries in bits.values()) / 8


def stored_bytes(quantized: QuantizedModel) -> int:
    """Return the bytes of all parameters, with quantized weights packed at their bits.

    Scales and zero points do not count. A weight of two sites counts once, at its highest bits.
    """
    parameters = list(quantized.model.parameters())
    width = 8 * parameters[0].element_size()
    bits: dict[WeightView, int] = {}
    entries: dict[WeightView, int] = {}
    for slot in quantized.slots():
        view, shape = slot.site.weight, slot.site.weight_shape
        if slot.is_weight and view is not None and shape is not None:
            own: Any = quantized.quantizers[slot.key].bits
            bits[view] = max(bits.get(view, 0), own)
            entries[view] = math.prod(shape)
    whole = sum(p.numel() * p.element_size() for p in parameters)
    return round(whole - sum(n * (width - bits[view]) / 8 for view, n in entries.items()))


def _quantizes(method: Method, kind: str) -> bool:
    return kind in method.kinds and kind in MATMUL_KINDS
