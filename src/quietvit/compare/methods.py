"""Compare post-training methods on one model: quantize with each, measure, and report.

``advice.ladder`` measures a setting, and ``report.methods`` shows the results. Nothing is trained.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from quietvit.advice.budget import Budget
from quietvit.advice.effects import Effect, FloatOutputs
from quietvit.advice.ladder import Ladder, Row, settings
from quietvit.advice.sizes import FLOAT_BITS
from quietvit.advice.switches import read_batches, refuse_unfit
from quietvit.compare.made import made
from quietvit.data.evaluate import class_numbers, worker_errors
from quietvit.errors import QuietvitError
from quietvit.files import LOCK, held, json_text, leftovers, refuse_nonempty, write_atomic
from quietvit.inputs import ImageBatch, image_batches
from quietvit.origin import Origin, origin_of
from quietvit.outputs import logits_of
from quietvit.progress import tracked
from quietvit.quantization import Method
from quietvit.quantization.calibration import IMAGES_ALONE
from quietvit.report.methods import (
    MethodResults,
    MethodRow,
    in_order,
    method_table,
    render_methods,
)
from quietvit.report.results import FLOAT
from quietvit.tracing import plain_model, trace_images

RESULTS, TABLE, PAGE = "comparison.json", "methods.csv", "report.html"
_BATCH = 32


@dataclass(frozen=True)
class MethodComparison:
    """The results of ``compare_methods``, and its HTML page."""

    results: MethodResults
    page: Path


def compare_methods(
    model: nn.Module,
    images: Iterable[Any],
    calibration: Any,
    output: str | Path,
    *,
    methods: Sequence[str],
    bits: Sequence[str],
    labelled: bool,
    described: Mapping[str, str],
    force: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> MethodComparison:
    """Quantize one model with each method at each choice of bits, and measure each result.

    ``output`` gets ``report.html``, ``methods.csv`` and ``comparison.json``, after every setting.
    Called again with the same model and images, it measures only the settings that are missing.

    Args:
        model: a float model in eval mode. It never changes.
        images: what the results are measured on, in any form of ``inputs.image_batches`` that can
            be read more than once, such as a DataLoader.
        calibration: images as for ``quietvit.quantize``, or a function that returns them, which is
            called only if a setting is missing.
        methods: names as for ``quietvit.quantize``, such as ``repq-vit+gptq``.
        bits: such as ``W4A8`` or ``W4A4+attention-maps-8``.
        labelled: whether the images have labels, so that top-1 is measured too.
        described: ``model``, ``images`` and ``calibration`` in words. They must be the same when
            a comparison goes on.
        force: start anew in a folder that holds other files or another comparison.
        progress: show the progress of each measurement on standard error.
        say: called with one line for each setting.

    Raises:
        QuietvitError: the folder holds something else, a method or bits are unknown, no setting
            could be measured, or the model is in training mode or cannot be traced.
        KeyboardInterrupt: on Ctrl-C. The measured settings are kept.
    """
    refuse_unfit(model)
    folder, model = Path(output), plain_model(model)
    source = _Source(images, model, labelled, progress)
    first = source.first()
    trace = trace_images(model, first[:1], IMAGES_ALONE)
    tries = settings(methods, bits, trace)
    identity = {
        **described,
        "weights": _checksum(model.state_dict().values()),
        "first images": _checksum([first]),
    }
    kept = _earlier(folder, identity, force)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        job = _Job(folder, identity, tries, {row.name: row for row in kept}, origin_of(images))
        if not job.missing():
            say("all settings are measured already")
            return job.write()
        say("measuring the float model")
        with worker_errors():
            floats = _Outputs(model, trace, source)
            job.add_float(floats, model)
            given = calibration() if callable(calibration) else calibration
            origin = origin_of(given)
            ladder = Ladder(model, trace, read_batches(given, model), floats, Budget(inf))
            for at, (method, own, config) in enumerate(tries, start=1):
                name = f"[{at}/{len(tries)}] {method} {own}"
                if f"{method} {own}" in job.rows:
                    say(f"{name}: measured before")
                    continue
                say(f"{name}: quantizing and measuring")
                ladder.climb([(method, own, config)], lambda seconds: True, False)
                if ladder.failed:
                    job.failed |= dict(ladder.failed)
                    say(f"{name} failed: {ladder.failed.pop()[1]}")
                else:
                    job.add(ladder.rows[-1], floats.top1, origin)
                job.write()
    if len(job.rows) == 1:
        raise QuietvitError(
            "no method could quantize this model. "
            + " ".join(f"{name}: {why}" for name, why in job.failed.items())
        )
    return job.write()


class _Job:
    """The rows so far, and the files that show them."""

    def __init__(
        self,
        folder: Path,
        identity: dict[str, str],
        tries: Sequence[tuple[str, str, Method]],
        rows: dict[str, MethodRow],
        origin: Origin,
    ) -> None:
        self._folder, self._identity = folder, identity
        self._origin = origin
        self._wanted = [f"{method} {bits}" for method, bits, _ in tries]
        self.rows = rows
        self.failed: dict[str, str] = {}

    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in self._wanted if name not in self.rows | self.failed)

    def add_float(self, floats: _Outputs, model: nn.Module) -> None:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        row = MethodRow(
            method=FLOAT,
            bits="",
            top1=floats.float_top1,
            kept=100.0 if floats.classifies else None,
            kl=0.0 if floats.classifies else None,
            error=0.0,
            quantized=0.0,
            deployable=None,
            mib=size / 2**20,
            mean_bits=FLOAT_BITS,
            seconds=0.0,
        )
        self.rows = {row.name: row} | self.rows | {row.name: row}

    def add(self, row: Row, top1: float | None, origin: Origin) -> None:
        self.rows[row.name] = MethodRow(
            method=row.method,
            bits=row.bits,
            top1=top1,
            kept=None if row.agreement is None else 100 * row.agreement,
            kl=row.effect.kl,
            error=row.effect.error,
            quantized=100 * row.integer_share,
            deployable=row.deployable,
            mib=row.mib,
            mean_bits=row.average_bits,
            seconds=row.seconds,
            origin=origin,
        )

    def write(self) -> MethodComparison:
        results = MethodResults(
            identity=self._identity,
            rows=in_order(tuple(self.rows.values()), self._wanted),
            failed=self.failed,
            missing=self.missing(),
            origin=self._origin,
            **made(),
        )
        text = json_text(results.model_dump(mode="json"), indent=1) + "\n"
        write_atomic(self._folder / RESULTS, text)
        write_atomic(self._folder / TABLE, method_table(results).csv())
        page = write_atomic(self._folder / PAGE, render_methods(results))
        return MethodComparison(results, page)


class _Source:
    """Images in batches on the model's device, any number of times, and their labels."""

    def __init__(self, images: Any, model: nn.Module, labelled: bool, progress: bool) -> None:
        if isinstance(images, Iterator):
            raise QuietvitError(
                "the images come from a generator, but each setting reads them again. Give a "
                "tensor, a list of batches or a DataLoader."
            )
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.images, self._labelled, self._progress = images, labelled, progress
        self._like = like
        self.labels: list[Tensor] | None = [] if labelled else None

    def first(self) -> Tensor:
        found = next(self._batches(), None)
        if found is None:
            raise QuietvitError("there are no images to measure on; give at least one.")
        return found.images.to(self._like.device, self._like.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        labels: list[Tensor] | None = [] if self._labelled else None
        for batch in tracked(self._batches(), None, "measuring batches of images", self._progress):
            if labels is not None and batch.labels is not None:
                labels.append(batch.labels)
            yield batch.images.to(self._like.device, self._like.dtype)
        self.labels = labels

    def _batches(self) -> Iterator[ImageBatch]:
        return image_batches(self.images, _BATCH, labelled=self._labelled)


class _Outputs(FloatOutputs):
    """The float outputs, and the top-1 of the model that was measured last."""

    def __init__(self, model: nn.Module, trace: Any, source: _Source) -> None:
        super().__init__(model, trace, source)  # type: ignore[arg-type]  # read only in order
        self.top1: float | None = None
        self._labels: list[Tensor] | None = None
        if source.labels and self.classifies:
            count = self.expected(0).shape[-1]
            numbers = class_numbers(source.images, model, count)
            labels = [y.cpu() if numbers is None else numbers[y.cpu()] for y in source.labels]
            low, high = (int(f(torch.cat(labels))) for f in (torch.min, torch.max))
            if not 0 <= low <= high < count:
                raise QuietvitError(
                    f"the images have labels from {low} to {high}, but the model has {count} "
                    "classes; measure it on its own data."
                )
            self._labels = labels
        self.float_top1 = self._top1([self.expected(n) for n in range(len(source.labels or ()))])

    def effect(self, run: Callable[[Tensor], Any]) -> Effect:
        outputs: list[Tensor] = []

        def counted(batch: Tensor) -> Any:
            output = run(batch)
            if self._labels is not None:
                outputs.append(logits_of(output).detach().cpu())
            return output

        found = super().effect(counted)
        self.top1 = self._top1(outputs)
        return found

    def _top1(self, outputs: Sequence[Tensor]) -> float | None:
        if self._labels is None:
            return None
        pairs = zip(outputs, self._labels, strict=True)
        right = sum(int((logits.argmax(-1) == labels).sum()) for logits, labels in pairs)
        return 100 * right / sum(map(len, self._labels))


def _earlier(folder: Path, identity: Mapping[str, str], force: bool) -> tuple[MethodRow, ...]:
    """Return the rows of an earlier comparison of the same model on the same images."""
    path = folder / RESULTS
    if not path.is_file():
        refuse_nonempty(folder, force, ignored=[*leftovers(path), folder / LOCK])
        return ()
    try:
        found = MethodResults.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        if force:
            return ()
        raise QuietvitError(
            f"{path} is damaged or of another version ({str(error).splitlines()[0]}). Choose "
            "another output folder, or pass force (--force) to start a new comparison in it."
        ) from error
    differing = [
        f"{key} was {found.identity.get(key)!r} and is now {value!r}"
        for key, value in identity.items()
        if found.identity.get(key) != value
    ]
    if not differing:
        return found.rows
    if force:
        return ()
    raise QuietvitError(
        f"{folder} holds another comparison: {'; '.join(differing)}. Choose another output folder, "
        f"or pass force (--force) to replace its {len(found.rows)} rows."
    )


def _checksum(tensors: Iterable[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        total.update(content.numpy().tobytes())
    return total.hexdigest()[:16]
