"""One quantized model, calibrated once, with operands that can be turned on and off.

``effects`` measures the outputs, and ``sensitivity`` decides which operands to switch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.advice.effects import Effect, FloatOutputs
from quietvit.errors import QuietvitError
from quietvit.normalization import warn_unless_normalized
from quietvit.origin import origins_of
from quietvit.quantization import Method, QuantizedModel, Slot, quantize
from quietvit.quantization.calibration import IMAGES_ALONE, ImageStream
from quietvit.tracing import MATMUL_KINDS, Trace, plain_model, trace_images

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
        origins: how the images for calibration and for measuring were generated, if they were.
        check: called before each piece of work. It raises if the time is over.
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
        check: Callable[[], None] = lambda: None,
    ) -> None:
        refuse_unfit(model)
        model = plain_model(model)
        self.origins = origins_of(images, calibration)
        batches = read_batches(images, model)
        if calibration is None:
            calibration = batches
        else:
            warn_unless_normalized(batches[0], model, "given")
        self.model, self.check = model, check
        self.images = sum(map(len, batches))
        trace = trace or trace_images(model, batches[0][:1], IMAGES_ALONE)
        self.floats = FloatOutputs(model, trace, batches)
        self.quantized: QuantizedModel = quantize(
            model, method, calibration, bits=bits, trace=trace, progress=progress
        )
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
            self.check()
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


def refuse_unfit(model: nn.Module) -> None:
    """Raise QuietvitError unless ``model`` is a float model in eval mode.

    In training mode outputs can be random.
    """
    if not isinstance(model, nn.Module):
        raise QuietvitError(f"the model is a {type(model).__name__}. Give a torch module.")
    if isinstance(model, QuantizedModel):
        raise QuietvitError(
            "this model is quantized already. Give the float model that it was made from."
        )
    found = next((name for name, m in model.named_modules() if m.training), None)
    if found is not None:
        raise QuietvitError(
            f"{found or 'the model'} is in training mode, so repeated passes over one image can "
            "differ. Call model.eval() first."
        )


def refuse_text(name: str, value: Any, example: str) -> None:
    """Raise QuietvitError if one text is given where several are expected."""
    if isinstance(value, str):
        raise QuietvitError(f"{name} is the text {value!r}. Give a list, such as {example}.")


def number_above_0(value: Any) -> bool:
    """Whether ``value`` is a number above 0. Infinity is one."""
    return isinstance(value, int | float) and value > 0


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
