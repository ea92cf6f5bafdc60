"""Add integers, scales and nodes to an ONNX graph, under the names of their sites.

``lower``, ``products`` and ``fold`` decide where they go.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quietvit.deployment.grids import Grid


@dataclass
class Stored:
    """The grid of a slot, and for a weight its codes in the model's own layout."""

    name: str
    grid: Grid
    codes: np.ndarray | None = None


@dataclass
class Writer:
    """Adds named nodes and initializers to a graph.

    ``packed`` stores weights of at most 4 bits as int4, if the opset has it.
    """

    graph: Any
    packed: bool = True
    _shared: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def constant(self, name: str, array: np.ndarray) -> Any:
        """Return the initializer ``name``; it is added with ``array`` if it does not exist."""
        import onnx_ir as ir

        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.tensor(np.array(array, order="C"), name=name)
        value = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
        )
        self.graph.initializers[name] = value
        return value

    def node(
        self,
        before: Any,
        op: str,
        inputs: list[Any],
        name: str,
        like: Any = None,
        **attributes: Any,
    ) -> Any:
        """Insert a node before ``before``. Returns its output ``name``, shaped like ``like``."""
        import onnx_ir as ir

        node = ir.node(op, inputs, attributes or None, name=name)
        self.graph.insert_before(before, node)
        node.outputs[0].name = name
        if like is not None:
            node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
        return node.outputs[0]

    def quantized(self, before: Any, x: Any, stored: Stored) -> Any:
        """Return x as 8-bit codes by QuantizeLinear, after a Clip for grids below 8 bits."""
        import onnx_ir as ir

        grid = stored.grid
        key = (x, grid.bits, grid.scale.tobytes(), grid.zero_point.tobytes())
        if key in self._shared:
            return self._shared[key]
        name = stored.name
        if (codes := self._codes_of(x, stored)) is not None:
            return codes
        clipped = x
        if grid.ends is not None:
            low, high = (
                self.constant(f"{name}:{side}", end)
                for side, end in zip(("low", "high"), grid.ends, strict=True)
            )
            clipped = self.node(before, "Clip", [x, low, high], f"{name}:clipped", x)
        ends = [clipped, *self.scale(stored)]
        codes = self.node(before, "QuantizeLinear", ends, f"{name}:codes")
        kind = ir.DataType.INT8 if grid.signed else ir.DataType.UINT8
        codes.shape, codes.type = x.shape, ir.TensorType(kind)
        self._shared[key] = codes
        return codes

    def _codes_of(self, x: Any, stored: Stored) -> Any:
        """Return the 8-bit codes that x was dequantized from, if their grid is the same."""
        producer = x.producer()
        if producer is None or producer.op_type != "DequantizeLinear" or stored.grid.bits != 8:
            return None
        known = [constant_of(value) for value in producer.inputs[1:]]
        own = [constant_of(value) for value in self.scale(stored)]
        same = len(known) == len(own) and all(
            a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)
            for a, b in zip(known, own, strict=False)
        )
        return producer.inputs[0] if same else None

    def dequantized(self, before: Any, codes: Any, stored: Stored, axis: int | None = None) -> Any:
        """Return the values of codes by DequantizeLinear, along ``axis`` for scales per channel."""
        extra = {} if stored.grid.scale.ndim == 0 else {"axis": axis}
        inputs = [codes, *self.scale(stored)]
        return self.node(before, "DequantizeLinear", inputs, f"{stored.name}:values", **extra)

    def scale(self, stored: Stored) -> list[Any]:
        """Return scale and zero point, even if the zero point is 0.

        Without one, exact sessions (``session.x64quantprecision``) of onnxruntime before 1.30
        crash. Later versions add it themselves.
        """
        grid = stored.grid
        zero = grid.zero_point.astype(grid.dtype)
        return [
            self.constant(f"{stored.name}:scale", grid.scale),
            self.constant(f"{stored.name}:zero_point", zero),
        ]

    def weight(self, before: Any, stored: Stored, codes: np.ndarray) -> Any:
        """Return the codes of a weight. At most 4 bits are stored as int4 and cast to int8."""
        import onnx_ir as ir

        if stored.grid.bits > 4 or not self._packs():
            return self.constant(f"{stored.name}:codes", codes)
        import ml_dtypes

        small = self.constant(f"{stored.name}:codes4", codes.astype(ml_dtypes.int4))
        return self.node(before, "Cast", [small], f"{stored.name}:codes", to=int(ir.DataType.INT8))

    def _packs(self) -> bool:
        return self.packed and self.graph.opset_imports.get("", 0) >= 21

    def in_blocks(self, before: Any, stored: Stored) -> Any:
        """Return a 4-bit weight (in, out) for float activations, in blocks along its inputs.

        Weight-only kernels need a scale for each block of 16 to 128 inputs. Each channel's scale is
        repeated, so no value changes. Example: (192, 768) has blocks of 64, scales (3, 768). None
        if no block size divides the inputs.
        """
        import ml_dtypes

        grid, codes = stored.grid, stored.codes
        assert codes is not None
        width = codes.shape[1]
        block = next((size for size in (128, 64, 32, 16) if width % size == 0), None)
        if grid.bits > 4 or block is None or not self._packs():
            return None
        shape = (width // block, codes.shape[0])
        scale = np.broadcast_to(grid.scale, shape)
        zero = np.broadcast_to(grid.zero_point, shape)
        inputs = [
            self.constant(f"{stored.name}:codes4", codes.T.astype(ml_dtypes.int4)),
            self.constant(f"{stored.name}:scale", scale),
        ]
        if zero.any():
            inputs.append(self.constant(f"{stored.name}:zero_point", zero.astype(ml_dtypes.int4)))
        return self.node(
            before, "DequantizeLinear", inputs, f"{stored.name}:values", axis=0, block_size=block
        )


def constant_of(value: Any) -> np.ndarray | None:
    """Return the array of an initializer or Constant, or None if the value is computed."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else np.asarray(tensor.numpy())


def only_user(value: Any, op: str) -> Any:
    """Return the node that is the only reader of a value, if it is an ``op``, else None."""
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return None
    return users[0].node if users[0].node.op_type == op else None


def other_input(node: Any, value: Any) -> Any:
    """Return the input of a two-input node that is not ``value``."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]
