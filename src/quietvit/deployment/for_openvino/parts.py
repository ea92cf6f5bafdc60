"""Read and compile models with OpenVINO, and cut the products out of an IR.

``parity`` feeds the products and compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quietvit.errors import QuietvitError

INSTALL = "quietvit[openvino]"
# Without f32 OpenVINO computes float operators in half precision on processors that can.
SETTINGS: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
CLIPS = frozenset({"Minimum", "Maximum", "Clamp"})


@cache
def core() -> Any:
    """Return the ``openvino.Core`` of this process.

    There is one, and it lives until the end. Each Core with a CPU plugin gives the thread another
    stack for signal handlers. If an older Core goes first, that stack is freed but stays in use,
    and the next signal (Ctrl-C, or the end of a child) kills the process.
    """
    import openvino

    return openvino.Core()


def read(path: Path) -> Any:
    """Read an ``openvino.Model`` from an .xml or .onnx."""
    return core().read_model(str(path))


def compiled(model: Any, threads: int = 0) -> Any:
    """Compile a model for latency on the CPU. With 0 ``threads`` OpenVINO chooses."""
    settings = SETTINGS | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    return core().compile_model(model, "CPU", settings)


@dataclass(frozen=True)
class IRParts:
    """The products of an IR. ``inputs`` and ``codes`` name the quantizers of each product.

    Two models compute codes and sums, because a model that also outputs its codes might not
    multiply them as integers.
    """

    path: Path
    inputs: dict[str, list[str]]
    codes: dict[str, list[str]]
    corrected = True

    @classmethod
    def of(cls, path: Path, names: list[str]) -> IRParts:
        """Find the products of these names. Raises QuietvitError if one is missing."""
        outputs = _outputs(read(path))
        inputs: dict[str, list[str]] = {}
        codes: dict[str, list[str]] = {}
        for name in names:
            if f"{name}:product" not in outputs:
                raise QuietvitError(f"{path} has no product named {name}; export it again.")
            quantizers = _quantizers(outputs[f"{name}:product"].get_node())
            inputs[name] = codes[name] = list(dict.fromkeys(quantizers))
        return cls(path, inputs, codes)

    def run(
        self, operands: dict[str, list[Tensor]]
    ) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
        """Return codes of the operands, and the sums, by product name for given operands."""
        fed = {
            key: x.cpu().numpy()
            for name, keys in self.inputs.items()
            for key, x in zip(keys, operands[name], strict=True)
        }
        levels = self._computed(fed, list(fed), quantizers=True)
        sums = self._computed(fed, [f"{name}:product" for name in self.inputs], quantizers=False)
        codes = {name: [levels[key] for key in keys] for name, keys in self.codes.items()}
        return codes, {name: sums[f"{name}:product"] for name in self.inputs}

    def _computed(
        self, fed: dict[str, np.ndarray], wanted: list[str], quantizers: bool
    ) -> dict[str, np.ndarray]:
        """Run the IR on values for its quantizers. Returns the outputs ``wanted`` by name."""
        import openvino
        from openvino import opset13 as ops

        model = read(self.path)
        named = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
        outputs = _outputs(model)
        parameters = []
        for key, array in fed.items():
            parameters.append(ops.parameter(list(array.shape), np.float32, name=key))
            _entrance(named[key].input(0)).replace_source_output(parameters[-1].output(0))
        values = [named[name].output(0) if quantizers else outputs[name] for name in wanted]
        submodel = openvino.Model([ops.result(value) for value in values], parameters, "part")
        arrays = compiled(submodel)(list(fed.values()))
        return {name: np.array(arrays[n]) for n, name in enumerate(wanted)}


def _outputs(model: Any) -> dict[str, Any]:
    return {
        name: output
        for node in model.get_ordered_ops()
        for output in node.outputs()
        for name in output.get_names()
    }


def _entrance(operand: Any) -> Any:
    """Return the input where a value enters its quantizer, or the clipping before it."""
    node = operand.get_source_output().get_node()
    if node.get_type_name() not in CLIPS:
        return operand
    computed = [
        side
        for side in node.inputs()
        if side.get_source_output().get_node().get_type_name() != "Constant"
    ]
    return _entrance(computed[0])


def _quantizers(node: Any) -> Iterator[str]:
    """Yield the names of the FakeQuantize nodes of a product's operands, in operand order."""
    if node.get_type_name() == "FakeQuantize":
        yield node.get_friendly_name()
        return
    for value in node.input_values():
        yield from _quantizers(value.get_node())
