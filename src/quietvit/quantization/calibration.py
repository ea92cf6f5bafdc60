"""Calibration images as a checked stream of batches, and the passes that a method may run on them.

Methods make the quantizers; the entry point is ``quantize``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.inputs import image_batches
from quietvit.progress import tracked
from quietvit.quantization.slot import Slot
from quietvit.tracing import MATMUL_KINDS, SITE_KINDS, Site, Trace, intercept, refusing
from quietvit.tracing.intercept import Handler

BATCH = 8
IMAGES_ALONE = (
    "The model is called with one tensor of images (B, C, H, W) and nothing else. If it needs more "
    "arguments, quantize a torch.nn.Module whose forward(images) calls it with them."
)
"""What to do with a model that does not run on images."""

T = TypeVar("T")


class ImageStream:
    """Iterate over batches (at most ``BATCH``, C, H, W) on the model's device, in its dtype.

    ``source``: images in any form that ``inputs.image_batches`` takes. Raises QuietvitError for no
    images, differing shapes, integer pixels, NaN or inf. A generator allows only one pass; a second
    pass raises QuietvitError.
    """

    def __init__(self, source: Any, model: nn.Module) -> None:
        self.source = source
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.device, self.dtype = like.device, like.dtype
        self.shape: tuple[int, ...] | None = None
        self.seen = 0
        self._ahead: tuple[Iterator[Tensor], Tensor] | None = None
        self._spent = False

    def peek(self) -> Tensor:
        """Return the first batch without consuming it."""
        if self._ahead is None:
            batches = self._batches()
            first = next(batches, None)
            if first is None:
                raise QuietvitError(
                    "zero calibration images; give at least one, 32 are usual for range methods."
                )
            self._ahead = (batches, first)
        return self._ahead[1]

    def __iter__(self) -> Iterator[Tensor]:
        first = self.peek()
        assert self._ahead is not None
        rest, self._ahead = self._ahead[0], None
        yield first
        yield from rest

    def batches_expected(self) -> int | None:
        """Number of batches, None if unknown."""
        if isinstance(self.source, Tensor):
            return -(-self.source.shape[0] // BATCH)
        if isinstance(self.source, Mapping) or not isinstance(self.source, Sized):
            return None
        try:
            return len(self.source) * max(
                1, -(-(getattr(self.source, "batch_size", None) or 1) // BATCH)
            )
        except TypeError:
            return None

    def _batches(self) -> Iterator[Tensor]:
        if self._spent:
            raise QuietvitError(
                "this method goes through the calibration images more than once, but they come "
                "from a generator; give a tensor, a list of batches or a DataLoader."
            )
        self._spent = isinstance(self.source, Iterator)
        self.seen = 0
        for batch in image_batches(self.source, BATCH):
            images = batch.images
            if self.shape is None:
                self.shape = tuple(images.shape[1:])
            elif tuple(images.shape[1:]) != self.shape:
                raise QuietvitError(
                    f"a calibration batch has images of shape {tuple(images.shape[1:])}, earlier "
                    f"ones had {self.shape}; resize all to one shape."
                )
            self.seen += batch.size
            yield images.to(self.device, self.dtype)


@dataclass
class Calibration:
    """What a method works on: a private copy of the model in eval mode, its trace, the images.

    ``chosen``: whether an operand is to be quantized, so that it needs values; None means all.
    """

    model: nn.Module
    trace: Trace
    images: ImageStream
    progress: bool = True
    chosen: Callable[[Slot], bool] | None = None

    def observe(
        self, handler: Handler, *, kinds: frozenset[str] = MATMUL_KINDS, label: str = "calibrating"
    ) -> None:
        """Run every calibration batch through the model under ``handler``, without gradients."""
        with torch.no_grad():
            for batch in self.track(self.images, self.images.batches_expected(), label):
                with intercept(self.trace, handler, kinds=kinds):
                    run_model(self.model, batch)

    def everything(self) -> Tensor:
        """Return all images in one tensor (N, C, H, W), for methods that need them at once."""
        return torch.cat(list(self.images))

    def run(
        self,
        images: Tensor,
        handler: Handler,
        *,
        kinds: frozenset[str] = SITE_KINDS,
        label: str | None = None,
    ) -> Any:
        """Run one pass under ``handler``, gradients as outside; ``label`` shows its progress."""
        if label is None:
            with intercept(self.trace, handler, kinds=kinds):
                return run_model(self.model, images)
        total = sum(site.kind in kinds for site in self.trace.sites)
        with closing(self.track(range(total), total, label)) as steps:

            def stepped(
                site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
            ) -> Tensor:
                next(steps, None)
                return handler(site, operands, run)

            return self.run(images, stepped, kinds=kinds)

    def watch(self, look: Callable[[Slot, Tensor], None], *, label: str = "calibrating") -> None:
        """Pass each operand of each matrix product to ``look``, batch by batch.

        Weights come with every batch, as the tensor that the operation reads. Empty operands are
        left out, because a detector may find nothing in a batch. Raises QuietvitError if an operand
        that will be quantized is empty in every batch.
        """
        reached: dict[Slot, bool] = {}

        def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
            for index, tensor in enumerate(operands):
                slot = Slot(site, index)
                reached[slot] = reached.get(slot, False) or tensor.numel() > 0
                if not tensor.numel():
                    continue
                try:
                    look(slot, tensor)
                except QuietvitError as error:
                    raise QuietvitError(f"{site.name} ({slot.operand}): {error}") from error
            return run(*operands)

        self.observe(handler, label=label)
        missed = [
            s.site.name
            for s, was_reached in reached.items()
            if not was_reached and (not self.chosen or self.chosen(s))
        ]
        refuse_unreached(missed)

    def track(
        self, batches: Iterable[T], total: int | None, label: str
    ) -> Generator[T, None, None]:
        """``tracked``, if this calibration shows its progress."""
        return tracked(batches, total, label, self.progress)


def refuse_unreached(sites: Iterable[str]) -> None:
    """Raise QuietvitError if there are sites that no calibration image gave values to."""
    names = list(dict.fromkeys(sites))
    if names:
        raise QuietvitError(
            f"no calibration image gave values to {', '.join(names)}: a detector found "
            f"nothing. Give images in which it finds something, or keep these {len(names)} "
            f"sites in float: exclude={names}."
        )


def run_model(model: nn.Module, batch: Tensor) -> Any:
    """Call the model. Turn its errors about the batch into a QuietvitError."""
    with refusing(
        lambda what: (
            f"{type(model).__name__} does not run on calibration images of shape "
            f"{tuple(batch.shape)}, {batch.dtype} ({what}). {IMAGES_ALONE}"
        )
    ):
        return model(batch)
