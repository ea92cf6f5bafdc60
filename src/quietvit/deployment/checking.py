"""``check``: compare an exported file with the simulated model it came from, on real images.

``proof`` tells what ran in integers, ``parity`` and ``comparing`` whether the results agree, and
``speed`` how fast it is. The result is a ``Check``.
"""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quietvit.deployment import processor
from quietvit.deployment.checked import Check
from quietvit.deployment.comparing import (
    Features,
    Labelled,
    compare_classes,
    compare_features,
)
from quietvit.deployment.detected import canvases, compare_detections, detection_batches
from quietvit.deployment.evaluation import FileDetector
from quietvit.deployment.facts import Facts
from quietvit.deployment.model import as_float32
from quietvit.deployment.networks import Network, networks_of, pooled_rows, proof_of, timed
from quietvit.deployment.opening import open_runtime
from quietvit.deployment.parity import Agreement, agreements
from quietvit.deployment.runtime import Runtime
from quietvit.deployment.speed import Speed, measure
from quietvit.deployment.targets import files_of
from quietvit.deployment.uniform import replacing_codes
from quietvit.detection.static_parts import HEADS
from quietvit.errors import QuietvitError
from quietvit.inputs import Images, image_batches
from quietvit.normalization import warn_unless_normalized
from quietvit.progress import tracked
from quietvit.quantization import QuantizedModel, load
from quietvit.tracing import plain_model

BATCH, FEW = 32, 500


def check(
    path: str | os.PathLike[str] | Runtime,
    against: QuantizedModel | str | Path,
    images: Images,
    *,
    runtime: str | None = None,
    threads: int = 0,
    seconds: float = 10.0,
    batches: tuple[int, ...] = (1, 8),
    progress: bool = True,
) -> Check:
    """Prove that an exported file computes in integers and agrees with its model, and time it.

    A check is ok if all of this holds:

    - Every product that the file claims is integer ran in integers in the runtime's own graph.
    - On the first two images all codes and all sums of products equal the simulated model's, except
      for ties.
    - Classes and top-1 agree within ``Classes.failures``. Embeddings and feature maps agree within
      ``Features.failures``.
    - The boxes of a detector agree within ``Detected.failures``. ``images`` from a
      ``detection_loader`` add the AP of both. All files of a detector are checked together.

    Logits are not compared. One value that rounds the other way changes later roundings. After a
    few blocks two correct computations differ as much as quantization itself (see the lab log).

    Args:
        path: an exported file, its ``Artifact``, or an open runtime (``open_runtime``).
        against: the quantized model that was exported, or its .qvit.
        images: after the model's own transform: a tensor (N, C, H, W), a DataLoader, or another
            form that ``inputs.image_batches`` takes. Labels add top-1. Classes are matched by name
            like in ``quietvit.data.evaluate``.
        runtime: ``onnxruntime``, ``openvino``, or that of your own target. By default the suffix
            decides.
        threads: number of CPU threads; 0 lets the runtime choose.
        seconds: how long to time each batch size; 0 disables timing. The float model is exported
            from ``against`` and runs alternately in the same runtime.
        batches: the batch sizes to time.
        progress: show the progress on standard error, if it takes more than 3 seconds.

    Raises:
        QuietvitError: a truncated or foreign file, another image size or model, a runtime that
            cannot prove anything (torchao), or a missing extra.
    """
    _refuse_settings(seconds, batches)
    loaded = _opened(path, runtime, threads)
    facts = loaded.facts
    detects = facts.detector is not None
    if detects and isinstance(images, Iterator):
        images = list(images)  # they are read twice
    quantized = _simulated(against, facts)
    networks = networks_of(loaded, facts, quantized)
    proof = proof_of(networks)
    labelled = _batches(canvases(images, loaded, BATCH) if detects else images)
    first = next(labelled)
    warn_unless_normalized(first[0], quantized.model, "given")
    loaded.check_images(tuple(first[0].shape))
    notes = [note for network in networks for note in network.facts.notes] + [*loaded.notes]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Export the float model first: if that fails, no time is lost on the images.
        floating = list[tuple[Path, int]]()
        if seconds > 0 and loaded.opens_float_onnx:
            floating = [network.write_float(Path(folder)) for network in networks]
        compared, heads = list[Agreement](), dict[str, Features]()
        for network in networks:
            if network.runtime is loaded:
                compared += _compared(network, first[0][:2], notes)
                continue
            rows = pooled_rows(quantized, network.part, first[0])
            compared += _compared(network, rows, notes)
            heads[HEADS[network.part]] = _features(network, [(rows, None)])
        joined = itertools.chain([first], labelled)
        everything = tracked(joined, _expected(images), "comparing batches of images", progress)
        classes = features = detections = None
        with closing(everything):
            if facts.output.of_classes:
                classes = compare_classes(loaded, quantized, everything, facts.output, images)
            else:
                features = _features(networks[0], everything)
        if detects:
            given = detection_batches(images, BATCH)
            detections = compare_detections(FileDetector(loaded), quantized, given)
        compared_images = detections or classes
        if compared_images is not None and compared_images.images < FEW:
            notes.append(
                f"{compared_images.images} images are few; use about {FEW} or more to judge "
                f"whether {'boxes' if detects else 'classes'} agree"
            )
        with closing(tracked(batches, len(batches), "timing batch sizes", progress)) as sizes:
            paths = [path for path, _ in floating]
            speeds = tuple(_speeds(networks, paths, first[0], seconds, sizes))
    return Check(
        path=loaded.path,
        machine=processor.described(),
        proof=proof,
        agreements=tuple(compared),
        classes=classes,
        features=features,
        speeds=speeds,
        bytes=sum(file.stat().st_size for file in files_of(loaded.path)),
        float_bytes=sum(size for _, size in floating) if floating else None,
        notes=tuple(dict.fromkeys(notes)),
        **heads,
        detections=detections,
    )


