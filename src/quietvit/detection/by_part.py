"""``ap_by_part``: which part of a detector loses how much AP when it is quantized.

``parts`` names the parts. ``advice.sensitivity`` measures single sites and roles of any model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from quietvit.detection.average_precision import BoxAP, evaluate_detector
from quietvit.detection.parts import part_of_each, sites_by_part, with_parts
from quietvit.errors import QuietvitError
from quietvit.files import finite, json_text, write_atomic
from quietvit.origin import Origins, counted, origin_of, provenance
from quietvit.progress import tracked
from quietvit.quantization import Method, QuantizedModel, Slot, quantize
from quietvit.quantization.settings import parse_method
from quietvit.text import in_text

SAME = 1e-3
"""With all quantizers off, the outputs equal the float model's within this relative error."""


@dataclass(frozen=True)
class Loss:
    """What quantization changes: ``error`` of the outputs, and the ``ap`` that is left.

    ``error`` is the relative L2 error of the networks' outputs: the root of the mean square over
    class scores, boxes and masks, of the RPN too. The box head of a Faster or Mask R-CNN gets the
    float model's proposals, and the mask head its boxes. So the number of their rows does not
    change. ``ap`` is None without annotated boxes.
    """

    error: float
    ap: BoxAP | None = None


@dataclass(frozen=True)
class PartLoss:
    """One part: its products, and the loss if only it, or all but it, is quantized.

    ``alone`` and ``without`` are None if Ctrl-C came before.
    """

    name: str
    sites: int
    macs: int
    alone: Loss | None
    without: Loss | None


@dataclass(frozen=True)
class PartLosses:
    """The result of ``ap_by_part``. ``print`` shows the table.

    ``float_ap`` is the AP of the float model on ``images``, ``whole`` the loss with everything
    quantized. ``origins`` says how the images for calibration and errors, and those for AP, were
    generated (``quietvit.synthesize``); None for real images. Without AP both are the same.
    """

    model: str
    setting: str
    images: int
    origins: Origins
    macs: int
    float_ap: BoxAP | None
    whole: Loss
    parts: tuple[PartLoss, ...]

    @property
    def complete(self) -> bool:
        """False if Ctrl-C ended the measurement."""
        return all(part.alone and part.without for part in self.parts)

    def __rich__(self) -> Group:
        table = Table()
        table.add_column("part", no_wrap=True)
        table.add_column("MACs", justify="right", no_wrap=True)
        names = ("error",) if self.float_ap is None else ("error", self._ap_name)
        for when in ("alone", "without"):
            for name in names:
                table.add_column(f"{when}: {name}", justify="right")
        for part in self.parts:
            cells = [cell for loss in (part.alone, part.without) for cell in self._cells(loss)]
            table.add_row(part.name, f"{100 * part.macs / (self.macs or 1):.0f} %", *cells)
        whole = f" and {self._ap_name} ".join(self._cells(self.whole))
        images = counted(self.images, self.origins[1])
        head = [f"{self.model}, {self.setting}, {images}", f"everything quantized: error {whole}"]
        if self.float_ap is not None:
            head.append(f"float: {self._ap_name} {_shown(self.float_ap)}")
        head += provenance(self.origins)
        if not self.complete:
            head.append("stopped early: a part with - is not measured")
        head.append("alone: only this part is quantized; without: all other parts are quantized")
        return Group(*head, table)

    @property
    def _ap_name(self) -> str:
        return "box/mask AP" if self.float_ap is not None and self.float_ap.mask else "AP"

    def _cells(self, loss: Loss | None) -> list[str]:
        count = 1 if self.float_ap is None else 2
        if loss is None:
            return ["-"] * count
        ap = "-" if loss.ap is None else _shown(loss.ap)
        return [f"{100 * loss.error:.3g} %", ap][:count]

    def __str__(self) -> str:
        return in_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain data."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain

    def to_json(self, path: str | Path) -> Path:
        """Write ``to_dict`` to ``path`` atomically. Returns the path."""
        return write_atomic(path, json_text(self.to_dict(), indent=1) + "\n")


