"""Read images in any supported form as batches, with their labels if wanted.

All consumers read images here. They choose the device and the use themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing import call, refusing
from quietvit.tracing.inputs import is_image_list

Images = Tensor | Iterable[Any]
IMAGE_KEYS = ("pixel_values", "images", "image", "input", "inputs", "x")
"""Keys under which a mapping may hold its images; the first one present is used."""
LABEL_KEYS = ("labels", "label")
ARGUMENTS = (
    "Give images that the model's own evaluation transform returns. If the model needs more "
    "arguments, give mappings by keyword, such as {'pixel_values': images, 'bool_masked_pos': "
    "mask}; a tuple holds images and labels."
)
"""What to do with a model that does not run on a batch."""


@dataclass(frozen=True)
class ImageBatch:
    """A batch: ``inputs`` is one tensor (B, C, H, W), or several tensors by keyword.

    ``labels``: (B,), or None if absent or not wanted.
    """

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        """The number of images."""
        inputs = self.inputs
        return len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))

    @property
    def images(self) -> Tensor:
        """The images (B, C, H, W). Raises QuietvitError if no key of ``IMAGE_KEYS`` holds them."""
        if isinstance(self.inputs, Tensor):
            return self.inputs
        images = next((self.inputs[key] for key in IMAGE_KEYS if key in self.inputs), None)
        if images is None or images.ndim != 4:
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in self.inputs.items())
            raise QuietvitError(
                f"a batch of images is a mapping with {shapes}. Give images (B, C, H, W) under one "
                f"of the keys {', '.join(IMAGE_KEYS)}."
            )
        return images

    @property
    def example(self) -> Tensor | dict[str, Tensor]:
        """The first image, in a form that ``quietvit.trace`` accepts."""
        return self.pick(0).inputs

    @property
    def shape(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """The shape of the tensor, or of each tensor by keyword."""
        if isinstance(self.inputs, Tensor):
            return tuple(self.inputs.shape)
        return {key: tuple(value.shape) for key, value in self.inputs.items()}

    def pick(self, i: int) -> ImageBatch:
        """Return a copy of image i as a batch of one."""
        if isinstance(self.inputs, Tensor):
            return ImageBatch(self.inputs[i : i + 1].clone())
        return ImageBatch({key: value[i : i + 1].clone() for key, value in self.inputs.items()})

    def run(self, model: nn.Module) -> Any:
        """Run the model on this batch. Raises QuietvitError if the model raises an exception."""
        with refusing(
            lambda what: (
                f"the model ({type(model).__name__}) does not run on images of shape {self.shape} "
                f"({what}). {ARGUMENTS}"
            )
        ):
            return call(model, self.inputs)


def image_batches(images: Images, size: int, *, labelled: bool = False) -> Iterator[ImageBatch]:
    """Yield batches of at most ``size`` images in order, with their device and dtype unchanged.

    Args:
        images: a tensor (N, C, H, W), a mapping, or an iterable such as a DataLoader or a data set.
            Its items may be, in any mixture: single images (C, H, W); batches (B, C, H, W); lists
            of images; tuples or lists of one of these and labels; mappings of batched tensors, with
            labels under ``labels`` or ``label``.
        size: larger batches are split, and single images are collected.
        labelled: whether labels are wanted. Otherwise they are ignored, whatever they are.

    Raises:
        QuietvitError: another form or shape, integer images, NaN or inf, or not one label for each
            image. No images at all are not an error.
    """
    before = 0
    for inputs, labels in _stacked(_items(images), size):
        whole = ImageBatch(inputs)
        numbers = _numbers(labels, whole.size) if labelled and labels is not None else None
        for start in range(0, whole.size, size):
            rows = slice(start, start + size)
            batch = ImageBatch(
                inputs[rows]
                if isinstance(inputs, Tensor)
                else {key: value[rows] for key, value in inputs.items()},
                None if numbers is None else numbers[rows],
            )
            _check(batch, before)
            before += batch.size
            yield batch


def _items(images: Any) -> Iterable[Any]:
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise QuietvitError(
                f"images have shape {tuple(images.shape)}; give (N, C, H, W). For a single image, "
                "add the batch dimension: images[None]."
            )
        return [images]
    if isinstance(images, Mapping):
        return [images]
    try:
        if not isinstance(images, str | bytes):
            return iter(images)  # works for a data set without __iter__, too
    except TypeError:
        pass
    raise QuietvitError(
        f"images are a {type(images).__name__}; give a tensor (N, C, H, W), or an iterable of "
        "batches, for example a DataLoader."
    )


def _stacked(items: Iterable[Any], size: int) -> Iterator[tuple[Tensor | dict[str, Tensor], Any]]:
    """Yield (inputs, labels) of batches: consecutive single images of one shape are stacked."""
    waiting: list[tuple[Tensor, Any]] = []

    def collected() -> tuple[Tensor, Any]:
        images, labels = zip(*waiting, strict=True)
        waiting.clear()
        known = None if any(label is None for label in labels) else list(labels)
        return torch.stack(images), known

    for item in items:
        inputs, labels = _parted(item)
        single = isinstance(inputs, Tensor) and inputs.ndim == 3
        if waiting and not (single and inputs.shape == waiting[0][0].shape):  # type: ignore[union-attr]
            yield collected()
        if not single:
            yield inputs, labels
            continue
        assert isinstance(inputs, Tensor)
        waiting.append((inputs, labels))
        if len(waiting) == size:
            yield collected()
    if waiting:
        yield collected()


def _parted(item: Any) -> tuple[Tensor | dict[str, Tensor], Any]:
    """Split one item into inputs and labels; stack a list of images."""
    if isinstance(item, Mapping):
        return _tensors(item), next((item[key] for key in LABEL_KEYS if key in item), None)
    if is_image_list(item):
        shapes = [tuple(image.shape) for image in item]
        if len(set(shapes)) > 1:
            raise QuietvitError(
                f"a batch is a list of images of shapes {shapes}. Resize all to one shape, or give "
                "them one by one."
            )
        return torch.stack(item), None
    if isinstance(item, tuple | list) and item:
        inputs, inner = _parted(item[0])
        return inputs, item[1] if len(item) > 1 else inner
    if not isinstance(item, Tensor):
        raise QuietvitError(
            f"an image is a {type(item).__name__}, not a tensor. Apply the model's evaluation "
            "transform first; it returns a float tensor of shape (C, H, W)."
        )
    if item.ndim not in (3, 4):
        raise QuietvitError(
            f"images have shape {tuple(item.shape)}; give (N, C, H, W), or single images (C, H, W)."
        )
    return item, None


def _tensors(item: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the batched tensors of a mapping; leave out other entries, such as names."""
    inputs = {key: value for key, value in item.items() if key not in LABEL_KEYS}
    tensors = {key: v for key, v in inputs.items() if isinstance(v, Tensor) and v.ndim}
    if not tensors or (len(tensors) < len(inputs) and not set(IMAGE_KEYS) & set(tensors)):
        shown = {key: type(value).__name__ for key, value in inputs.items()}
        raise QuietvitError(f"a batch holds {shown}; a mapping must hold batched tensors only.")
    return tensors


def _numbers(labels: Any, count: int) -> Tensor:
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise QuietvitError(f"the labels are not class numbers ({error}).") from error
    if numbers.shape != (count,):
        raise QuietvitError(
            f"{count} images have labels of shape {tuple(numbers.shape)}; give one for each."
        )
    return numbers


def _check(batch: ImageBatch, before: int) -> None:
    """Check the images of a batch; ``before`` images came before, so errors can number them."""
    alone = isinstance(batch.inputs, Tensor)
    for x in [batch.inputs] if isinstance(batch.inputs, Tensor) else batch.inputs.values():
        if alone and not x.is_floating_point():
            raise QuietvitError(
                f"images are {x.dtype}; give float tensors, scaled and normalized by the model's "
                "own evaluation transform."
            )
        if x.is_floating_point() and not bool(x.isfinite().all()):
            bad = ~x.isfinite().flatten(1).all(1)
            raise QuietvitError(
                f"image {before + int(bad.int().argmax())} holds NaN or inf; check how it is read "
                "and normalized, or leave it out."
            )
