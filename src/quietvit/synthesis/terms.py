"""The loss terms, as pure functions of images, patches, outputs and statistics.

``psaq`` and ``dgh`` weight the terms and run the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_IMAGES, _VALUES = 32, 3 * 224 * 224


def patch_entropy(patches: Tensor, bandwidth: float = 0.01, points: int = 10) -> Tensor:
    """Return the differential entropy of patch similarity for each sample: (S, N, D) -> (S,).

    The cosine similarities s_ij of all N x N pairs include i = j. The density at x is the mean of
    the Gaussian kernels (x; s_ij, bandwidth). It is evaluated at ``points`` evenly spaced points
    from the smallest to the largest similarity of the sample. No gradient flows through these two
    ends. The entropy integrates -p log p by the trapezoid rule, where p is the density + 1e-4.

    Source: PSAQ-ViT, arXiv 2203.02250, equations 4 to 6, with constants from its code. There the
    two ends come from the whole batch.

    Args:
        patches: S samples (images or windows) of N patches with D features. N is at least 2.
    """
    unit = F.normalize(patches.float(), dim=-1, eps=1e-8)
    count = unit.shape[1]
    rows, columns = torch.triu_indices(count, count, 1, device=unit.device)
    above = (unit @ unit.mT).flatten(1).index_select(1, rows * count + columns)  # (S, pairs)
    # The similarity of a patch with itself is 1, or 0 if the patch is all zeros.
    own = unit.square().sum(-1)
    with torch.no_grad():
        low = torch.minimum(above.amin(1), own.amin(1))
        high = torch.maximum(above.amax(1), own.amax(1))
        steps = torch.linspace(0, 1, points, device=unit.device)
        grid = low[:, None] + (high - low)[:, None] * steps  # (S, points)
    both: Any = [_Kernels.apply(grid, pairs, bandwidth) for pairs in (above, own)]
    total = 2 * both[0] + both[1]  # s_ij = s_ji, so pairs above the diagonal count twice
    density = total / (count**2 * bandwidth * math.sqrt(2 * math.pi)) + 1e-4
    return torch.trapezoid(-density * density.log(), grid, dim=-1)


class _Kernels(torch.autograd.Function):
    """Sums of the unscaled kernels exp(-(x - s)^2 / 2h^2) at each grid point x, (S, points).

    The backward pass recomputes the kernels. Autograd would store one value per pair and point: for
    196 patches, 19,110 pairs times 10 points for each sample.
    """

    @staticmethod
    def forward(ctx: Any, grid: Tensor, similarities: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(grid, similarities)
        ctx.bandwidth = bandwidth
        at = [_kernel(x, similarities, bandwidth).sum(1) for x in grid.unbind(1)]
        return torch.stack(at, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor, None]:
        grid, similarities = ctx.saved_tensors
        total = torch.zeros_like(similarities)
        for x, weight in zip(grid.unbind(1), gradients[0].unbind(1), strict=True):
            kernel = _kernel(x, similarities, ctx.bandwidth)
            total += weight[:, None] * kernel * (x[:, None] - similarities)
        return None, total / ctx.bandwidth**2, None


def _kernel(x: Tensor, similarities: Tensor, bandwidth: float) -> Tensor:
    return (x[:, None] - similarities).square_().mul_(-0.5 / bandwidth**2).exp_()


def total_variation(images: Tensor) -> Tensor:
    """Return the sum of the norms of differences in 4 directions, for images in natural units.

    A norm grows with the square root of the number of values. The result is therefore scaled to 32
    images of 3 x 224 x 224, for which PSAQ-ViT chose its target. Source: the code of arXiv
    2203.02250 (same prior as arXiv 1912.08795). The scaling is derived here.
    """
    across = images[..., :, :-1] - images[..., :, 1:]
    down = images[..., :-1, :] - images[..., 1:, :]
    falling = images[..., :-1, :-1] - images[..., 1:, 1:]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    norms = sum(difference.norm() for difference in (across, down, falling, rising))
    scale = math.sqrt(_IMAGES * _VALUES / images.numel())
    return scale * norms  # type: ignore[return-value]


def stretch(outputs: Sequence[Tensor]) -> Tensor:
    """Return the mean over images and tensors of -(largest - smallest output).

    Empty tensors are skipped, because a detector may find nothing. Source: DGH, arXiv 2410.22110.

    Args:
        outputs: tensors (B, ...), at least one of them not empty.
    """
    rows = [x.float().flatten(1) for x in outputs if x.numel()]
    return -torch.stack([(x.amax(1) - x.amin(1)).mean() for x in rows]).mean()


@dataclass(frozen=True)
class Moments:
    """Means and second moments of the channels of one layer's input, each (C,)."""

    mean: Tensor
    second: Tensor


def moments(x: Tensor) -> Moments:
    """Return the moments of a layer's input (B, C, ...) over all dims except the channels."""
    wide = x.float()
    dims = [dim for dim in range(wide.ndim) if dim != 1]
    return Moments(wide.mean(dims), wide.square().mean(dims))


def alignment(layer: Moments, mean: Tensor, variance: Tensor, deviation: float = 10.0) -> Tensor:
    """Return the distance of a layer's statistics from the stored ones, averaged over channels.

    |mean - m|^2 / C + deviation * |sqrt(var + 1e-6) - sqrt(v + 1e-6)|^2 / C, with var = second
    moment - mean^2 and the stored m and v. Source: DGH, arXiv 2410.22110, and its code.
    """
    own = (layer.second - layer.mean.square()).clamp_min(0)
    apart = (own + 1e-6).sqrt() - (variance + 1e-6).sqrt()
    return (layer.mean - mean).square().mean() + deviation * apart.square().mean()


def image_spread(x: Tensor, batch: int, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the distance of each image from the statistics of the last BatchNorm, (batch,).

    relu(|mean_i - m|^2 / C - 0.5) + relu(|std_i - s|^2 / C - 0.5). The mean and the unbiased
    deviation are over the positions of image i. Source: hinge terms of DGH, arXiv 2410.22110.

    Args:
        x: (B, C, H, W), (B, C, L), or (B * L, C) with L of at least 2.
    """
    wide = x.float()
    wide = wide.reshape(batch, -1, x.shape[1]).mT if x.ndim == 2 else wide.flatten(2)
    means = (wide.mean(-1) - mean).square().mean(-1)
    deviations = (wide.std(-1, correction=1) - variance.sqrt()).square().mean(-1)
    return (means - 0.5).relu() + (deviations - 0.5).relu()
