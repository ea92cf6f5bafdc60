"""Capture a quantized model as a float ONNX graph with marks at its quantized operands.

torch's exporter writes the graph. ``lower`` replaces the marks.
"""

from __future__ import annotations

import builtins
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quietvit.deployment.extras import need
from quietvit.deployment.for_onnx.session import INSTALL
from quietvit.deployment.model import as_float32
from quietvit.deployment.outputs import Output
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.slot import Slot
from quietvit.tracing import evaluating
from quietvit.tracing.standins import STANDINS

DOMAIN, OPERAND, WEIGHT = "quietvit", "Operand", "Weight"
INPUT = "images"
OPSETS = (20, 21)


class OneTensor(nn.Module):
    """A model that returns only the tensor ``output`` of ``model``'s output."""

    def __init__(self, model: nn.Module, output: Output) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        return self.output.of(self.model(images))


class _WritableAttention(TorchFunctionMode):
    """Replace attention that torch cannot write to ONNX by its explicit matrix products.

    torch only writes queries of four dims, and no keys shared by several queries (GQA).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            if query.ndim != 4 or kwargs.get("enable_gqa"):
                func = STANDINS[func]
        return func(*args, **kwargs)


def captured(quantized: QuantizedModel, opset: int, output: Output) -> Any:
    """Return an ``onnx_ir.Model`` of the quantized model with marked operands.

    A quantized activation passes through a node ``quietvit::Operand``. A quantized weight is the
    output of a node ``quietvit::Weight`` without inputs. The attribute ``slot`` of both holds the
    slot's key. Raises QuietvitError if torch cannot export the model.
    """

    def marked(slot: Slot, x: Tensor) -> Tensor:
        name = WEIGHT if slot.is_weight else OPERAND
        inputs = [] if slot.is_weight else [x]
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{name}",
            inputs,
            {"slot": slot.key},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )

    own = as_float32(quantized)
    with own.replacing(marked):
        return to_ir(own, own.input_shape, opset, output)


def to_ir(model: nn.Module, input_shape: tuple[int, ...], opset: int, output: Output) -> Any:
    """Return an ``onnx_ir.Model`` from images (batch, C, H, W) to the tensor ``output``.

    The batch is dynamic. It is fixed at 1 if torch.export finds that the model's code depends on
    it (``fixed_batch``). Raises QuietvitError if torch cannot export the model.
    """
    if opset not in OPSETS:
        raise QuietvitError(
            f"opset {opset} is not supported; choose 21, or 20 for older runtimes. 4-bit weights "
            "need 21. Opset 23 fuses attention, which hides its products."
        )
    need("onnxscript", install=INSTALL)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    traced = _exported(model, torch.zeros(2, *input_shape, device=device), opset, output, free=True)
    if fixed_batch(traced) is not None:
        traced = _exported(
            model, torch.zeros(1, *input_shape, device=device), opset, output, free=False
        )
    _register_constants(traced.graph)
    return traced


def fixed_batch(model: Any) -> int | None:
    """Return the fixed batch of an ``onnx_ir.Model``, or None if the batch is dynamic."""
    shape = model.graph.inputs[0].shape
    return shape[0] if shape is not None and isinstance(shape[0], int) else None


def _exported(model: nn.Module, example: Tensor, opset: int, output: Output, free: bool) -> Any:
    """Run torch's exporter with a dynamic batch if ``free``, else with the example's batch."""
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    try:
        whole = OneTensor(model, output)
        with (
            torch.no_grad(),
            evaluating(whole),
            _quiet(),
            _unchecked(),
            _free_len(whole),
            _WritableAttention(),
        ):
            program = torch.onnx.export(
                whole,
                (example,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=[INPUT],
                output_names=[output.name],
                verbose=False,
            )
    except QuietvitError:
        raise
    except Exception as error:  # the exporter passes on exceptions of any type
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, QuietvitError):
            raise cause from None
        name = type(getattr(model, "model", model)).__name__
        raise QuietvitError(
            f"torch could not export {name} to ONNX: {type(cause).__name__}: {cause}. Remove "
            "Python branches on tensor values from the model; they cannot be exported."
        ) from error
    assert program is not None
    return _named_once(program.model, output.name)


def _named_once(model: Any, name: str) -> Any:
    """Reserve ``name`` for the output. torch may also have used it inside the graph."""
    output = model.graph.outputs[0]
    for node in model.graph:
        for value in node.outputs:
            if value is not output and value.name == name:
                value.name = f"{name}:inner"
    output.name = name
    return model


def _register_constants(graph: Any) -> None:
    """Register every constant that a node reads as an initializer, with a unique name.

    torch's exporter merges equal initializers. Then some nodes read one that the graph no longer
    has. Seen with the clamps of gemma4_vit, onnxscript 0.7.2.
    """
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            if graph.initializers.get(value.name) is value or value.is_graph_input():
                continue
            while value.name in graph.initializers:
                value.name = f"{value.name}:again"
            graph.register_initializer(value)


@contextmanager
def _unchecked() -> Iterator[None]:
    """Switch off value checks in transformers' models with its environment variable.

    They do not change the output, and ONNX has no operator for them (D-FINE, RT-DETRv2).
    """
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _free_len(model: nn.Module) -> Iterator[None]:
    """Let ``len(tensor)`` in the code of the model's modules be a size that stays dynamic.

    Python's ``len`` must return a plain int. So the exporter would fix the batch at the example's
    (RT-DETR and D-FINE ask ``len`` of their features).
    """
    modules = {type(module).__module__ for module in model.modules()}
    spaces = [
        vars(sys.modules[name])
        for name in modules
        if name in sys.modules and name.partition(".")[0] not in ("torch", "quietvit")
    ]
    spaces = [space for space in spaces if "len" not in space]
    for space in spaces:
        space["len"] = _len
    try:
        yield
    finally:
        for space in spaces:
            del space["len"]


def _len(of: Any) -> Any:
    return of.shape[0] if isinstance(of, Tensor) and of.ndim else builtins.len(of)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and warnings off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
