"""Remove the weights' zero points from an ONNX graph, before ``file`` converts it.

OpenVINO computes a product in float if its weight has a zero point (seen in its runtime model).
"""

from __future__ import annotations

from typing import Any

import numpy as np

SUFFIX = ":weight:zero_point"


def without_zero_points(model: Any) -> frozenset[str]:
    """Rewrite our ``onnx.ModelProto`` in place. Returns the sites whose zero points remain.

    Zero points of 0 are deleted. If code minus zero point fits in int8, it becomes the new code,
    and no value changes. This holds for all weights of at most 7 bits. 4-bit weights stay int4 in
    the file, and the zero point is subtracted at loading. For other MatMuls
    s (q - z) x = s q x - s z Σx, and Σx is the input times ones. (OpenVINO's ReduceSum of 8-bit
    codes gave wrong sums.) Other convolutions keep their zero points. Derived here.
    """
    from onnx import numpy_helper

    graph = model.graph
    stored = {entry.name: entry for entry in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    kept: set[str] = set()
    for node in list(graph.node):
        if node.op_type != "DequantizeLinear" or len(node.input) < 3:
            continue
        if not node.input[2].endswith(SUFFIX) or node.input[2] not in stored:
            continue
        if not numpy_helper.to_array(stored[node.input[2]]).any():
            del node.input[2]
            continue
        readers = [user for user in graph.node if node.output[0] in user.input]
        if any(not _quantized(producers.get(reader.input[0])) for reader in readers):
            continue  # a float input: the product is float anyway
        site = node.input[2].removesuffix(SUFFIX)
        if not _moved(graph, node, stored, producers) and not _corrected(graph, node, stored):
            kept.add(site)
    return frozenset(kept)


def _quantized(node: Any) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _moved(graph: Any, node: Any, stored: dict[str, Any], producers: dict[str, Any]) -> bool:
    """Subtract the zero point from the codes. Returns False if int8 cannot hold the result."""
    from onnx import helper, numpy_helper

    cast = producers.get(node.input[0])
    entry = stored.get(cast.input[0] if cast is not None else node.input[0])
    if entry is None:
        return False
    codes = numpy_helper.to_array(entry).astype(np.int16)
    zero = _along(numpy_helper.to_array(stored[node.input[2]]), _axis(node), codes.ndim)
    moved = codes - zero
    if moved.min() < -128 or moved.max() > 127:
        return False
    if cast is None:
        entry.CopyFrom(numpy_helper.from_array(moved.astype(np.int8), entry.name))
    else:
        shaped, name = f"{node.input[2]}:shaped", f"{node.input[0]}:moved"
        graph.initializer.append(numpy_helper.from_array(zero.astype(np.int8), shaped))
        _before(graph, node, helper.make_node("Sub", [node.input[0], shaped], [name], name))
        node.input[0] = name
    del node.input[2]
    return True


def _corrected(graph: Any, node: Any, stored: dict[str, Any]) -> bool:
    """Multiply by the codes, then subtract s z Σx. Returns False if it is not one MatMul."""
    from onnx import helper, numpy_helper

    readers = [user for user in graph.node if node.output[0] in user.input]
    if len(readers) != 1 or readers[0].op_type != "MatMul" or readers[0].input[1] != node.output[0]:
        return False
    product = readers[0]
    scale = numpy_helper.to_array(stored[node.input[1]])
    zero = numpy_helper.to_array(stored[node.input[2]]).astype(np.float32)
    name = product.output[0]
    offset, total, raw = f"{name}:offset", f"{name}:total", f"{name}:raw"
    graph.initializer.append(numpy_helper.from_array(zero * scale, offset))
    ones, one = f"{name}:ones", f"{name}:one"
    width = stored[node.input[0]].dims[0]
    for array, title in ((np.ones((width, 1), dtype=np.int8), ones), (np.float32(1), one)):
        graph.initializer.append(numpy_helper.from_array(np.asarray(array), title))
    added = [
        helper.make_node("DequantizeLinear", [ones, one], [f"{ones}:values"], f"{ones}:values"),
        helper.make_node("MatMul", [product.input[0], f"{ones}:values"], [total], total),
        helper.make_node("Mul", [total, offset], [f"{total}:scaled"], f"{total}:scaled"),
        helper.make_node("Sub", [raw, f"{total}:scaled"], [name], f"{name}:corrected"),
    ]
    product.output[0] = raw
    place = list(graph.node).index(product)
    for later, new in enumerate(added, start=1):
        graph.node.insert(place + later, new)
    del node.input[2]
    return True


def _before(graph: Any, node: Any, new: Any) -> None:
    graph.node.insert(list(graph.node).index(node), new)


def _axis(node: Any) -> int | None:
    axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
    return int(axes[0]) if axes else None


def _along(values: np.ndarray, axis: int | None, ndim: int) -> np.ndarray:
    """Reshape values per channel to broadcast along ``axis``; a scalar gets shape ()."""
    wide = values.astype(np.int16)
    if wide.ndim == 0 or axis is None:
        return wide.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return wide.reshape(shape)
