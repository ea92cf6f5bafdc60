"""Write convolutions with a quantized output as onnxruntime's integer convolution.

onnxruntime has no other integer convolution. ``products`` writes all other products.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quietvit.deployment.facts import COARSEST
from quietvit.deployment.for_onnx.writer import Stored, Writer, constant_of, other_input

ROUNDED = ":rounded"
MOVES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
LARGEST_SUM = 2**29
FLOAT32 = 2.0**-21
"""The float32 error of a sum, relative to the largest sum, in either model."""
UNROUNDED = (
    "onnxruntime has integer convolutions only with a quantized output, but this output is read in "
    "float; conv_output_bits=8 of the method quantizes it"
)


@dataclass(frozen=True)
class Rounded:
    """A convolution that outputs the codes of its reader ``slot`` (``site:operand``).

    ``rounding`` bounds the error of the output in steps of these codes, per channel (dim 1) or one
    number for all. It covers the rounding of bias and codes, and the float32 error.
    """

    slot: str
    rounding: tuple[float, ...]


@dataclass(frozen=True)
class Integers:
    """The integers of a convolution: weight (code - zero) * factor with ``scale``, int32 bias.

    ``rounding`` bounds the output's error in steps of its codes. All have shape (out channels,).
    """

    zero: np.ndarray
    factor: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    rounding: np.ndarray


@dataclass
class Behind:
    """The operators between a convolution and the quantizer of its output.

    The quantizer gets min(max(gain * sums + offset, low), high), with gain and offset per channel.
    ``moves`` only rearrange entries. ``terms`` is the sum of the absolute values that float32 adds
    up to ``offset``. These may nearly cancel, such as BatchNorm's bias and mean.
    """

    quantizer: Any
    gain: np.ndarray
    offset: np.ndarray
    terms: np.ndarray
    low: float = -np.inf
    high: float = np.inf
    moves: list[Any] = field(default_factory=list)


def convolution_of(mark: Any) -> Any:
    """Return the convolution that is the only reader of a marked weight, else None."""
    users = list(mark.outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "Conv" or users[0].idx != 1:
        return None
    return users[0].node


def quantized_at_once(writer: Writer, conv: Any, stored: Stored) -> str | Rounded:
    """Rewrite a convolution so that a runtime computes its output's codes from its input's codes.

    BatchNorm and biases are folded into the weight's scales and an int32 bias. ReLU and Clip limit
    the output's codes. Values equal the simulated model's except for rounding, because the bias
    becomes a whole number of sum steps. No output moves by more than ``COARSEST`` of its step.

    Returns what was written, or the reason why nothing was changed.
    """
    codes, producer = stored.codes, conv.inputs[0].producer()
    assert codes is not None
    if codes.ndim != 4:
        return "onnxruntime has integer convolutions only for images (2-D)"
    if producer is None or producer.op_type != "DequantizeLinear":
        return "its input is float"
    behind = _behind(conv, len(codes))
    if behind is None:
        return UNROUNDED
    step = float(_constant(producer.inputs[1]))
    weight = _integers(stored, behind, step)
    if isinstance(weight, str):
        return weight
    _write(writer, conv, stored, behind, step, weight)
    slot = behind.quantizer.inputs[1].name.removesuffix(":scale")
    rounding = weight.rounding
    return Rounded(
        slot, tuple((rounding.max(keepdims=True) if behind.moves else rounding).tolist())
    )


def _behind(conv: Any, channels: int) -> Behind | None:
    """Follow the convolution's output to its only reader, a quantizer; None if there is another."""
    bias = constant_of(conv.inputs[2]) if len(conv.inputs) > 2 else np.zeros(channels)
    if bias is None:
        return None
    offset = bias.astype(np.float64)
    chain = Behind(None, np.ones(channels), offset, np.abs(offset))
    value, affine = conv.outputs[0], True
    while True:
        if value.is_graph_output() or len(list(value.uses())) != 1:
            return None
        node = next(iter(value.uses())).node
        if node.op_type == "QuantizeLinear" and node.inputs[0] is value:
            chain.quantizer = node
            return chain
        if affine and (folded := _affine(node, value, channels)) is not None:
            gain, offset, terms = folded
            chain.gain, chain.offset = chain.gain * gain, chain.offset * gain + offset
            chain.terms = chain.terms * np.abs(gain) + terms
        elif (clipped := _clip(node, value)) is not None:
            affine = False
            low, high = clipped
            chain.low, chain.high = (min(max(end, low), high) for end in (chain.low, chain.high))
        elif node.op_type in MOVES and node.inputs[0] is value:
            affine = False
            chain.moves.append(node)
        else:
            return None
        value = node.outputs[0]


