"""Adds integers, scales and nodes to an ONNX graph, under names that tell whose they are.

Where they go is decided in ``lower``, ``products`` and ``fold``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quietvit.deployment.grids import Grid


@dataclass
class Stored:
    """What stands at a slot: its grid, and for a weight its codes in the model's own layout."""

    name: str
    grid: Grid
    codes: np.ndarray | None = None


@dataclass
class Writer:
    """Adds nodes and initializers to a graph under the names it is given.

    ``packed``: 4-bit weights take half a byte, where the opset has int4.
    """

    graph: Any
    packed: bool = True
    _shared: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def constant(self, name: str, array: np.ndarray) -> Any:
        """An initializer; one of the same name is the same."""
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
        """A node in front of ``before``; its output, called ``name`` and shaped like ``like``."""
        import onnx_ir as ir

        node = ir.node(op, inputs, attributes or None, name=name)
        self.graph.insert_before(before, node)
        node.outputs[0].name = name
        if like is not None:
            node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
        return node.outputs[0]

    def quantized(self, before: Any, x: Any, stored: Stored) -> Any:
        """x as 8-bit codes: clipped where the codes are fewer, then QuantizeLinear."""
        import onnx_ir as ir

        grid = stored.grid
        key = (x, grid.bits, grid.scale.tobytes(), grid.zero_point.tobytes())
        if key in self._shared:
            return self._shared[key]
        name = stored.name
        if (codes := self._codes_of(x, stored)) is not None:
            return codes
        given = x
        if grid.ends is not None:
            low, high = (
                self.constant(f"{name}:{side}", end)
                for side, end in zip(("low", "high"), grid.ends, strict=True)
            )
            given = self.node(before, "Clip", [x, low, high], f"{name}:clipped", x)
        ends = [given, *self.scale(stored)]
        codes = self.node(before, "QuantizeLinear", ends, f"{name}:codes")
        kind = ir.DataType.INT8 if grid.signed else ir.DataType.UINT8
        codes.shape, codes.type = x.shape, ir.TensorType(kind)
        self._shared[key] = codes
        return codes

    def _codes_of(self, x: Any, stored: Stored) -> Any:
        """The 8-bit codes that x was made from, where they stand for the same values here."""
        made = x.producer()
        if made is None or made.op_type != "DequantizeLinear" or stored.grid.bits != 8:
            return None
        known = [constant_of(given) for given in made.inputs[1:]]
        own = [constant_of(given) for given in self.scale(stored)]
        same = len(known) == len(own) and all(
            a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)
            for a, b in zip(known, own, strict=False)
        )
        return made.inputs[0] if same else None

    def dequantized(self, before: Any, codes: Any, stored: Stored, axis: int | None = None) -> Any:
        """DequantizeLinear, along ``axis`` where there is a scale for each channel."""
        extra = {} if stored.grid.scale.ndim == 0 else {"axis": axis}
        given = [codes, *self.scale(stored)]
        return self.node(before, "DequantizeLinear", given, f"{stored.name}:values", **extra)

    def scale(self, stored: Stored) -> list[Any]:
        """Scale and zero point, the latter also where it is zero.

        Where it is left out, onnxruntime writes one itself. Before 1.30 its exact sessions
        (``session.x64quantprecision``) crash instead.
        """
        grid = stored.grid
        zero = grid.zero_point.astype(grid.dtype)
        return [
            self.constant(f"{stored.name}:scale", grid.scale),
            self.constant(f"{stored.name}:zero_point", zero),
        ]

    def weight(self, before: Any, stored: Stored, codes: np.ndarray) -> Any:
        """The codes of a weight in the layout given; 4-bit ones take half a byte in the file."""
        import onnx_ir as ir

        if stored.grid.bits > 4 or not self._packs():
            return self.constant(f"{stored.name}:codes", codes)
        import ml_dtypes

        small = self.constant(f"{stored.name}:codes4", codes.astype(ml_dtypes.int4))
        return self.node(before, "Cast", [small], f"{stored.name}:codes", to=int(ir.DataType.INT8))

    def _packs(self) -> bool:
        return self.packed and self.graph.opset_imports.get("", 0) >= 21

    def in_blocks(self, before: Any, stored: Stored) -> Any:
        """A 4-bit weight that multiplies float activations, (in, out) in blocks along its inputs.

        Weight-only kernels want a scale for each block of 16 to 128 inputs; each channel's own is
        repeated, so no value changes. None where no such block divides the inputs.
        """
        import ml_dtypes

        grid, codes = stored.grid, stored.codes
        assert codes is not None
        inputs = codes.shape[1]
        block = next((size for size in (128, 64, 32, 16) if inputs % size == 0), None)
        if grid.bits > 4 or block is None or not self._packs():
            return None
        shape = (inputs // block, codes.shape[0])
        scale = np.broadcast_to(grid.scale, shape)
        zero = np.broadcast_to(grid.zero_point, shape)
        given = [
            self.constant(f"{stored.name}:codes4", codes.T.astype(ml_dtypes.int4)),
            self.constant(f"{stored.name}:scale", scale),
        ]
        if zero.any():
            given.append(self.constant(f"{stored.name}:zero_point", zero.astype(ml_dtypes.int4)))
        return self.node(
            before, "DequantizeLinear", given, f"{stored.name}:values", axis=0, block_size=block
        )


def constant_of(value: Any) -> np.ndarray | None:
    """The array of an initializer or Constant; None where the value is computed."""
    import onnx_ir as ir

    found = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if found is None else np.asarray(found.numpy())


def only_user(value: Any, op: str) -> Any:
    """The node that alone reads a value, if it is an ``op``."""
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return None
    return users[0].node if users[0].node.op_type == op else None


def other_input(node: Any, value: Any) -> Any:
    """The second input of a node of two, whichever place ``value`` has."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]
