"""ONNX with QuantizeLinear and DequantizeLinear: a quantized model, or a float one, as bytes.

What the bytes say about themselves is ``facts``'; which file they go to is ``export``'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from quietvit.deployment.extras import need
from quietvit.deployment.facts import KEY, Facts
from quietvit.deployment.for_onnx.capture import captured, to_ir
from quietvit.deployment.for_onnx.lower import lower, weight_codes
from quietvit.deployment.for_onnx.writer import Stored
from quietvit.deployment.grids import Grid
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.storage import weights_in_use


def onnx_of(
    quantized: QuantizedModel, grids: Mapping[str, Grid], facts: Facts, opset: int = 21
) -> tuple[bytes, Facts]:
    """Return the bytes of an ONNX file with the quantized model, and the facts in its metadata.

    Products that are not written as a MatMul of two quantized operands are no longer claimed there.
    Input ``images`` (batch, C, H, W) float32, output ``logits`` (batch, classes). Weights are int8,
    at opset 21 those of at most 4 bits int4. Raises QuietvitError where torch cannot export it.
    """
    model = captured(quantized, opset)
    weights = weights_in_use(quantized)
    lower(model, stored_of(quantized, grids, weights))
    written = {node.name for node in model.graph if node.op_type == "MatMul"}
    facts = facts.claiming({name.removesuffix(":product") for name in written})
    model.metadata_props[KEY] = facts.to_json()
    return serialized(model), facts


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


def float_onnx_of(model: nn.Module, input_shape: tuple[int, ...], opset: int = 21) -> bytes:
    """Return the bytes of an ONNX file with a float model of images, for comparison."""
    return serialized(to_ir(model, input_shape, opset))


def serialized(model: Any) -> bytes:
    """The bytes of an ``onnx_ir.Model``, checked by onnx itself."""
    need("onnx")
    import onnx
    import onnx_ir as ir

    for node in model.graph:  # torch notes the lines of Python code that each came from
        node.metadata_props.clear()
        node.doc_string = None
    proto = ir.to_proto(model)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise QuietvitError(
            f"the exported graph is not valid ONNX ({str(error).strip()}); this is a fault of "
            "quietvit: please report it with the model."
        ) from error
    return proto.SerializeToString()  # type: ignore[no-any-return]
