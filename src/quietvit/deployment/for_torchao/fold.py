"""Fold adjustments of outputs into the parameters of the float modules that compute them.

``model`` decides which modules compute in integers.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.adjustments import ChannelAffine
from quietvit.tracing import Site, Trace
from quietvit.tracing.ops import COMPOSED

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def fold_adjustments(model: nn.Module, quantized: QuantizedModel) -> tuple[str, ...]:
    """Fold every adjustment of ``quantized`` into ``model``, a copy of its model, in place.

    Exact except for float32 rounding: g (γ x̂ + β) + b = (g γ) x̂ + (g β + b) for norms,
    (W x + c) + b = W x + (c + b) for linears and convolutions. Returns the names of new parameters.

    Raises QuietvitError with the site's name for adjustments that no parameter can hold:
    compensations of blocks, learnt adjustments, and modules that are not torch's or run twice.
    """
    for name in quantized.compensated():
        _refuse(name, "its block is compensated in float beside it")
    made: list[str] = []
    for name, adjustment in quantized.adjusted().items():
        site = quantized.trace[name]
        if not isinstance(adjustment, ChannelAffine):
            _refuse(name, f"its output is adjusted by {adjustment.kind}, not by a gain and a bias")
        elif site.kind == "norm":
            made += _into_norm(model, quantized.trace, site, adjustment)
        else:
            made += _into_bias(model, quantized.trace, site, adjustment)
    return tuple(made)


def called_module(model: nn.Module, trace: Trace, site: Site) -> nn.Module | None:
    """Return the module whose only call is this site, or None."""
    module = model.get_submodule(site.module)
    inside = [other for other in trace.sites if other.module == site.module]
    return module if len(inside) == 1 else None


def _into_norm(model: nn.Module, trace: Trace, site: Site, by: ChannelAffine) -> list[str]:
    module = called_module(model, trace, site)
    view = site.weight
    if site.function == COMPOSED and view is not None and view.module == site.module and module:
        if bool((by.bias != 0).any()):
            _refuse(site.name, "it was shifted, and an RMSNorm has no bias")
        gain = _value(module, view.attribute, by.gain, 1.0)
        return _put(site.module, module, view.attribute, gain * by.gain.double())
    if not isinstance(module, NORMS):
        _refuse(site.name, "it is not a torch.nn norm that is called once in a pass")
    centred = not isinstance(module, nn.RMSNorm)
    if not centred and bool((by.bias != 0).any()):
        _refuse(site.name, "it was shifted, and an RMSNorm has no bias")
    made = []
    gain, bias = _value(module, "weight", by.gain, 1.0), _value(module, "bias", by.bias, 0.0)
    if gain.shape != by.gain.shape:
        _refuse(site.name, f"its weight has shape {tuple(gain.shape)}, not {tuple(by.gain.shape)}")
    made += _put(site.module, module, "weight", gain * by.gain.double())
    if centred:
        made += _put(site.module, module, "bias", bias * by.gain.double() + by.bias.double())
    return made


def _into_bias(model: nn.Module, trace: Trace, site: Site, by: ChannelAffine) -> list[str]:
    module = called_module(model, trace, site)
    own = site.weight is not None and site.weight.module == site.module
    if not own or not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        _refuse(site.name, "its bias was moved, and it is not a torch.nn module called once")
    if bool((by.gain != 1).any()):
        _refuse(site.name, "its output is scaled per channel")
    bias = _value(module, "bias", by.bias, 0.0) + by.bias.double()
    return _put(site.module, module, "bias", bias)


def _value(module: nn.Module, name: str, like: Tensor, default: float) -> Tensor:
    tensor = getattr(module, name, None)
    if tensor is None:
        return torch.full_like(like, default, dtype=torch.float64)
    return tensor.detach().double()  # type: ignore[no-any-return]


def _put(where: str, module: Any, name: str, value: Tensor) -> list[str]:
    """Set a parameter. Returns its name in a list if it is new, else an empty list."""
    before = getattr(module, name, None)
    dtype = torch.float32 if before is None else before.dtype
    setattr(module, name, nn.Parameter(value.to(dtype), requires_grad=False))
    return [f"{where}.{name}"] if before is None else []


def _refuse(name: str, why: str) -> NoReturn:
    raise QuietvitError(
        f"{name} cannot be expressed with torchao: {why}. Export to onnx, which keeps it, or "
        "quantize with a method without such adjustments."
    )
