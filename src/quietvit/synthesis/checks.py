"""Refuse models and arguments that cannot give images, before any long work.

``reach`` checks that a gradient reaches the pixels.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.synthesis.watching import has_statistics

logger = logging.getLogger("quietvit")

_SEEDS = 2**64
_FROM_FLOAT = "Generate images from the float model that it was made from."
# Where the modules and tensors of quantized models are defined. torchao's float8 training is not.
_QUANTIZED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.qat",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.quantization.fake_quantize",
    "torchao.quantization",
    "torchao.dtypes",
    "torchao.prototype",
    "quietvit.deployment",
)


def whole_number(value: Any, least: int, complaint: str) -> int:
    """Return an integer of Python or numpy of at least ``least``. Raises QuietvitError for others.

    ``complaint`` tells what is wrong and how to mend it; it holds ``{}`` for the value.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise QuietvitError(complaint.format(repr(value)))
    return number


def checked_numbers(count: Any, seed: Any, minutes: Any) -> tuple[int, int]:
    """Return the count and the seed as integers. Raises QuietvitError for unfit values."""
    many = whole_number(count, 1, "{} images were requested. Request at least 1; 32 is usual.")
    told = f"the seed is {{}}. Give an integer from 0 to 2^64 - 1 ({_SEEDS - 1})."
    number = whole_number(seed, 0, told)
    if number >= _SEEDS:
        raise QuietvitError(told.format(seed))
    if minutes is not None:
        real = isinstance(minutes, int | float) and not isinstance(minutes, bool)
        if not (real and math.isfinite(minutes) and minutes > 0):
            raise QuietvitError(f"minutes is {minutes!r}. Give a number above 0, or leave it out.")
    return many, number


def refuse_model(model: Any) -> None:
    """Raise QuietvitError unless ``model`` is a float module with values in all its tensors."""
    if not isinstance(model, nn.Module):
        raise QuietvitError(
            f"the model is of type {type(model).__name__}, not a torch.nn.Module. Give the float "
            "model, because gradients cannot flow through an exported one."
        )
    for name, module in model.named_modules():
        _refuse_kind(model, name, module)
    for name, tensor in _tensors(model):
        _refuse_tensor(model, name, tensor)


def _refuse_kind(model: nn.Module, name: str, module: nn.Module) -> None:
    of = f"{name} of {type(model).__name__}" if name else f"this {type(model).__name__}"
    if isinstance(module, torch.jit.ScriptModule):
        raise QuietvitError(
            f"{of} is a TorchScript module, which cannot be traced. Generate images from the model "
            "that it was made from."
        )
    if isinstance(module, torch.fx.GraphModule) and "inline_constraints" in _meta(module):
        raise QuietvitError(
            f"{of} was exported by torch.export, which fixes its operations, and with pt2e also "
            "its quantization. Generate images from the float model that it was exported from."
        )
    where = type(module).__module__
    if isinstance(module, torch.ao.nn.quantized.FloatFunctional):
        return  # float operations of a model that can be quantized later
    if isinstance(module, QuantizedModel) or where.startswith(_QUANTIZED):
        kind = "" if isinstance(module, QuantizedModel) else f" ({where}.{type(module).__name__})"
        raise QuietvitError(f"{of} is quantized{kind}. {_FROM_FLOAT}")


def _meta(graph: Any) -> Any:
    return graph.meta


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _refuse_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    of = f"{name} of {type(model).__name__}"
    if is_lazy(tensor):
        raise QuietvitError(
            f"{of} has no shape yet. Run the model on one batch of images, or load its weights."
        )
    if tensor.is_meta:
        raise QuietvitError(
            f"{of} is on the device 'meta', so it has no values. Call model.to_empty(device='cpu') "
            "and load the weights."
        )
    kind, where = type(tensor), type(tensor).__module__
    integers = isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()
    if tensor.is_quantized or where.startswith(_QUANTIZED):
        raise QuietvitError(f"{of} is quantized ({where}.{kind.__name__}). {_FROM_FLOAT}")
    if integers and not tensor.is_complex():
        raise QuietvitError(f"{of} holds {tensor.dtype}, so it is quantized. {_FROM_FLOAT}")
    if not tensor.is_floating_point():
        return
    if tensor.layout != torch.strided:
        raise QuietvitError(
            f"{of} is sparse ({tensor.layout}), so the model cannot be copied and traced. Replace "
            "it by a dense tensor (to_dense())."
        )
    values = tensor.detach()
    values = values.float() if values.element_size() == 1 else values
    # Buffers such as attention masks hold -inf.
    bad = values.isnan() if not isinstance(tensor, nn.Parameter) else ~values.isfinite()
    if bool(bad.any()):
        raise QuietvitError(
            f"{of} holds NaN or inf, so no images can be generated from it. Reload the weights, or "
            "train the model again."
        )


def refuse_statistics(model: nn.Module) -> None:
    """Raise QuietvitError for stored statistics that no images can have (``dgh``).

    Warns if the statistics of all BatchNorms are still those of a new module.
    """
    found = [(name, module) for name, module in model.named_modules() if has_statistics(module)]
    fresh = bool(found)
    for name, norm in found:
        mean: Any = norm.running_mean
        variance: Any = norm.running_var
        why = ""
        if not bool(mean.isfinite().all()):
            name, why = f"{name}.running_mean", "holds NaN or inf"
        elif not bool(variance.isfinite().all()):
            name, why = f"{name}.running_var", "holds NaN or inf"
        elif bool((variance < 0).any()):
            name, why = f"{name}.running_var", f"holds {float(variance.min()):.3g}, below 0"
        elif not bool(variance.any()):
            name, why = f"{name}.running_var", "is 0 in every channel"
        if why:
            raise QuietvitError(
                f"{name} of {type(model).__name__} {why}, and no images have such statistics. "
                "Reload the weights, or use method 'pink', which needs none."
            )
        fresh = fresh and not bool(mean.any()) and bool((variance == 1).all())
    if fresh:
        logger.warning(
            "all BatchNorms of %s hold the statistics of new modules (mean 0, variance 1), so the "
            "generated images fit no data. Load the weights of a trained model.",
            type(model).__name__,
        )


def without_statistics(model: nn.Module) -> str:
    """Say why ``dgh`` finds no statistics in a model."""
    shown = type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return (
                f"{name} of {shown} keeps no statistics (track_running_stats=False), and {shown} "
                "has no BatchNorm that does"
            )
    return f"{shown} has no BatchNorm with stored statistics"
