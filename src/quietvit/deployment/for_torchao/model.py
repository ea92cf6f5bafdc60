"""Convert a quantized model to a torch model whose linears multiply our int8 codes with torchao.

Other products stay in float and are listed. ``file`` writes the model to disk.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.deployment.extras import need
from quietvit.deployment.for_torchao.file import TorchAO
from quietvit.deployment.for_torchao.fold import called_module, fold_adjustments
from quietvit.deployment.for_torchao.linear import INSTALL, IntegerLinear, int8_tensor
from quietvit.deployment.model import as_float32
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel
from quietvit.quantization.architecture import architecture_of
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import why_fixed, write_weight
from quietvit.tracing import MATMUL_KINDS, Site, plain_model

WEIGHT_ONLY = "only its weight is quantized: int8 in memory, multiplied in float"


def to_torchao(quantized: QuantizedModel) -> TorchAO:
    """Return a copy of the model whose linears compute the simulated model's integers.

    A linear with quantized input and weight gets int8 weight codes. Its weight has a scale per
    output channel, its input one static scale and zero point. Unsigned input codes shift by 128.
    Its sums of products equal the simulated model's. A linear with only its weight quantized stores
    int8 and multiplies in float. Everything else stays in float with quantized weight values:
    convolutions, products of two activations, and linears that torchao cannot take. Adjustments of
    norms and biases are folded.

    Raises QuietvitError for a missing extra, a model that is not quantized, and adjustments that no
    parameter can hold.
    """
    need("torchao", install=INSTALL)
    quantized = plain_model(quantized)  # type: ignore[assignment]
    if not isinstance(quantized, QuantizedModel):
        raise QuietvitError(
            f"a {type(quantized).__name__} is not quantized; quantize it with "
            "quietvit.quantize(model, method, images), or read one with quietvit.load(path)."
        )
    own = as_float32(quantized)
    model = copy.deepcopy(own.model).eval()
    made = fold_adjustments(model, own)
    slots: dict[str, dict[int, Slot]] = {}
    for slot in own.slots():
        slots.setdefault(slot.site.name, {})[slot.index] = slot
    used = own.weights_in_use()
    coverage = own.coverage
    untouched = dict(coverage.untouched)
    integer, macs, left = [], 0, []
    for site in own.trace.matmuls:
        here = slots.get(site.name, {})
        why = _converted(model, own, site, here, used.get(site.name))
        if why is None:
            integer.append(site.name)
            macs += site.macs
            continue
        left.append((site.name, why if why == WEIGHT_ONLY else untouched.get(site.name, why)))
        _round_weight(model, own, site, here)
    for name, here in slots.items():
        site = own.trace[name]
        if site.kind not in MATMUL_KINDS:
            operands = ", ".join(slot.operand for slot in here.values())
            left.append((name, f"its {operands} is rounded in the simulated model, not here"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    share = macs / coverage.total_macs if coverage.total_macs else 0.0
    architecture = architecture_of(quantized.model, quantized.input_shape)
    return TorchAO(model, tuple(integer), share, tuple(left), made, architecture)


def _converted(
    model: nn.Module, own: QuantizedModel, site: Site, here: dict[int, Slot], used: Tensor | None
) -> str | None:
    """Give the site's module an Int8Tensor. Returns why it multiplies no integers, or None."""
    if site.kind != "linear":
        what = "convolution" if site.kind == "conv" else "product of two activations"
        return f"torchao has no integer {what}, so it runs in float with unrounded operands"
    if 1 not in here:
        return "its weight is not quantized"
    module = called_module(model, own.trace, site)
    own_call = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not own_call or site.weight is None or site.weight.module != site.module:
        return "it is not the call of an nn.Linear, so torchao cannot replace it"
    whole = site.weight.rows is None and site.weight.cols is None and not site.weight.transposed
    reason = why_fixed(model, own.trace, site)
    if reason is not None or not whole:
        return reason or "its weight is a part of a parameter"
    assert isinstance(module, nn.Linear)
    if used is None or not torch.equal(used, module.weight):
        return "its weight is computed from the parameter in every pass"
    weight_codes = _weight_codes(own.quantizers[here[1].key], module.weight)
    if isinstance(weight_codes, str):
        return weight_codes
    codes, steps, offset = weight_codes
    quantizer = own.quantizers[here[0].key] if 0 in here else None
    reason = None if quantizer is None else _why_no_input(quantizer)
    if reason is not None:
        return reason
    rank = len(site.operands[0].shape)
    low, high = (None, None) if quantizer is None else _ends(quantizer)
    scale, zero = (None, None) if quantizer is None else _input_grid(quantizer, rank)
    if low is not None or offset is not None:
        IntegerLinear.in_place_of(module, low, high, offset)
    module.weight = nn.Parameter(int8_tensor(codes, steps, scale, zero), requires_grad=False)
    if quantizer is None:
        return WEIGHT_ONLY
    return None


