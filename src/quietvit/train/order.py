"""The order of the images and their randomness, as functions of seed, epoch and index alone.

So a run may stop anywhere and go on, with any number of workers, and see the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from quietvit.data import ImageDataset

Place = tuple[int, int]


class SeededImages(Dataset[tuple[Tensor, int]]):
    """``dataset`` augmented: ``self[epoch, index]`` draws from (seed, epoch, index) only."""

    def __init__(
        self, dataset: ImageDataset, transform: Callable[[Image.Image], Tensor], seed: int
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:  # type: ignore[override]
        epoch, index = place
        image, label = self.dataset[index]
        with seeded(self.seed, epoch, index):
            return self.transform(image), label


class EpochBatches(Sampler[list[Place]]):
    """Batches of (epoch, index) in the order of the epoch, from batch ``start`` on.

    The order is a permutation drawn from (seed, epoch). ``batches`` is how many make an epoch.
    """

    def __init__(self, images: int, batch_size: int, batches: int, seed: int) -> None:
        self.images, self.batches, self.seed = images, batches, seed
        self.batch_size, self.drop_last = batch_size, True
        self.epoch, self.start = 0, 0

    def seek(self, epoch: int, start: int) -> None:
        """Go on at batch ``start`` of ``epoch``."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[Place]]:
        epoch = self.epoch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.images).tolist()
        for batch in range(self.start, self.batches):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, index) for index in chosen]


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


def generator_states() -> dict[str, Any]:
    """Return the states of all generators of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Restore what ``generator_states`` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
