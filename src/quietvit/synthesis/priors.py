"""Images of noise, the baselines for the other generators.

They are in natural units (see ``PixelScale``), and nothing is optimized here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quietvit.synthesis.scale import PixelScale
from quietvit.synthesis.settings import Pink


def noise(count: int, scale: PixelScale, random: torch.Generator) -> Tensor:
    """Return Gaussian noise (count, C, H, W), mean 0 and deviation 1, clipped to valid pixels."""
    return clipped(torch.randn(count, *scale.size, generator=random), scale)


def pink(count: int, scale: PixelScale, random: torch.Generator, settings: Pink) -> Tensor:
    """Return noise (count, C, H, W), mean 0 and deviation 1, with amplitude 1 / f^exponent."""
    white = torch.randn(count, *scale.size, generator=random)
    height, width = scale.size[1:]
    down, across = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (down.square() + across.square()).sqrt()
    frequency[0, 0] = torch.inf  # no mean
    shaped = torch.fft.irfft2(
        torch.fft.rfft2(white) / frequency.pow(settings.exponent), s=(height, width)
    )
    deviation = shaped.std((-2, -1), correction=0, keepdim=True).clamp_min(1e-12)
    return clipped(shaped / deviation, scale)


def clipped(images: Tensor, scale: PixelScale) -> Tensor:
    """Clip images in natural units to valid pixels."""
    return images.clamp(*scale.bounds(images.device))
