"""WebDataset shards: tars of images and labels with random access, so any order is exact.

``tars`` indexes a tar; training chooses the order of images.
"""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import BinaryIO

import numpy as np

from quietvit.data.formats import PassedOver, is_readable
from quietvit.data.images import ImageDataset, NoLabelsError
from quietvit.data.label_names import NamesByLabel
from quietvit.data.paths import Recent, expand, part_for, split_parts
from quietvit.data.tars import MISSING, TarIndex, build_index, name_at, read_index
from quietvit.errors import QuietvitError

logger = logging.getLogger("quietvit")

OPEN_SHARDS = 64
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_EXAMPLE = "'shards:/train-{0000..1023}.tar,/val-{0000..0049}.tar'"


def open_shards(
    rest: str, split: str | None, num_classes: int | None, labels: bool = True
) -> ImageDataset:
    """Open ``/train-{0000..1023}.tar[,/val-{0000..0049}.tar]``, or globs or folders of tars.

    Shards must be local files, because WebDataset's streaming iterators cannot resume a run
    exactly. Each shard is a group of ``ImageDataset.groups``. Samples whose image cannot be read
    here (``.heic`` without its plugin) are skipped, and a log line counts them. Class names come
    from the samples' JSON, see ``tars.build_index``. Without ``labels`` no sample needs a label.

    Raises:
        NoLabelsError: labels are needed, but no sample has one.
        QuietvitError: a shard is missing, compressed or truncated, a sample lacks its image or
            label, or there are no samples.
    """
    parts = split_parts(rest)
    chosen = part_for(parts, split, "shards", _EXAMPLE)
    paths, indexes = _indexed(chosen)
    if labels:
        _check_labels(chosen, paths, indexes)
    name = f"shards {chosen}"
    reader = ShardReader(paths, _readable(name, indexes))
    if num_classes is None and split == "test" and labels:
        indexes = _indexed(parts[0])[1]
        num_classes = max((int(index.labels.max(initial=-1)) for index in indexes), default=-1) + 1
    return ImageDataset(
        reader.labels if labels else None,
        reader.read,
        reader.where,
        num_classes=num_classes,
        name=name,
        class_names=NamesByLabel(reader.names).tuple(name) if labels else None,
        groups=np.repeat(np.arange(len(reader.paths), dtype=np.int32), np.diff(reader.starts)),
        count=len(reader.offsets),
    )


def _check_labels(chosen: str, paths: list[Path], indexes: list[TarIndex]) -> None:
    """Raise QuietvitError if a sample lacks a label, or NoLabelsError if all samples do."""
    lacking = [bool((index.labels == MISSING).any()) for index in indexes]
    if not any(lacking):
        return
    try:
        build_index(paths[lacking.index(True)], labels=True)
    except QuietvitError as error:
        if any((index.labels != MISSING).any() for index in indexes):
            raise
        raise NoLabelsError(
            f"{error} No sample of shards {chosen} has a label. Training and evaluation need "
            "labels; calibration does not."
        ) from error


def _readable(name: str, indexes: list[TarIndex]) -> list[TarIndex]:
    """Leave out samples whose image cannot be read here, and log the skipped files."""
    passed = PassedOver()
    chosen = []
    for index in indexes:
        good = np.array([is_readable(suffix) for suffix in index.suffixes], bool)
        for suffix in index.suffixes[~good]:
            passed.add(suffix)
        for member in index.passed:
            passed.add(str(member))
        chosen.append(index.chosen(good))
    passed.tell(name, sum(len(index.offsets) for index in chosen))
    return chosen


class ShardReader:
    """Reads images of several tars by number; a process keeps up to ``OPEN_SHARDS`` tars open."""

    def __init__(self, paths: list[Path], indexes: list[TarIndex]) -> None:
        self.paths = paths
        self.starts = np.cumsum([0, *(len(index.offsets) for index in indexes)])
        self.offsets = np.concatenate([index.offsets for index in indexes])
        self.sizes = np.concatenate([index.sizes for index in indexes])
        self.labels = np.concatenate([index.labels for index in indexes])
        self.names = [pair for index in indexes for pair in index.names]
        self._files: Recent[BinaryIO] = Recent(OPEN_SHARDS)

    def read(self, index: int) -> bytes:
        """Return the encoded image ``index``."""
        path, size = self.paths[self._shard(index)], int(self.sizes[index])
        try:
            file = self._files.get(self._shard(index), self._open)
            content = os.pread(file.fileno(), size, int(self.offsets[index]))
        except OSError as error:
            raise QuietvitError(
                f"the shard {path} could not be read: {error.strerror or error}; restore the file."
            ) from error
        if len(content) < size:
            raise QuietvitError(
                f"the shard {path} is shorter than when it was opened, and lacks "
                f"{self.where(index)}; do not change data sets while they are in use."
            )
        return content

    def where(self, index: int) -> str:
        """Return the names of the image's member and shard; this searches the whole tar."""
        path = self.paths[self._shard(index)]
        return f"{name_at(path, int(self.offsets[index]))} in {path}"

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _open(self, shard: int) -> BinaryIO:
        return self.paths[shard].open("rb", buffering=0)  # type: ignore[return-value]


def _indexed(part: str) -> tuple[list[Path], list[TarIndex]]:
    if part.startswith("pipe:") or "://" in part:
        raise QuietvitError(
            f"shards are read from local files, but {part} is not one; copy them here first (an "
            "exact resume needs random access to all images)."
        )
    paths = expand(part, _SUFFIXES, "shard")
    indexes = {path: read_index(path) for path in _own_first(paths)}
    return paths, [indexes[path] for path in paths]


def _own_first(paths: list[Path]) -> list[Path]:
    """Return the paths with this process's share first, then the others in an order by rank.

    Processes that open the same shards at once then index each shard about once, because indexes
    are stored. Example: of 4 shards and 2 ranks, rank 1 starts with shards 1 and 3. No process
    waits for another, so one may also open shards alone.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return paths
    rank, world = dist.get_rank(), dist.get_world_size()
    others = [path for place, path in enumerate(paths) if place % world != rank]
    random.Random(rank).shuffle(others)
    return [*paths[rank::world], *others]
