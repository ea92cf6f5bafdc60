"""From marks to QuantizeLinear and DequantizeLinear, laid out as integer kernels want them.

The marked graph comes from ``capture``; products are rearranged in ``products``. Values and nodes
are named after their sites, so that a runtime's own graph can be read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from quietvit.deployment.for_onnx.capture import DOMAIN, WEIGHT
from quietvit.deployment.for_onnx.fold import fold_affine
from quietvit.deployment.for_onnx.products import patches_as_product, product_of_weight, settled
from quietvit.deployment.for_onnx.writer import Stored, Writer
from quietvit.deployment.grids import Grid


def lower(model: Any, stored: Mapping[str, Stored]) -> None:
    """Replace every mark of an ``onnx_ir.Model`` in place; ``stored`` by the key of the slot.

    Afterwards the graph has standard operators alone. Weights that nothing reads any more are gone.
    """
    graph = model.graph
    name = graph.outputs[0].name
    # Who needs signed activations (TensorRT) has no Cast from int4.
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
        if patches_as_product(writer, node, entry) or product_of_weight(writer, node, entry):
            graph.remove(node, safe=True)
            continue
        assert entry.codes is not None
        codes = writer.weight(node, entry, entry.codes)
        values = writer.dequantized(node, codes, entry, entry.grid.axis, alone=True)
        _replace(graph, node, values, output)
    fold_affine(writer)
    _swept(model)
    settled(writer)
    graph.outputs[0].name = name
    model.opset_imports.pop(DOMAIN, None)
    graph.opset_imports.pop(DOMAIN, None)
    _swept(model)


def _replace(graph: Any, node: Any, values: Any, output: Any) -> None:
    values.shape, values.type = output.shape, output.type
    output.replace_all_uses_with(values)
    graph.remove(node, safe=True)


def _swept(model: Any) -> None:
    """Remove nodes and initializers that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def weight_codes(grid: Grid, quantizer: Any, weight: Tensor) -> np.ndarray:
    """Codes of a weight as the site reads it, (out, in, ...)."""
    return grid.codes(quantizer, weight.detach())
