"""``check``: an exported file against the simulated model it came from, on real images.

Three questions, each answered in a file of its own: what ran in integers (``proof``), whether it
computes the same (``parity``), and what that is worth (``speed``).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quietvit.data.evaluate import class_numbers
from quietvit.deployment.facts import Facts
from quietvit.deployment.for_onnx.file import float_onnx_of
from quietvit.deployment.model import as_float32, logits_of
from quietvit.deployment.parity import Agreement, agreements
from quietvit.deployment.proof import Proof, prove
from quietvit.deployment.runtime import (
    OnnxRuntime,
    OpenVINO,
    Runtime,
    open_runtime,
    parts_of,
    processor,
)
from quietvit.deployment.speed import Speed, measure
from quietvit.deployment.uniform import as_uniform
from quietvit.errors import QuietvitError
from quietvit.files import json_text, write_atomic
from quietvit.normalization import warn_unless_normalized
from quietvit.quantization import QuantizedModel
from quietvit.tracing import plain_model

AGREEMENT, DIFFERENCE, DISTURBANCE = 99.0, 0.3, 1e-6
BATCH, FEW = 32, 500


@dataclass(frozen=True)
class Classes:
    """What file and simulated model say about the same images, counted.

    ``same``: both the same class. ``steady``: the simulated model's own class with images moved by
    one part in a million, the measure of how far its roundings alone move it. Of labelled images
    ``right`` and ``simulated_right``, and how many only one of them has right; None without labels.
    """

    images: int
    same: int
    steady: int
    right: int | None = None
    simulated_right: int | None = None
    only_one_right: int | None = None

    @property
    def agreement(self) -> float:
        """Percent of images with the same class in both."""
        return 100 * self.same / self.images

    @property
    def steadiness(self) -> float:
        """Percent of images whose class the simulated model keeps when they are hardly moved."""
        return 100 * self.steady / self.images

    @property
    def top1(self) -> float | None:
        return None if self.right is None else 100 * self.right / self.images

    @property
    def top1_simulated(self) -> float | None:
        return None if self.simulated_right is None else 100 * self.simulated_right / self.images

    @property
    def failures(self) -> tuple[str, ...]:
        """Where file and simulated model are further apart than chance puts them.

        The class agrees on 99 % of the images, or as often as the simulated model agrees with
        itself, but for three standard errors of that difference; top-1 is within 0.3 points, or
        within two standard errors of the paired difference (the root of the number of images that
        only one of them has right).
        """
        found = []
        n, p = self.images, self.steadiness / 100
        chance = 300 * math.sqrt(2 * max(p * (1 - p), 1 / n) / n)
        least = min(AGREEMENT, self.steadiness - chance)
        if self.agreement < least:
            found.append(
                f"the class is the simulated model's on {self.agreement:.2f} % of {n} images, less "
                f"than {least:.2f} % (99 %, or what the simulated model keeps of its own classes "
                f"when its images are moved by {DISTURBANCE:g}, {self.steadiness:.2f} %)"
            )
        if self.right is not None and self.simulated_right is not None:
            apart = abs(self.right - self.simulated_right)
            room = max(DIFFERENCE * n / 100, 2 * math.sqrt(self.only_one_right or 0))
            if apart > room:
                found.append(
                    f"top-1 is {self.top1:.2f} % where the simulated model has "
                    f"{self.top1_simulated:.2f} %: {apart} of {n} images, more than {room:.1f}"
                )
        return tuple(found)


@dataclass(frozen=True)
class Check:
    """What ``check`` found.

    ``bytes`` and ``float_bytes``: size of the file and of a float one, which is made for the timing
    only, so None without.
    """

    path: Path
    machine: str
    proof: Proof
    agreements: tuple[Agreement, ...]
    classes: Classes
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
        return (*found, *self.classes.failures)

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
            "classes": asdict(self.classes)
            | {
                "agreement_percent": self.classes.agreement,
                "steadiness_percent": self.classes.steadiness,
                "top1": self.classes.top1,
                "top1_simulated": self.classes.top1_simulated,
            },
            "speed": [asdict(speed) for speed in self.speeds],
            "bytes": self.bytes,
            "float_bytes": self.float_bytes,
            "notes": list(self.notes),
        }
        return write_atomic(path, json_text(content, indent=1) + "\n")

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
    but for ties; classes and top-1 are the simulated model's as far as ``Classes.failures`` says.
    Logits are not compared: where one rounding falls the other way, others follow, and after a few
    blocks two correct computations differ by as much as quantization itself (measured, see the
    lab log).

    Raises QuietvitError for a file that is truncated, foreign, of another image size or another
    model, and for a missing extra.
    """
    path = Path(path)
    loaded = open_runtime(path, runtime, threads)
    facts = loaded.facts
    quantized = _simulated(against, facts)
    _same_model(path, facts, quantized)
    given = _batches(images)
    first = next(given)
    warn_unless_normalized(first[0], quantized.model, "given")
    loaded.check_images(tuple(first[0].shape))
    compared: tuple[Agreement, ...] = ()
    notes = list(facts.notes)
    if isinstance(loaded, OpenVINO) and path.suffix != ".xml":
        notes.append(
            "of an .onnx in openvino no product is compared: export it to openvino for that"
        )
    else:
        compared = tuple(agreements(path, facts, quantized, first[0][:2]))
    if isinstance(loaded, OnnxRuntime) and loaded.note is not None:
        notes.append(loaded.note)
    left = sum(p.why_float is not None for p in facts.products)
    if left:
        notes.append(f"{left} products that the file does not claim to be integer are not compared")
    classes = _classes(loaded, quantized, itertools.chain([first], given), images)
    if classes.images < FEW:
        notes.append(
            f"{classes.images} images are few: whether classes agree shows from about {FEW} on"
        )
    floating = float_onnx_of(quantized.model, quantized.input_shape) if seconds > 0 else b""
    return Check(
        path=path,
        machine=processor(),
        proof=prove(loaded, facts),
        agreements=compared,
        classes=classes,
        speeds=tuple(_speeds(loaded, floating, first[0], threads, seconds, batches)),
        bytes=sum(part.stat().st_size for part in parts_of(path)),
        float_bytes=len(floating) or None,
        notes=tuple(dict.fromkeys(notes)),
    )


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
    return as_uniform(own)[0] if facts.uniform else own


