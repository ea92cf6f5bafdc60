"""Read which kernels OpenVINO chose, and limit the claims to what it always keeps.

``proof`` counts what this means for the model's products.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    by_codes = {f"{product.name}:input:codes": product for product in facts.products}
    named: dict[str, Kernel] = {}
    elsewhere: dict[str, Kernel] = {}
    renamed: dict[str, list[Kernel]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = _info(node)
        layer = info.get("layerType")
        own = [
            products[name]
            for name in _names(info)
            if name in products and not (name.endswith(":biased") and layer == "Eltwise")
        ]
        found = named if layer in LAYERS else elsewhere
        found |= {f"{product.name}:product": _kernel(info, product) for product in own}
        if layer in LAYERS and not own:
            for name in _names(_source(node)):
                if product := by_codes.get(name):
                    key = f"{product.name}:product"
                    renamed.setdefault(key, []).append(_kernel(info, product))
    # Codes can enter several layers, and then this does not tell which one is the product.
    alone = {key: kernels[0] for key, kernels in renamed.items() if len(kernels) == 1}
    return elsewhere | alone | named


def _kernel(info: Mapping[str, str], product: Product) -> Kernel:
    layer, kernel = info.get("layerType", "?"), info.get("primitiveType", "?")
    integer = (
        layer in LAYERS
        and info.get("runtimePrecision") in ("i8", "u8")
        and kernel.lower().endswith("_i8")
    )
    reason = None if integer else _why_float(product, layer, kernel)
    return Kernel(f"{layer} {kernel}", integer, reason)


def _info(node: Any) -> dict[str, str]:
    return {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}


def _names(info: Mapping[str, str]) -> list[str]:
    """Return the names of the nodes of the file that OpenVINO fused into this one."""
    fused = info.get("originalLayersNames", "").split(",")
    return list(dict.fromkeys(entry.partition("/Dequantization")[0] for entry in fused))


def _source(layer: Any) -> dict[str, str]:
    """Return the info of what computes a layer's input, before any change of memory layout.

    OpenVINO renames a layer where it moves a scale or an addition behind another operation. The
    codes of its input keep their name.
    """
    node = layer.input_value(0).get_node()
    while (info := _info(node)).get("layerType") == "Reorder":
        node = node.input_value(0).get_node()
    return info


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
