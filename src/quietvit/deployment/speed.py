"""Time an exported model and its float model alternately in the same runtime.

Only paired ratios are compared, because absolute times are noisy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

WARM_UP, LEAST, MOST = 2, 5, 100


@dataclass(frozen=True)
class Speed:
    """Median milliseconds per call, and the median and quartiles of float / integer ratios."""

    batch: int
    integer_ms: float
    float_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    repeats: int

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.integer_ms


Run = Callable[[np.ndarray], Any]


def measure(integer: Run, floating: Run, images: np.ndarray, seconds: float = 10.0) -> Speed:
    """Time alternating calls of both on images (batch, C, H, W) for about ``seconds``."""
    spent: dict[str, list[float]] = {"integer": [], "float": []}
    for _ in range(WARM_UP):
        integer(images)
        floating(images)
    end = time.perf_counter() + seconds
    while len(spent["float"]) < LEAST or (time.perf_counter() < end and len(spent["float"]) < MOST):
        for name, runtime in (("integer", integer), ("float", floating)):
            start = time.perf_counter()
            runtime(images)
            spent[name].append(1000 * (time.perf_counter() - start))
    ratios = [f / i for f, i in zip(spent["float"], spent["integer"], strict=True)]
    quarter = statistics.quantiles(ratios, n=4)
    return Speed(
        len(images),
        statistics.median(spent["integer"]),
        statistics.median(spent["float"]),
        statistics.median(ratios),
        quarter[0],
        quarter[2],
        len(ratios),
    )