def _same_model(path: Path, facts: Facts, quantized: QuantizedModel) -> None:
    """Raise QuietvitError unless both make the same products of images of one shape."""
    own = [(site.name, site.macs) for site in quantized.trace.matmuls]
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


Labelled = tuple[Tensor, Tensor | None]


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


def _classes(
    loaded: Runtime, quantized: QuantizedModel, given: Iterable[Labelled], loader: Any
) -> Classes:
    count = same = steady = right = simulated_right = only_one = 0
    labelled, numbers = True, None
    noise = torch.Generator().manual_seed(0)
    for x, labels in given:
        labelled = labelled and labels is not None
        loaded.check_images(tuple(x.shape))
        moved = x * (1 + DISTURBANCE * torch.randn(x.shape, generator=noise))
        with torch.no_grad():
            logits = [logits_of(quantized(images)) for images in (x, moved)]
        classes, (own, again) = logits[0].shape[-1], (found.argmax(-1) for found in logits)
        theirs = torch.from_numpy(loaded(x.numpy())).argmax(-1)
        if count == 0 and labels is not None:
            numbers = class_numbers(loader, quantized, classes)
        count, same = count + len(x), same + int((theirs == own).sum())
        steady += int((again == own).sum())
        if labels is not None:
            labels = labels.cpu() if numbers is None else numbers[labels.cpu()]
            hits, simulated_hits = theirs == labels, own == labels
            right, simulated_right = (
                right + int(hits.sum()),
                simulated_right + int(simulated_hits.sum()),
            )
            only_one += int((hits != simulated_hits).sum())
    if not labelled:
        return Classes(count, same, steady)
    return Classes(count, same, steady, right, simulated_right, only_one)


def _speeds(
    loaded: Runtime,
    floating: bytes,
    first: Tensor,
    threads: int,
    seconds: float,
    batches: tuple[int, ...],
) -> Iterator[Speed]:
    if not floating:
        return
    kind = OpenVINO if isinstance(loaded, OpenVINO) else OnnxRuntime
    other = kind(floating, threads=threads)
    pool = first.numpy()
    for size in batches:
        images = np.ascontiguousarray(np.resize(pool, (size, *pool.shape[1:])))
        yield measure(loaded, other, images, seconds)
