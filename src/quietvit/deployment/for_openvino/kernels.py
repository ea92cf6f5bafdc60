"""Which kernels OpenVINO chose, read off its runtime model, and what it can be held to.

What this says about the model's products is counted in ``proof``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from quietvit.deployment.facts import Facts, Product
from quietvit.deployment.runtime import Kernel

LAYERS = frozenset({"FullyConnected", "MatMul", "Convolution", "GroupConvolution"})
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


def kernels_of(compiled: Any, facts: Facts) -> dict[str, Kernel]:
    """The kernel of each product, by ``name:product``, of a compiled model that has run once.

    OpenVINO chooses a kernel at the first call. A layer whose precision is i8 may still multiply
    floats (weights decompressed), so only the kernel's own name tells.
    """
    products = {f"{product.name}:product": product for product in facts.products}
    # A product with its bias in one layer bears the name of the addition.
    products |= {f"{product.name}:biased": product for product in facts.products}
    found: dict[str, Kernel] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
        layer, kernel = info.get("layerType", "?"), info.get("primitiveType", "?")
        fused = info.get("originalLayersNames", "").split(",")
        for name in dict.fromkeys(each.partition("/Dequantization")[0] for each in fused):
            if name not in products or (name.endswith(":biased") and layer == "Eltwise"):
                continue
            integer = (
                layer in LAYERS
                and info.get("runtimePrecision") in ("i8", "u8")
                and kernel.lower().endswith("_i8")
            )
            reason = None if integer else _why_float(products[name], layer, kernel)
            found[f"{products[name].name}:product"] = Kernel(f"{layer} {kernel}", integer, reason)
    return found


def _why_float(product: Product, layer: str, kernel: str) -> str:
    if layer not in LAYERS:
        return (
            f"openvino fused it with its neighbours into one {layer} ({kernel}), and does not say "
            "that this multiplies integers"
        )
    if product.kind in ("linear", "conv"):
        return (
            f"openvino chose {kernel}, a float kernel, as it does where a weight has zero points; "
            "'quietvit export --to openvino' takes those out"
        )
    zeros = [operand.get("zero_point") for operand in product.operands.values()]
    return (
        f"openvino chose {kernel}, a float kernel: it multiplies two activations in integers only "
        f"where neither has a zero point (here {' and '.join(map(str, zeros))}), nor a signed one "
        "is on the left"
    )
