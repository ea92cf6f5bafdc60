"""Optimize images to match the running statistics of BatchNorms (``settings.DGH``).

``terms`` holds the loss terms, and ``watching`` finds BatchNorms and outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from quietvit.synthesis.loop import in_batches
from quietvit.synthesis.reach import refuse_unreached
from quietvit.synthesis.scale import PixelScale
from quietvit.synthesis.settings import DGH
from quietvit.synthesis.terms import Moments, alignment, moments, stretch
from quietvit.synthesis.watching import Look, Norms, output_sites, watched
from quietvit.tracing import Site, Trace

_PUBLISHED = {"resnet18": 3e-7, "resnet50": 1e-7, "mobilenetv2": 3e-5}
_DEFAULT = 3e-5
_SHORTEST_PATIENCE = 20


class Plateau(ReduceLROnPlateau):
    """Halve the learning rate after ``patience`` steps without progress, then reset the best loss.

    Progress is a relative decrease of 1e-4 below the best loss. The rate stays at 1e-4 or above.
    Source: the code of arXiv 2410.22110.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, patience: int) -> None:
        super().__init__(optimizer, factor=0.5, patience=patience, threshold=1e-4, min_lr=1e-4)

    def step(self, metrics: Any, epoch: Any = None) -> None:  # type: ignore[override]
        before = self.optimizer.param_groups[0]["lr"]
        super().step(metrics, epoch)
        if self.optimizer.param_groups[0]["lr"] < before:
            self.best = float("inf")


