"""``check``: an exported file against the simulated model it came from, on real images.

Three questions, each answered in files of its own: what ran in integers (``proof``), whether it
computes the same (``parity``, ``comparing``), and what that is worth (``speed``).
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quietvit.deployment.comparing import (
    Classes,
    Features,
    Labelled,
    compare_classes,
    compare_features,
)
from quietvit.deployment.facts import Facts
from quietvit.deployment.for_onnx.file import float_onnx, write_onnx
from quietvit.deployment.model import as_float32
from quietvit.deployment.opening import exported_kind, open_runtime
from quietvit.deployment.parity import Agreement, agreements
from quietvit.deployment.paths import parts_of
from quietvit.deployment.proof import Proof, prove
from quietvit.deployment.runtime import OnnxRuntime, OpenVINO, Runtime, processor
from quietvit.deployment.speed import Speed, measure
from quietvit.deployment.uniform import replacing_codes
from quietvit.errors import QuietvitError
from quietvit.files import json_text, write_atomic
from quietvit.normalization import warn_unless_normalized
from quietvit.quantization import QuantizedModel
from quietvit.tracing import plain_model

BATCH, FEW = 32, 500


@dataclass(frozen=True, repr=False)
class Check:
    """What ``check`` found.

    ``classes``: of a file that gives scores of classes, else None, and then ``features`` is there.
    ``bytes`` and ``float_bytes``: size of the file and of a float one, which is made for the timing
    only, so None without.
    """

    path: Path
    machine: str
    proof: Proof
    agreements: tuple[Agreement, ...]
    classes: Classes | None
    features: Features | None
    speeds: tuple[Speed, ...]
    bytes: int
    float_bytes: int | None
    notes: tuple[str, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """What the file claims and does not keep, a sentence each; empty where all is kept."""
        found = [
            f"{ran.product} ran in float as {ran.operator}: {ran.reason}"
            for ran in self.proof.broken
        ]
        found += [
            f"{a.product}: {a.wrong} of {a.codes} codes and {a.off} of {a.sums} sums of products "
            "are not the simulated model's"
            for a in self.agreements
            if not a.equal
        ]
        compared = self.classes or self.features
        return (*found, *(() if compared is None else compared.failures))

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_json(self, path: str | Path) -> Path:
        """Write everything as JSON."""
        content = {
            "path": str(self.path),
            "machine": self.machine,
            "runtime": self.proof.runtime,
            "ok": self.ok,
            "failures": list(self.failures),
            "integer_share_of_macs": self.proof.integer_share,
            "products": [
                asdict(ran) | {"claimed": ran.product in self.proof.claimed}
                for ran in self.proof.ran
            ],
            "agreements": [asdict(agreement) for agreement in self.agreements],
            "classes": None
            if self.classes is None
            else asdict(self.classes)
            | {
                "agreement_percent": self.classes.agreement,
                "steadiness_percent": self.classes.steadiness,
                "top1": self.classes.top1,
                "top1_simulated": self.classes.top1_simulated,
            },
            "features": None if self.features is None else asdict(self.features),
            "speed": [asdict(speed) for speed in self.speeds],
            "bytes": self.bytes,
            "float_bytes": self.float_bytes,
            "notes": list(self.notes),
        }
        return write_atomic(path, json_text(content, indent=1) + "\n")

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.failures)} failures"
        share = 100 * self.proof.integer_share
        return f"Check({str(self.path)!r}, {verdict}, {share:.2f} % in integers)"

    def __str__(self) -> str:
        from quietvit.deployment.text import check_text

        return check_text(self)


def check(
    path: str | Path,
    against: QuantizedModel | str | Path,
    images: Tensor | Iterable[Any],
    *,
    runtime: str | None = None,
    threads: int = 0,
    seconds: float = 10.0,
    batches: tuple[int, ...] = (1, 8),
) -> Check:
    """Prove what an exported file computes in integers, that it computes the same, and how fast.

    ``against``: the quantized model it was exported from, or its .qvit. ``images``: a tensor
    (N, C, H, W) after the model's own transform, or batches of such, with labels behind them
    (N,) for top-1; their classes are matched by name as ``quietvit.data.evaluate`` does.
    ``runtime``: ``onnxruntime`` or ``openvino``, by default what the suffix says. ``seconds``: how
    long each batch size of ``batches`` is timed, 0 for not at all; the float model is exported from
    ``against`` and runs in the same runtime, in turn.

    Kept are: every product that the file says is integer ran so (from the runtime's optimized
    graph); on the first two images every code and every sum of products is the simulated model's
    but for ties; classes and top-1 are the simulated model's as far as ``Classes.failures`` says,
    and values of an embedding or feature map as far as ``Features.failures`` says. Logits are not
    compared: where one rounding falls the other way, others follow, and after a few blocks two
    correct computations differ by as much as quantization itself (measured, see the lab log).

    Raises QuietvitError for a file that is truncated, foreign, of another image size or another
    model, and for a missing extra.
    """
    path = Path(path)
    _refuse_settings(path, seconds, batches)
    loaded = open_runtime(path, runtime, threads)
    facts = loaded.facts
    quantized = _simulated(against, facts)
    _same_model(path, facts, quantized)
    given = _batches(images)
    first = next(given)
    warn_unless_normalized(first[0], quantized.model, "given")
    loaded.check_images(tuple(first[0].shape))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # The float model first: where it cannot be exported, no time is lost on the images.
        floating = None if seconds == 0 else Path(folder) / "float.onnx"
        size = None
        if floating is not None:
            content = float_onnx(quantized.model, quantized.input_shape, facts.output)
            size = write_onnx(content, floating)
        proof = prove(loaded, facts)
        compared, notes = _compared(loaded, facts, quantized, first[0][:2])
        everything = itertools.chain([first], given)
        classes = features = None
        if facts.output.of_classes:
            classes = compare_classes(loaded, quantized, everything, facts.output, images)
            if classes.images < FEW:
                notes.append(
                    f"{classes.images} images are few: whether classes agree shows from about "
                    f"{FEW} on"
                )
        else:
            features = compare_features(loaded, quantized, everything, facts.output)
        speeds = tuple(_speeds(loaded, floating, first[0], threads, seconds, batches))
    return Check(
        path=path,
        machine=processor(),
        proof=proof,
        agreements=compared,
        classes=classes,
        features=features,
        speeds=speeds,
        bytes=sum(part.stat().st_size for part in parts_of(path)),
        float_bytes=size,
        notes=tuple(dict.fromkeys(notes)),
    )


def _refuse_settings(path: Path, seconds: float, batches: tuple[int, ...]) -> None:
    """Raise QuietvitError for settings that would be refused only after the images ran."""
    if not 0 <= seconds < float("inf"):
        raise QuietvitError(f"seconds={seconds} is no time; give 0 for none, or more.")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in batches):
        raise QuietvitError(f"batches={batches} are no batch sizes; give whole numbers from 1 on.")
    if exported_kind(path) == ".torchao":
        raise QuietvitError(
            f"{path} is a torchao folder, which check does not compare product by product; its "
            "integer_share and left_float tell what it multiplies (load_torchao), and "
            "'quietvit evaluate' measures its top-1. Check the .onnx or .xml of the same model."
        )


def _compared(
    loaded: Runtime, facts: Facts, quantized: QuantizedModel, images: Tensor
) -> tuple[tuple[Agreement, ...], list[str]]:
    """Compare the products on a few images; also the notes on what is not compared."""
    notes = list(facts.notes)
    compared: tuple[Agreement, ...] = ()
    if isinstance(loaded, OpenVINO) and loaded.path.suffix != ".xml":
        notes.append(
            "of an .onnx in openvino no product is compared: export it to openvino for that"
        )
    else:
        compared = tuple(agreements(loaded.path, facts, quantized, images))
    if isinstance(loaded, OnnxRuntime) and loaded.note is not None:
        notes.append(loaded.note)
    left = sum(p.why_float is not None for p in facts.products)
    if left:
        notes.append(f"{left} products that the file does not claim to be integer are not compared")
    return compared, notes


def _simulated(against: QuantizedModel | str | Path, facts: Facts) -> QuantizedModel:
    against = plain_model(against)  # type: ignore[assignment, arg-type]
    if not isinstance(against, QuantizedModel | str | Path):
        raise QuietvitError(
            f"a {type(against).__name__} is not quantized; give the quantized model that the file "
            "was exported from, or its .qvit."
        )
    if not isinstance(against, QuantizedModel):
        from quietvit.quantization import load

        against = load(against)
    own = as_float32(against)
    if own.training or any(p.device.type != "cpu" for p in own.parameters()):
        own = copy.deepcopy(own).cpu().eval()  # the one given stays where and as it is
    return own if facts.replaced is None else replacing_codes(own, facts.replaced)[0]


def _same_model(path: Path, facts: Facts, quantized: QuantizedModel) -> None:
    """Raise QuietvitError unless both make the same products of images of one shape."""
    unused = set(facts.unused)
    sites = [site for site in quantized.trace.matmuls if site.name not in unused]
    own = [(site.name, site.macs) for site in sites]
    theirs = [(p.name, p.macs) for p in facts.products if p.kind != "compensation"]
    if own != theirs or quantized.input_shape != facts.input_shape:
        differing = next(
            (pair for pair in zip(own, theirs, strict=False) if pair[0] != pair[1]), ""
        )
        raise QuietvitError(
            f"{path} was exported from another model than the one it is checked against: images of "
            f"{facts.input_shape} against {quantized.input_shape}, {len(theirs)} products against "
            f"{len(own)}{f', first {differing[1]} against {differing[0]}' if differing else ''}. "
            "Give the .qvit that it was exported from."
        )


def _batches(images: Any) -> Iterator[Labelled]:
    """Images (B, C, H, W) on the CPU with their labels, if there are any."""
    empty = True
    for item in [images] if isinstance(images, Tensor) else images:
        whole = isinstance(item, tuple | list)
        x, y = (item[0], item[1] if len(item) > 1 else None) if whole else (item, None)
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            shown = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise QuietvitError(
                f"a batch of images is {shown}; give float tensors (N, C, H, W) after the model's "
                "own transform, with labels (N,) behind them or without."
            )
        named = None if y is None else torch.as_tensor(y)
        if named is not None and named.shape != (len(x),):
            raise QuietvitError(
                f"{len(x)} images have labels of shape {tuple(named.shape)}; give one for each."
            )
        for start in range(0, len(x), BATCH):
            part = x[start : start + BATCH]
            labels = None if named is None else named[start : start + BATCH]
            empty = False
            yield part.detach().float().cpu().contiguous(), labels
    if empty:
        raise QuietvitError("there are no images to check on; give at least one.")


def _speeds(
    loaded: Runtime,
    floating: Path | None,
    first: Tensor,
    threads: int,
    seconds: float,
    batches: tuple[int, ...],
) -> Iterator[Speed]:
    if floating is None:
        return
    kind = OpenVINO if isinstance(loaded, OpenVINO) else OnnxRuntime
    other = kind(floating, threads=threads)
    pool = first.numpy()
    for size in batches:
        images = np.ascontiguousarray(np.resize(pool, (size, *pool.shape[1:])))
        yield measure(loaded, other, images, seconds)
