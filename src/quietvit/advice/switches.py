"""One quantized model whose operands are switched on and off by site and by role.

It is calibrated once. ``effects`` measures the outputs; ``sensitivity`` decides what is switched.
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

# A model whose quantizers are all off computes the float model's outputs, up to rounding.
_SAME = {torch.float32: 1e-3, torch.float64: 1e-3}
_SAME_IN_HALF = 5e-2


class Switches:
    """A quantized model, its groups of operands, and the float outputs on the given images.

    Attributes:
        model: the float model.
        quantized: the quantized model.
        floats: outputs of the float model.
        sites: the quantized operands of each site, in the order of the forward pass.
        roles: the quantized operands of each role, as ``Method.overrides`` understands roles.
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
                "the method leaves every site in float; there is nothing to measure."
            )
        self.sites = _by_site(self.quantized.trace, slots)
        self.roles = _by_role(self.quantized.trace, slots)
        self._known: dict[frozenset[Slot], Effect] = {}
        self._refuse_changed_weights(next(model.parameters()).dtype)

    def effect(self, slots: Iterable[Slot]) -> Effect:
        """Measure the model with only these operands quantized. Results are kept."""
        chosen = frozenset(slots)
        if chosen not in self._known:
            with self.quantized.only(chosen):
                self._known[chosen] = self.floats.effect(self.quantized)
        return self._known[chosen]

    def others(self, slots: Collection[Slot]) -> list[Slot]:
        """All quantized operands but these."""
        left_out = set(slots)
        return [slot for slot in self.quantized.slots() if slot not in left_out]

    def _refuse_changed_weights(self, dtype: torch.dtype) -> None:
        error = self.effect(()).error or 0.0
        if error <= _SAME.get(dtype, _SAME_IN_HALF):
            return
        name = self.quantized.method.name
        raise QuietvitError(
            f"{name} changes weights or outputs to make up for rounding. With all its quantizers "
            f"off, the outputs still differ from the float model's by {100 * error:.2g} %, so the "
            "cost of one site alone cannot be measured. Measure a method that only chooses ranges, "
            f"such as rtn-omse, smoothquant or repq-vit. The bits found there suit {name} too."
        )


def read_batches(images: Any, model: nn.Module) -> list[Tensor]:
    """Read images in any form that ``quietvit.quantize`` takes, to run over them many times."""
    return list(ImageStream(images, model))


def refuse_training(model: nn.Module) -> None:
    """Raise QuietvitError if any module is in training mode: its outputs would be random."""
    found = next((name for name, m in model.named_modules() if m.training), None)
    if found is not None:
        raise QuietvitError(
            f"{found or 'the model'} is in training mode, so two passes over one image may differ. "
            "Call model.eval() first."
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
