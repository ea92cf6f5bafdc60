"""WebDataset shards: tars of images and labels, read by seek, so that any order can be exact.

What a tar holds is found out in ``tars``; in which order images come is decided in training.
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
    """Open ``/train-{0000..1023}.tar[,/val-{0000..0049}.tar]``; globs and folders of tars too.

    The shards are local files: WebDataset's own iterators stream from anywhere, but cannot go on
    exactly where a run stopped. Each shard is a group of ``ImageDataset.groups``. Samples whose
    image cannot be read here (``.heic`` without its plugin) are passed over, and a log line counts
    them. Names of classes are those in the samples' JSON, see ``tars.build_index``. Without
    ``labels`` no sample needs one.

    Raises:
        NoLabelsError: labels are needed, and no sample has one.
        QuietvitError: a shard is missing, compressed, truncated, or holds a sample without image
            or label; no samples at all.
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
    """Raise QuietvitError for a sample without a label, NoLabelsError where no sample has one."""
    lacking = [bool((index.labels == MISSING).any()) for index in indexes]
    if not any(lacking):
        return
    try:
        build_index(paths[lacking.index(True)], labels=True)
    except QuietvitError as error:
        if any((index.labels != MISSING).any() for index in indexes):
            raise
        raise NoLabelsError(
            f"{error} No sample of shards {chosen} has a label: training and evaluation need "
            "labels, calibration does not."
        ) from error


def _readable(name: str, indexes: list[TarIndex]) -> list[TarIndex]:
    """Leave out samples whose image cannot be read here, and say what is passed over."""
    passed = PassedOver()
    found = []
    for index in indexes:
        good = np.array([is_readable(suffix) for suffix in index.suffixes], bool)
        for suffix in index.suffixes[~good]:
            passed.add(suffix)
        for member in index.passed:
            passed.add(str(member))
        found.append(index.chosen(good))
    passed.tell(name, sum(len(index.offsets) for index in found))
    return found


class ShardReader:
    """Images of several tars by number. Up to ``OPEN_SHARDS`` are open at once in a process."""

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
                f"{self.where(index)}; leave data sets alone while they are in use."
            )
        return content

    def where(self, index: int) -> str:
        """Return the sample's member and its shard; the tar is looked through for it."""
        path = self.paths[self._shard(index)]
        return f"{name_at(path, int(self.offsets[index]))} in {path}"

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _open(self, shard: int) -> BinaryIO:
        return self.paths[shard].open("rb", buffering=0)  # type: ignore[return-value]


def _indexed(part: str) -> tuple[list[Path], list[TarIndex]]:
    if part.startswith("pipe:") or "://" in part:
        raise QuietvitError(
            f"shards are read from local files, and {part} is none; copy them here first (an exact "
            "resume needs to reach any image at any time)."
        )
    paths = expand(part, _SUFFIXES, "shard")
    indexes = {path: read_index(path) for path in _own_first(paths)}
    return paths, [indexes[path] for path in paths]


def _own_first(paths: list[Path]) -> list[Path]:
    """The paths, this process's share of them first, the others after it in an order of its own.

    So processes that open the same shards at once index each about once: indexes are kept, and
    when a process comes to the others' shares, these are done, or are met at different places.
    Nobody waits, so that a process may also open shards alone.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return paths
    rank, world = dist.get_rank(), dist.get_world_size()
    others = [path for place, path in enumerate(paths) if place % world != rank]
    random.Random(rank).shuffle(others)
    return [*paths[rank::world], *others]
