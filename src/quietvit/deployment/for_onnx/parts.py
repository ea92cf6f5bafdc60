"""Cut the products out of an ONNX file, so that ``parity`` can feed and compare each one."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quietvit.deployment.for_onnx.convolutions import MOVES, ROUNDED
from quietvit.deployment.for_onnx.session import open_session
from quietvit.deployment.paths import too_large
from quietvit.errors import QuietvitError

GIVEN = ":given"


@dataclass(frozen=True)
class OnnxParts:
    """The parts of an ONNX file that quantize operands and multiply them.

    ``inputs`` and ``codes`` name the quantized values and their codes by product, in operand order.
    ``outputs`` names each product's sums, or its codes if a convolution outputs codes. ``model``
    computes the outputs, and the nodes ``quantizers`` compute the codes. These run in two sessions,
    because onnxruntime has no integer kernel after int8 codes that are also graph outputs.
    """

    model: Any
    quantizers: list[Any]
    inputs: dict[str, list[str]]
    codes: dict[str, list[str]]
    outputs: dict[str, str]
    corrected = False

    @classmethod
    def of(cls, path: Path, names: list[str]) -> OnnxParts:
        """Cut out the products of these names. Raises QuietvitError if one is missing."""
        import onnx

        model = onnx.load(path)
        _cut_behind_rounded(model.graph)
        producers = {output: node for node in model.graph.node for output in node.output}
        kept: dict[str, Any] = {}
        outputs: dict[str, str] = {}
        inputs: dict[str, list[str]] = {}
        codes: dict[str, list[str]] = {}
        quantizers: dict[str, Any] = {}

        def back(value: str, name: str) -> None:
            node = producers.get(value)
            if node is None:
                return
            kept[node.name] = node
            if node.op_type != "QuantizeLinear":
                for source in node.input:
                    back(source, name)
                return
            first, before = node, producers.get(node.input[0])
            while before is not None and before.op_type in MOVES and _of(name, before):
                kept[before.name], first = before, before
                before = producers.get(before.input[0])
            clip = before if before is not None and before.op_type == "Clip" else None
            if clip is not None:
                kept[clip.name] = quantizers[clip.name] = first = clip
            source = first.input[0].removesuffix(GIVEN)
            first.input[0] = f"{source}{GIVEN}"  # fed, even if another part computes this value
            inputs[name].append(first.input[0])
            codes[name].append(node.output[0])
            alone = copy.deepcopy(node)
            alone.input[0] = first.input[0] if clip is None else clip.output[0]
            quantizers[node.name] = alone

        for name in names:
            inputs[name], codes[name] = [], []
            product = f"{name}:product"
            if product not in producers:
                raise QuietvitError(f"{path} has no product named {name}; export it again.")
            outputs[name] = value = (
                f"{name}{ROUNDED}" if f"{name}{ROUNDED}" in producers else product
            )
            while value != product:  # from a convolution's codes back through moves and Clip
                node = producers[value]
                kept[node.name], value = node, node.input[0]
            back(product, name)
        order = [node for node in model.graph.node if node.name in kept]
        used = {source for node in (*order, *quantizers.values()) for source in node.input}
        stored = [entry for entry in model.graph.initializer if entry.name in used]
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        del model.graph.input[:], model.graph.output[:]
        model.graph.node.extend(order)
        model.graph.initializer.extend(stored)
        return cls(model, list(quantizers.values()), inputs, codes, outputs)

    def run(
        self, operands: dict[str, list[Tensor]]
    ) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
        """Return codes of the operands, and the output, by product name for given operands."""
        from onnx import TensorProto

        fed: dict[str, np.ndarray] = {}
        for name, values in self.inputs.items():
            fed |= {v: x.cpu().numpy() for v, x in zip(values, operands[name], strict=True)}
        kinds = {entry.name: entry.data_type for entry in self.model.graph.initializer}
        producers = {output: node for node in self.model.graph.node for output in node.output}

        def kind_of(value: str) -> int:
            return kinds[_quantizer_of(value, producers).input[2]]

        levels = {value: kind_of(value) for values in self.codes.values() for value in values}
        outputs = {
            value: kind_of(value) if value.endswith(ROUNDED) else TensorProto.FLOAT
            for value in self.outputs.values()
        }
        integers = self._computed(self.quantizers, levels, fed)
        sums = self._computed(list(self.model.graph.node), outputs, fed)
        codes = {name: [integers[v] for v in values] for name, values in self.codes.items()}
        return codes, {name: sums[value] for name, value in self.outputs.items()}

    def _computed(
        self, nodes: list[Any], outputs: dict[str, int], fed: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Run the nodes on ``fed``. Returns ``outputs`` (name -> ONNX type) by name."""
        import onnx
        from onnx import TensorProto, helper

        used = {value for node in nodes for value in node.input}
        fed = {name: array for name, array in fed.items() if name in used}
        graph = helper.make_graph(
            nodes,
            "parts",
            [helper.make_tensor_value_info(v, TensorProto.FLOAT, x.shape) for v, x in fed.items()],
            [helper.make_tensor_value_info(v, kind, None) for v, kind in outputs.items()],
            [entry for entry in self.model.graph.initializer if entry.name in used],
        )
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )

        def run(source: bytes | Path) -> dict[str, np.ndarray]:
            arrays = open_session(source).run(list(outputs), fed)
            return dict(zip(outputs, arrays, strict=True))

        if not too_large(sum(len(entry.raw_data) for entry in graph.initializer)):
            return run(model.SerializeToString())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "parts.onnx"
            onnx.save_model(model, path, save_as_external_data=True, location="parts.data")
            return run(path)


def _of(product: str, node: Any) -> bool:
    """Return whether a node was written for this product."""
    return bool(node.name.startswith(f"{product}:"))


def _quantizer_of(value: str, producers: dict[str, Any]) -> Any:
    """Return the QuantizeLinear that computes ``value``, perhaps followed by moves or Clip."""
    node = producers[value]
    while node.op_type != "QuantizeLinear":
        node = producers[node.input[0]]
    return node


def _cut_behind_rounded(graph: Any) -> None:
    """Give readers of a convolution's codes their own quantizer, so that each part has an input."""
    from onnx import helper

    producers = {output: node for node in graph.node for output in node.output}
    for value in [value for value in producers if value.endswith(ROUNDED)]:
        node = _quantizer_of(value, producers)
        own = f"{value}:read"
        for reader in graph.node:
            for place, source in enumerate(reader.input):
                if source == value:
                    reader.input[place] = own
        again = helper.make_node("QuantizeLinear", [own + GIVEN, *node.input[1:]], [own], own)
        graph.node.insert(0, again)
