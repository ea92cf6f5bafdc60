"""``open_runtime``: open an exported file in its runtime, or explain what the path is instead."""

from __future__ import annotations

import os
from pathlib import Path

from quietvit.deployment.runtime import Runtime
from quietvit.deployment.targets import listed, registered_targets, target_of
from quietvit.errors import QuietvitError
from quietvit.files import refuse_other_bytes
from quietvit.quantization import storage


def open_runtime(
    path: str | os.PathLike[str], runtime: str | None = None, threads: int = 0
) -> Runtime:
    """Open an exported file or folder in a runtime.

    Args:
        path: a file or folder that ``export`` wrote, or the ``Artifact`` that it returned.
        runtime: ``onnxruntime`` (.onnx), ``openvino`` (.xml and .onnx), ``torchao`` (its folder),
            or that of your own target. By default the one that the file was made for.
        threads: number of CPU threads; 0 lets the runtime choose.

    Raises QuietvitError for a missing, truncated or foreign file, a runtime that does not open it,
    or a missing extra.
    """
    path = Path(path)
    refuse_other_bytes(path)
    target = target_of(path)
    if target is None or not target.holds(path):
        raise QuietvitError(_why_not(path))
    fitting = {
        each.runtime: each
        for each in (target, *registered_targets().values())
        if each is target or target.suffix in each.reads
    }
    chosen = runtime or target.runtime
    if chosen not in fitting:
        raise QuietvitError(
            f"runtime {chosen!r} does not run {path}; choose {listed(list(fitting))}."
        )
    return fitting[chosen].open(path, threads)


def _why_not(path: Path) -> str:
    examples = listed([f"model{target.suffix}" for target in registered_targets().values()])
    ask = f"Give a file that 'quietvit export' wrote, such as {examples}."
    if storage.FORMAT.holds(path):
        return (
            f"{path} is a quantized model that was not exported yet. Export it with 'quietvit "
            f"export {path}' (quietvit.export), and give the exported file."
        )
    if storage.FORMAT.holds(path / "model.qvit"):
        return (
            f"{path} is a training run whose quantized model was not exported. Export it with "
            f"'quietvit export {path}', and give the exported file."
        )
    if path.is_dir():
        what = "a training run" if (path / "result.json").is_file() else "a folder"
        return f"{path} is {what}, not an exported file. {ask}"
    if not path.exists():
        return f"{path} does not exist. {ask}"
    suffixes = " or ".join(target.suffix for target in registered_targets().values())
    return f"{path} does not end in {suffixes}. {ask}"