def _affine(
    node: Any, value: Any, channels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return gain, offset and terms (see ``Behind``) of a node that is affine per channel."""
    if node.op_type == "BatchNormalization" and node.inputs[0] is value:
        arrays = [constant_of(source) for source in node.inputs[1:5]]
        if any(array is None for array in arrays):
            return None
        weight, bias, mean, variance = (np.asarray(a, dtype=np.float64) for a in arrays)
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        gain = weight / np.sqrt(variance + epsilon)
        return gain, bias - mean * gain, np.abs(bias) + np.abs(mean * gain)
    if node.op_type not in ("Add", "Mul"):
        return None
    array = constant_of(other_input(node, value))
    if array is None or array.ndim > 4 or array.dtype != np.float32:
        return None
    wide = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if wide.shape not in ((1, channels, 1, 1), (1, 1, 1, 1)):
        return None
    row = np.broadcast_to(wide.reshape(-1).astype(np.float64), channels)
    zero = np.zeros(channels)
    return (row, zero, zero) if node.op_type == "Mul" else (zero + 1, row, np.abs(row))


def _clip(node: Any, value: Any) -> tuple[float, float] | None:
    if node.inputs[0] is not value:
        return None
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    ends = []
    for place, free in ((1, -np.inf), (2, np.inf)):
        end = node.inputs[place] if len(node.inputs) > place else None
        array = None if end is None else constant_of(end)
        if end is not None and array is None:
            return None
        ends.append(free if array is None else float(array))
    return ends[0], ends[1]


def _constant(value: Any) -> np.ndarray:
    array = constant_of(value)
    assert array is not None
    return array


def _integers(stored: Stored, behind: Behind, step: float) -> Integers | str:
    """Fold ``behind`` into the weight, or return why 8 bits cannot hold it.

    The unit of the int32 sums is scale * |gain| * step. A finer unit rounds the bias less. So a
    channel's codes are multiplied by the largest integer ``finer`` that keeps them within 8 bits,
    and its scale is divided by it. Example: codes up to 7 become codes up to 126 with ``finer`` 18.
    If a bias does not fit in int32, the channel's unit grows, and its codes are rounded.
    Error bound in units: 255 times the codes' rounding (inputs are up to 255 from their zero
    point), 0.5 for the bias, and ``FLOAT32`` times the largest sum.
    """
    grid, codes = stored.grid, stored.codes
    assert codes is not None
    channels = len(codes)
    if grid.scale.ndim and grid.axis != 0:
        return "its weight has a scale for each input channel"
    zero = np.broadcast_to(grid.zero_point, channels)
    whole = np.abs(codes.astype(np.int64) - zero.reshape(-1, 1, 1, 1)).reshape(channels, -1)
    if whole.max() > 127:
        return (
            "its weight has zero points, and its codes minus zero point do not fit 8 bits; use "
            "weight_symmetric=True, or 7 bits"
        )
    finer = 127 // np.maximum(whole.max(axis=1), 1)
    sign = np.where(behind.gain < 0, -1, 1)
    output = float(_constant(behind.quantizer.inputs[1]))
    exact = grid.scale.astype(np.float64) * np.abs(behind.gain) / finer * step
    unit = np.maximum(exact, np.maximum(np.abs(behind.offset) / LARGEST_SUM, output / LARGEST_SUM))
    bias = np.rint(behind.offset / unit)
    factor = sign * finer * np.where(unit > exact, exact / unit, 1.0)
    spread = whole * np.abs(factor).reshape(-1, 1)
    reach = 255 * spread.sum(axis=1) + behind.terms / unit
    lost = 255 * np.abs(np.rint(spread) - spread).sum(axis=1) + 0.5 + reach * FLOAT32
    rounding = lost * unit / output
    if rounding.max() > COARSEST:
        worst = int(rounding.argmax())
        return (
            f"in integers its output would be off by up to {rounding[worst]:.2g} steps of its "
            f"codes (channel {worst}), because its bias is rounded to an integer"
        )
    return Integers(zero, factor, (unit / step).astype(np.float32), bias.astype(np.int32), rounding)


def _write(
    writer: Writer, conv: Any, stored: Stored, behind: Behind, step: float, weight: Integers
) -> None:
    site, old, like = stored.name.rpartition(":")[0], behind.quantizer, conv.outputs[0]
    units = (weight.scale.astype(np.float64) * step).astype(np.float32)
    shift = writer.node(
        conv,
        "DequantizeLinear",
        [writer.constant(f"{site}:bias", weight.bias), writer.constant(f"{site}:units", units)],
        f"{site}:bias:values",
        axis=0,
    )
    values = _weight(writer, conv, stored, weight)
    kept = {name: attribute.value for name, attribute in conv.attributes.items()}
    inputs = [conv.inputs[0], values, shift]
    product = writer.node(conv, "Conv", inputs, f"{site}:product", like, **kept)
    codes = writer.node(conv, "QuantizeLinear", [product, *old.inputs[1:]], f"{site}:quantized")
    codes.shape, codes.type = like.shape, old.outputs[0].type
    codes = _clipped(writer, conv, site, behind, codes)
    for node in behind.moves:
        kept = {name: attribute.value for name, attribute in node.attributes.items()}
        inputs = [codes, *node.inputs[1:]]
        codes = writer.node(node, node.op_type, inputs, f"{node.name}:codes", **kept)
        codes.shape, codes.type = node.outputs[0].shape, old.outputs[0].type
    codes.name = f"{site}{ROUNDED}"
    old.outputs[0].replace_all_uses_with(codes)


def _weight(writer: Writer, conv: Any, stored: Stored, weight: Integers) -> Any:
    """Return the weight's values. 4-bit codes stay 4-bit in the file and are scaled at loading."""
    import onnx_ir as ir

    assert stored.codes is not None
    zero, factor = (row.reshape(-1, 1, 1, 1) for row in (weight.zero, weight.factor))
    codes = writer.weight(conv, stored, stored.codes)
    if codes.is_initializer() or (factor != np.rint(factor)).any():
        whole = np.rint((stored.codes.astype(np.int32) - zero) * factor)
        codes = writer.constant(f"{stored.name}:spread", whole.astype(np.int8))
    else:
        name = stored.name
        codes = writer.node(conv, "Cast", [codes], f"{name}:wide", to=int(ir.DataType.INT32))
        for op, row in (("Sub", zero), ("Mul", factor)):
            row = writer.constant(f"{name}:{op.lower()}", row.astype(np.int32))
            codes = writer.node(conv, op, [codes, row], f"{name}:{op}")
        codes = writer.node(conv, "Cast", [codes], f"{name}:spread", to=int(ir.DataType.INT8))
    none = np.zeros(len(weight.scale), np.int8)  # kernels of other runtimes need a zero point
    rest = [
        writer.constant(f"{stored.name}:scale", weight.scale),
        writer.constant(f"{stored.name}:zero_point", none),
    ]
    return writer.node(conv, "DequantizeLinear", [codes, *rest], f"{stored.name}:values", axis=0)


def _clipped(writer: Writer, before: Any, site: str, behind: Behind, codes: Any) -> Any:
    """Clip the codes to those of ``behind.low`` and ``behind.high``, if 8 bits hold others."""
    scale = np.float32(1) / _constant(behind.quantizer.inputs[1])
    zero = _constant(behind.quantizer.inputs[2])
    limits = np.iinfo(zero.dtype)
    ends = [
        int(np.clip(np.rint(np.float32(end) * scale) + int(zero), limits.min, limits.max))
        for end in (behind.low, behind.high)
    ]
    if ends == [limits.min, limits.max]:
        return codes
    bounds = [
        writer.constant(f"{site}:{side}", np.array(end, dtype=zero.dtype))
        for side, end in zip(("low", "high"), ends, strict=True)
    ]
    return writer.node(before, "Clip", [codes, *bounds], f"{site}:clipped", codes)
