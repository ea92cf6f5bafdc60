"""The target ``openvino``: an IR, which is an .xml and a .bin, for OpenVINO on the CPU."""

from __future__ import annotations

from dataclasses import replace

from quietvit.deployment.facts import Facts
from quietvit.deployment.for_openvino.file import write_openvino
from quietvit.deployment.for_openvino.kernels import SATURATES
from quietvit.deployment.for_openvino.parts import INSTALL
from quietvit.deployment.for_openvino.runtime import OpenVINO
from quietvit.deployment.target import Export, Target


def _write(export: Export) -> Facts:
    graph, facts = export.onnx_graph(False)
    slots = export.quantized.slots()
    wide = sum(slot.is_weight and export.grids[slot.key].bits == 8 for slot in slots)
    if wide:
        note = f"{wide} weights have 8 bits: {SATURATES}"
        facts = replace(facts, notes=(*facts.notes, note))
    return write_openvino(graph, export.path, facts)


OPENVINO = Target(
    "openvino",
    suffix=".xml",
    runtime="openvino",
    needs=("onnxscript", "onnx", "openvino"),
    install=INSTALL,
    write=_write,
    open=OpenVINO,
    files=lambda path: [path, path.with_suffix(".bin")],
    settings=frozenset({"opset", "signed"}),
    reads=(".onnx",),
)
