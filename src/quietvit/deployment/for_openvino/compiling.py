"""How OpenVINO reads and compiles a model for the CPU. What for, is decided in the other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INSTALL = "quietvit[openvino]"
# Where the processor can, OpenVINO would compute what is float in half precision.
SETTINGS: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}


def read(path: Path) -> Any:
    """An ``openvino.Model`` from an .xml or .onnx."""
    import openvino

    return openvino.Core().read_model(str(path))


def compiled(model: Any, threads: int = 0) -> Any:
    """The model compiled for latency; ``threads``: 0 is OpenVINO's choice."""
    import openvino

    settings = SETTINGS | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    return openvino.Core().compile_model(model, "CPU", settings)
