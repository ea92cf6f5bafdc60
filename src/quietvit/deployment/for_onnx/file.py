"""Make ONNX graphs of quantized and float models, and write them as files.

``facts`` describes the file. ``exporting`` chooses its name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from quietvit.deployment.extras import need
from quietvit.deployment.facts import KEY, Facts
from quietvit.deployment.for_onnx.capture import captured, fixed_batch, to_ir
from quietvit.deployment.for_onnx.convolutions import Rounded
from quietvit.deployment.for_onnx.lower import lower, weight_codes
from quietvit.deployment.for_onnx.session import INSTALL
from quietvit.deployment.for_onnx.writer import Stored
from quietvit.deployment.grids import Grid
from quietvit.deployment.outputs import Output
from quietvit.deployment.paths import data_of, too_large
from quietvit.errors import QuietvitError
from quietvit.files import beside, put_in_place
from quietvit.quantization import QuantizedModel
from quietvit.tracing import evaluating

TRANSPOSED = (
    "the file claims no integers for a transposed convolution, because onnxruntime has no integer "
    "kernel for it"
)
CONSTANT = "it does not depend on the images, so it is computed when the file is written or loaded"
FIXED_BATCH = (
    "the file takes one image at a time: torch.export cannot make the batch dynamic, because the "
    "model's code depends on it"
)


def quantized_onnx(
    quantized: QuantizedModel,
    grids: Mapping[str, Grid],
    facts: Facts,
    opset: int = 21,
    at_once: bool = True,
) -> tuple[Any, Facts]:
    """Return an ``onnx_ir.Model`` of the quantized model, and the facts in its metadata.

    Its input is ``images`` (batch, C, H, W) float32, its output ``facts.output``. Weights are int8.
    At opset 21 weights of at most 4 bits are int4, unless activations have signed codes. The facts
    claim integers for MatMuls of two quantized operands, and with ``at_once`` for convolutions with
    a quantized output. Raises QuietvitError if torch cannot export the model.
    """
    model = captured(quantized, opset, facts.output)
    weights = quantized.weights_in_use()
    convolutions = lower(model, stored_of(quantized, grids, weights), at_once)
    written = {node.name for node in model.graph if node.op_type == "MatMul"}
    rounded = {name: how for name, how in convolutions.items() if isinstance(how, Rounded)}
    reasons = {name: how for name, how in convolutions.items() if isinstance(how, str)}
    reasons |= {s.name: CONSTANT for s in quantized.trace.matmuls if s.role == "constant"}
    transposed = [s for s in quantized.trace.matmuls if s.function.startswith("conv_transpose")]
    reasons |= {site.name: TRANSPOSED for site in transposed}
    facts = facts.claiming(
        {name.removesuffix(":product") for name in written} | set(rounded),
        reasons,
        {name: asdict(rounding) for name, rounding in rounded.items()},
    )
    if fixed_batch(model) is not None:
        facts = replace(facts, notes=(*facts.notes, FIXED_BATCH))
    model.metadata_props[KEY] = facts.to_json()
    return _finished(model), facts


def stored_of(
    quantized: QuantizedModel, grids: Mapping[str, Grid], weights: Mapping[str, Tensor]
) -> dict[str, Stored]:
    """Return each slot's ``Stored`` by key. ``weights`` are by site, as the sites read them."""
    stored = {}
    for slot in quantized.slots():
        grid, codes = grids[slot.key], None
        if slot.is_weight:
            codes = weight_codes(grid, quantized.quantizers[slot.key], weights[slot.site.name])
        stored[slot.key] = Stored(f"{slot.site.name}:{slot.operand}", grid, codes)
    return stored


def _apart(module: nn.Module) -> None:
    """Give a copied parametrized module its own class.

    torch keeps the computed weight as a property of the class, which a copy shares with the
    original. Removing it from the copy would remove it from the original too.
    """
    kind = type(module)
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, own)


def float_onnx(
    model: nn.Module, input_shape: tuple[int, ...], output: Output | None = None, opset: int = 21
) -> Any:
    """Return an ``onnx_ir.Model`` of a float model of images, for comparison.

    Parametrized weights (``torch.nn.utils.parametrize``) are computed once and stored.
    """
    plain = _with_plain_weights(model)
    return _finished(to_ir(plain, input_shape, opset, output or Output()))


def _with_plain_weights(model: nn.Module) -> nn.Module:
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    with evaluating(model):
        own = copy.deepcopy(model)
    for module in list(own.modules()):
        if parametrize.is_parametrized(module):
            _apart(module)
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return own


def _finished(model: Any) -> Any:
    """Set the opset's IR version, and drop torch's notes about Python source lines."""
    need("onnx", install=INSTALL)
    from onnx import helper

    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    sets = [helper.make_opsetid(domain, n) for domain, n in model.opset_imports.items()]
    model.ir_version = helper.find_min_ir_version_for(sets, ignore_unknown=True)
    return model


def write_onnx(model: Any, path: Path) -> int:
    """Write an ``onnx_ir.Model`` to ``path``, let onnx check it, and return its size in bytes.

    Weights of more than ``paths.LIMIT`` bytes go to ``paths.data_of(path)``. Both files appear only
    when both are complete. The data file of an earlier export is deleted if it is not needed.

    Raises QuietvitError if the graph is not valid ONNX, or the path cannot be written.
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
    """Return the bytes of all weights of an ``onnx_ir.Model``."""
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def _checked(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise QuietvitError(
            f"the exported graph is not valid ONNX ({str(error).strip()}). This is a bug in "
            "quietvit; please report it with the model."
        ) from error
