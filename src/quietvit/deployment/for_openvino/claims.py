"""What OpenVINO can be held to on every processor. Which kernels ran is read in ``kernels``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from quietvit.deployment.facts import Facts, Product

ATTENTION = (
    "openvino computes the whole attention in one kernel, in float but where processor and scales "
    "suit it"
)
ZERO_POINTS = "openvino multiplies integers only where the weight has no zero points"
SATURATES = (
    "on processors without VNNI openvino adds pairs of 8-bit products in 16 bits, and what does "
    "not fit is cut off: weights of 7 bits, patch embedding and head too, are safe there"
)


def kept_by_openvino(facts: Facts, zero: Collection[str] = ()) -> Facts:
    """The facts without the claims that OpenVINO does not keep on every processor.

    Products of two activations are not claimed, nor the sites in ``zero``, whose weights have zero
    points. Where one of them runs in integers all the same, ``proof`` counts it.
    """

    def kept(product: Product) -> Product:
        if product.why_float is not None:
            return product
        if product.kind not in ("linear", "conv"):
            return replace(product, why_float=ATTENTION)
        return replace(product, why_float=ZERO_POINTS) if product.name in zero else product

    return replace(facts, products=tuple(map(kept, facts.products)))
