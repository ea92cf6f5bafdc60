"""``diagnose``: run a model on images, find its outliers and their causes in the weights.

``outliers``, ``colinearity`` and ``root_cause`` compute the statistics; ``diagnosis`` describes the
result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.inputs import ARGUMENTS, ImageBatch, Images
from quietvit.measure.colinearity import measure_pair
from quietvit.measure.diagnosis import Diagnosis
from quietvit.measure.images import batches
from quietvit.measure.outliers import RunningStatistics, SiteStatistics
from quietvit.measure.root_cause import CauseFinder, Peak, PeakTracker, RootCause
from quietvit.pairs import DENSE_KINDS, MatrixPair, find_pairs
from quietvit.tracing import (
    MATMUL_KINDS,
    SITE_KINDS,
    Site,
    Trace,
    evaluating,
    intercept,
    plain_model,
    trace_images,
)

UNREACHED = "not measured: no image gave it a value, for example because nothing was detected"
MASKED = "not measured: its scores hold the -inf of a mask"
GIVEN = "not measured: a sum with inf where the model marks entries as invalid"
_SIDES = ("left", "right")


def diagnose(
    model: nn.Module,
    images: Images,
    *,
    pairs: Sequence[MatrixPair] | None = None,
    trace: Trace | None = None,
    batch_size: int = 32,
    top: int = 10,
) -> Diagnosis:
    """Measure every site's activations and every pair's weights, and find what causes outliers.

    The model runs in eval mode without gradients. Afterwards it is in the mode it had before. It
    runs once on all images. Then it runs again on each image with one of the ``top`` largest pair
    outputs. Memory does not grow with the number of images; one image per pair output is kept.

    Args:
        model: any model that ``quietvit.trace`` takes.
        images: a tensor (N, C, H, W), or an iterable (a DataLoader) of images, of batches, of
            (images, labels), or of mappings that are given to the model by keyword.
        pairs: None measures the pairs of two dense matrices (``quietvit.pairs.DENSE_KINDS``) that
            ``quietvit.find_pairs`` finds; ``()`` measures sites alone.
        trace: of this model; None records it on the first image.
        batch_size: images per forward pass; larger batches are split.
        top: number of root causes sought and of rows in the tables.

    Raises:
        QuietvitError: no images, images of the wrong shape or not finite, no pairs found, NaN or
            inf in an activation (names the site) or in the weights of a pair. The -inf of a mask
            in front of a softmax is allowed, and so is inf in an addend that no product computes.
    """
    if top < 1:
        raise QuietvitError(f"top is {top}; give at least 1.")
    model = plain_model(model)
    stream = batches(images, model, batch_size)
    first = next(stream)
    if trace is None:
        trace = trace_images(model, first.example, ARGUMENTS)
    if pairs is None:
        try:
            pairs = find_pairs(model, kinds=DENSE_KINDS, trace=trace)
        except QuietvitError as error:
            raise QuietvitError(f"{error} To measure the sites alone, pass pairs=().") from error
    recorder = _Recorder(trace, PeakTracker(trace, pairs))
    with evaluating(model), torch.no_grad():
        measured = tuple(measure_pair(model, pair) for pair in pairs)
        recorder.run(model, first)
        for batch in stream:
            recorder.run(model, batch)
        skipped = [*recorder.masked, *recorder.unreached, *recorder.tracker.skipped]
        causes = _root_causes(model, trace, recorder.tracker.peaks, top, skipped)
    return Diagnosis(
        sites=recorder.finish(),
        pairs=measured,
        root_causes=tuple(causes),
        skipped=tuple(dict.fromkeys(skipped)),
        images=recorder.images,
        top=top,
    )


class _Recorder:
    """Handler that measures every site during the pass over all images."""

    def __init__(self, trace: Trace, tracker: PeakTracker) -> None:
        self.tracker = tracker
        self.images = 0
        self._unmeasured: dict[str, str] = {}
        self._trace = trace
        self._batch: ImageBatch | None = None
        self._running: dict[tuple[str, str], tuple[str, RunningStatistics]] = {}
        self._by_name = {site.name: site for site in trace.sites}

    def run(self, model: nn.Module, batch: ImageBatch) -> None:
        self._batch = batch
        with intercept(self._trace, self._handle, kinds=SITE_KINDS):
            batch.run(model)
        self.images += batch.size

    def finish(self) -> tuple[SiteStatistics, ...]:
        return tuple(
            running.finish(site, operand, role)
            for (site, operand), (role, running) in self._running.items()
            if running.count
        )

    @property
    def masked(self) -> list[tuple[str, str]]:
        """(site, reason) for each sum that holds the infinities of a mask."""
        return list(self._unmeasured.items())

    @property
    def unreached(self) -> list[tuple[str, str]]:
        """(site, reason) for each site that got no values."""
        return [(key[0], UNREACHED) for key, (_, stats) in self._running.items() if not stats.count]

    def _handle(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        assert self._batch is not None
        output: Tensor
        if site.kind in MATMUL_KINDS:
            single = len(site.operands) == 1
            for i, (operand, x) in enumerate(zip(site.operands, operands, strict=False)):
                side = "input" if single else _SIDES[i]
                axes = operand_axes(site, i)
                self._measure(site, side, operand.role, operand.shape, x, axes)
            output = run(*operands)
            self._check(site, output)
            if output.numel():
                self.tracker.update(site, output, self.images, self._batch.size, self._batch.pick)
            return output
        output = run(*operands)
        reason = self._masked(site, operands, output)
        if reason is not None:
            self._unmeasured[site.name] = reason
            self._running.pop((site.name, "output"), None)
            return output
        self._check(site, output)
        if site.kind != "softmax" and site.name not in self._unmeasured:
            axes = (output_axis(site, self._by_name),)
            self._measure(site, "output", site.role, site.output_shape, output, axes)
        return output

    def _measure(
        self,
        site: Site,
        side: str,
        role: str,
        traced: tuple[int, ...],
        x: Tensor,
        axes: tuple[int, ...],
    ) -> None:
        assert self._batch is not None
        key = (site.name, side)
        if key not in self._running:
            self._running[key] = (role, RunningStatistics(axes))
        counts = bool(traced) and x.shape[0] == traced[0] * self._batch.size
        images = self._batch.size if counts else None
        self._running[key][1].update(x, images=images, first_image=self.images)

    def _masked(self, site: Site, operands: tuple[Tensor, ...], output: Tensor) -> str | None:
        """Return why a sum is not measured if its only non-finite values are those of a mask.

        A mask is -inf in front of a softmax, or inf in an addend that no product computes. For
        example, a two-stage Deformable DETR gives proposals in the padding the box inf.
        """
        if site.kind != "add" or output.isfinite().all() or output.isnan().any():
            return None
        if _leads_to_softmax(site, self._by_name) and (output < torch.inf).all():
            return MASKED
        given = torch.zeros_like(output, dtype=torch.bool)
        for operand, x in zip(site.operands, operands, strict=False):
            if not operand.fed_by:
                given = given | x.isinf()
        return GIVEN if (given | output.isfinite()).all() else None

    def _check(self, site: Site, output: Tensor) -> None:
        if output.isfinite().all():
            return
        assert self._batch is not None
        what = "NaN" if output.isnan().any() else "inf"
        last = self.images + self._batch.size - 1
        raise QuietvitError(
            f"the output of {site.name} ({site.kind}, shape {tuple(output.shape)}) holds {what} on "
            f"images {self.images} to {last}; check the weights of {site.module or 'the model'}, "
            "or run it in float32."
        )


def _leads_to_softmax(site: Site, by_name: dict[str, Site]) -> bool:
    """Whether only a softmax reads this sum, possibly after further additions."""
    readers = [by_name[name] for name in site.feeds]
    return bool(readers) and all(
        reader.kind == "softmax" or (reader.kind == "add" and _leads_to_softmax(reader, by_name))
        for reader in readers
    )


def operand_axes(site: Site, position: int) -> tuple[int, ...]:
    """Axes that together form the channel index of a matrix product's operand.

    Query, key and value of shape (B, H, ...): heads and channels together. Probabilities: source
    tokens. Convolutions: axis 1. Others: the last axis. Example: a transposed key (B, H, c, N) has
    the axes (1, -2), so H·c channels.
    """
    if site.kind == "conv":
        return (1 if len(site.operands[position].shape) == len(site.weight_shape or ()) else 0,)
    operand = site.operands[position]
    axis = -1
    if site.kind == "matmul":
        transposed_key = site.role == "query_key" and position == 1
        transposed_value = operand.role == "value" and position == 0
        axis = -2 if transposed_key or transposed_value else -1
    if operand.role in ("query", "key", "value") and len(operand.shape) >= 4:
        return (1, axis)
    return (axis,)


def output_axis(site: Site, by_name: dict[str, Site]) -> int:
    """Channel axis of a site's output: 1 after a convolution and the norms that follow it."""
    if site.kind == "conv":
        return 1
    if site.kind == "norm":
        return -1 if "layer" in site.function or "rms" in site.function else 1
    if site.kind not in ("activation", "add") or len(site.output_shape) < 3:
        return -1
    for operand in site.operands:
        for name in operand.fed_by:
            source = by_name[name]
            if source.output_shape == operand.shape:
                return output_axis(source, by_name)
    return -1


def _root_causes(
    model: nn.Module,
    trace: Trace,
    peaks: Sequence[Peak],
    top: int,
    skipped: list[tuple[str, str]],
) -> list[RootCause]:
    largest = sorted((p for p in peaks if p.value), key=lambda p: -abs(p.value))[:top]
    by_image: dict[int, list[Peak]] = {}
    for peak in largest:
        by_image.setdefault(peak.image, []).append(peak)
    causes: list[RootCause] = []
    for group in by_image.values():
        finder = CauseFinder(trace, model, group, skipped)
        inputs = group[0].inputs
        assert isinstance(inputs, ImageBatch)
        with intercept(trace, finder, kinds=SITE_KINDS):
            inputs.run(model)
        causes += finder.causes
    return sorted(causes, key=lambda cause: -abs(cause.value))
