"""Which matrix products ran in integers, read off the runtime's own optimized graph.

A file that says int8 proves nothing: a runtime may compute all of it in float and not say so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietvit.deployment.facts import Facts, Product
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
        nodes = dict(_openvino_nodes(runtime))
    else:
        assert isinstance(runtime, OnnxRuntime)
        nodes = dict(_onnxruntime_nodes(runtime.path))
    ran = tuple(_ran(product, nodes.get(f"{product.name}:product")) for product in facts.products)
    claimed = frozenset(p.name for p in facts.products if p.why_float is None)
    return Proof(runtime.name, ran, claimed, facts.total_macs)


def _ran(product: Product, found: tuple[str, bool, str | None] | None) -> Ran:
    if product.why_float is not None:
        operator = found[0] if found is not None else "float"
        return Ran(product.name, product.macs, operator, False, product.why_float)
    if found is None:
        reason = "no operator of the runtime's graph bears its name: it was fused into another"
        return Ran(product.name, product.macs, "?", False, reason)
    return Ran(product.name, product.macs, *found)


def _onnxruntime_nodes(path: Path) -> Iterator[tuple[str, tuple[str, bool, str | None]]]:
    """Name of a product -> operator, whether it multiplies integers, why not."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        OnnxRuntime(path, optimized=written, exact=False)
        graph = onnx.load(written).graph
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in INTEGER_OPS:
            yield node.name, (node.op_type, True, None)
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


def _openvino_nodes(runtime: OpenVINO) -> Iterator[tuple[str, tuple[str, bool, str | None]]]:
    """The same from OpenVINO's runtime model, which names layers, types and precisions."""
    for node in runtime.compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        layer = str(info["layerType"].astype(str)) if "layerType" in info else ""
        if layer not in ("FullyConnected", "MatMul", "Convolution"):
            continue
        names = str(info["originalLayersNames"].astype(str)).split(",")
        precision = str(info["runtimePrecision"].astype(str))
        kernel = str(info["primitiveType"].astype(str)) if "primitiveType" in info else ""
        integer = precision in ("i8", "u8")
        reason = None if integer else f"openvino chose {precision} ({kernel or 'no kernel named'})"
        for name in names:
            if name.endswith(":product"):
                yield name, (f"{layer} {precision}", integer, reason)
