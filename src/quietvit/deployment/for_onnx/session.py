"""A session of onnxruntime on the CPU, and whether its 8-bit products are kept exact.

What is run in it is decided in ``runtime``, ``kernels`` and ``parts``.
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
    "this processor has no VNNI: 8-bit products gain little speed here, often none, and a default "
    "session of onnxruntime saturates them; set session.x64quantprecision to 1 in your own "
    "session, as was done here"
)
PERHAPS_VNNI = (
    "it cannot be told here whether this processor has VNNI, so session.x64quantprecision was set "
    "to 1: without VNNI a default session saturates 8-bit products, with it the setting takes a "
    "third of their speed"
)


def exactness() -> str | None:
    """Why a session is made exact on this processor; None where it is not."""
    return {True: None, False: WITHOUT_VNNI, None: PERHAPS_VNNI}[processor.vnni()]


def open_session(
    source: bytes | Path,
    *,
    threads: int = 0,
    optimized: Path | None = None,
    exact: bool | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` with default settings but for ``EXACT``.

    ``optimized``: where the session writes its optimized graph. ``exact``: set ``EXACT``, so that
    products do not saturate at 16 bits. None sets it where the processor lacks the instruction for
    8-bit products, or where that cannot be told. With the instruction products do not saturate, and
    ``EXACT`` would take a third of their speed.

    Raises QuietvitError for a missing extra, and a file that onnxruntime cannot load.
    """
    need("onnxruntime", install=INSTALL)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(*EXTERNAL)  # of any size, where one file ends at 2 GB
    if exactness() is not None if exact is None else exact:
        options.add_session_config_entry(*EXACT)
    given = str(source) if isinstance(source, Path) else source
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no class in common but this
        shown = source if isinstance(source, Path) else "a model in memory"
        raise QuietvitError(
            f"onnxruntime cannot load {shown}: {str(error).strip().splitlines()[0]}. The file is "
            f"cut short, foreign, or of an opset that onnxruntime {onnxruntime.__version__} does "
            "not know. Export it again: quietvit writes opset 21, or 20 with --opset 20."
        ) from error
