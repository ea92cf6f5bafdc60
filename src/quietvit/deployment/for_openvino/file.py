"""An OpenVINO IR, .xml and .bin, converted from the ONNX graph.

Which nodes the graph has is decided in ``for_onnx``; which kernels run them is read in ``kernels``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quietvit.deployment.facts import KEY, Facts
from quietvit.deployment.for_openvino.graph import without_zero_points
from quietvit.deployment.for_openvino.kernels import kept_by_openvino
from quietvit.deployment.paths import too_large
from quietvit.errors import QuietvitError
from quietvit.files import beside, put_in_place


def write_openvino(content: Any, path: Path, facts: Facts) -> Facts:
    """Convert an ``onnx_ir.Model`` of ours to the IR ``path`` (.xml) and its .bin of the same stem.

    Weights stay the integers they are, int4 too; nothing is rounded to half precision. The facts
    are the entry ``quietvit`` of the model's rt_info. They are returned as they are there: with
    the claims that ``kept_by_openvino`` leaves. Both files are written in a folder beside ``path``
    and renamed when both are whole. Earlier ones of these names are replaced, and put back where
    that fails.

    Raises QuietvitError for a graph that OpenVINO does not read, and a place that it cannot write.
    """
    import onnx_ir as ir
    import openvino

    source = ir.to_proto(content)
    del source.metadata_props[:]  # openvino would keep them in the .xml, a second time
    facts = kept_by_openvino(facts, without_zero_points(source))
    with beside(path, RuntimeError) as folder:
        model = _read(source, folder)
        model.set_rt_info(facts.to_json(), KEY)
        openvino.save_model(model, str(folder / path.name), compress_to_fp16=False)
        put_in_place(folder, path.with_suffix(".bin"), path)
    return facts


def _read(source: Any, folder: Path) -> Any:
    """Let OpenVINO read an ``onnx.ModelProto``, one too large for a message out of ``folder``."""
    import onnx
    import openvino

    try:
        if not too_large(sum(len(entry.raw_data) for entry in source.graph.initializer)):
            return openvino.Core().read_model(source.SerializeToString())
        graph = folder / "graph.onnx"
        onnx.save_model(source, graph, save_as_external_data=True, location="graph.data")
        return openvino.Core().read_model(str(graph))
    except RuntimeError as error:
        raise QuietvitError(
            f"openvino {openvino.__version__} does not read the exported graph "
            f"({str(error).strip().splitlines()[-1]}); export to onnx, or install a newer openvino."
        ) from error
