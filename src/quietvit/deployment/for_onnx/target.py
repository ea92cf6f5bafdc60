"""The target ``onnx``: one file with QuantizeLinear and DequantizeLinear, for onnxruntime."""

from __future__ import annotations

from quietvit.deployment.facts import Facts
from quietvit.deployment.for_onnx.file import write_onnx
from quietvit.deployment.for_onnx.runtime import OnnxRuntime
from quietvit.deployment.for_onnx.session import INSTALL
from quietvit.deployment.paths import data_of
from quietvit.deployment.target import Export, Target


def _write(export: Export) -> Facts:
    graph, facts = export.onnx_graph(True)
    write_onnx(graph, export.path)
    return facts


ONNX = Target(
    "onnx",
    suffix=".onnx",
    runtime="onnxruntime",
    needs=("onnxscript", "onnx"),
    install=INSTALL,
    write=_write,
    open=OnnxRuntime,
    files=lambda path: [path, data_of(path)],
    settings=frozenset({"opset", "signed"}),
)
