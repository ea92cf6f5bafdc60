"""Convert the ONNX graph to an OpenVINO IR (.xml and .bin) and write it.

``for_onnx`` decides which nodes the graph has. ``kernels`` reads which kernels run them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quietvit.deployment.facts import KEY, Facts
from quietvit.deployment.for_openvino.graph import without_zero_points
from quietvit.deployment.for_openvino.kernels import kept_by_openvino
from quietvit.deployment.for_openvino.parts import core
from quietvit.deployment.paths import too_large
from quietvit.errors import QuietvitError
from quietvit.files import beside, put_in_place


def write_openvino(content: Any, path: Path, facts: Facts) -> Facts:
    """Convert our ``onnx_ir.Model`` to the IR ``path`` (.xml) and its .bin with the same stem.

    Weights stay integers (int4 too), and nothing becomes half precision. The facts are stored in
    the model's rt_info under ``quietvit``. They are returned with only the claims that
    ``kept_by_openvino`` leaves. Both files are written to a folder next to ``path`` and renamed
    together. If that fails, the earlier files are restored.

    Raises QuietvitError if OpenVINO cannot read the graph, or ``path`` cannot be written.
    """
    import onnx_ir as ir
    import openvino

    source = ir.to_proto(content)
    del source.metadata_props[:]  # openvino would copy these facts to the .xml a second time
    facts = kept_by_openvino(facts, without_zero_points(source))
    with beside(path, RuntimeError) as folder:
        model = _read(source, folder)
        model.set_rt_info(facts.to_json(), KEY)
        openvino.save_model(model, str(folder / path.name), compress_to_fp16=False)
        put_in_place(folder, path.with_suffix(".bin"), path)
    return facts


def _read(source: Any, folder: Path) -> Any:
    """Let OpenVINO read an ``onnx.ModelProto``, through ``folder`` if it is above 2 GB."""
    import onnx
    import openvino

    try:
        if not too_large(sum(len(entry.raw_data) for entry in source.graph.initializer)):
            return core().read_model(source.SerializeToString())
        graph = folder / "graph.onnx"
        onnx.save_model(source, graph, save_as_external_data=True, location="graph.data")
        return core().read_model(str(graph))
    except RuntimeError as error:
        raise QuietvitError(
            f"openvino {openvino.__version__} cannot read the exported graph "
            f"({str(error).strip().splitlines()[-1]}); export to onnx, or install a newer openvino."
        ) from error
