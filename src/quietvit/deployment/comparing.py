"""Compare outputs of a file and the simulated model: classes, or values of other outputs.

``parity`` compares the integers inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quietvit.data.evaluate import class_numbers
from quietvit.deployment.outputs import Output
from quietvit.deployment.queries import Choosing, paired
from quietvit.deployment.runtime import Runtime
from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel

AGREEMENT, DIFFERENCE, DISTURBANCE = 99.0, 0.3, 1e-6
LEAST_ERROR, TIMES_OWN = 0.01, 2.0
"""The relative error that is always allowed, and the allowed multiple of ``Features.own``."""
MOST_TIED = 0.1
"""Queries are not compared if a larger share of their scores ties."""

Labelled = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Classes:
    """How often the file and the simulated model choose the same class.

    ``same`` counts images with the same class in both. ``steady`` counts images whose class the
    simulated model keeps if they are perturbed by 1e-6. It measures the effect of rounding alone.
    ``right`` and ``simulated_right`` count correct classes, ``only_one_right`` the images that only
    one of the two classifies correctly. These are None without labels.
    """

    images: int
    same: int
    steady: int
    right: int | None = None
    simulated_right: int | None = None
    only_one_right: int | None = None

    @property
    def agreement(self) -> float:
        """Percent of images with the same class in both."""
        return 100 * self.same / self.images

    @property
    def steadiness(self) -> float:
        """Percent of images whose class the simulated model keeps if they are perturbed by 1e-6."""
        return 100 * self.steady / self.images

    @property
    def top1(self) -> float | None:
        return None if self.right is None else 100 * self.right / self.images

    @property
    def top1_simulated(self) -> float | None:
        return None if self.simulated_right is None else 100 * self.simulated_right / self.images

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each difference that chance does not explain.

        Agreement must reach 99 %, or ``steadiness`` minus three standard errors of the difference.
        Top-1 must agree within 0.3 points, or within two standard errors of the paired difference
        (one is the square root of ``only_one_right``).
        """
        failures = []
        n, p = self.images, self.steadiness / 100
        chance = 300 * math.sqrt(2 * max(p * (1 - p), 1 / n) / n)
        least = min(AGREEMENT, self.steadiness - chance)
        if self.agreement < least:
            failures.append(
                f"the class agrees with the simulated model on {self.agreement:.2f} % of {n} "
                f"images, less than {least:.2f} %. That model keeps its own class on "
                f"{self.steadiness:.2f} % of images perturbed by {DISTURBANCE:g}"
            )
        if self.right is not None and self.simulated_right is not None:
            apart = abs(self.right - self.simulated_right)
            room = max(DIFFERENCE * n / 100, 2 * math.sqrt(self.only_one_right or 0))
            if apart > room:
                failures.append(
                    f"top-1 is {self.top1:.2f} %, but {self.top1_simulated:.2f} % in the simulated "
                    f"model: a difference of {apart} of {n} images, more than {room:.1f}"
                )
        return tuple(failures)


@dataclass(frozen=True)
class Queries:
    """How a file's queries, chosen by score, differ from the simulated model's.

    ``moved`` is the share at another place. ``tied`` is the share whose score equals the next one
    within float32 rounding in the simulated model, so that each runtime chooses as it likes.
    """

    moved: float
    tied: float

    @property
    def comparable(self) -> bool:
        return self.tied <= MOST_TIED


