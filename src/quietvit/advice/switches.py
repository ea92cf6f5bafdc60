"""One quantized model, calibrated once, with operands that can be turned on and off.

``effects`` measures the outputs, and ``sensitivity`` decides which operands to switch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.advice.effects import Effect, FloatOutputs
from quietvit.errors import QuietvitError
from quietvit.normalization import warn_unless_normalized
from quietvit.quantization import Method, QuantizedModel, Slot, quantize
from quietvit.quantization.calibration import ImageStream
from quietvit.tracing import MATMUL_KINDS, Trace, plain_model

# With all quantizers off, outputs match the float model's within this relative error.
_SAME = {torch.float32: 1e-3, torch.float64: 1e-3}
_SAME_IN_HALF = 5e-2


class Switches:
    """A quantized model, its groups of operands, and the float outputs on the given images.

    Attributes:
        model: the float model.
        quantized: the quantized model.
        floats: outputs of the float model.
        sites: the quantized operands of each site, in the order of the forward pass.
        roles: the quantized operands of each role, grouped as in ``Method.overrides``.
        images: number of images.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | str,
        images: Any,
        *,
        bits: str | None = None,
        calibration: Any = None,
        trace: Trace | None = None,
        progress: bool = True,
    ) -> None:
        refuse_training(model)
        model = plain_model(model)
        batches = read_batches(images, model)
        if calibration is None:
            calibration = batches
        else:
            warn_unless_normalized(batches[0], model, "given")
        self.model = model
        self.quantized: QuantizedModel = quantize(
            model, method, calibration, bits=bits, trace=trace, progress=progress
        )
        self.images = sum(map(len, batches))
        self.floats = FloatOutputs(model, self.quantized.trace, batches)
        slots = self.quantized.slots()
        if not slots:
            raise QuietvitError(
                "the method leaves every site in float, so there is no cost. Quantize some sites."
            )
        self.sites = _by_site(self.quantized.trace, slots)
        self.roles = _by_role(self.quantized.trace, slots)
        self._known: dict[frozenset[Slot], Effect] = {}
        self._refuse_changed_weights(next(model.parameters()).dtype)

    def effect(self, slots: Iterable[Slot]) -> Effect:
        """Return the effect of quantizing only these operands. Results are cached."""
        chosen = frozenset(slots)
        if chosen not in self._known:
            with self.quantized.only(chosen):
                self._known[chosen] = self.floats.effect(self.quantized)
        return self._known[chosen]

    def others(self, slots: Collection[Slot]) -> list[Slot]:
        """Return all quantized operands except these."""
        left_out = set(slots)
        return [slot for slot in self.quantized.slots() if slot not in left_out]

    def _refuse_changed_weights(self, dtype: torch.dtype) -> None:
        error = self.effect(()).error or 0.0
        if error <= _SAME.get(dtype, _SAME_IN_HALF):
            return
        name = self.quantized.method.name
        raise QuietvitError(
            f"{name} changes weights or outputs to compensate for rounding. With all quantizers "
            f"off, its outputs still differ from the float model's by {100 * error:.2g} %. So the "
            "cost of a single site cannot be measured. Measure a method that only chooses ranges, "
            f"such as rtn-omse, smoothquant or repq-vit. The bits found there suit {name} too."
        )


def read_batches(images: Any, model: nn.Module) -> list[Tensor]:
    """Read images in any form that ``quietvit.quantize`` takes, and hold them in memory."""
    return list(ImageStream(images, model))


def refuse_training(model: nn.Module) -> None:
    """Raise QuietvitError if any module is in training mode, where outputs can be random."""
    found = next((name for name, m in model.named_modules() if m.training), None)
    if found is not None:
        raise QuietvitError(
            f"{found or 'the model'} is in training mode, so repeated passes over one image can "
            "differ. Call model.eval() first."
        )


def _by_site(trace: Trace, slots: Iterable[Slot]) -> Mapping[str, list[Slot]]:
    found: dict[str, list[Slot]] = {site.name: [] for site in trace.sites}
    for slot in slots:
        found[slot.site.name].append(slot)
    return {name: own for name, own in found.items() if own}


def _by_role(trace: Trace, slots: Iterable[Slot]) -> Mapping[str, list[Slot]]:
    sites = [site for site in trace.sites if site.kind in MATMUL_KINDS]
    names = [name for site in sites for name in (site.role, *(o.role for o in site.operands))]
    found: dict[str, list[Slot]] = {name: [] for name in names}
    for slot in slots:
        if slot.site.kind not in MATMUL_KINDS or slot.is_output:
            continue
        edge = slot.site.role in ("patch_embed", "head")
        keys = {slot.site.role} if edge or slot.is_weight else {slot.site.role, slot.role}
        for key in keys:
            found[key].append(slot)
    return {name: own for name, own in found.items() if own}
