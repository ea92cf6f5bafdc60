"""Replace marks by QuantizeLinear and DequantizeLinear in the layout that integer kernels need.

``capture`` makes the marked graph, and ``products`` rearranges products. Values and nodes are named
after their sites, so that ``proof`` finds them in a runtime's own graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from quietvit.deployment.for_onnx.capture import DOMAIN, WEIGHT
from quietvit.deployment.for_onnx.convolutions import (
    MOVES,
    UNROUNDED,
    Rounded,
    convolution_of,
    quantized_at_once,
)
from quietvit.deployment.for_onnx.fold import fold_affine
from quietvit.deployment.for_onnx.products import (
    apart_from_limits,
    patches_as_product,
    product_of_weight,
    settled,
)
from quietvit.deployment.for_onnx.writer import Stored, Writer
from quietvit.deployment.grids import Grid

SIGNED = (
    "a file with signed codes keeps convolutions in the form for TensorRT, which onnxruntime "
    "computes in float"
)


def lower(
    model: Any, stored: Mapping[str, Stored], at_once: bool = True
) -> dict[str, Rounded | str]:
    """Replace every mark of an ``onnx_ir.Model`` in place. ``stored`` is by slot key.

    Afterwards the graph has only standard operators, and no unused weights. ``at_once`` is for
    onnxruntime: a convolution with a quantized output is written with its quantizer, and no Relu or
    Clip follows a product directly. With signed codes, convolutions stay as they are, and moves
    (``MOVES``) go before quantizers.

    Returns by site the result for each convolution that is not a product of patches: ``Rounded``,
    or the reason why it stays in float in onnxruntime.
    """
    convolutions: dict[str, Rounded | str] = {}
    graph = model.graph
    name = graph.outputs[0].name
    # Signed activations are for TensorRT, which has no Cast from int4.
    signed = any(entry.codes is None and entry.grid.signed for entry in stored.values())
    writer = Writer(graph, packed=not signed)
    marks = [node for node in graph if node.domain == DOMAIN]
    for node in [mark for mark in marks if mark.op_type != WEIGHT]:
        entry = stored[node.attributes["slot"].as_string()]
        x, output = node.inputs[0], node.outputs[0]
        codes = writer.quantized(node, x, entry)
        values = writer.dequantized(node, codes, entry)
        _replace(graph, node, values, output)
    for node in [mark for mark in marks if mark.op_type == WEIGHT]:
        entry = stored[node.attributes["slot"].as_string()]
        output = node.outputs[0]
        conv = convolution_of(node)
        rounds = conv is not None and at_once and not signed
        written = quantized_at_once(writer, conv, entry) if rounds else None
        if isinstance(written, Rounded):
            convolutions[entry.name.rpartition(":")[0]] = written
            continue  # the old convolution has no reader now, and _swept removes it
        if patches_as_product(writer, node, entry) or product_of_weight(writer, node, entry):
            graph.remove(node, safe=True)
            continue
        if conv is not None:
            reason = SIGNED if signed else written or UNROUNDED
            convolutions[entry.name.rpartition(":")[0]] = reason
        assert entry.codes is not None
        codes = writer.weight(node, entry, entry.codes)
        values = writer.dequantized(node, codes, entry, entry.grid.axis)
        _replace(graph, node, values, output)
    fold_affine(writer)
    _swept(model)
    settled(writer)
    if at_once:
        apart_from_limits(writer)
    if signed and at_once:
        _pair_quantizers(writer)
    _named_output(writer, name)
    model.opset_imports.pop(DOMAIN, None)
    graph.opset_imports.pop(DOMAIN, None)
    _swept(model)
    return convolutions


def _pair_quantizers(writer: Writer) -> None:
    """Let DequantizeLinear follow QuantizeLinear directly, with moves before both.

    On x86-64 onnxruntime has no kernel for int8 activations, so it converts such pairs to uint8.
    It leaves the product in float if a Reshape or Transpose stands inside the pair.
    """
    for values in [node for node in writer.graph if node.op_type == "DequantizeLinear"]:
        codes, moves = values.inputs[0], list[Any]()
        while (producer := codes.producer()) is not None and producer.op_type in MOVES:
            if len(list(codes.uses())) != 1:
                break
            moves.append(producer)
            codes = producer.inputs[0]
        if not moves or producer is None or producer.op_type != "QuantizeLinear":
            continue
        moves[-1].replace_input_with(0, producer.inputs[0])
        for move in moves:
            move.outputs[0].type = producer.inputs[0].type
        moved = moves[0].outputs[0]
        inputs = [moved, *producer.inputs[1:]]
        again = writer.node(values, "QuantizeLinear", inputs, f"{producer.name}:moved")
        again.shape, again.type = moved.shape, codes.type
        values.replace_input_with(0, again)


def _replace(graph: Any, node: Any, values: Any, output: Any) -> None:
    values.shape, values.type = output.shape, output.type
    output.replace_all_uses_with(values)
    graph.remove(node, safe=True)


def _named_output(writer: Writer, name: str) -> None:
    """Name the graph's output ``name``. A product keeps its own name, so it gets an Identity."""
    graph = writer.graph
    output = graph.outputs[0]
    node = output.producer()
    if node is not None and node.name == output.name:
        import onnx_ir as ir

        copy = ir.node("Identity", [output], name=name)
        copy.outputs[0].shape, copy.outputs[0].type = output.shape, output.type
        graph.append(copy)
        graph.outputs[0] = copy.outputs[0]
    graph.outputs[0].name = name


def _swept(model: Any) -> None:
    """Remove nodes and initializers that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def weight_codes(grid: Grid, quantizer: Any, weight: Tensor) -> np.ndarray:
    """Return the codes of a weight in the layout that its site reads, (out, in, ...)."""
    return grid.codes(quantizer, weight.detach())
