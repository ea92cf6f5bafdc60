"""Optimize images for the patch similarity of a vision transformer (``settings.PSAQ``).

``terms`` holds the loss terms, and ``watching`` finds patches and outputs in the trace.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.outputs import logits_of
from quietvit.synthesis.loop import in_batches
from quietvit.synthesis.reach import refuse_unreached
from quietvit.synthesis.scale import PixelScale
from quietvit.synthesis.settings import PSAQ
from quietvit.synthesis.terms import patch_entropy, stretch, total_variation
from quietvit.synthesis.watching import Look, Patches, output_sites, watched
from quietvit.tracing import Site, Trace

_WARM_UP = 0.2
_ROLLS = 15 / 224, 30 / 224
"""Largest roll in the first and second half of a run, as a share of the shorter side."""


class PatchSimilarity:
    """Optimize batches of images on the model's device, each with its own Adam.

    Raises QuietvitError if the model lacks what a term with a weight above 0 needs.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        settings: PSAQ,
        images: Tensor,
        scale: PixelScale,
        random: torch.Generator,
    ) -> None:
        self._model, self._trace, self._settings = model, trace, settings
        self._scale, self._random = scale, random
        self.batches = in_batches(images, settings.batch_size)
        self._bounds = scale.bounds(images.device)
        probes = scale.to_model(torch.randn(2, *scale.size, generator=random).to(images.device))
        self._patches = Patches(model, trace, probes) if settings.entropy else None
        windows = self._patches is not None and self._patches.windows
        self._lr = settings.lr if settings.lr is not None else (0.25 if windows else 0.2)
        self._optimizers = [
            torch.optim.Adam([batch], lr=self._lr, betas=(0.5, 0.9)) for batch in self.batches
        ]
        self._labels = self._drawn_labels(probes) if settings.classes else None
        if looks_at_model(settings):
            refuse_unreached(model, trace, images[:1], scale.to_model, self._seen)
        low, high = settings.variation_range
        self._variation = low + (high - low) * float(torch.rand((), generator=random))

    def step(self, index: int, share: float) -> float:
        half, within = divmod(min(share, 1 - 1e-9) * 2, 1)
        images, optimizer = self.batches[index], self._optimizers[index]
        moved = self._moved(images, _ROLLS[int(half)])
        for group in optimizer.param_groups:
            group["lr"] = self._lr * rate(within, 2 / self._settings.iterations)
        optimizer.zero_grad()
        loss = self.loss(moved, index)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(*self._bounds)
        return float(loss.detach())

    def finished(self) -> list[Tensor]:
        return [batch.detach().clamp(*self._bounds) for batch in self.batches]

    def loss(self, images: Tensor, index: int = 0) -> Tensor:
        """Return the weighted sum of the terms for batch ``index``, given in natural units."""
        chosen = self._settings
        outputs: list[Tensor] = []
        entropies: list[Tensor] = []

        def of_outputs(site: Site, output: Tensor) -> None:
            outputs.append(output)

        def of_patches(site: Site, output: Tensor) -> None:
            assert self._patches is not None
            patches = self._sampled(self._patches(site, output))
            entropies.append(patch_entropy(patches, chosen.bandwidth, chosen.points).mean())

        looks: dict[str, Look] = {}
        if self._patches is not None:
            looks |= dict.fromkeys(self._patches.sites, of_patches)
        if chosen.stretching:
            looks |= dict.fromkeys(output_sites(self._trace), of_outputs)
        inputs = self._scale.to_model(images)
        result = watched(self._model, self._trace, looks, inputs, chosen.precision)
        total = images.new_zeros(())
        if entropies:
            total = total - chosen.entropy * torch.stack(entropies).sum()
        if any(x.numel() for x in outputs):
            total = total + chosen.stretching * stretch(outputs)
        if self._labels is not None:
            logits = logits_of(result).float()
            total = total + chosen.classes * F.cross_entropy(logits, self._labels[index])
        if chosen.variation:
            apart = (total_variation(images) - self._variation).abs()
            total = total + chosen.variation * apart
        return total

    def _seen(self, image: Tensor) -> list[Tensor]:
        """Return the tensors that the terms with a weight above 0 look at."""
        found: list[Tensor] = []

        def look(site: Site, output: Tensor) -> None:
            found.append(output)

        sites = () if self._patches is None else self._patches.sites
        sites += output_sites(self._trace) if self._settings.stretching else ()
        looks = dict.fromkeys(sites, look)
        inputs = self._scale.to_model(image)
        result = watched(self._model, self._trace, looks, inputs, self._settings.precision)
        return found if self._labels is None else [*found, logits_of(result)]

    def _drawn_labels(self, probes: Tensor) -> list[Tensor]:
        with torch.no_grad():
            output: Any = self._model(probes)
        try:
            count = logits_of(output).shape[1]
        except QuietvitError as error:
            raise QuietvitError(
                f"the class loss needs logits, but {error} Or set classes=0 to drop this loss."
            ) from error
        return [
            torch.randint(count, (len(batch),), generator=self._random).to(batch.device)
            for batch in self.batches
        ]

    def _moved(self, images: Tensor, most: float) -> Tensor:
        """Roll all images by one random offset in both dims, and flip them with probability 1/2."""
        limit = round(most * min(images.shape[-2:]))
        offset = int(torch.randint(-limit, limit + 1, (), generator=self._random))
        moved = images.roll((offset, offset), (2, 3))
        return moved.flip(3) if float(torch.rand((), generator=self._random)) < 0.5 else moved

    def _sampled(self, patches: Tensor) -> Tensor:
        count, most = patches.shape[1], self._settings.patches
        if count <= most:
            return patches
        chosen = torch.randperm(count, generator=self._random)[:most].to(patches.device)
        return patches.index_select(1, chosen)


def looks_at_model(settings: PSAQ) -> bool:
    """Whether a term with a weight above 0 depends on the model."""
    return bool(settings.entropy or settings.stretching or settings.classes)


def rate(within: float, step: float) -> float:
    """Return the factor of the learning rate: linear warm-up for 20 %, then half a cosine.

    ``within``: completed share of this half of the run; ``step``: the share of one iteration.
    """
    if within < _WARM_UP:
        return min(1.0, (within + step) / _WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (within - _WARM_UP) / (1 - _WARM_UP)))