def ap_by_part(
    model: nn.Module,
    method: Method | str,
    calibration: Tensor,
    loader: Any = None,
    *,
    bits: str | None = None,
    progress: bool = True,
) -> PartLosses:
    """Measure the AP and the error if one part of a detector, or all but one, is quantized.

    The parts are those of ``sites_by_part``. The model is calibrated once and never changes. The
    errors need two passes over ``calibration`` for each part, and AP two over ``loader``. Ctrl-C
    ends the measurement and returns the results so far.

    Args:
        model: the float detector, in eval mode.
        method: as for ``quietvit.quantize``. It must not change weights to make up for rounding.
        calibration: images (N, 3, H, W) from ``detection_calibration``. They also give the errors.
        loader: a ``detection_loader`` for AP. None measures only the errors.
        bits: such as ``W4A4``, for a method given by name.
        progress: show a progress bar after 3 seconds.

    Raises:
        QuietvitError: the model is no detector with known parts, the method changes weights, or
            ``quietvit.quantize`` or ``evaluate_detector`` refuses the arguments.
    """
    if isinstance(method, str):
        method = parse_method(method, bits)
    method = with_parts(method, model, calibration[:1])
    quantized = quantize(model, method, calibration, progress=progress)
    parts = sites_by_part(quantized.model, quantized.trace)
    wanted = _Reference(model, calibration)
    if (error := wanted.error(quantized, ())) > SAME:
        raise QuietvitError(
            f"{method.name} changes weights to make up for rounding: with all quantizers "
            f"off, its outputs are {100 * error:.2g} % from the float model's. So the loss of one "
            "part cannot be measured. Use a method that only chooses ranges, such as rtn-omse."
        )

    def loss(slots: Sequence[Slot]) -> Loss:
        error = wanted.error(quantized, slots)
        if loader is None:
            return Loss(error)
        with quantized.only(slots):
            return Loss(error, evaluate_detector(quantized, loader))

    float_ap = None if loader is None else evaluate_detector(model, loader)
    slots, owner = quantized.slots(), part_of_each(quantized.model, quantized.trace)
    whole = loss(slots)
    found: dict[tuple[str, bool], Loss] = {}
    jobs = [(part, alone) for alone in (True, False) for part in parts]
    try:
        with closing(tracked(jobs, len(jobs), "parts", progress)) as steps:
            for part, alone in steps:
                found[part, alone] = loss(
                    [slot for slot in slots if (owner.get(slot.site.name) == part) is alone]
                )
    except KeyboardInterrupt:
        pass
    return PartLosses(
        model=quantized.trace.model_name,
        setting=f"{method.name} {method.label}",
        images=len(calibration) if loader is None else len(loader.dataset),
        origins=(origin_of(calibration), origin_of(calibration if loader is None else loader)),
        macs=quantized.trace.macs,
        float_ap=float_ap,
        whole=whole,
        parts=tuple(
            PartLoss(
                name=part,
                sites=len(sites),
                macs=sum(quantized.trace[site].macs for site in sites),
                alone=found.get((part, True)),
                without=found.get((part, False)),
            )
            for part, sites in parts.items()
        ),
    )


def _shown(ap: BoxAP) -> str:
    """Return AP in words for the table: that of boxes, or of boxes and masks."""
    return f"{ap.ap:.1f}" if ap.mask is None else f"{ap.ap:.1f}/{ap.mask.ap:.1f}"


class _Reference:
    """The outputs of the float detector's networks on a few images."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self._images = list(images)
        self._proposals: list[Any] = []
        self._boxes: list[Any] = []
        self._outputs = self._read(model, model)

    def error(self, quantized: QuantizedModel, slots: Sequence[Slot]) -> float:
        """Return ``Loss.error`` if only these operands are quantized."""
        with quantized.only(slots):
            outputs = self._read(quantized, quantized.model)
        squares = [
            float((x - y).square().sum() / y.square().sum().clamp(min=torch.finfo(y.dtype).tiny))
            for x, y in zip(outputs, self._outputs, strict=True)
        ]
        return (sum(squares) / len(squares)) ** 0.5

    @torch.no_grad()
    def _read(self, run: nn.Module, model: Any) -> list[Tensor]:
        """Run a detector, one image at a time. Returns its outputs, each over all images."""
        rows = []
        for place, image in enumerate(self._images):
            with _watched(model) as seen, self._fixed(model, place):
                found = run([image])
            tensors = seen or [found.logits, found.boxes]
            rows.append([x.detach().double().flatten() for x in tensors])
        return [torch.cat(each) for each in zip(*rows, strict=True)]

    @contextmanager
    def _fixed(self, model: Any, place: int) -> Iterator[None]:
        """Give the heads the proposals and boxes of the float model, which runs first."""
        if not hasattr(model, "rpn"):
            yield
            return

        def fix(module: Any, inputs: Any, output: Any) -> Any:
            if place == len(self._proposals):
                self._proposals.append(output[0])
            return self._proposals[place], output[1]

        heads = model.roi_heads
        found = heads.postprocess_detections

        def boxes(*given: Any) -> Any:
            if place == len(self._boxes):
                self._boxes.append(found(*given))
            return self._boxes[place]

        hook = model.rpn.register_forward_hook(fix)
        heads.postprocess_detections = boxes
        try:
            yield
        finally:
            hook.remove()
            del heads.postprocess_detections


@contextmanager
def _watched(model: Any) -> Iterator[list[Tensor]]:
    """Collect the outputs of the last modules of torchvision's detectors, of others nothing."""
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        values = output.values() if isinstance(output, dict) else output
        values = [output] if isinstance(output, Tensor) else values
        for value in values:  # the RPN's head gives one list for each of its two outputs
            each = value if isinstance(value, list) else [value]
            seen.append(torch.cat([x.flatten() for x in each]))

    watched = []
    if hasattr(model, "rpn"):
        heads = model.roi_heads
        watched = [model.rpn.head, heads.box_predictor]
        watched += [heads.mask_predictor] if heads.has_mask() else []
    elif hasattr(model, "head"):
        watched = [model.head]
    with ExitStack() as stack:
        for module in watched:
            stack.callback(module.register_forward_hook(keep).remove)
        yield seen
