"""The order of the images and their augmentation, as functions of seed, epoch and index only.

A run can therefore stop anywhere and resume with the same batches and any number of workers.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from quietvit.errors import QuietvitError

logger = logging.getLogger("quietvit")

Place = tuple[int, ...]

_REPLACED = 0x7265706C
_TRIES = 100


class SeededImages(Dataset[tuple[Any, Any]]):
    """An augmented data set whose randomness depends only on (seed, place).

    A place is (epoch, index), or (epoch, index, copy) if an epoch repeats its images.
    ``transform(image, target)`` makes a sample.

    An image that cannot be read or decoded is replaced by another one. A resumed run draws the same
    replacement. Each bad image is logged once and counted once over all workers of this process.
    ``mark_bad`` restores an earlier count. Images for evaluation are never replaced, because the
    score would belong to another data set.

    Args:
        max_bad: how many different images may be replaced; 0 stops at the first one.

    Raises:
        QuietvitError: more than ``max_bad`` images cannot be decoded; the first few are named.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any, Any], tuple[Any, Any]],
        seed: int,
        *,
        max_bad: int = 0,
    ) -> None:
        self.dataset, self.transform, self.seed, self.max_bad = dataset, transform, seed, max_bad
        # One byte an image, in memory shared with the workers: it needs no lock, and an image that
        # several workers meet counts once.
        self._bad = torch.zeros(len(dataset) if max_bad else 0, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> tuple[Any, Any]:  # type: ignore[override]
        image, target = self._read(place)
        with seeded(self.seed, *place):
            return self.transform(image, target)

    @property
    def bad_images(self) -> list[int]:
        """The indices of the bad images that any worker of this process has met so far."""
        return [int(index) for index in self._bad.nonzero()]

    def mark_bad(self, indices: Sequence[int]) -> None:
        """Count these images as bad. Indices beyond the data set are ignored."""
        self._bad[[index for index in indices if index < len(self._bad)]] = 1

    def _read(self, place: Place) -> tuple[Any, Any]:
        index = place[1]
        if not self.max_bad:
            return self.dataset[index]
        drawn = None
        for _ in range(_TRIES):
            try:
                return self.dataset[index]
            except QuietvitError as error:
                self._count(index, error)
            drawn = drawn or np.random.default_rng((self.seed, *place, _REPLACED))
            index = int(drawn.integers(len(self.dataset)))
        raise QuietvitError(
            f"{_TRIES} images in a row, drawn from {self.dataset.name}, could not be read; check "
            "that the data set is still accessible."
        )

    def _count(self, index: int, error: QuietvitError) -> None:
        known = bool(self._bad[index])
        self._bad[index] = 1
        bad = self.bad_images
        # A resume in fewer processes may start above the limit; only a new image raises.
        if len(bad) > self.max_bad and not known:
            named = "; ".join(self.dataset.where(index) for index in bad[:5])
            raise QuietvitError(
                f"{len(bad)} images of {self.dataset.name} could not be decoded, and "
                f"data.max_bad_images allows {self.max_bad}: {named}"
                f"{'; ...' if len(bad) > 5 else ''}. The last one: {error} Or raise "
                "data.max_bad_images to train on the others."
            ) from error
        if not known:
            logger.warning(
                "bad image %d of at most %d, replaced by another: %s", len(bad), self.max_bad, error
            )


class EpochBatches(Sampler[list[Place]]):
    """Batches of places in the order of the epoch (``epoch_order``), starting at batch ``start``.

    timm's ``RepeatAugSampler`` needs torch.distributed, splits the copies over its processes and
    cannot start inside an epoch. Here the copies are neighbours in one order of (seed, epoch). A
    run can resume anywhere in it with any number of processes.

    Args:
        images: number of images.
        batch_size: places in a batch.
        batches: batches in an epoch.
        seed: seed of the order.
        repeats: how often an epoch visits each image, each time with another augmentation
            (repeated augmentation, Hoffer et al. 2019, as in DeiT). An epoch keeps its length: it
            visits 1/``repeats`` of the images, each ``repeats`` times in a row. The last image
            comes fewer times if the number does not divide.
        groups: the group (shard on disk) of each image: ``ImageDataset.groups``.
        window: shuffle images within this many groups at a time; None shuffles all.

    Raises:
        QuietvitError: ``window`` is given for images without groups.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        batches: int,
        seed: int,
        *,
        repeats: int = 1,
        groups: np.ndarray | None = None,
        window: int | None = None,
    ) -> None:
        if window is not None and groups is None:
            raise QuietvitError(
                f"data.shuffle_window is {window}, but this data set is not in shards, so all its "
                "images can be shuffled together. Leave data.shuffle_window out."
            )
        self.images, self.batches, self.seed = images, batches, seed
        self.repeats, self.groups, self.window = repeats, groups, window
        self.batch_size, self.drop_last = batch_size, True
        self.epoch, self.start = 0, 0

    def seek(self, epoch: int, start: int) -> None:
        """Continue at batch ``start`` of ``epoch``."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[Place]]:
        epoch = self.epoch
        order = epoch_order(self.images, self.seed, epoch, self.groups, self.window)
        for batch in range(self.start, self.batches):
            first = batch * self.batch_size
            visits = range(first, min(first + self.batch_size, self.images))
            if self.repeats == 1:
                yield [(epoch, int(order[visit])) for visit in visits]
            else:
                yield [
                    (epoch, int(order[visit // self.repeats]), visit % self.repeats)
                    for visit in visits
                ]


def epoch_order(
    images: int,
    seed: int,
    epoch: int,
    groups: np.ndarray | None = None,
    window: int | None = None,
) -> np.ndarray:
    """Return a permutation (images,) drawn from (seed, epoch).

    With a ``window``, the groups are permuted and cut into windows of ``window`` groups. The
    windows follow each other, and the images of each are in random order. Reading is then almost
    sequential, and only one window must be at hand.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(images)
    if groups is None or window is None:
        return order
    present, group = np.unique(groups, return_inverse=True)
    windows = generator.permutation(len(present)) // window
    return order[np.argsort(windows[group[order]], kind="stable")]


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed ``random``, numpy and torch (CPU) from ``key`` inside, and restore their states."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the generator states of Python, numpy, torch (CPU) and ``device``.

    Other devices are not touched, so that a run on the CPU does not initialize CUDA.
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else _generator_of(device).get_rng_state(device),
    }


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore what ``generator_states`` returned.

    Checkpoints of earlier versions hold a list with the states of all CUDA devices. The entry at
    the index of ``device`` is used.

    Raises:
        QuietvitError: such a list is too short for ``device``.
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    own = states["device"] if "device" in states else _of_all(states["cuda"], device)
    if device.type != "cpu" and own is not None:
        _generator_of(device).set_rng_state(own, device)
    elif (device.type != "cpu") != (own is not None):
        logger.warning(
            "the checkpoint was written on another kind of device; random numbers on %s (dropout) "
            "differ from those of an uninterrupted run.",
            device.type,
        )


def _of_all(states: Sequence[Tensor], device: torch.device) -> Tensor | None:
    if device.type != "cuda" or not states:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= len(states):
        raise QuietvitError(
            f"the checkpoint holds the random states of {len(states)} GPUs, but this process runs "
            f"on cuda:{index}; resume with the same visible GPUs (CUDA_VISIBLE_DEVICES), or start "
            "a new run from its weights (model.weights)."
        )
    return states[index]


def _generator_of(device: torch.device) -> Any:
    return torch.get_device_module(device)
