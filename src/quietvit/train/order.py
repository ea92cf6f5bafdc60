"""The order of the images and their randomness, as functions of seed, epoch and index alone.

So a run may stop anywhere and go on, with any number of workers, and see the same batches.
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
    """``dataset`` augmented: ``self[place]`` draws from (seed, place) only.

    ``transform(image, target)`` makes a sample.

    A place is (epoch, index), or (epoch, index, copy) where an epoch repeats its images.

    An image that cannot be read or decoded is replaced by another one of the data set, drawn from
    (seed, place), so that a resumed run replaces it by the same. Each such image is logged once,
    and the different ones are counted over all workers of this process; ``mark_bad`` goes on from
    an earlier count. Images for evaluation are never replaced, because the accuracy would be that
    of another data set.

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
        # One byte an image in memory shared with the workers: no locks, and each counts once.
        self._bad = torch.zeros(len(dataset) if max_bad else 0, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> tuple[Any, Any]:  # type: ignore[override]
        image, target = self._read(place)
        with seeded(self.seed, *place):
            return self.transform(image, target)

    @property
    def bad_images(self) -> list[int]:
        """The indices of the images found bad so far by any worker of this process."""
        return [int(index) for index in self._bad.nonzero()]

    def mark_bad(self, indices: Sequence[int]) -> None:
        """Count these as found bad already; indices that are no image are left out."""
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
            f"{_TRIES} images drawn in a row from {self.dataset.name} could not be read; check "
            "that the data set can still be reached."
        )

    def _count(self, index: int, error: QuietvitError) -> None:
        known = bool(self._bad[index])
        self._bad[index] = 1
        bad = self.bad_images
        if len(bad) > self.max_bad and not known:  # resumed in fewer processes they may be more
            named = "; ".join(self.dataset.where(index) for index in bad[:5])
            raise QuietvitError(
                f"{len(bad)} images of {self.dataset.name} could not be decoded, and "
                f"data.max_bad_images allows {self.max_bad}: {named}"
                f"{'; ...' if len(bad) > 5 else ''}. The last one: {error} Or raise "
                "data.max_bad_images, to train on the others."
            ) from error
        if not known:
            logger.warning(
                "bad image %d of at most %d, replaced by another: %s", len(bad), self.max_bad, error
            )


class EpochBatches(Sampler[list[Place]]):
    """Batches of places in the order of the epoch (``epoch_order``), from batch ``start`` on.

    Args:
        images: how many there are.
        batch_size: places in a batch.
        batches: how many make an epoch.
        seed: of the order.
        repeats: how often each image of an epoch comes, each time with its own randomness
            (repeated augmentation, Hoffer et al. 2019, as DeiT uses it). An epoch is as long as
            without, so it visits 1/``repeats`` of the images, each ``repeats`` times in a row (the
            last one fewer times where the number does not divide).
        groups: what lies together on disk, one number per image: ``ImageDataset.groups``.
        window: mix images within so many groups at a time; None mixes all.

    timm's ``RepeatAugSampler`` needs torch.distributed and deals the copies out to its processes,
    from a position that cannot be entered. Here the copies are neighbours in one order, which is a
    function of (seed, epoch) in any number of processes, so that a run can go on anywhere in it.

    Raises:
        QuietvitError: ``window`` is given for images that are not in groups.
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
                f"data.shuffle_window is {window}, but this data set is not in shards: each of its "
                "images can be reached alike. Leave data.shuffle_window out."
            )
        self.images, self.batches, self.seed = images, batches, seed
        self.repeats, self.groups, self.window = repeats, groups, window
        self.batch_size, self.drop_last = batch_size, True
        self.epoch, self.start = 0, 0

    def seek(self, epoch: int, start: int) -> None:
        """Go on at batch ``start`` of ``epoch``."""
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

    With a ``window``, the groups are permuted and cut into windows of so many; one window comes
    after the other, the images of each in random order. Reading is then near to sequential, and a
    window is what needs to be at hand.
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
    """Seed ``random``, numpy and torch (CPU) from ``key`` inside, and restore them after."""
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
    """Return the states of this process's generators: of Python, numpy, torch, and ``device``.

    No other device is looked at, so that a run on the CPU leaves CUDA alone.
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else _generator_of(device).get_rng_state(device),
    }


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore what ``generator_states`` returned, that of the device to ``device``.

    Checkpoints of earlier versions hold a list of the states of all CUDA devices; the one at the
    place of ``device`` is taken.

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
            "the checkpoint was written on another kind of device; what is drawn on %s (dropout) "
            "is not what the run would have drawn without the stop.",
            device.type,
        )


def _of_all(states: Sequence[Tensor], device: torch.device) -> Tensor | None:
    if device.type != "cuda" or not states:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= len(states):
        raise QuietvitError(
            f"the checkpoint holds the random states of {len(states)} GPUs and this process runs "
            f"on cuda:{index}; resume with the GPUs visible that the run had "
            "(CUDA_VISIBLE_DEVICES), or start anew from its weights (model.weights)."
        )
    return states[index]


def _generator_of(device: torch.device) -> Any:
    return torch.get_device_module(device)
