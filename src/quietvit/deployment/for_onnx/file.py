"""ONNX with QuantizeLinear and DequantizeLinear: a quantized model, or a float one, as bytes.

What the bytes say about themselves is ``facts``'; which file they go to is ``export``'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from quietvit.deployment.extras import need
from quietvit.deployment.facts import KEY, Facts
from quietvit.deployment.for_onnx.capture import captured, fixed_batch, to_ir
from quietvit.deployment.for_onnx.convolutions import Rounded
from quietvit.deployment.for_onnx.lower import lower, weight_codes
from quietvit.deployment.for_onnx.writer import Stored
from quietvit.deployment.grids import Grid
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.storage import weights_in_use
from quietvit.tracing import evaluating

CONSTANT = "it does not depend on the images: it is computed when the file is written or loaded"
FIXED_BATCH = (
    "the file takes one image at a time: torch.export cannot keep the batch of this model free, "
    "since its code depends on it"
)


def onnx_of(
    quantized: QuantizedModel,
    grids: Mapping[str, Grid],
    facts: Facts,
    opset: int = 21,
    at_once: bool = True,
) -> tuple[bytes, Facts]:
    """Return the bytes of an ONNX file with the quantized model, and the facts in its metadata.

    Products that are written neither as a MatMul of two quantized operands nor as a convolution
    whose output is quantized ``at_once`` are no longer claimed there.
    Input ``images`` (batch, C, H, W) float32, output ``logits`` (batch, classes). Weights are int8,
    at opset 21 those of at most 4 bits int4. Raises QuietvitError where torch cannot export it.
    """
    model = captured(quantized, opset)
    weights = weights_in_use(quantized)
    convolutions = lower(model, stored_of(quantized, grids, weights), at_once)
    written = {node.name for node in model.graph if node.op_type == "MatMul"}
    rounded = {name: found for name, found in convolutions.items() if isinstance(found, Rounded)}
    reasons = {name: found for name, found in convolutions.items() if isinstance(found, str)}
    reasons |= {s.name: CONSTANT for s in quantized.trace.matmuls if s.role == "constant"}
    facts = facts.claiming(
        {name.removesuffix(":product") for name in written} | set(rounded),
        reasons,
        {name: asdict(found) for name, found in rounded.items()},
    )
    if fixed_batch(model) is not None:
        facts = replace(facts, notes=(*facts.notes, FIXED_BATCH))
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
    """Return the bytes of an ONNX file with a float model of images, for comparison.

    Weights that are parametrized (``torch.nn.utils.parametrize``) are computed once, and stored.
    """
    return serialized(to_ir(_with_plain_weights(model), input_shape, opset))


def _with_plain_weights(model: nn.Module) -> nn.Module:
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    with evaluating(model):
        own = copy.deepcopy(model)
    for module in list(own.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return own


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
