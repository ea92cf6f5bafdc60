"""``export``: write a quantized model as a file that a runtime computes in integers.

Each target's folder writes its own files. ``check`` proves what ran in integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quietvit.classes import are_presumed, checked_names, names_of
from quietvit.deployment.artifact import Artifact
from quietvit.deployment.companion import digest
from quietvit.deployment.facts import Facts, facts_of
from quietvit.deployment.for_onnx.file import quantized_onnx
from quietvit.deployment.grids import Grid, grids_of, remedy, why_none
from quietvit.deployment.model import as_float32
from quietvit.deployment.outputs import Output, output_of, unused_products
from quietvit.deployment.paths import head_file
from quietvit.deployment.preprocessing import plain_preprocessing
from quietvit.deployment.splitting import split
from quietvit.deployment.target import Export, Target
from quietvit.deployment.targets import target_to_write
from quietvit.deployment.uniform import REPLACEMENTS, Replaced, replacing_codes
from quietvit.detection.static_parts import DENSE, HEADS, decoding_of
from quietvit.errors import QuietvitError
from quietvit.files import beside, put_in_place
from quietvit.quantization import QuantizedModel
from quietvit.quantization.architecture import preprocessing_of
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer
from quietvit.tracing import MATMUL_KINDS, plain_model

PRESUMED = (
    "the class names come from timm's configuration of this architecture; if the head was trained "
    "on other data, give its names (labels=..., --labels)"
)


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

    The file takes ``images`` (batch, C, H, W), float32. The batch is dynamic; if torch.export can
    only keep it at 1, a note in the facts says so. Weights are stored as int8, or as int4 if they
    have at most 4 bits (opset 21, not for torchao or ``signed``). Activations of fewer than 8 bits
    use 8-bit codes: accuracy is that of their bits, speed that of 8 bits. Weights above 2 GB go to
    a second file, ``model.onnx.data``.

    A detector of torchvision becomes files for its networks: backbone, neck and dense heads in
    ``path``, and beside it the box head of a Faster R-CNN in ``model.boxes.onnx`` and the mask head
    of a Mask R-CNN in ``model.masks.onnx``. All are written together. ``predict``, ``check`` and
    ``evaluate`` take ``path``, and compute anchors, proposals, pooling and NMS with torchvision.

    Args:
        quantized: the calibrated model.
        path: where to write.
        to: the target: ``onnx`` (an .onnx for onnxruntime), ``openvino`` (.xml and .bin),
            ``torchao`` (a folder for ``load_torchao``, only its linears are integers), or one of
            ``register_target``. By default the suffix of ``path`` decides.
        as_: replace quantizers that have no integer kernel, and report the loss. By default they
            are refused: logarithmic and two-range codes, activations with a scale per channel, and
            more than 8 bits. ``uniform`` puts uniform codes of at most 8 bits in their place.
            ``symmetric`` also replaces asymmetric codes, and implies ``signed``.
        opset: of the ONNX graph, 20 or 21.
        signed: store activations as int8 with zero point 0, as TensorRT needs, instead of uint8.
            The integers only shift by 128. The export is refused if a zero point would remain.
        output: the tensor of the model's output to export, by name (``pooler_output``,
            ``feature_maps.1``) or index. By default ``logits``; else ``image_embeds`` or
            ``pooler_output``; else the only tensor. An only tensor (batch, n) counts as class
            scores, unless the model has ``num_classes == 0``. ``output="embeddings"`` marks it as
            an embedding.
        preprocessing: timm's data config, an image processor of transformers, or torchvision's
            ``weights.transforms()``. By default the model's own.
        labels: a name for each class. By default the model's (``quietvit.data.names_of``).
        force: replace an earlier export.

    Raises:
        QuietvitError: a model that is not quantized or not calibrated, codes without an integer
            kernel, several outputs and no choice, unknown preprocessing, a setting that the target
            does not take, a model that torch cannot export, a missing extra, or a path in use.
    """
    quantized = plain_model(quantized)  # type: ignore[assignment]
    if not isinstance(quantized, QuantizedModel):
        raise QuietvitError(
            f"a {type(quantized).__name__} is not quantized, so there are no integers to export. "
            "Quantize it with quietvit.quantize(model, method, images), or read a QuantizedModel "
            "with quietvit.load(path)."
        )
    path = Path(path)
    target = target_to_write(path, to)
    target.refuse_path(path, force)
    target.need()
    if as_ not in (None, *REPLACEMENTS):
        raise QuietvitError(f"as_={as_!r} is unknown; choose 'uniform' or 'symmetric'.")
    signed = signed or as_ == "symmetric"
    target.refuse_settings(opset=opset, signed=signed)
    _refuse_uncalibrated(quantized)
    own, replaced = as_float32(quantized), list[Replaced]()
    prepared = plain_preprocessing(
        preprocessing_of(own.model) if preprocessing is None else preprocessing, own.input_shape
    )
    parts = split(own)
    if parts is None:
        chosen = output_of(own, own.input_shape, output, named_classes=labels is not None)
        detector = getattr(own.model, "decoding", None) if chosen.path == "queries" else None
    else:
        _refuse_output(target, output)
        chosen, detector = _whole(DENSE, parts[DENSE]), decoding_of(own.model)
    named = chosen.of_classes or detector is not None
    if labels is not None and not named:
        raise QuietvitError(f"labels name classes, but the output is {chosen}; leave out labels.")
    names = _labels(own, labels) if named else None
    if as_ is not None:
        own, replaced = replacing_codes(own, as_)
        parts = split(own)
    elif not target.leaves_float:
        _refuse_simulated(own, signed)
    presumed = _presumed(own, chosen, labels)

    def exported(part: QuantizedModel, place: Path, tensor: Output, **known: Any) -> Export:
        grids = grids_of(part, strict=not target.leaves_float, signed=signed)
        unused = unused_products(part, tensor)
        facts = facts_of(
            part,
            grids,
            notes=[
                *presumed,
                *_rounding_notes(part, grids),
                *_unused_notes(tensor, unused),
                *map(str, replaced),
            ],
            replaced=as_,
            output=tensor,
            unused=unused,
            **known,
        )
        return Export(part, place, facts, grids, partial(quantized_onnx, part, grids, facts, opset))

    about = {"preprocessing": prepared, "labels": names}
    if parts is None:
        facts = target.write(exported(own, path, chosen, **about, detector=detector))
        for stale in target.head_files_of(path):  # of a Faster R-CNN that was there before
            stale.unlink(missing_ok=True)
        return Artifact(path, facts, tuple(replaced))
    with beside(path) as folder:
        written, heads = list[Path](), dict[str, Facts]()
        for head, name in HEADS.items():
            if head not in parts:
                continue
            part, place = parts[head], head_file(folder / path.name, head)
            heads[head] = target.write(
                exported(part, place, _whole(head, part), preprocessing=None, labels=None)
            )
            detector = {**(detector or {}), name: digest(place)}
        facts = target.write(
            exported(parts[DENSE], folder / path.name, chosen, **about, detector=detector)
        )
        files = target.files_of(path)
        written = [file for file in files if (folder / file.name).exists()]
        put_in_place(folder, *written)
    for stale in set(files) - set(written):
        stale.unlink(missing_ok=True)
    return Artifact(path, facts, tuple(replaced), heads)