@dataclass(frozen=True)
class Features:
    """How far the file's output is from the simulated model's, per image.

    The error of an image is |file - simulated| / |simulated|, with L2 norms over all its values.
    ``error`` is the mean over images, ``largest_error`` the maximum. ``own`` is the mean error of
    the simulated model itself for images perturbed by 1e-6. It measures the effect of rounding
    alone. ``cosine`` and ``smallest_cosine`` compare file and simulated model.

    A detector that chooses its queries by score (``queries``) may order them differently in each
    runtime. Then queries are paired first, and the error of an image is the median over its
    queries, because a few near the least score may be other queries.
    """

    images: int
    error: float
    largest_error: float
    own: float
    cosine: float
    smallest_cosine: float
    queries: Queries | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence if the mean error exceeds both 1 % and twice ``own``.

        None if the scores of more than a tenth of the chosen queries tie: the choice is chance.
        """
        if self.queries is not None and not self.queries.comparable:
            return ()
        allowed = max(LEAST_ERROR, TIMES_OWN * self.own)
        if self.error <= allowed:
            return ()
        return (
            f"the output is {100 * self.error:.2f} % (relative L2, mean of {self.images} images) "
            f"from the simulated model's, more than {100 * allowed:.2f} %. That output moves by "
            f"{100 * self.own:.2f} % if images are perturbed by {DISTURBANCE:g}",
        )


def compare_classes(
    loaded: Runtime,
    quantized: QuantizedModel,
    batches: Iterable[Labelled],
    output: Output,
    loader: Any = None,
) -> Classes:
    """Compare the classes of images (B, C, H, W) with labels (B,) or None.

    ``loader`` is the source of the batches. Its data set's class names match labels to outputs,
    like in ``quietvit.data.evaluate``. Raises QuietvitError for labels the model does not have.
    """
    count = same = steady = right = simulated_right = only_one = 0
    labelled, numbers = True, None
    for (x, labels), (theirs, own, again) in _outputs(loaded, quantized, batches, output):
        labelled = labelled and labels is not None
        if count == 0 and labels is not None:
            numbers = class_numbers(loader, quantized, own.shape[-1])
        if labels is not None and numbers is not None:
            labels = numbers[labels.cpu()]
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < own.shape[-1]:
            raise QuietvitError(
                f"the images have labels from {int(labels.min())} to {int(labels.max())}, but the "
                f"model has only {own.shape[-1]} classes; check it on its own data."
            )
        theirs, own, again = theirs.argmax(-1), own.argmax(-1), again.argmax(-1)
        count, same = count + len(x), same + int((theirs == own).sum())
        steady += int((again == own).sum())
        if labels is not None:
            hits, simulated_hits = theirs == labels.cpu(), own == labels.cpu()
            right += int(hits.sum())
            simulated_right += int(simulated_hits.sum())
            only_one += int((hits != simulated_hits).sum())
    if not labelled:
        return Classes(count, same, steady)
    return Classes(count, same, steady, right, simulated_right, only_one)


def compare_features(
    loaded: Runtime, quantized: QuantizedModel, batches: Iterable[Labelled], output: Output
) -> Features:
    """Measure errors and cosines on images (B, C, H, W), ignoring labels."""
    errors, moved, cosines, places = [], [], [], []
    choosing = Choosing()
    for _, outputs in _outputs(loaded, quantized, batches, output, choosing):
        theirs, own, again = (x.double() for x in outputs)
        if output.of_queries:
            theirs, place = paired(theirs, own)
            places.append(place)
            again, _ = paired(again, own)
        errors.append(_errors(theirs, own, output.of_queries))
        moved.append(_errors(again, own, output.of_queries))
        cosines.append(torch.cosine_similarity(theirs.flatten(1), own.flatten(1), dim=1))
    error, own_error, cosine = torch.cat(errors), torch.cat(moved), torch.cat(cosines)
    queries = None
    if places:
        tied = choosing.tied / max(1, choosing.chosen)
        queries = Queries(sum(places) / len(places), tied)
    return Features(
        len(error),
        float(error.mean()),
        float(error.max()),
        float(own_error.mean()),
        float(cosine.mean()),
        float(cosine.min()),
        queries,
    )


def _errors(theirs: Tensor, own: Tensor, by_query: bool) -> Tensor:
    """Return the relative L2 error of each image (B,): of the whole, or the median of its rows."""
    kept = 2 if by_query else 1
    theirs, own = theirs.flatten(kept), own.flatten(kept)
    size = own.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    errors = (theirs - own).norm(dim=-1) / size
    return errors.median(dim=1).values if by_query else errors


def _outputs(
    loaded: Runtime,
    quantized: QuantizedModel,
    batches: Iterable[Labelled],
    output: Output,
    watching: AbstractContextManager[Any] | None = None,
) -> Iterator[tuple[Labelled, tuple[Tensor, Tensor, Tensor]]]:
    """Yield each batch with the outputs of file, simulated model, and that on noisy images."""
    noise = torch.Generator().manual_seed(0)
    for x, labels in batches:
        loaded.check_images(tuple(x.shape))
        disturbed = x * (1 + DISTURBANCE * torch.randn(x.shape, generator=noise))
        with torch.no_grad(), watching or nullcontext():
            own, again = (output.of(quantized(images)) for images in (x, disturbed))
        theirs = torch.from_numpy(loaded(x.numpy()))
        if theirs.shape != own.shape:
            raise QuietvitError(
                f"{loaded.path} gives {tuple(theirs.shape)} for {len(x)} images, but the simulated "
                f"model gives {tuple(own.shape)}; give the .qvit that it was exported from."
            )
        yield (x, labels), (theirs, own, again)
