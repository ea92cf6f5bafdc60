"""Open onnxruntime sessions on the CPU whose 8-bit products do not saturate.

``runtime``, ``kernels`` and ``parts`` use these sessions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quietvit.deployment import processor
from quietvit.deployment.extras import need
from quietvit.errors import QuietvitError

INSTALL = "quietvit[onnx]"
EXACT = ("session.x64quantprecision", "1")
EXTERNAL = ("session.optimized_model_external_initializers_file_name", "optimized.data")
WITHOUT_VNNI = (
    "this processor has no VNNI: 8-bit products gain little or no speed, and a default session of "
    "onnxruntime saturates them. This check set session.x64quantprecision to 1; do the same in "
    "your own session"
)
PERHAPS_VNNI = (
    "it is unknown whether this processor has VNNI, so session.x64quantprecision was set to 1. "
    "Without VNNI a default session saturates 8-bit products. With VNNI the setting costs a third "
    "of their speed"
)


def exactness() -> str | None:
    """Return why sessions are exact on this processor, or None if they need not be."""
    return {True: None, False: WITHOUT_VNNI, None: PERHAPS_VNNI}[processor.vnni()]


def open_session(
    source: bytes | Path,
    *,
    threads: int = 0,
    optimized: Path | None = None,
    exact: bool | None = None,
) -> Any:
    """Return an ``onnxruntime.InferenceSession`` with default settings, perhaps with ``EXACT``.

    ``optimized`` is a path for the optimized graph. ``exact`` sets ``EXACT``, so that products do
    not saturate at 16 bits. None sets it unless the processor is known to have 8-bit dot products.
    With these, products never saturate, and ``EXACT`` would cost a third of their speed.

    Raises QuietvitError for a missing extra, or a file that onnxruntime cannot load.
    """
    need("onnxruntime", install=INSTALL)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(*EXTERNAL)  # one file cannot exceed 2 GB
    if exactness() is not None if exact is None else exact:
        options.add_session_config_entry(*EXACT)
    model = str(source) if isinstance(source, Path) else source
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no other common class
        shown = source if isinstance(source, Path) else "a model in memory"
        raise QuietvitError(
            f"onnxruntime cannot load {shown}: {str(error).strip().splitlines()[0]}. The file is "
            f"truncated, foreign, or has an opset that onnxruntime {onnxruntime.__version__} does "
            "not know. Export it again: quietvit writes opset 21, or 20 with --opset 20."
        ) from error