def _whole(name: str, part: QuantizedModel) -> Output:
    """Return the only output of a detector's part, under its name."""
    return output_of(part, part.input_shape, name)


def _refuse_output(target: Target, output: str | int | None) -> None:
    if output is not None:
        raise QuietvitError(
            f"a detector's file has one output, so output={output!r} has no meaning; leave out "
            "output (--output-tensor)."
        )
    if target.folder is not None:
        raise QuietvitError(
            f"{target.name} cannot hold the parts of a detector; export it to onnx or openvino."
        )


def _labels(quantized: QuantizedModel, labels: Sequence[str] | None) -> tuple[str, ...] | None:
    return names_of(quantized) if labels is None else checked_names(quantized.model, labels)


def _refuse_uncalibrated(quantized: QuantizedModel) -> None:
    slots = [slot for slot in quantized.slots() if not slot.is_weight]
    if not quantized.slots():
        raise QuietvitError(
            "the model has no quantizers, so there are no integers to export. Quantize it with "
            "quietvit.quantize(model, method, images)."
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
            f"zero point 0 (first {slots[0].site.name}). Quantize with calibration images "
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
        kernel = "integer kernel with signed codes" if signed else "integer kernel"
        raise QuietvitError(
            f"{len(reasons)} operands of this {quantized.method.name} model have no {kernel}: "
            f"{'; '.join(reasons[:2])}{more}. {remedy(signed)}"
        )


def _presumed(quantized: QuantizedModel, output: Output, labels: Sequence[str] | None) -> list[str]:
    presumed = output.of_classes and labels is None and are_presumed(quantized.model)
    return [PRESUMED] if presumed else []


def _unused_notes(output: Output, unused: Sequence[str]) -> list[str]:
    if not unused:
        return []
    return [
        f"{len(unused)} products do not enter the output {output.name} and are not in the file "
        f"(first {unused[0]})"
    ]


def _rounding_notes(quantized: QuantizedModel, grids: Mapping[str, Grid]) -> list[str]:
    """Say where the file computes otherwise than its bit widths suggest."""
    notes = []
    slots = {slot.key: slot for slot in quantized.slots()}
    low = {grid.bits for key, grid in grids.items() if not slots[key].is_weight} - {8}
    if low:
        bits = ", ".join(map(str, sorted(low)))
        notes.append(
            f"activations of {bits} bits use 8-bit codes: accuracy is that of {bits} bits, speed "
            "that of 8 bits"
        )
    kinds = {slot.site.kind for slot in slots.values() if not slot.is_output}
    if not kinds <= MATMUL_KINDS:
        notes.append("operands of norms, softmax or additions are rounded, but computed in float")
    return notes
