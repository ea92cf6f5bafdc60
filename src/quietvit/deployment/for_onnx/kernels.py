"""Read which operators onnxruntime uses for an .onnx file, from the optimized graph it writes.

``proof`` counts what this means for the model's products.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from quietvit.deployment.for_onnx.session import open_session
from quietvit.deployment.runtime import Kernel

# Operators of onnxruntime whose kernels multiply integers, and those that multiply floats.
INTEGER_OPS = frozenset(
    {
        *("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul"),
        *("QLinearConv", "ConvInteger", "QGemm", "QAttention", "DynamicQuantizeLSTM"),
    }
)
WEIGHT_ONLY_OPS = frozenset({"MatMulNBits", "MatMulBnb4"})
CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv"})
FLOAT_OPS = CONVOLUTIONS | {
    *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "ConvTranspose", "Einsum"),
    *("Attention", "MultiHeadAttention", "GroupQueryAttention"),
}
# onnxruntime adds this suffix to a node that it rebuilds with channels last.
LAYOUT_SUFFIX = re.compile(r"_token_\d+$")


def kernels_of(path: Path) -> dict[str, Kernel]:
    """Return the kernel of each product by its node's name, ``name:product``."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        open_session(path, optimized=written)
        graph = onnx.load(written, load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    kernels: dict[str, Kernel] = {}
    for node in graph.node:
        kind = node.op_type
        if kind in INTEGER_OPS:
            kernels[LAYOUT_SUFFIX.sub("", node.name)] = Kernel(kind, True)
        elif kind in WEIGHT_ONLY_OPS:
            reason = "only its weight is quantized, its activations are float"
            kernels[node.name] = Kernel(kind, False, reason)
        elif kind in FLOAT_OPS:
            # A fused node has another name, but its output keeps the product's name.
            for name in (node.name, *node.output):
                kernels[name] = Kernel(kind, False, _why_float(node, producers))
    return kernels


def _why_float(node: Any, producers: dict[str, Any]) -> str:
    inputs = [producers[name].op_type for name in node.input[:2] if name in producers]
    if node.op_type in CONVOLUTIONS:
        return (
            "onnxruntime has integer convolutions only with a quantized output, and this one is "
            "not a product of separate patches"
        )
    if node.op_type in ("Gemm", "FusedGemm"):
        return "onnxruntime fused its bias into a float Gemm before it handled quantization"
    if inputs.count("DequantizeLinear") < 2:
        return "an operand comes from another operator in float"
    return "this onnxruntime has no integer kernel for this pattern"
