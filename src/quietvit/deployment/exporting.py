"""``export``: the one verb from a quantized model to a file that a runtime computes in integers.

How a file is written is the business of its target's room, what ran is proven by ``check``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietvit.classes import are_presumed, checked_names, names_of
from quietvit.deployment.extras import need
from quietvit.deployment.facts import Facts, facts_of
from quietvit.deployment.for_onnx.file import quantized_onnx, write_onnx
from quietvit.deployment.grids import Grid, grids_of, remedy, why_none
from quietvit.deployment.model import as_float32
from quietvit.deployment.outputs import Output, output_of, unused_products
from quietvit.deployment.paths import data_of, parts_of, target_of
from quietvit.deployment.preprocessing import plain_preprocessing
from quietvit.deployment.uniform import REPLACEMENTS, Replaced, replacing_codes
from quietvit.errors import QuietvitError
from quietvit.files import refuse_other_bytes, refuse_unwritable
from quietvit.quantization import QuantizedModel
from quietvit.quantization.architecture import preprocessing_of
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer
from quietvit.tracing import MATMUL_KINDS, plain_model

NEEDS = {
    "onnx": ("onnxscript", "onnx"),
    "openvino": ("onnxscript", "onnx", "openvino"),
    "torchao": ("torchao",),
}
PRESUMED = (
    "the classes have the names in timm's configuration of this architecture; if the head was "
    "trained on other data, give its names (labels=..., --labels)"
)


@dataclass(frozen=True, repr=False)
class Artifact:
    """An exported file, its facts, and which quantizers were replaced to export it."""

    path: Path
    facts: Facts
    replaced: tuple[Replaced, ...] = ()

    @property
    def size(self) -> int:
        """Bytes on disk, of all its files."""
        return sum(part.stat().st_size for part in parts_of(self.path))

    def __str__(self) -> str:
        from quietvit.deployment.text import artifact_text

        return artifact_text(self)

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, {self.size / 1e6:.2f} MB, {self.facts!r})"

    def check(self, against: Any, images: Any, **options: Any) -> Any:
        """Prove what runs in integers; see ``quietvit.check``."""
        from quietvit.deployment.checking import check

        return check(self.path, against, images, **options)


def export(
    quantized: QuantizedModel,
    path: str | Path,
    *,
    to: str | None = None,
    as_: str | None = None,
    opset: int = 21,
    signed: bool = False,
    output: str | int | None = None,
    preprocessing: Any = None,
    labels: Sequence[str] | None = None,
    force: bool = False,
) -> Artifact:
    """Write a quantized model as a file whose products a runtime computes in integers.

    ``to``: ``onnx`` (a file .onnx with QuantizeLinear and DequantizeLinear, for onnxruntime),
    ``openvino`` (.xml and .bin) or ``torchao`` (a folder, read by ``load_torchao``, whose linears
    alone are integers); by default what the suffix of ``path`` says. Input ``images`` (batch, C, H,
    W), float32; the batch is dynamic, or 1 where torch.export fixes it (a note among the facts says
    so). Weights are stored as integers, int8, or int4 where they have
    at most 4 bits (opset 21, neither torchao nor ``signed``). Activations of fewer than 8 bits are
    carried in 8-bit codes: the accuracy is theirs, the speed that of 8 bits. Weights of more than
    2 GB lie in a second file, ``model.onnx.data``.

    ``output``: which tensor of the model's output the file gives, by name (``pooler_output``,
    ``feature_maps.1``) or place. By default ``logits``; else ``image_embeds`` or ``pooler_output``;
    else the only tensor. An only tensor (batch, n) is taken for scores of classes, unless the model
    has ``num_classes == 0``; ``output="embeddings"`` says that it is none.

    ``signed``: activations are int8 with zero point 0, as TensorRT wants them, in place of uint8.
    The integers are the same but for the offset of 128; where a zero point would stay, the export
    is refused.

    ``as_="uniform"`` replaces quantizers that no integer kernel has (logarithmic, two-range, one
    scale a channel, more than 8 bits) by uniform ones of 8 bits and says what that loses; without
    it they are refused. ``as_="symmetric"`` also replaces those that are not symmetric, and implies
    ``signed``.

    ``preprocessing``: timm's data config, an image processor of transformers, or torchvision's
    ``weights.transforms()``; by default the model's own. ``labels``: a name for each class, by
    default those of the model (``quietvit.data.names_of``).

    Raises QuietvitError for a model that is not quantized or not calibrated, codes without integer
    kernels, several outputs and no choice, preprocessing that is not understood, a model torch
    cannot export, a missing extra, or a path in use (``force`` replaces an earlier export).
    """
    quantized = plain_model(quantized)  # type: ignore[assignment]
    if not isinstance(quantized, QuantizedModel):
        raise QuietvitError(
            f"a {type(quantized).__name__} is not quantized, so there are no integers to export; "
            "make it a QuantizedModel by quietvit.quantize(model, method, images), or read one by "
            "quietvit.load(path)."
        )
    path = Path(path)
    target = target_of(path, to)
    refuse_existing(path, force, target)
    need(*NEEDS[target])
    if as_ not in (None, *REPLACEMENTS):
        raise QuietvitError(f"as_={as_!r} is not known; choose 'uniform' or 'symmetric'.")
    signed = signed or as_ == "symmetric"
    if signed and target == "torchao":
        raise QuietvitError(
            "signed codes are for ONNX and OpenVINO; torchao always multiplies int8, so leave "
            "signed (--signed) and as_='symmetric' out."
        )
    _refuse_uncalibrated(quantized)
    own, replaced = as_float32(quantized), list[Replaced]()
    prepared = plain_preprocessing(
        preprocessing_of(own.model) if preprocessing is None else preprocessing, own.input_shape
    )
    given = output_of(own, own.input_shape, output, named_classes=labels is not None)
    if labels is not None and not given.of_classes:
        raise QuietvitError(f"labels name classes, but the output is {given}; leave labels out.")
    if as_ is not None:
        own, replaced = replacing_codes(own, as_)
    elif target != "torchao":  # it takes linears alone, and lists what it leaves in float
        _refuse_simulated(own, signed)
    grids = grids_of(own, strict=target != "torchao", signed=signed)
    unused = unused_products(own, given)
    presumed = given.of_classes and labels is None and are_presumed(own.model)
    facts = facts_of(
        own,
        grids,
        preprocessing=prepared,
        labels=_labels(own, labels) if given.of_classes else None,
        notes=[
            *([PRESUMED] if presumed else []),
            *_notes(own, grids, target),
            *_of_output(given, unused),
            *map(str, replaced),
        ],
        replaced=as_,
        output=given,
        unused=unused,
    )
    if target == "torchao":
        from quietvit.deployment.for_torchao.file import write_torchao

        return Artifact(path, write_torchao(own, path, facts, force=force), tuple(replaced))
    content, facts = quantized_onnx(own, grids, facts, opset, at_once=target == "onnx")
    if target == "openvino":
        from quietvit.deployment.for_openvino.file import write_openvino

        write_openvino(content, path, facts)
    else:
        write_onnx(content, path)
    return Artifact(path, facts, tuple(replaced))


def refuse_existing(path: Path, force: bool, target: str = "onnx") -> None:
    """Raise QuietvitError where something stands at ``path``.

    With ``force`` only for a folder, and for torchao, whose artifact is one, for any but an earlier
    export.
    """
    if target == "torchao":
        from quietvit.deployment.for_torchao.file import FORMAT

        FORMAT.refuse(path, force)
        return
    refuse_other_bytes(path)
    for part in [path, path.with_suffix(".bin") if path.suffix == ".xml" else data_of(path)]:
        if part.is_dir():
            raise QuietvitError(f"{part} is a folder; name a file, such as model.onnx.")
        if part.exists() and not force:
            raise QuietvitError(
                f"{part} exists already; choose another name, or pass force (--force) to replace "
                "it."
            )
    refuse_unwritable(path)


def _labels(quantized: QuantizedModel, given: Sequence[str] | None) -> tuple[str, ...] | None:
    return names_of(quantized) if given is None else checked_names(quantized.model, given)


def _refuse_uncalibrated(quantized: QuantizedModel) -> None:
    slots = [slot for slot in quantized.slots() if not slot.is_weight]
    if not quantized.slots():
        raise QuietvitError(
            "the model has no quantizers at all, so there are no integers to export; quantize it "
            "by quietvit.quantize(model, method, images)."
        )
    untouched = [
        slot
        for slot in slots
        if isinstance(q := quantized.quantizers[slot.key], AffineQuantizer)
        and bool((q.scale == 1).all())
        and bool((q.zero_point == 0).all())
    ]
    if slots and len(untouched) == len(slots):
        raise QuietvitError(
            f"the quantizers were never calibrated: all {len(slots)} activations have scale 1 and "
            f"zero point 0, the first {slots[0].site.name}. Quantize with calibration images "
            "(quietvit.quantize), or load the finished .qvit."
        )


def _refuse_simulated(quantized: QuantizedModel, signed: bool) -> None:
    reasons = []
    for slot in quantized.slots():
        quantizer = quantized.quantizers[slot.key]
        assert isinstance(quantizer, Quantizer)
        why = why_none(slot, quantizer, signed)
        if why is not None:
            reasons.append(f"{slot.site.name} ({slot.operand}): {why}")
    if reasons:
        more = f"; and {len(reasons) - 2} more" if len(reasons) > 2 else ""
        kernel = "integer kernel with signed codes alone" if signed else "integer kernel"
        raise QuietvitError(
            f"{len(reasons)} operands of this {quantized.method.name} model have no {kernel}: "
            f"{'; '.join(reasons[:2])}{more}. {remedy(signed)}"
        )


def _of_output(output: Output, unused: Sequence[str]) -> list[str]:
    notes = []
    if unused:
        notes.append(
            f"{len(unused)} products do not enter the output {output.name} and are not in the file "
            f"(first {unused[0]})"
        )
    return notes


def _notes(quantized: QuantizedModel, grids: Mapping[str, Grid], target: str) -> list[str]:
    notes = []
    slots = {slot.key: slot for slot in quantized.slots()}
    wide = [key for key, grid in grids.items() if slots[key].is_weight and grid.bits == 8]
    if target == "openvino" and wide:
        from quietvit.deployment.for_openvino.file import SATURATES

        notes.append(f"{len(wide)} weights have 8 bits: {SATURATES}")
    low = {grid.bits for key, grid in grids.items() if not slots[key].is_weight} - {8}
    if low:
        bits = ", ".join(map(str, sorted(low)))
        notes.append(
            f"activations of {bits} bits are carried in 8-bit codes: the accuracy is theirs, the "
            "speed that of 8 bits"
        )
    kinds = {slot.site.kind for slot in slots.values() if not slot.is_output}
    if not kinds <= MATMUL_KINDS:
        notes.append("operands of norms, softmax or additions are rounded, and computed in float")
    return notes
