"""Fold affine maps of channels into the norms and biases before them.

Re-parametrization adjusts a norm's output, and bias correction a linear's. Folding makes both free
in the exported graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quietvit.deployment.for_onnx.writer import Writer, constant_of, only_user, other_input


def fold_affine(writer: Writer) -> None:
    """Fold constant Mul and Add after LayerNormalization, and after a bias, in place.

    Exact except for float32 rounding: g·(γ x̂ + β) + b = (g γ) x̂ + (g β + b), and
    1·(y + b) + c = y + (b + c).
    """
    for node in [n for n in writer.graph if n.op_type == "Mul"]:
        _drop_ones(writer, node)
    for node in list(writer.graph):
        if node.op_type == "LayerNormalization":
            _into_norm(writer, node)
        elif node.op_type == "Add":
            _into_bias(writer, node)


def _drop_ones(writer: Writer, mul: Any) -> None:
    for value in mul.inputs:
        factor = constant_of(other_input(mul, value))
        if factor is None or not (factor == 1).all() or mul.outputs[0].is_graph_output():
            continue
        if value.shape is not None and value.shape == mul.outputs[0].shape:
            mul.outputs[0].replace_all_uses_with(value)
            writer.graph.remove(mul, safe=True)
        return


def _affine_behind(value: Any) -> tuple[np.ndarray, np.ndarray, Any] | None:
    """Return (gain, bias, Add node) of ``value * gain + bias``, or None for another reader.

    Gain and bias have shape (1,) or (channels,). Without a Mul the gain is 1.
    """
    mul = only_user(value, "Mul")
    add = only_user(value if mul is None else mul.outputs[0], "Add")
    if add is None:
        return None
    rank = None if value.shape is None else len(value.shape)
    ones = np.ones(1, np.float32)
    gain = ones if mul is None else _vector(constant_of(other_input(mul, value)), rank)
    bias = _vector(constant_of(other_input(add, value if mul is None else mul.outputs[0])), rank)
    return None if gain is None or bias is None else (gain, bias, add)


def _vector(array: np.ndarray | None, rank: int | None) -> np.ndarray | None:
    """Return a float32 constant along the last axis as a vector; a scalar has shape (1,).

    None for any other constant, or one with more dims than ``rank``, its partner's rank.
    """
    if array is None or rank is None or array.ndim > rank or array.dtype != np.float32:
        return None
    along_last = array.ndim == 0 or array.size == array.shape[-1]
    return array.reshape(-1) if along_last else None


def _into_norm(writer: Writer, norm: Any) -> None:
    behind = _affine_behind(norm.outputs[0])
    if behind is None or norm.outputs[0].is_graph_output():
        return
    scale = constant_of(norm.inputs[1])
    offset = constant_of(norm.inputs[2]) if len(norm.inputs) > 2 else None
    if scale is None or scale.ndim != 1 or (len(norm.inputs) > 2 and offset is None):
        return
    gain, bias, add = behind
    if gain.size not in (1, scale.size) or bias.size not in (1, scale.size):
        return
    offset = np.zeros_like(scale) if offset is None else offset
    wide = [array.astype(np.float64) for array in (scale, offset, gain, bias)]
    folded = wide[0] * wide[2], wide[1] * wide[2] + wide[3]
    affine = [
        writer.constant(f"{norm.name}:{name}", array.astype(np.float32))
        for name, array in zip(("gain", "bias"), folded, strict=True)
    ]
    attributes = {name: attribute.value for name, attribute in norm.attributes.items()}
    like = add.outputs[0]
    new = writer.node(
        norm,
        "LayerNormalization",
        [norm.inputs[0], *affine],
        f"{norm.name}:folded",
        like,
        **attributes,
    )
    like.replace_all_uses_with(new, replace_graph_outputs=True)


def _into_bias(writer: Writer, first: Any) -> None:
    behind = _affine_behind(first.outputs[0])
    if behind is None:
        return
    product = next((i for i in first.inputs if constant_of(i) is None), None)
    rank = None if product is None or product.shape is None else len(product.shape)
    array = None if product is None else _vector(constant_of(other_input(first, product)), rank)
    gain, bias, add = behind
    if array is None or not (gain == 1).all() or bias.size not in (1, array.size):
        return
    total = writer.constant(f"{first.name}:bias", array + bias)
    like = add.outputs[0]
    new = writer.node(first, "Add", [product, total], f"{first.name}:folded", like)
    like.replace_all_uses_with(new, replace_graph_outputs=True)
