"""``open_runtime``: an exported file in the runtime that it is for; what else a path may be.

The runtimes themselves are in ``runtime``, and torchao's in ``for_torchao``.
"""

from __future__ import annotations

from pathlib import Path

from quietvit.deployment.runtime import OnnxRuntime, OpenVINO, Runtime
from quietvit.errors import QuietvitError
from quietvit.files import refuse_other_bytes

RUNTIMES = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".torchao": ("torchao",),
}


def open_runtime(path: str | Path, runtime: str | None = None, threads: int = 0) -> Runtime:
    """Load an exported file: .onnx in onnxruntime unless OpenVINO is asked for, .xml in OpenVINO.

    A folder that was exported for torchao runs in torch. ``threads``: 0 is the runtime's choice.

    Raises QuietvitError for a missing, truncated or foreign file, and a missing extra.
    """
    path = Path(path)
    refuse_other_bytes(path)
    kind = exported_kind(path)
    if kind is None:
        raise QuietvitError(_why_not(path))
    known = RUNTIMES[kind]
    chosen = runtime or known[0]
    if chosen not in known:
        raise QuietvitError(f"runtime {chosen!r} does not run {path}; choose {' or '.join(known)}.")
    if chosen == "torchao":
        from quietvit.deployment.for_torchao.runtime import TorchRuntime

        return TorchRuntime(path, threads=threads)
    if chosen == "openvino":
        return OpenVINO(path, threads=threads)
    return OnnxRuntime(path, threads=threads)


def exported_kind(path: Path) -> str | None:
    """The suffix of the kind of exported file that ``path`` is, None where it is none."""
    if path.is_file() and path.suffix in (".onnx", ".xml"):
        return path.suffix
    return ".torchao" if (path / "torchao.json").is_file() else None


def _why_not(path: Path) -> str:
    ask = "give an exported model.onnx, model.xml or torchao folder"
    if (path / "quantization.json").is_file():
        return (
            f"{path} is a quantized model that was not exported yet; write a file that a runtime "
            f"takes by 'quietvit export {path}' (quietvit.export), and give that one."
        )
    if path.is_dir():
        what = "a training run" if (path / "result.json").is_file() else "a folder"
        return f"{path} is {what}, not an exported file; {ask}."
    if not path.exists():
        return f"{path} does not exist; {ask}."
    return f"{path} ends neither in .onnx nor in .xml; {ask}."
