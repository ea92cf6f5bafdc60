"""The files of one export, up to three, with the quantized models that they came from.

``checking`` proves and compares each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quietvit.deployment.companion import heads_of
from quietvit.deployment.evaluation import FileDetector
from quietvit.deployment.facts import Facts
from quietvit.deployment.for_onnx.file import float_onnx, write_onnx
from quietvit.deployment.proof import Proof, prove
from quietvit.deployment.runtime import Runtime
from quietvit.deployment.splitting import split
from quietvit.detection.static_parts import DENSE, HEADS
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel

ROWS = 64
"""Pooled boxes on which a head is compared."""


@dataclass(frozen=True)
class Network:
    """One file in its runtime, its facts, and the quantized model or part it came from.

    ``part`` is the part's name: ``dense``, or a key of ``HEADS``.
    """

    runtime: Runtime
    facts: Facts
    quantized: QuantizedModel
    part: str = DENSE

    def write_float(self, folder: Path) -> tuple[Path, int]:
        """Write the float network to an .onnx in ``folder``. Returns its path and bytes."""
        path = folder / f"float{len(list(folder.iterdir()))}.onnx"
        own = self.quantized
        return path, write_onnx(float_onnx(own.model, own.input_shape, self.facts.output), path)


def networks_of(loaded: Runtime, facts: Facts, whole: QuantizedModel) -> list[Network]:
    """Return the file's own network first, then the heads of a Faster or Mask R-CNN.

    Raises QuietvitError if a file is missing, or ``whole`` is another model than the files'.
    """
    parts = split(whole) or {DENSE: whole}
    found = [Network(loaded, facts, parts[DENSE])]
    for part, head in heads_of(loaded, facts).items():
        if part in parts:
            found.append(Network(head, head.facts, parts[part], part))
    for network in found:
        _same_model(network.runtime.path, network.facts, network.quantized)
    return found


def proof_of(networks: Sequence[Network]) -> Proof:
    """Return how the products of all files ran. Raises QuietvitError if a runtime does not tell."""
    each = [prove(network.runtime, network.facts) for network in networks]
    return Proof(
        each[0].runtime,
        tuple(ran for proof in each for ran in proof.ran),
        frozenset().union(*(proof.claimed for proof in each)),
        sum(proof.total_macs for proof in each),
    )


def pooled_rows(whole: QuantizedModel, part: str, images: Tensor) -> Tensor:
    """Return at most ``ROWS`` pooled boxes (K, C, h, w) that a head of the simulated model sees.

    ``part`` is a key of ``HEADS``.

    Raises QuietvitError if there are none.
    """
    kept: list[Tensor] = []
    model: Any = whole.model
    head = getattr(model.roi_heads, HEADS[part])
    hook = head.register_forward_pre_hook(
        lambda module, given: kept.append(given[0].detach().clone())
    )
    try:
        with torch.no_grad():
            whole(images)
    finally:
        hook.remove()
    if not len(kept[0]):
        raise QuietvitError(
            f"the first images give the {HEADS[part].replace('_', ' ')} no boxes, so it cannot be "
            "compared. Check on images with objects."
        )
    return kept[0][:ROWS]


class Timed:
    """The whole detector as a function of images (N, 3, H, W), for ``speed.measure``."""

    def __init__(self, detector: FileDetector) -> None:
        self._detector = detector

    def __call__(self, images: np.ndarray) -> Any:
        return self._detector(list(torch.from_numpy(images)))


def timed(networks: Sequence[Network], floating: Sequence[Path]) -> Iterator[Any]:
    """Yield what is timed, as functions of images: the exported files, then the float files."""
    first = networks[0]
    kind: Any = type(first.runtime)
    runtimes = [kind(path, first.runtime.threads) for path in floating]
    if "kind" not in (first.facts.detector or {}):
        yield from (first.runtime, runtimes[0])
        return
    heads = {network.part: head for network, head in zip(networks, runtimes, strict=True)}
    del heads[DENSE]
    yield Timed(FileDetector(first.runtime, first.facts))
    yield Timed(FileDetector(runtimes[0], first.facts, heads))


def _same_model(path: Path, facts: Facts, quantized: QuantizedModel) -> None:
    """Raise QuietvitError unless both have the same products and the same image shape."""
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
