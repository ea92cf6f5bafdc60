"""Lay out matrix products so that runtimes use their integer kernels.

Runtimes compute four patterns in float, as their optimized graphs show (docs/decisions.md):

- A product with a plain bias vector can become a float Gemm. So biases get shape (1, 1, N).
- A Gemm with a float bias. So it becomes a MatMul.
- A convolution with a float output. So one with separate patches becomes a MatMul.
- A MatMul with Relu or Clip as reader. So another operator is put between.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quietvit.deployment.for_onnx.writer import Stored, Writer, constant_of, only_user, other_input


def product_of_weight(writer: Writer, mark: Any, stored: Stored) -> bool:
    """Rewrite ``x Wᵀ + b`` of a marked W, a MatMul or Gemm. Returns False for other readers."""
    users = list(mark.outputs[0].uses())
    if len(users) != 1:
        return False
    user = users[0].node
    if user.op_type == "Gemm" and users[0].idx == 1:
        return _gemm(writer, user, stored)
    if user.op_type != "Transpose" or list(user.attributes["perm"].as_ints()) != [1, 0]:
        return False
    assert stored.codes is not None
    readers = list(user.outputs[0].uses())
    if not readers or any(r.node.op_type != "MatMul" or r.idx != 1 for r in readers):
        return False
    alone = all(_site_of(reader.node.inputs[0]) is None for reader in readers)
    values = writer.in_blocks(user, stored) if alone else None
    if values is None:
        codes = writer.weight(user, stored, stored.codes.T)
        values = writer.dequantized(user, codes, stored, 1)
    values.type = user.outputs[0].type
    user.outputs[0].replace_all_uses_with(values)
    writer.graph.remove(user, safe=True)
    return True


def _gemm(writer: Writer, node: Any, stored: Stored) -> bool:
    """Rewrite Gemm(x, W, b), x (B, in), as MatMul of (B, 1, in), which no fusion makes a Gemm."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
    if not plain or attributes.get("transA", 0) or not attributes.get("transB", 0):
        return False
    assert stored.codes is not None
    site = stored.name.rpartition(":")[0]
    x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    middle = writer.constant("quietvit:axis1", np.array([1], dtype=np.int64))
    producer = x.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        rows = writer.node(node, "Unsqueeze", [producer.inputs[0], middle], f"{site}:rows")
        tall = writer.node(node, "DequantizeLinear", [rows, *producer.inputs[1:]], f"{site}:tall")
    else:
        tall = writer.node(node, "Unsqueeze", [x, middle], f"{site}:tall")
    tall.type = x.type
    codes = writer.weight(node, stored, stored.codes.T)
    weight = writer.dequantized(node, codes, stored, 1)
    weight.type = x.type
    out = writer.node(node, "MatMul", [tall, weight], f"{site}:product")
    if bias is not None:
        out = writer.node(node, "Add", [out, bias], f"{site}:biased")
    flat = writer.node(node, "Squeeze", [out, middle], f"{site}:flat", node.outputs[0])
    node.outputs[0].replace_all_uses_with(flat, replace_graph_outputs=True)
    writer.graph.remove(node, safe=True)
    return True


