"""Which matrix products ran in integers, read off the runtime's own optimized graph.

A file that says int8 proves nothing: a runtime may compute all of it in float and not say so.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quietvit.deployment.facts import Facts, Product
from quietvit.deployment.for_openvino.file import ATTENTION, ZERO_POINTS, kept_by_openvino
from quietvit.deployment.runtime import OnnxRuntime, OpenVINO, Runtime

# Operators of onnxruntime whose kernels multiply integers, and those that multiply floats.
INTEGER_OPS = frozenset(
    {
        *("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul"),
        *("QLinearConv", "ConvInteger", "QGemm", "QAttention", "DynamicQuantizeLSTM"),
    }
)
WEIGHT_ONLY_OPS = frozenset({"MatMulNBits", "MatMulBnb4"})
FLOAT_OPS = frozenset(
    {
        *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "NhwcFusedConv"),
        *("Attention", "MultiHeadAttention", "Einsum", "ConvTranspose", "GroupQueryAttention"),
    }
)
# onnxruntime adds it to a node that it makes again with channels last.
LAYOUT_SUFFIX = re.compile(r"_token_\d+$")
OPENVINO_LAYERS = frozenset({"FullyConnected", "MatMul", "Convolution", "GroupConvolution"})


@dataclass(frozen=True)
class Ran:
    """How one matrix product ran: the runtime's operator, whether in integers, and why not."""

    product: str
    macs: int
    operator: str
    integer: bool
    reason: str | None = None


@dataclass(frozen=True)
class Proof:
    """How every product ran. ``claimed``: those that the file says are integers."""

    runtime: str
    ran: tuple[Ran, ...]
    claimed: frozenset[str]
    total_macs: int

    @property
    def integer_share(self) -> float:
        """Share of all multiply-accumulates that ran in integers."""
        macs = sum(ran.macs for ran in self.ran if ran.integer)
        return macs / self.total_macs if self.total_macs else 0.0

    @property
    def broken(self) -> tuple[Ran, ...]:
        """Products that the file claims are integers and that ran in float."""
        return tuple(ran for ran in self.ran if ran.product in self.claimed and not ran.integer)

    @property
    def counts(self) -> dict[str, int]:
        """How many products each operator of the runtime computed."""
        found: dict[str, int] = {}
        for ran in self.ran:
            found[ran.operator] = found.get(ran.operator, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def prove(runtime: Runtime, facts: Facts) -> Proof:
    """Read off the runtime's graph how each product of ``facts`` runs."""
    if isinstance(runtime, OpenVINO):
        facts = kept_by_openvino(facts)
        nodes = dict(_openvino_nodes(runtime, facts))
    else:
        assert isinstance(runtime, OnnxRuntime)
        nodes = dict(_onnxruntime_nodes(runtime.path))
    ran = tuple(_ran(product, nodes.get(f"{product.name}:product")) for product in facts.products)
    claimed = frozenset(p.name for p in facts.products if p.why_float is None)
    return Proof(runtime.name, ran, claimed, facts.total_macs)


def _ran(product: Product, found: tuple[str, bool, str | None] | None) -> Ran:
    if product.why_float is not None and (found is None or not found[1]):
        operator = found[0] if found is not None else "float"
        reason = product.why_float
        if found is not None and found[2] is not None and reason in (ATTENTION, ZERO_POINTS):
            reason = found[2]  # what was seen says more than what was to be feared
        return Ran(product.name, product.macs, operator, False, reason)
    if found is None:
        reason = "no operator of the runtime's graph bears its name: it was fused into another"
        return Ran(product.name, product.macs, "?", False, reason)
    return Ran(product.name, product.macs, *found)


def _onnxruntime_nodes(path: Path) -> Iterator[tuple[str, tuple[str, bool, str | None]]]:
    """Name of a product -> operator, whether it multiplies integers, why not."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        OnnxRuntime(path, optimized=written)
        graph = onnx.load(written, load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in INTEGER_OPS:
            yield LAYOUT_SUFFIX.sub("", node.name), (node.op_type, True, None)
        elif node.op_type in WEIGHT_ONLY_OPS:
            reason = "only its weight is quantized, activations are float"
            yield node.name, (node.op_type, False, reason)
        elif node.op_type in FLOAT_OPS:
            yield node.name, (node.op_type, False, _why(node, made))
            for output in node.output:
                yield output, (node.op_type, False, _why(node, made))


def _why(node: Any, made: dict[str, Any]) -> str:
    inputs = [made[name].op_type for name in node.input[:2] if name in made]
    dequantized = inputs.count("DequantizeLinear")
    if node.op_type in ("Conv", "FusedConv", "NhwcFusedConv"):
        return (
            "onnxruntime has integer convolutions only where the output is quantized at once, and "
            "this one is no product of separate patches"
        )
    if node.op_type in ("Gemm", "FusedGemm"):
        return "its bias was fused into a float Gemm before quantization was looked at"
    if dequantized < 2:
        return "an operand comes out of another operator in float"
    return "this onnxruntime has no integer kernel for this pattern"


def _openvino_nodes(
    runtime: OpenVINO, facts: Facts
) -> Iterator[tuple[str, tuple[str, bool, str | None]]]:
    """The same from OpenVINO's runtime model, which names layers, precisions and kernels.

    The kernel is chosen at the first call, so one is made. A layer whose precision is i8 may still
    multiply floats (weights decompressed): only the kernel tells.
    """
    runtime(np.zeros([n or 1 for n in runtime.input_shape], dtype=np.float32))
    products = {f"{product.name}:product": product for product in facts.products}
    products |= {f"{product.name}:biased": product for product in facts.products}
    for node in runtime.compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
        layer, kernel = info.get("layerType", "?"), info.get("primitiveType", "?")
        fused = info.get("originalLayersNames", "").split(",")
        for name in dict.fromkeys(each.partition("/Dequantization")[0] for each in fused):
            if name not in products or (name.endswith(":biased") and layer == "Eltwise"):
                continue
            known = layer in OPENVINO_LAYERS
            integer = (
                known
                and info.get("runtimePrecision") in ("i8", "u8")
                and kernel.lower().endswith("_i8")
            )
            reason = None if integer else _why_openvino(products[name], layer, kernel)
            yield f"{products[name].name}:product", (f"{layer} {kernel}", integer, reason)


def _why_openvino(product: Product, layer: str, kernel: str) -> str:
    if layer not in OPENVINO_LAYERS:
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
