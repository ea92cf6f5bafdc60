"""ONNX with QuantizeLinear and DequantizeLinear: a quantized model, or a float one, and its file.

What a file says about itself is ``facts``'; its name is ``exporting``'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quietvit.deployment.extras import need
from quietvit.deployment.facts import KEY, Facts
from quietvit.deployment.for_onnx.capture import captured, to_ir
from quietvit.deployment.for_onnx.lower import lower, weight_codes
from quietvit.deployment.for_onnx.writer import Stored
from quietvit.deployment.grids import Grid
from quietvit.deployment.outputs import Output
from quietvit.deployment.paths import data_of, too_large
from quietvit.errors import QuietvitError
from quietvit.files import beside, put_in_place
from quietvit.quantization import QuantizedModel
from quietvit.quantization.storage import weights_in_use


def quantized_onnx(
    quantized: QuantizedModel, grids: Mapping[str, Grid], facts: Facts, opset: int = 21
) -> tuple[Any, Facts]:
    """Return an ``onnx_ir.Model`` of the quantized model, and the facts in its metadata.

    Products that are not written as a MatMul of two quantized operands are no longer claimed there.
    Input ``images`` (batch, C, H, W) float32, output as ``facts.output`` says. Weights are int8, at
    opset 21 those of at most 4 bits int4, unless the codes of activations are signed. Raises
    QuietvitError where torch cannot export it.
    """
    model = captured(quantized, opset, facts.output)
    weights = weights_in_use(quantized)
    lower(model, stored_of(quantized, grids, weights))
    written = {node.name for node in model.graph if node.op_type == "MatMul"}
    facts = facts.claiming({name.removesuffix(":product") for name in written})
    model.metadata_props[KEY] = facts.to_json()
    return _finished(model), facts


def stored_of(
    quantized: QuantizedModel, grids: Mapping[str, Grid], weights: Mapping[str, Tensor]
) -> dict[str, Stored]:
    """What stands at each slot, by its key; ``weights`` by site as the sites read them."""
    stored = {}
    for slot in quantized.slots():
        grid, codes = grids[slot.key], None
        if slot.is_weight:
            codes = weight_codes(grid, quantized.quantizers[slot.key], weights[slot.site.name])
        stored[slot.key] = Stored(f"{slot.site.name}:{slot.operand}", grid, codes)
    return stored


def float_onnx(
    model: nn.Module, input_shape: tuple[int, ...], output: Output | None = None, opset: int = 21
) -> Any:
    """Return an ``onnx_ir.Model`` of a float model of images, for comparison."""
    return _finished(to_ir(model, input_shape, opset, output or Output()))


def _finished(model: Any) -> Any:
    """Set the IR version that belongs to the opset, and drop torch's notes on lines of Python."""
    need("onnx")
    from onnx import helper

    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    sets = [helper.make_opsetid(domain, n) for domain, n in model.opset_imports.items()]
    model.ir_version = helper.find_min_ir_version_for(sets, ignore_unknown=True)
    return model


def write_onnx(model: Any, path: Path) -> int:
    """Write an ``onnx_ir.Model`` to ``path``, checked by onnx itself; return how many bytes.

    Weights of more than ``paths.LIMIT`` bytes go to ``paths.data_of(path)`` beside it. Both files
    appear when both are whole. A file of weights of an earlier export goes.

    Raises QuietvitError where the graph is not valid ONNX, or the place cannot be written.
    """
    import onnx_ir as ir

    data = data_of(path)
    with beside(path) as folder:
        new = folder / path.name
        if too_large(weights_of(model)):
            ir.save(model, new, external_data=data.name, size_threshold_bytes=1024)
        else:
            ir.save(model, new)
        _checked(new)
        parts = [data, path] if (folder / data.name).exists() else [path]
        size = sum((folder / part.name).stat().st_size for part in parts)
        put_in_place(folder, *parts)
    if len(parts) == 1 and data.is_file():
        data.unlink()
    return size


def weights_of(model: Any) -> int:
    """Bytes of the weights of an ``onnx_ir.Model``."""
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def serialized(model: Any) -> bytes:
    """The bytes of an ``onnx_ir.Model``, whose weights are not ``paths.too_large``."""
    import onnx_ir as ir

    return ir.to_proto(model).SerializeToString()  # type: ignore[no-any-return]


def _checked(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise QuietvitError(
            f"the exported graph is not valid ONNX ({str(error).strip()}); this is a fault of "
            "quietvit: please report it with the model."
        ) from error
