"""Labelled images behind one face: ``dataset[i] -> (PIL image in RGB, label)``, and parts of it.

Where the encoded bytes come from is decided in ``folder``, ``table``, ``shards`` and ``hub``.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from quietvit.classes import fitted
from quietvit.errors import QuietvitError

Sample = tuple[Image.Image, int]
T = TypeVar("T")


class ImageDataset(Dataset[Sample]):
    """Labelled images, decoded on access: ``dataset[i] -> (PIL image in RGB, label)``.

    Args:
        labels: one integer in 0..num_classes-1 per image.
        read: index -> the encoded bytes, or a PIL image.
        where: index -> a few words naming the image in error messages.
        num_classes: number of classes; None takes the largest label plus one.
        name: names the data set in error messages.
        class_names: of the classes in their order, where they are known. The attribute has one for
            each of ``num_classes``: names that lack are ``class 7`` and the like.
        groups: one integer per image, equal for images that lie together on disk (a shard of a
            WebDataset, a row group of a table): what ``shuffle_window`` counts. None if all can be
            reached alike.

    Raises:
        QuietvitError: no images at all, or a label outside 0..num_classes-1.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        read: Callable[[int], bytes | Image.Image],
        where: Callable[[int], str],
        *,
        num_classes: int | None = None,
        name: str = "the data set",
        class_names: tuple[str, ...] | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.name = name
        self.groups = groups
        self._read, self._where = read, where
        if len(self.labels) == 0:
            raise QuietvitError(f"{name} holds no images at all; check the path and its contents.")
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        self.class_names = None if class_names is None else fitted(class_names, self.num_classes)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(outside):
            first = int(outside[0])
            raise QuietvitError(
                f"{name}: the label of {where(first)} is {int(self.labels[first])}, outside "
                f"0..{self.num_classes - 1} ({len(outside)} such labels); labels count from 0, so "
                "correct them or state the right number of classes."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        content = self._read(index)
        if isinstance(content, Image.Image):
            return content.convert("RGB"), int(self.labels[index])
        # Where it lies may take a search through its shard, so it is asked for only when it is bad.
        image = decode(content, lambda: f"{self._where(index)} of {self.name}")
        return image, int(self.labels[index])

    def checksum(self, index: int) -> str:
        """Return a checksum of the stored image ``index``; empty where it cannot be read."""
        try:
            content = self._read(index)
        except QuietvitError:
            return ""
        plain = content.tobytes() if isinstance(content, Image.Image) else content
        return hashlib.sha256(plain).hexdigest()[:16]

    def where(self, index: int) -> str:
        """Return a few words that name image ``index``: its file, its row, its sample."""
        return self._where(index)


class Transformed(Dataset[tuple[Tensor, int]]):
    """``dataset`` with its images transformed: samples are (tensor (3, H, W), label)."""

    def __init__(self, dataset: Dataset[Sample], transform: Callable[[Image.Image], Tensor]):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


def subset(dataset: ImageDataset, count: int | None, seed: int = 0) -> ImageDataset:
    """Return ``count`` images drawn without replacement (all for None), the same for every call.

    Raises:
        QuietvitError: ``count`` is below 1 or more than there are.
    """
    if count is None:
        return dataset
    if not 1 <= count <= len(dataset):
        raise QuietvitError(
            f"{count} images of {dataset.name} were asked for, which holds {len(dataset)}; ask "
            f"for 1 to {len(dataset)}."
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count])
    return ImageDataset(
        dataset.labels[chosen],
        partial(_chosen, dataset._read, chosen),
        partial(_chosen, dataset._where, chosen),
        num_classes=dataset.num_classes,
        name=dataset.name,
        class_names=dataset.class_names,
        groups=None if dataset.groups is None else dataset.groups[chosen],
    )


def relabelled(dataset: ImageDataset, labels: np.ndarray, names: Sequence[str]) -> ImageDataset:
    """Return the same images with other labels (N,), which count the classes called ``names``."""
    return ImageDataset(
        labels,
        dataset._read,
        dataset._where,
        num_classes=len(names),
        name=dataset.name,
        class_names=tuple(names),
        groups=dataset.groups,
    )


def decode(content: bytes, where: Callable[[], str]) -> Image.Image:
    """Decode an image to RGB. Raises QuietvitError naming ``where()`` if it cannot be done."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(content)).convert("RGB")
    except Exception as error:  # damaged files raise anything, AVIF's decoder a RuntimeError
        raise QuietvitError(
            f"the image at {where()} could not be decoded: {error} ({len(content)} bytes); replace "
            "it or remove it from the data set."
        ) from error


def _chosen(inner: Callable[[int], T], chosen: np.ndarray, index: int) -> T:
    return inner(int(chosen[index]))
