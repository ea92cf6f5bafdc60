"""The target ``openvino``: an IR, which is an .xml and a .bin, for OpenVINO on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quietvit.deployment.facts import Facts
from quietvit.deployment.for_openvino.claims import SATURATES
from quietvit.deployment.for_openvino.compiling import INSTALL
from quietvit.deployment.for_openvino.file import write_openvino
from quietvit.deployment.for_openvino.runtime import OpenVINO
from quietvit.deployment.target import Export, Target


def _write(export: Export) -> Facts:
    graph, facts = export.onnx_graph(False)
    weights = {slot.key for slot in export.quantized.slots() if slot.is_weight}
    wide = sum(key in weights and grid.bits == 8 for key, grid in export.grids.items())
    if wide:
        note = f"{wide} weights have 8 bits: {SATURATES}"
        facts = replace(facts, notes=(*facts.notes, note))
    return write_openvino(graph, export.path, facts)


def _open(path: Path, threads: int) -> OpenVINO:
    return OpenVINO(path, threads=threads)


OPENVINO = Target(
    "openvino",
    suffix=".xml",
    runtime="openvino",
    needs=("onnxscript", "onnx", "openvino"),
    install=INSTALL,
    write=_write,
    open=_open,
    files=lambda path: [path, path.with_suffix(".bin")],
    settings=frozenset({"opset", "signed"}),
    reads=(".onnx",),
)
