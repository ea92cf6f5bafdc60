"""Images in whatever form they are given, as checked batches on the model's device.

What is measured while the model runs is decided by the callers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.normalization import warn_unless_normalized
from quietvit.tracing import call, refusing
from quietvit.tracing.inputs import is_image_list

Images = Tensor | Iterable[Any]
_LABELS = frozenset({"label", "labels"})


@dataclass(frozen=True)
class Batch:
    """Model inputs for ``size`` images: positional (one tensor) or by keyword."""

    inputs: Tensor | dict[str, Tensor]
    size: int

    @property
    def example(self) -> Tensor | dict[str, Tensor]:
        """The first image alone, in the form ``quietvit.trace`` takes."""
        return self.pick(0).inputs

    def pick(self, i: int) -> Batch:
        """A copy of image i alone."""
        if isinstance(self.inputs, Tensor):
            return Batch(self.inputs[i : i + 1].clone(), 1)
        return Batch({key: value[i : i + 1].clone() for key, value in self.inputs.items()}, 1)

    def run(self, model: nn.Module) -> Any:
        """Run the model on this batch.

        Raises:
            QuietvitError: the model refuses the batch; its own message is carried along.
        """
        with refusing(
            lambda what: (
                f"the model ({type(model).__name__}) does not run on images of shape {self.shape} "
                f"({what}). Give images as the model's own evaluation transform makes them."
            )
        ):
            return call(model, self.inputs)

    @property
    def shape(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        if isinstance(self.inputs, Tensor):
            return tuple(self.inputs.shape)
        return {key: tuple(value.shape) for key, value in self.inputs.items()}


def batches(images: Images, model: nn.Module, batch_size: int) -> Iterator[Batch]:
    """Yield checked batches of at most ``batch_size``, on the model's device and of its dtype.

    A warning says so where the first batch is not normalized as the model's preprocessing does it.

    Args:
        images: a tensor (N, C, H, W); or an iterable, for example a DataLoader, of single images
            (C, H, W), of batches (B, C, H, W), of lists of images, of tuples or lists whose first
            entry is one of these (labels follow), or of mappings of batched tensors given to the
            model by keyword, of which ``label`` and ``labels`` are left out.

    Raises:
        QuietvitError: no images, another shape, integers, NaN or inf; names the values.
    """
    if batch_size < 1:
        raise QuietvitError(f"batch_size is {batch_size}; give at least 1.")
    parameter = next(model.parameters(), None)
    empty = True
    for inputs in _grouped(images, batch_size):
        if isinstance(inputs, Tensor):
            _check(inputs)
        if empty:
            warn_unless_normalized(inputs, model, "given")
        empty = False
        if isinstance(inputs, Tensor):
            size = inputs.shape[0]
            yield Batch(_like(inputs, parameter), size)
        else:
            for value in inputs.values():
                if value.is_floating_point() and not value.isfinite().all():
                    raise QuietvitError(f"the inputs {sorted(inputs)} hold NaN or inf; clean them.")
            size = next(iter(inputs.values())).shape[0]
            yield Batch({key: _like(value, parameter) for key, value in inputs.items()}, size)
    if empty:
        raise QuietvitError("there are no images to measure; give at least one.")


def _grouped(images: Images, batch_size: int) -> Iterator[Tensor | dict[str, Tensor]]:
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise _wrong_shape(images)
        yield from images.split(batch_size)
        return
    if isinstance(images, Mapping):
        images = [images]
    held: list[Tensor] = []
    for item in images:
        if isinstance(item, Mapping):
            yield from _split({k: v for k, v in item.items() if k not in _LABELS}, batch_size)
            continue
        if is_image_list(item) and len({image.shape for image in item}) == 1:
            yield from torch.stack(item).split(batch_size)
            continue
        if is_image_list(item) and len(item) > 1:
            raise QuietvitError(
                f"a batch is a list of images of shapes {[tuple(image.shape) for image in item]}; "
                "resize all to one shape, or give them one by one."
            )
        tensor = item[0] if isinstance(item, tuple | list) and item else item
        if not isinstance(tensor, Tensor):
            raise QuietvitError(
                f"an image is a {type(tensor).__name__}, not a tensor; apply the model's "
                "evaluation transform (it ends in a float tensor of shape (C, H, W)) first."
            )
        if tensor.ndim == 4:
            yield from tensor.split(batch_size)
        elif tensor.ndim == 3:
            if held and tensor.shape != held[0].shape:
                yield torch.stack(held)
                held = []
            held.append(tensor)
            if len(held) == batch_size:
                yield torch.stack(held)
                held = []
        else:
            raise _wrong_shape(tensor)
    if held:
        yield torch.stack(held)


def _split(inputs: dict[str, Any], batch_size: int) -> Iterator[dict[str, Tensor]]:
    if not inputs or not all(isinstance(v, Tensor) and v.ndim for v in inputs.values()):
        shown = {key: type(value).__name__ for key, value in inputs.items()}
        raise QuietvitError(f"a batch holds {shown}; a mapping must hold batched tensors only.")
    size = next(iter(inputs.values())).shape[0]
    for start in range(0, size, batch_size):
        yield {key: value[start : start + batch_size] for key, value in inputs.items()}


def _check(images: Tensor) -> None:
    if images.numel() == 0:
        raise QuietvitError(f"images have shape {tuple(images.shape)}; give at least one image.")
    if not images.is_floating_point():
        raise QuietvitError(
            f"images are {images.dtype}; apply the model's evaluation transform, which scales and "
            "normalizes them to floats."
        )
    if not images.isfinite().all():
        raise QuietvitError("the images hold NaN or inf; leave the broken ones out.")


def _like(x: Tensor, parameter: Tensor | None) -> Tensor:
    if parameter is None:
        return x
    dtype = parameter.dtype if x.is_floating_point() and parameter.is_floating_point() else x.dtype
    return x.to(parameter.device, dtype)


def _wrong_shape(images: Tensor) -> QuietvitError:
    return QuietvitError(
        f"images have shape {tuple(images.shape)}; give (N, C, H, W), or single images (C, H, W)."
    )
