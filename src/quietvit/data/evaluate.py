"""Top-1 of a model on labelled images, and images drawn for calibration.

The transform is always given by the caller, from ``transforms.evaluation_transform``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quietvit.classes import names_of
from quietvit.data.matching import label_numbers
from quietvit.data.sources import ImageDataset, Transformed
from quietvit.errors import QuietvitError
from quietvit.outputs import logits_of
from quietvit.tracing import evaluating


def evaluation_loader(
    dataset: ImageDataset,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int = 64,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Return a loader in order over all of it: batches (images (B, 3, H, W), labels (B,))."""
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
    """Return the top-1 accuracy in percent. The model is run in eval mode and its mode restored.

    Args:
        model: images (B, 3, H, W) -> logits (B, classes), in any form that ``outputs.logits_of``
            takes.
        loader: batches of (images, labels), as from ``evaluation_loader``. Where the names of the
            classes are known of its data set and of the model, classes are matched by name: see
            ``matching``.
        device: where the model is and the batches are sent.
        progress: show a bar on standard error.

    Raises:
        QuietvitError: no images, labels beyond the model's classes, classes whose names the model
            does not know, or logits that are not numbers.
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
    """Return how many images a classifier gets right, and how many there are.

    Arguments and errors are those of ``evaluate``; no images at all give (0, 0).
    """
    correct = total = 0
    numbers: Tensor | None = None
    with evaluating(model), worker_errors(), progress_bar(loader, progress) as batches:
        for images, labels in batches:
            logits = logits_of(model(images.to(device)))
            if int(labels.min()) < 0:
                raise QuietvitError(
                    f"the data has label {int(labels.min())}, so images without labels; top-1 "
                    "needs the class of each image, counted from 0."
                )
            if total == 0:
                numbers = class_numbers(loader, model, logits.shape[-1])
            labels = (labels if numbers is None else numbers[labels.cpu()]).to(logits.device)
            if int(labels.max()) >= logits.shape[-1]:
                raise QuietvitError(
                    f"the data has label {int(labels.max())}, but the model tells only "
                    f"{logits.shape[-1]} classes apart; evaluate it on its own data."
                )
            if bool(logits.isnan().any()):
                raise QuietvitError(
                    f"the model's logits are not numbers after {total} images; find the first "
                    "site with NaN by quietvit.diagnose(model, images)."
                )
            correct += int((logits.argmax(-1) == labels).sum())
            total += len(labels)
    return correct, total


def class_numbers(loader: Any, model: nn.Module, count: int) -> Tensor | None:
    """Return what to index by a loader's labels to get numbers of the model's ``count`` classes.

    None where the labels are these numbers. Raises as ``matching.matched`` does.
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
    if n < 1:
        raise QuietvitError(
            f"{n} calibration images were asked for; the ranges of activations need at least one "
            "(32 is usual)."
        )
    if n > len(dataset):
        raise QuietvitError(
            f"{n} calibration images were asked for, but {dataset.name} holds {len(dataset)}; ask "
            "for fewer."
        )
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:n]
    return torch.stack([transform(dataset[int(index)][0]) for index in chosen])


@contextmanager
def worker_errors() -> Iterator[None]:
    """Give a QuietvitError raised in a loader's worker process its plain message back.

    A worker that was killed becomes a QuietvitError, too.
    """
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
            f"a process that loads images ended unexpectedly ({error}). If nobody ended it, there "
            "was too little memory (Killed) or room in /dev/shm (Bus error): lower num_workers."
        ) from error


@contextmanager
def progress_bar(loader: Iterable[Any], progress: bool) -> Iterator[Iterable[Any]]:
    """Give the batches, with a bar on standard error where ``progress`` asks for it."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True) if progress else None
    with bar if bar is not None else nullcontext():
        total = len(loader) if isinstance(loader, Sized) else None
        yield bar.track(loader, total=total, description="evaluating") if bar else loader