def patches_as_product(writer: Writer, mark: Any, stored: Stored) -> bool:
    """Rewrite an unpadded convolution with stride = kernel: patches (B, L, C·k·k) times Wᵀ.

    Example: ViT's patch embedding of images (B, 3, 224, 224) with k = 16 and 192 channels becomes
    (B, 196, 768) times (768, 192). Returns False for any other convolution.
    """
    users = list(mark.outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "Conv" or users[0].idx != 1:
        return False
    conv = users[0].node
    assert stored.codes is not None
    out, channels, *kernel = stored.codes.shape
    attributes = {name: attribute.value for name, attribute in conv.attributes.items()}
    x, shape = conv.inputs[0], conv.inputs[0].shape
    sides = [] if shape is None else [side for side in list(shape)[2:] if isinstance(side, int)]
    plain = (
        len(kernel) == 2
        and list(attributes.get("strides", [1, 1])) == kernel
        and not any(attributes.get("pads", [0]))
        and all(n == 1 for n in attributes.get("dilations", [1]))
        and attributes.get("group", 1) == 1
        and attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and len(sides) == 2
        and all(side >= k for side, k in zip(sides, kernel, strict=False))
    )
    producer = x.producer()
    if not plain or producer is None or producer.op_type != "DequantizeLinear":
        return False
    if any(side % k for side, k in zip(sides, kernel, strict=True)):
        return False
    site = stored.name.rpartition(":")[0]
    (h, w), (kh, kw) = (side // k for side, k in zip(sides, kernel, strict=True)), kernel
    cut = writer.constant(f"{site}:cut", np.array([-1, channels, h, kh, w, kw], dtype=np.int64))
    rows = writer.constant(
        f"{site}:rows", np.array([-1, h * w, channels * kh * kw], dtype=np.int64)
    )
    pixels = writer.node(conv, "Reshape", [producer.inputs[0], cut], f"{site}:cut_codes")
    pixels = writer.node(conv, "Transpose", [pixels], f"{site}:ordered", perm=[0, 2, 4, 1, 3, 5])
    pixels = writer.node(conv, "Reshape", [pixels, rows], f"{site}:patches")
    patches = writer.node(
        conv, "DequantizeLinear", [pixels, *producer.inputs[1:]], f"{site}:values"
    )
    flat = stored.codes.reshape(out, -1).T
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    codes = writer.weight(conv, stored, flat)
    weight = writer.dequantized(conv, codes, stored, 1)
    patches.type = weight.type = x.type
    product = writer.node(conv, "MatMul", [patches, weight], f"{site}:product")
    if bias is not None:
        product = writer.node(conv, "Add", [product, bias], f"{site}:biased")
    last = writer.node(conv, "Transpose", [product], f"{site}:channels", perm=[0, 2, 1])
    back = writer.constant(f"{site}:back", np.array([-1, out, h, w], dtype=np.int64))
    image = writer.node(conv, "Reshape", [last, back], f"{site}:image", conv.outputs[0])
    conv.outputs[0].replace_all_uses_with(image, replace_graph_outputs=True)
    writer.graph.remove(conv, safe=True)
    return True


def settled(writer: Writer) -> None:
    """Name products after their sites, and give their biases the shape (1, 1, N)."""
    for node in [n for n in writer.graph if n.op_type in ("MatMul", "Conv")]:
        sites = {_site_of(value) for value in node.inputs[:2]} - {None}
        if len(sites) != 1:
            continue
        site = sites.pop()
        node.name = node.outputs[0].name = f"{site}:product"
        if node.op_type == "Conv":
            continue
        add = only_user(node.outputs[0], "Add")
        array = None if add is None else constant_of(other_input(add, node.outputs[0]))
        if array is None or array.ndim > 1 or array.size == 1:
            continue
        wide = writer.constant(f"{site}:bias", array.reshape(1, 1, -1))
        add.replace_input_with(1 if add.inputs[0] is node.outputs[0] else 0, wide)


def apart_from_limits(writer: Writer) -> None:
    """Put another operator between a product and a Relu or Clip. No value changes.

    onnxruntime merges such a pair into one operator, and computes it in float unless its output is
    quantized. Relu becomes Max. Before a Clip goes a Max or Min with one of its own limits.
    """
    for node in [n for n in writer.graph if n.op_type in ("Relu", "Clip")]:
        x, output = node.inputs[0], node.outputs[0]
        producer = x.producer()
        if producer is None or producer.op_type != "MatMul":
            continue
        name = f"{producer.name}:limited"
        if node.op_type == "Relu":
            zero = writer.constant("quietvit:zero", np.zeros((), np.float32))
            limited = writer.node(node, "Max", [x, zero], name, output)
            output.replace_all_uses_with(limited, replace_graph_outputs=True)
            writer.graph.remove(node, safe=True)
            continue
        limits = zip(("Max", "Min"), node.inputs[1:], strict=False)
        op, limit = next(((op, limit) for op, limit in limits if limit is not None), ("", None))
        if limit is not None:
            node.replace_input_with(0, writer.node(node, op, [x, limit], name, x))


def _site_of(value: Any) -> str | None:
    """Return the site of which a value is an operand, or None if it is not quantized."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    site: str = producer.inputs[1].name.rsplit(":", 2)[0]
    return site