def _features(network: Network, batches: Iterable[Labelled]) -> Features:
    return compare_features(network.runtime, network.quantized, batches, network.facts.output)


def _opened(path: str | os.PathLike[str] | Runtime, runtime: str | None, threads: int) -> Runtime:
    if not isinstance(path, Runtime):
        return open_runtime(path, runtime, threads)
    if runtime is not None or threads:
        raise QuietvitError(
            f"{path.path} is already open in {path.name}; leave out runtime and threads, or give "
            "the path of the file."
        )
    return path


def _refuse_settings(seconds: float, batches: tuple[int, ...]) -> None:
    """Refuse bad settings before the images run. Raises QuietvitError."""
    if not 0 <= seconds < float("inf"):
        raise QuietvitError(f"seconds={seconds} must be finite and not negative; 0 times nothing.")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in batches):
        raise QuietvitError(f"batches={batches} must be batch sizes: integers of 1 or more.")


def _compared(network: Network, images: Tensor, notes: list[str]) -> tuple[Agreement, ...]:
    """Compare the products on a few images. Adds a note for products that are not compared."""
    loaded, facts = network.runtime, network.facts
    compared: tuple[Agreement, ...] = ()
    if loaded.uncompared is None:
        compared = tuple(agreements(loaded, facts, network.quantized, images))
    else:
        notes.append(loaded.uncompared)
    left = sum(p.why_float is not None for p in facts.products)
    if left:
        notes.append(f"{left} products are not compared, because the file claims no integers there")
    return compared


def _simulated(against: QuantizedModel | str | Path, facts: Facts) -> QuantizedModel:
    against = plain_model(against)  # type: ignore[assignment, arg-type]
    if not isinstance(against, QuantizedModel | str | Path):
        raise QuietvitError(
            f"a {type(against).__name__} is not quantized; give the quantized model that was "
            "exported, or its .qvit."
        )
    if not isinstance(against, QuantizedModel):
        against = load(against)
    own = as_float32(against)
    if own.training or any(p.device.type != "cpu" for p in own.parameters()):
        own = copy.deepcopy(own).cpu().eval()  # the caller's model keeps its device and mode
    return own if facts.replaced is None else replacing_codes(own, facts.replaced)[0]


def _batches(images: Any) -> Iterator[Labelled]:
    """Yield images (B, C, H, W), float32 on the CPU, with labels (B,) or None."""
    batch = None
    for batch in image_batches(images, BATCH, labelled=True):
        yield batch.images.detach().float().cpu().contiguous(), batch.labels
    if batch is None:
        raise QuietvitError("there are no images to check; give at least one.")


def _expected(images: Any) -> int | None:
    """Return the number of batches of at most ``BATCH`` images, None if it is not known."""
    if isinstance(images, Tensor):
        return -(-len(images) // BATCH)
    size = getattr(images, "batch_size", None)
    try:
        return len(images) * -(-size // BATCH) if isinstance(size, int) else None
    except TypeError:  # a loader over a stream
        return None


def _speeds(
    networks: Sequence[Network],
    floating: Sequence[Path],
    first: Tensor,
    seconds: float,
    batches: Iterable[int],
) -> Iterator[Speed]:
    if not floating:
        return
    integer, other = timed(networks, floating)
    pool = first.numpy()
    for size in batches:
        images = np.ascontiguousarray(np.resize(pool, (size, *pool.shape[1:])))
        yield measure(integer, other, images, seconds)