def _weight_codes(quantizer: Any, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | str:
    """Return (int8 codes (out, in), scale (out, 1), offset), or the reason why not.

    If codes minus zero point fit in int8, the offset is None. Otherwise codes and scale get a row
    of ones, and ``offset`` (out,) is that of ``IntegerLinear``.
    """
    if not isinstance(quantizer, AffineQuantizer) or quantizer.bits > 8:
        return f"its weight is {quantizer.kind} of {quantizer.bits} bits, torchao needs affine int8"
    if quantizer.axis not in (None, 0, -2):
        return f"its weight has scales along axis {quantizer.axis}, torchao needs output channels"
    scale, zero = quantizer._broadcast(weight)
    scale = scale.detach().reshape(-1, 1).expand(weight.shape[0], 1).clone()
    codes = quantizer.codes(weight.detach())
    plain = codes - zero
    if int(plain.min()) >= -128 and int(plain.max()) <= 127:
        return plain.to(torch.int8).contiguous(), scale, None
    middle = 0 if quantizer.signed else 128
    row = torch.ones(1, weight.shape[1], dtype=torch.int8, device=weight.device)
    offset = (scale * (zero - middle)).reshape(-1)
    moved = torch.cat([(codes - middle).to(torch.int8), row])
    return moved, torch.cat([scale, torch.ones_like(scale[:1])]), offset


def _why_no_input(quantizer: Any) -> str | None:
    if not isinstance(quantizer, AffineQuantizer) or quantizer.bits > 8:
        return f"its input is {quantizer.kind} of {quantizer.bits} bits, torchao needs affine int8"
    if quantizer.axis is not None:
        return "its input has a scale for each channel, torchao needs one for the tensor"
    return None


def _input_grid(quantizer: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Return (float32 scale, int8 zero point), (1, ..., 1). Unsigned 8-bit codes shift by 128."""
    zero = quantizer.zero_point
    if not quantizer.signed and quantizer.bits == 8:
        zero = zero - 128
    shape = [1] * rank
    return quantizer.scale.detach().reshape(shape).clone(), zero.reshape(shape).to(torch.int8)


def _ends(quantizer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the smallest and largest value if there are fewer codes than int8 holds."""
    if quantizer.bits == 8:
        return None, None
    low, high = ((end - quantizer.zero_point) * quantizer.scale for end in quantizer.code_range)
    return low.detach().clone(), high.detach().clone()


def _round_weight(model: nn.Module, own: QuantizedModel, site: Site, here: dict[int, Slot]) -> None:
    """Write the quantized weight's values to the float weight, as a loaded .qvit has them."""
    from torchao.utils import TorchAOBaseTensor

    if 1 not in here or not here[1].is_weight or site.weight is None:
        return
    whole = site.weight.parameter(model)
    if isinstance(whole, TorchAOBaseTensor) or why_fixed(model, own.trace, site) is not None:
        return
    quantizer = own.quantizers[here[1].key]
    assert isinstance(quantizer, Quantizer)
    weight = site.weight.read(model).detach().reshape(site.weight_shape or whole.shape)
    with torch.no_grad():
        write_weight(model, site, quantizer(weight))