class Pipeline:
    """Flip, smooth, crop and clip images (N, C, h, w) to (N, C, H, W) before a pass.

    Images are in natural units. Smoothing pads with zeros. Clipping passes gradients unchanged.
    """

    def __init__(
        self, scale: PixelScale, sigma: float, margin: float, device: torch.device
    ) -> None:
        height, width = scale.size[1:]
        self.target = (height, width)
        self.size = (height + round(margin * height), width + round(margin * width))
        self._bounds = scale.bounds(device)
        line = torch.exp(-torch.tensor([1.0, 0.0, 1.0], device=device) / (2 * sigma**2))
        kernel = line[:, None] * line[None]
        self._kernel = (kernel / kernel.sum()).expand(scale.size[0], 1, 3, 3)

    def smoothed(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self._kernel, padding=1, groups=images.shape[1])

    def clipped(self, images: Tensor) -> Tensor:
        # Adding x - x = 0 keeps the clipped values exact, also where x is 1e8.
        return images.detach().clamp(*self._bounds) + (images - images.detach())

    def cropped(self, images: Tensor, top: int, left: int) -> Tensor:
        return images[..., top : top + self.target[0], left : left + self.target[1]]

    def drawn(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Return images (N, C, H, W), cropped at random and flipped with probability 1/2."""
        if float(torch.rand((), generator=random)) < 0.5:
            images = images.flip(3)
        top, left = (
            int(torch.randint(room + 1, (), generator=random)) for room in self._room(images)
        )
        return self.clipped(self.cropped(self.smoothed(images), top, left))

    def finished(self, images: Tensor) -> Tensor:
        """Return images (N, C, H, W) cropped at the center, as the result and for statistics."""
        top, left = (room // 2 for room in self._room(images))
        return self.clipped(self.cropped(self.smoothed(images), top, left))

    def _room(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] - self.target[0], images.shape[3] - self.target[1]


class WholeSet:
    """Moments of each layer and batch. Their mean over batches is the statistic of the whole set.

    All batches have equal weight. Gradients flow only to the batch of the current step.
    """

    def __init__(self, batches: list[list[Moments]]) -> None:
        """``batches``: for each batch, the moments of each layer."""
        layers = list(zip(*batches, strict=True))
        self._means = [torch.stack([m.mean for m in layer]).detach() for layer in layers]
        self._seconds = [torch.stack([m.second for m in layer]).detach() for layer in layers]

    def with_batch(self, index: int, batch_moments: list[Moments]) -> list[Moments]:
        """Return each layer's moments over all batches, with these in place of batch ``index``."""
        merged = []
        for own, means, seconds in zip(batch_moments, self._means, self._seconds, strict=True):
            rest = torch.arange(len(means), device=means.device) != index
            merged.append(
                Moments(
                    (means[rest].sum(0) + own.mean) / len(means),
                    (seconds[rest].sum(0) + own.second) / len(means),
                )
            )
        return merged

    def keep(self, index: int, batch_moments: list[Moments]) -> None:
        """Store the moments of batch ``index`` for the first ``len(batch_moments)`` layers."""
        for layer, own in enumerate(batch_moments):
            self._means[layer][index] = own.mean.detach()
            self._seconds[layer][index] = own.second.detach()


class Statistics:
    """Optimize batches of images on the model's device, each with its own RAdam and plateau."""

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        settings: DGH,
        count: int,
        scale: PixelScale,
        random: torch.Generator,
        device: torch.device,
    ) -> None:
        self._model, self._trace, self._settings = model, trace, settings
        self._scale, self._random = scale, random
        self._outputs: list[Tensor] = []
        self._weight = (
            stretching_weight(model) if settings.stretching is None else (settings.stretching)
        )
        self.pipeline = Pipeline(scale, settings.sigma, settings.margin, device)
        start = torch.randn(count, scale.size[0], *self.pipeline.size, generator=random)
        start = start.to(device).clamp(*scale.bounds(device))
        self.batches = in_batches(start, settings.batch_size)
        self._norms = Norms(model, self._run, self.pipeline.finished(start[:1]))
        channels = torch.zeros(scale.size[0], device=device)
        refuse_unreached(model, trace, start[:1], self._through, self._seen)
        self._targets = [(channels, torch.ones_like(channels)), *self._norms.stored]
        patience = settings.patience or max(settings.iterations // 50, _SHORTEST_PATIENCE)
        self._optimizers = [torch.optim.RAdam([batch], lr=settings.lr) for batch in self.batches]
        self._schedules = [Plateau(optimizer, patience) for optimizer in self._optimizers]
        with torch.no_grad():
            self._whole = WholeSet([self._moments(images) for images in self.finished()])

    def step(self, index: int, share: float) -> float:
        images, optimizer = self.batches[index], self._optimizers[index]
        optimizer.zero_grad()
        loss, batch_moments = self.loss(self.pipeline.drawn(images, self._random), index)
        loss.backward()
        optimizer.step()
        self._schedules[index].step(float(loss.detach()))
        # As published: only the images' own moments are updated after the step, not the layers'.
        with torch.no_grad():
            self._whole.keep(index, [moments(self.pipeline.finished(images)), *batch_moments[1:]])
        return float(loss.detach())

    def finished(self) -> list[Tensor]:
        return [self.pipeline.finished(batch).detach() for batch in self.batches]

    def loss(self, images: Tensor, index: int) -> tuple[Tensor, list[Moments]]:
        """Return the loss with ``images`` as batch ``index``, and their moments by layer."""
        batch_moments = self._moments(images)
        apart = [
            alignment(merged, *target, self._settings.deviation)
            for merged, target in zip(
                self._whole.with_batch(index, batch_moments), self._targets, strict=True
            )
        ]
        loss = torch.stack(apart).mean()
        if self._weight:
            if any(x.numel() for x in self._outputs):
                loss = loss + self._weight * stretch(self._outputs)
            if self._norms.spread is not None:
                loss = loss + self._weight * self._norms.spread.mean()
        return loss, batch_moments

    def _through(self, images: Tensor) -> Tensor:
        return self._scale.to_model(self.pipeline.finished(images))

    def _seen(self, images: Tensor) -> list[Tensor]:
        found = self._moments(self.pipeline.finished(images))[1:]
        return [x for layer in found for x in (layer.mean, layer.second)]

    def _moments(self, images: Tensor) -> list[Moments]:
        """Run the model and return the moments of the images and of each BatchNorm's input."""
        self._run(images)
        return [moments(images), *self._norms.moments]

    def _run(self, images: Tensor) -> None:
        self._outputs = []
        if hasattr(self, "_norms"):
            self._norms.start(len(images))

        def look(site: Site, output: Tensor) -> None:
            self._outputs.append(output)

        looks: dict[str, Look] = dict.fromkeys(output_sites(self._trace), look)
        precision = self._settings.precision
        watched(self._model, self._trace, looks, self._scale.to_model(images), precision)


def stretching_weight(model: nn.Module) -> float:
    """Return the published weight of the output term for this timm architecture, or the default."""
    config = getattr(model, "pretrained_cfg", None)
    name = str(config.get("architecture", "")) if isinstance(config, dict) else ""
    family = name.partition("_")[0].partition(".")[0]
    return _PUBLISHED.get(family, _DEFAULT)
