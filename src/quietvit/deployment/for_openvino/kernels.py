"""Read which kernels OpenVINO chose, and limit the claims to what it always keeps.

``proof`` counts what this means for the model's products.
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
    "on processors without VNNI openvino adds pairs of 8-bit products in 16 bits, which can "
    "saturate. Use 7-bit weights there, also in patch embedding and head"
)


def kept_by_openvino(facts: Facts, zero: Collection[str] = ()) -> Facts:
    """Return the facts without claims that OpenVINO does not keep on every processor.

    These are products of two activations, and the sites in ``zero``, whose weights have zero
    points. ``proof`` still counts them if they run in integers.
    """

    def kept(product: Product) -> Product:
        if product.why_float is not None:
            return product
        if product.kind not in ("linear", "conv"):
            return replace(product, why_float=ATTENTION)
        return replace(product, why_float=ZERO_POINTS) if product.name in zero else product

    return replace(facts, products=tuple(map(kept, facts.products)))


def kernels_of(compiled: Any, facts: Facts) -> dict[str, Kernel]:
    """Return the kernel of each product (``name:product``) of a compiled model that ran once.

    OpenVINO chooses kernels at the first call. A layer with precision i8 may still decompress
    weights and multiply floats, so the kernel's name must say i8 too.
    """
    products = {f"{product.name}:product": product for product in facts.products}
    # A layer that fuses a product with its bias has the name of the addition.
    products |= {f"{product.name}:biased": product for product in facts.products}
    kernels: dict[str, Kernel] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
        layer, kernel = info.get("layerType", "?"), info.get("primitiveType", "?")
        fused = info.get("originalLayersNames", "").split(",")
        for name in dict.fromkeys(entry.partition("/Dequantization")[0] for entry in fused):
            if name not in products or (name.endswith(":biased") and layer == "Eltwise"):
                continue
            integer = (
                layer in LAYERS
                and info.get("runtimePrecision") in ("i8", "u8")
                and kernel.lower().endswith("_i8")
            )
            reason = None if integer else _why_float(products[name], layer, kernel)
            kernels[f"{products[name].name}:product"] = Kernel(f"{layer} {kernel}", integer, reason)
    return kernels


def _why_float(product: Product, layer: str, kernel: str) -> str:
    if layer not in LAYERS:
        return (
            f"openvino fused it with its neighbours into one {layer} ({kernel}), and does not "
            "report whether this multiplies integers"
        )
    if product.kind in ("linear", "conv"):
        return (
            f"openvino chose {kernel}, a float kernel, as it does if a weight has zero points; "
            "'quietvit export --to openvino' removes them"
        )
    zeros = [operand.get("zero_point") for operand in product.operands.values()]
    return (
        f"openvino chose {kernel}, a float kernel: it multiplies two activations in integers only "
        f"if both zero points are 0 (here {' and '.join(map(str, zeros))}) and the left one is "
        "unsigned"
    )
