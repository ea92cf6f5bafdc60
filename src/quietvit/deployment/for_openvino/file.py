"""OpenVINO IR, .xml and .bin, out of the ONNX bytes; and what OpenVINO can be held to.

Which nodes the ONNX has is decided in ``for_onnx``; how OpenVINO ran them is read in ``proof``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from quietvit.deployment.extras import need
from quietvit.deployment.facts import KEY, Facts, Product
from quietvit.deployment.for_openvino.graph import without_zero_points
from quietvit.deployment.paths import too_large
from quietvit.errors import QuietvitError
from quietvit.files import beside, put_in_place

ATTENTION = (
    "openvino computes the whole attention in one kernel, in float but where processor and scales "
    "suit it"
)
ZERO_POINTS = "openvino multiplies integers only where the weight has no zero points"
SATURATES = (
    "on processors without VNNI openvino adds pairs of 8-bit products in 16 bits, and what does "
    "not fit is cut off: weights of 7 bits, patch embedding and head too, are safe there"
)


def write_openvino(content: Any, path: Path, facts: Facts) -> None:
    """Convert an ``onnx_ir.Model`` of ours to the IR ``path`` (.xml) and its .bin of the same stem.

    Weights stay the integers they are, int4 too; nothing is rounded to half precision. The facts,
    with claims as ``kept_by_openvino`` leaves them, are the entry ``quietvit`` of the model's
    rt_info. Both files are written in a folder beside ``path`` and renamed when both stand; earlier
    ones of these names are replaced, and put back where that fails.

    Raises QuietvitError for a missing extra, a graph that OpenVINO does not read, and a place that
    cannot be written.
    """
    need("onnx", "openvino")
    import onnx_ir as ir
    import openvino

    source = ir.to_proto(content)
    del source.metadata_props[:]  # openvino would keep them in the .xml, a second time
    left = without_zero_points(source)
    with beside(path, RuntimeError) as folder:
        model = _read(source, folder)
        model.set_rt_info(kept_by_openvino(facts, left).to_json(), KEY)
        openvino.save_model(model, str(folder / path.name), compress_to_fp16=False)
        put_in_place(folder, path.with_suffix(".bin"), path)


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


def kept_by_openvino(facts: Facts, zero: Collection[str] = ()) -> Facts:
    """The facts with no claim left that OpenVINO does not keep on every processor.

    No longer claimed are products of two activations, and the sites in ``zero``, whose weights have
    zero points. Where one runs in integers all the same, ``proof`` counts it.
    """

    def held_to(product: Product) -> Product:
        if product.why_float is not None:
            return product
        if product.kind not in ("linear", "conv"):
            return replace(product, why_float=ATTENTION)
        return replace(product, why_float=ZERO_POINTS) if product.name in zero else product

    return replace(facts, products=tuple(map(held_to, facts.products)))
