"""The products of an ONNX file cut out of the rest, for ``parity`` to feed and to compare."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quietvit.deployment.paths import too_large
from quietvit.deployment.runtime import OnnxRuntime
from quietvit.errors import QuietvitError

GIVEN = ":given"


@dataclass(frozen=True)
class Parts:
    """The parts of an ONNX file that quantize operands and multiply them, cut out of the rest.

    ``inputs``, ``codes``: per product the values that are quantized, in the order of the operands,
    and their codes.
    """

    model: Any
    inputs: dict[str, list[str]]
    codes: dict[str, list[str]]

    @classmethod
    def of(cls, path: Path, names: list[str]) -> Parts:
        """Cut out the products of these names. Raises QuietvitError where one is not there."""
        import onnx

        model = onnx.load(path)
        made = {output: node for node in model.graph.node for output in node.output}
        kept: dict[str, Any] = {}
        inputs: dict[str, list[str]] = {}
        codes: dict[str, list[str]] = {}

        def back(value: str, name: str) -> None:
            node = made.get(value)
            if node is None:
                return
            kept[node.name] = node
            if node.op_type != "QuantizeLinear":
                for given in node.input:
                    back(given, name)
                return
            before = made.get(node.input[0])
            if before is not None and before.op_type == "Clip":
                kept[before.name] = before
            else:
                before = node
            given = before.input[0].removesuffix(GIVEN)
            before.input[0] = f"{given}{GIVEN}"  # apart from the product of another part
            inputs[name].append(before.input[0])
            codes[name].append(node.output[0])

        for name in names:
            inputs[name], codes[name] = [], []
            if f"{name}:product" not in made:
                raise QuietvitError(f"{path} has no product named {name}; export it again.")
            back(f"{name}:product", name)
        order = [node for node in model.graph.node if node.name in kept]
        used = {given for node in order for given in node.input}
        stored = [entry for entry in model.graph.initializer if entry.name in used]
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        del model.graph.input[:], model.graph.output[:]
        model.graph.node.extend(order)
        model.graph.initializer.extend(stored)
        return cls(model, inputs, codes)

    def run(
        self, given: dict[str, list[Tensor]]
    ) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
        """Codes of the operands and the product, by the name of the product, for given operands."""
        from onnx import TensorProto, helper

        fed: dict[str, np.ndarray] = {}
        for name, values in self.inputs.items():
            fed |= {v: x.cpu().numpy() for v, x in zip(values, given[name], strict=True)}
        kinds = {entry.name: entry.data_type for entry in self.model.graph.initializer}
        zeros = {
            node.output[0]: kinds[node.input[2]]
            for node in self.model.graph.node
            if node.op_type == "QuantizeLinear"
        }
        outputs = {value: zeros[value] for values in self.codes.values() for value in values}
        outputs |= {f"{name}:product": TensorProto.FLOAT for name in self.inputs}
        graph = self.model.graph
        for value, array in fed.items():
            graph.input.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, array.shape))
        for value, kind in outputs.items():
            graph.output.append(helper.make_tensor_value_info(value, kind, None))
        found = dict(zip(outputs, self._computed(list(outputs), fed), strict=True))
        codes = {name: [found[v] for v in values] for name, values in self.codes.items()}
        return codes, {name: found[f"{name}:product"] for name in self.inputs}

    def _computed(self, outputs: list[str], fed: dict[str, np.ndarray]) -> list[np.ndarray]:
        import onnx

        def run(source: bytes | Path) -> list[np.ndarray]:
            return list(OnnxRuntime(source).session.run(outputs, fed))

        if not too_large(sum(len(entry.raw_data) for entry in self.model.graph.initializer)):
            return run(self.model.SerializeToString())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "parts.onnx"
            onnx.save_model(self.model, path, save_as_external_data=True, location="parts.data")
            return run(path)
