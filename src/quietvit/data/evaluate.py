"""Top-1 accuracy of a model on labelled images, and random calibration images.

Callers pass the transform, usually ``transforms.evaluation_transform``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import closing, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quietvit.classes import names_of
from quietvit.data.images import drawn
from quietvit.data.matching import label_numbers
from quietvit.data.sources import ImageDataset, Transformed
from quietvit.errors import QuietvitError
from quietvit.outputs import logits_of
from quietvit.progress import tracked
from quietvit.tracing import evaluating


def evaluation_loader(
    dataset: ImageDataset,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int = 64,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Return a loader over the whole data set in order: (images (B, 3, H, W), labels (B,))."""
    return DataLoader(
        Transformed(dataset, transform),
        batch_size=batch_size,
        num_workers=num_workers,
        generator=torch.Generator(),
    )


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> float:
    """Return the top-1 accuracy in percent. The model runs in eval mode; its mode is restored.

    Args:
        model: images (B, 3, H, W) -> logits (B, classes), in any form that ``outputs.logits_of``
            accepts.
        loader: batches of (images, labels), as from ``evaluation_loader``. If both the data set
            and the model have class names, classes are matched by name, see ``matching``.
        device: the model's device.
        progress: show a progress bar on standard error.

    Raises:
        QuietvitError: no images, labels beyond the model's classes, class names that the model
            does not know, or NaN in the logits.
    """
    correct, total = count_right(model, loader, device, progress)
    if total == 0:
        raise QuietvitError("there was not one image to evaluate on; check the data set.")
    return 100.0 * correct / total


@torch.no_grad()
def count_right(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> tuple[int, int]:
    """Return (correct images, all images). Like ``evaluate``, but no images give (0, 0)."""
    if getattr(model, "num_classes", None) == 0:
        raise QuietvitError(
            "this model is an encoder without a head (num_classes is 0), so it has no top-1. "
            "quietvit.sqnr and quietvit.check compare its output before and after quantization."
        )
    correct = total = 0
    numbers: Tensor | None = None
    with evaluating(model), worker_errors(), progress_bar(loader, progress) as batches:
        for images, labels in batches:
            logits = logits_of(model(images.to(device)))
            if int(labels.min()) < 0:
                raise QuietvitError(
                    f"the data has label {int(labels.min())}: images without labels; top-1 needs "
                    "the class of each image, counted from 0."
                )
            if total == 0:
                numbers = class_numbers(loader, model, logits.shape[-1])
            labels = (labels if numbers is None else numbers[labels.cpu()]).to(logits.device)
            if int(labels.max()) >= logits.shape[-1]:
                raise QuietvitError(
                    f"the data has label {int(labels.max())}, but the model has only "
                    f"{logits.shape[-1]} classes; evaluate it on its own data."
                )
            if bool(logits.isnan().any()):
                raise QuietvitError(
                    f"the model's logits are NaN after {total} images; find the first site with "
                    "NaN by quietvit.diagnose(model, images)."
                )
            correct += int((logits.argmax(-1) == labels).sum())
            total += len(labels)
    return correct, total


def class_numbers(loader: Any, model: nn.Module, count: int) -> Tensor | None:
    """Return the table (classes,) from a loader's labels to the model's ``count`` class numbers.

    None if the labels are these numbers already. Errors: see ``matching.matched``.
    """
    names = names_of(model)
    return label_numbers(loader, None if names is None or len(names) != count else names, count)


def calibration_images(
    dataset: ImageDataset, n: int, transform: Callable[[Image.Image], Tensor], seed: int = 0
) -> Tensor:
    """Return ``n`` images drawn without replacement, transformed, as one tensor (n, 3, H, W).

    Raises:
        QuietvitError: ``n`` is below 1 or more than the data set holds.
    """
    chosen = drawn(dataset, n, seed, "calibration images")
    return torch.stack([transform(dataset[int(index)][0]) for index in chosen])


@contextmanager
def worker_errors() -> Iterator[None]:
    """Restore the plain message of a worker's QuietvitError; turn a killed worker into one."""
    try:
        yield
    except QuietvitError as error:
        text, mark = str(error), f"{QuietvitError.__module__}.{QuietvitError.__qualname__}: "
        if "DataLoader worker" not in text or mark not in text:
            raise
        raise QuietvitError(text.rsplit(mark, 1)[1].strip()) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise QuietvitError(
            f"a process that loads images ended unexpectedly ({error}). If nobody stopped it, "
            "memory (Killed) or space in /dev/shm (Bus error) ran out: lower num_workers."
        ) from error


@contextmanager
def progress_bar(loader: Iterable[Any], progress: bool) -> Iterator[Iterable[Any]]:
    """Give the batches, and show the progress on standard error if ``progress``."""
    total = len(loader) if isinstance(loader, Sized) else None
    with closing(tracked(loader, total, "evaluating", progress)) as batches:
        yield batches
