"""``ImageDataset``: ``dataset[i] -> (PIL image in RGB, label)``, and its subsets.

``folder``, ``table``, ``shards`` and ``hub`` provide the encoded bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from quietvit.classes import fitted
from quietvit.data.decoding import decode
from quietvit.errors import QuietvitError

Sample = tuple[Image.Image, int]
T = TypeVar("T")
D = TypeVar("D")

UNLABELLED = -1
"""The label of each image of a data set without labels."""


class NoLabelsError(QuietvitError):
    """Labels are needed, but no image of the data set has one."""


class ImageDataset(Dataset[Sample]):
    """Images, decoded on access (``decoding.decode``): ``dataset[i] -> (PIL image, label)``.

    Args:
        labels: one integer in 0..num_classes-1 per image; None for images without labels, whose
            label is then ``UNLABELLED``.
        read: index -> the encoded bytes, or a PIL image.
        where: index -> a few words that name the image in error messages.
        num_classes: number of classes; None uses the largest label plus one.
        name: names the data set in error messages.
        class_names: names in the order of the classes, or None. The attribute has ``num_classes``
            names; missing ones are ``class 7`` and the like.
        groups: one integer per image, equal for images that are stored together (a shard, or a row
            group of a table). ``shuffle_window`` counts groups. None if random access is fast.
        count: number of images if ``labels`` is None.

    Raises:
        QuietvitError: no images at all, or a label outside 0..num_classes-1.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray | None,
        read: Callable[[int], bytes | Image.Image],
        where: Callable[[int], str],
        *,
        num_classes: int | None = None,
        name: str = "the data set",
        class_names: tuple[str, ...] | None = None,
        groups: np.ndarray | None = None,
        count: int = 0,
    ) -> None:
        self.labelled = labels is not None
        numbers = np.full(count, UNLABELLED) if labels is None else np.asarray(labels)
        self._labels = numbers.astype(np.int64, copy=False)
        self.name = name
        self.groups = groups
        self.class_names: tuple[str, ...] | None = None
        self._read, self._where = read, where
        if len(self._labels) == 0:
            raise QuietvitError(f"{name} holds no images at all; check the path and its contents.")
        if not self.labelled:
            self.num_classes = 0
            return
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        if class_names is not None:
            self.class_names = fitted(class_names, self.num_classes)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(outside):
            first = int(outside[0])
            raise QuietvitError(
                f"{name}: the label of {where(first)} is {int(self.labels[first])}, outside "
                f"0..{self.num_classes - 1} ({len(outside)} such labels). Labels count from 0: "
                "correct them, or give the right number of classes."
            )

    @property
    def labels(self) -> np.ndarray:
        """The labels (N,), int64. Raises NoLabelsError if there are none."""
        if not self.labelled:
            raise NoLabelsError(f"{self.name} was opened without labels; open it with labels=True.")
        return self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        # _where may search a whole shard, so it runs only for an error message.
        image = decode(self._read(index), lambda: f"{self._where(index)} of {self.name}")
        return image, int(self._labels[index])

    def checksum(self, index: int) -> str:
        """Return a checksum of the stored image ``index``; "" if it cannot be read."""
        try:
            content = self._read(index)
        except QuietvitError:
            return ""
        plain = content.tobytes() if isinstance(content, Image.Image) else content
        return hashlib.sha256(plain).hexdigest()[:16]

    def where(self, index: int) -> str:
        """Return a few words that name image ``index``: its file, its row, its sample."""
        return self._where(index)

    def chosen(self, indices: Sequence[int]) -> ImageDataset:
        """Return these images in this order."""
        places = np.asarray(indices, np.int64)
        return ImageDataset(
            self.labels[places] if self.labelled else None,
            partial(_chosen, self._read, places),
            partial(_chosen, self._where, places),
            num_classes=self.num_classes,
            name=self.name,
            class_names=self.class_names,
            groups=None if self.groups is None else self.groups[places],
            count=len(places),
        )


class Transformed(Dataset[tuple[Tensor, int]]):
    """``dataset`` with transformed images: samples are (tensor (3, H, W), label)."""

    def __init__(self, dataset: Dataset[Sample], transform: Callable[[Image.Image], Tensor]):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


def drawn(dataset: Any, count: int, seed: int, what: str = "images") -> np.ndarray:
    """Return ``count`` different indices of a data set in random order; ``seed`` fixes them.

    Raises:
        QuietvitError: ``count`` is below 1 or exceeds the number of images; it names ``what``.
    """
    if not 1 <= count <= len(dataset):
        raise QuietvitError(
            f"{count} {what} were requested, but {dataset.name} holds {len(dataset)}; ask for 1 "
            f"to {len(dataset)}."
        )
    return np.random.default_rng(seed).permutation(len(dataset))[:count]


def subset(dataset: D, count: int | None, seed: int = 0) -> D:
    """Return ``count`` images drawn without replacement (all for None); ``seed`` fixes them.

    ``dataset`` is an ``ImageDataset``, a ``quietvit.detection.DetectionDataset``, or another data
    set with ``name`` and ``chosen(indices)``.

    Raises:
        QuietvitError: ``count`` is below 1 or exceeds the number of images.
    """
    if count is None:
        return dataset
    whole: Any = dataset
    chosen: D = whole.chosen(np.sort(drawn(whole, count, seed)).tolist())
    return chosen


def relabelled(dataset: ImageDataset, labels: np.ndarray, names: Sequence[str]) -> ImageDataset:
    """Return the same images with other labels (N,), which index ``names``."""
    return ImageDataset(
        labels,
        dataset._read,
        dataset._where,
        num_classes=len(names),
        name=dataset.name,
        class_names=tuple(names),
        groups=dataset.groups,
    )


def _chosen(inner: Callable[[int], T], chosen: np.ndarray, index: int) -> T:
    return inner(int(chosen[index]))
