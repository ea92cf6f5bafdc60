"""``check``: compare an exported file with the simulated model it came from, on real images.

``proof`` tells what ran in integers, ``parity`` and ``comparing`` whether the results agree, and
``speed`` how fast it is. The result is a ``Check``.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quietvit.deployment import processor
from quietvit.deployment.checked import Check
from quietvit.deployment.comparing import Labelled, compare_classes, compare_features
from quietvit.deployment.facts import Facts
from quietvit.deployment.for_onnx.file import float_onnx, write_onnx
from quietvit.deployment.model import as_float32
from quietvit.deployment.opening import open_runtime
from quietvit.deployment.parity import Agreement, agreements
from quietvit.deployment.proof import prove
from quietvit.deployment.runtime import Runtime
from quietvit.deployment.speed import Speed, measure
from quietvit.deployment.targets import files_of
from quietvit.deployment.uniform import replacing_codes
from quietvit.errors import QuietvitError
from quietvit.inputs import Images, image_batches
from quietvit.normalization import warn_unless_normalized
from quietvit.progress import tracked
from quietvit.quantization import QuantizedModel, load
from quietvit.tracing import plain_model

BATCH, FEW = 32, 500


def check(
    path: str | Path | Runtime,
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

    Logits are not compared. One value that rounds the other way changes later roundings. After a
    few blocks two correct computations differ as much as quantization itself (see the lab log).

    Args:
        path: an exported file, or an open runtime (``open_runtime``).
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
    proof = prove(loaded, facts)
    quantized = _simulated(against, facts)
    _same_model(loaded.path, facts, quantized)
    labelled = _batches(images)
    first = next(labelled)
    warn_unless_normalized(first[0], quantized.model, "given")
    loaded.check_images(tuple(first[0].shape))
    notes = [*facts.notes, *loaded.notes]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Export the float model first: if that fails, no time is lost on the images.
        floating, float_bytes = None, None
        if seconds > 0 and loaded.opens_float_onnx:
            floating = Path(folder) / "float.onnx"
            graph = float_onnx(quantized.model, quantized.input_shape, facts.output)
            float_bytes = write_onnx(graph, floating)
        compared = _compared(loaded, facts, quantized, first[0][:2], notes)
        joined = itertools.chain([first], labelled)
        everything = tracked(joined, _expected(images), "comparing batches of images", progress)
        classes = features = None
        if facts.output.of_classes:
            with closing(everything):
                classes = compare_classes(loaded, quantized, everything, facts.output, images)
            if classes.images < FEW:
                notes.append(
                    f"{classes.images} images are few; use about {FEW} or more to judge whether "
                    "classes agree"
                )
        else:
            with closing(everything):
                features = compare_features(loaded, quantized, everything, facts.output)
        with closing(tracked(batches, len(batches), "timing batch sizes", progress)) as sizes:
            speeds = tuple(_speeds(loaded, floating, first[0], seconds, sizes))
    return Check(
        path=loaded.path,
        machine=processor.described(),
        proof=proof,
        agreements=compared,
        classes=classes,
        features=features,
        speeds=speeds,
        bytes=sum(file.stat().st_size for file in files_of(loaded.path)),
        float_bytes=float_bytes,
        notes=tuple(dict.fromkeys(notes)),
    )


def _opened(path: str | Path | Runtime, runtime: str | None, threads: int) -> Runtime:
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


def _compared(
    loaded: Runtime, facts: Facts, quantized: QuantizedModel, images: Tensor, notes: list[str]
) -> tuple[Agreement, ...]:
    """Compare the products on a few images. Adds a note for products that are not compared."""
    compared: tuple[Agreement, ...] = ()
    if loaded.uncompared is None:
        compared = tuple(agreements(loaded, facts, quantized, images))
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
    loaded: Runtime,
    floating: Path | None,
    first: Tensor,
    seconds: float,
    batches: Iterable[int],
) -> Iterator[Speed]:
    if floating is None:
        return
    kind: Any = type(loaded)
    other = kind(floating, loaded.threads)
    pool = first.numpy()
    for size in batches:
        images = np.ascontiguousarray(np.resize(pool, (size, *pool.shape[1:])))
        yield measure(loaded, other, images, seconds)
