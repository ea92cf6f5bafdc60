"""Build feature pyramids on timm backbones: ViTDet's for plain ViTs, FPN for hierarchical models.

``detectors`` builds proposals and box heads on top of the pyramid.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from quietvit.detection.windows import use_windows
from quietvit.errors import QuietvitError

SCALES = (4.0, 2.0, 1.0, 0.5)


class Pyramid(nn.Module):
    """A timm backbone with a pyramid: images (N, 3, H, W) -> maps (N, channels, h, w) by name.

    ``body`` is the timm model. ``neck`` turns its features into the maps ``"0"``, ``"1"``, ... The
    extra map ``"pool"`` takes every second position of the coarsest map. ``strides`` lists the
    strides without ``"pool"``. Example: for an image of 512 x 512 and strides 4, 8, 16 and 32, the
    maps have sides 128, 64, 32 and 16, and ``"pool"`` has 8.
    """

    def __init__(self, body: nn.Module, neck: nn.Module, levels: Sequence[int], norm: bool) -> None:
        super().__init__()
        self.body, self.neck = body, neck
        self._levels, self._norm = list(levels), norm
        self._pool = LastLevelMaxPool()
        self.out_channels: int = neck.out_channels  # type: ignore[assignment]
        self.strides: tuple[int, ...] = neck.strides  # type: ignore[assignment]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        body: Any = self.body
        features = body.forward_intermediates(
            x, indices=self._levels, norm=self._norm, output_fmt="NCHW", intermediates_only=True
        )
        maps = self.neck(features)
        names = [str(index) for index in range(len(maps))]
        maps, names = self._pool(maps, features, names)
        return OrderedDict(zip(names, maps, strict=True))

    def use_windows(
        self, size: tuple[int, int], side: int, global_blocks: Sequence[int] | None
    ) -> None:
        """Give the plain backbone windows. ``size`` is that of its images in pixels."""
        body: Any = self.body
        if not isinstance(self.neck, SimplePyramid):
            raise QuietvitError(
                f"{type(body).__name__} is hierarchical. Windows are for plain backbones, so leave "
                "windows out."
            )
        stride = body.feature_info[-1]["reduction"]
        use_windows(body, (size[0] // stride, size[1] // stride), side, global_blocks)


def pyramid(body: nn.Module, channels: int = 256, scales: Sequence[float] | None = None) -> Pyramid:
    """Build a feature pyramid on a timm model.

    A plain backbone (ViT, DeiT, BEiT, EVA, DINOv2) has one stride in all blocks. It gets ViTDet's
    simple feature pyramid (arXiv 2203.16527, section 3) on its last, normalized map. A hierarchical
    backbone (Swin, ConvNeXt, ResNet) gets an FPN (arXiv 1612.03144). The FPN takes the last map of
    each stride from 4 to 32. A LayerNorm precedes it, as in Swin's detectors (arXiv 2103.14030).

    Args:
        body: a timm model with ``forward_intermediates``. Its head is removed.
        channels: channels of each map.
        scales: for a plain backbone: size of each map relative to the backbone's map. None takes
            those of 4, 2, 1 and 1/2 that give an integer stride (4 to 32 for 16-pixel patches).

    Raises:
        QuietvitError: the backbone has no feature maps, a scale does not fit, or scales are given
            for a hierarchical backbone.
    """
    name = type(body).__name__
    info = _levels_of(body, name)
    strides = [level["reduction"] for level in info]
    width = [level["num_chs"] for level in info]
    if len(set(strides)) == 1:
        last = len(info) - 1
        whole = [s for s in SCALES if strides[0] % s == 0]
        chosen = tuple(whole if scales is None else scales)
        for scale in chosen:
            if scale not in SCALES or strides[0] % scale != 0:
                raise QuietvitError(
                    f"the scale {scale:g} does not fit {name} with patches of {strides[0]} pixels. "
                    f"Choose from {', '.join(f'{s:g}' for s in whole)}."
                )
        neck: nn.Module = SimplePyramid(width[last], channels, chosen, strides[0])
        return Pyramid(_without_head(body, True), neck, [last], norm=True)
    if scales is not None:
        raise QuietvitError(
            f"{name} is hierarchical: its maps have the strides {', '.join(map(str, strides))}. "
            "Scales are for plain backbones, so leave scales out."
        )
    levels = [
        max(place for place, stride in enumerate(strides) if stride == wanted)
        for wanted in (4, 8, 16, 32)
        if wanted in strides
    ]
    neck = NormedFPN(
        [width[level] for level in levels], channels, [strides[level] for level in levels]
    )
    return Pyramid(_without_head(body, False), neck, levels, norm=False)


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid (arXiv 2203.16527, section 3 and appendix A.2).

    Transposed convolutions or pooling scale one map (N, C, h, w). Each scaled map then passes a
    1 x 1 and a 3 x 3 convolution, each followed by a LayerNorm over channels.
    """

    def __init__(self, width: int, channels: int, scales: Sequence[float], stride: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.strides = tuple(round(stride / scale) for scale in scales)
        self.levels = nn.ModuleList()
        for scale in scales:
            steps: list[nn.Module] = []
            inner = width
            for step in range(max(0, round(math.log2(scale)))):
                if step:
                    steps += [LayerNorm2d(inner), nn.GELU()]
                steps.append(nn.ConvTranspose2d(inner, inner // 2, 2, stride=2))
                inner //= 2
            if scale < 1:
                steps.append(nn.MaxPool2d(2))
            steps += [
                nn.Conv2d(inner, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            ]
            self.levels.append(nn.Sequential(*steps))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(maps[-1]) for level in self.levels]


class NormedFPN(nn.Module):
    """torchvision's FPN, after a LayerNorm over channels on each input map."""

    def __init__(self, widths: Sequence[int], channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.out_channels, self.strides = channels, tuple(strides)
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in widths)
        self.fpn = FeaturePyramidNetwork(list(widths), channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        normed = OrderedDict(
            (str(place), norm(x))
            for place, (norm, x) in enumerate(zip(self.norms, maps, strict=True))
        )
        return list(self.fpn(normed).values())


def _levels_of(body: nn.Module, name: str) -> list[dict[str, Any]]:
    info: Any = getattr(body, "feature_info", None)
    if info is None or not hasattr(body, "forward_intermediates"):
        raise QuietvitError(
            f"{name} gives no feature maps (timm's forward_intermediates and feature_info), so no "
            "detector can be built on it. Choose a ViT, DeiT, BEiT, EVA, DINOv2, Swin or ConvNeXt."
        )
    return [dict(level) for level in info]


def _without_head(body: Any, norm: bool) -> nn.Module:
    """Remove what follows the feature maps: the classifier, the pooling and their norms.

    ``norm``: keep the last norm. With mean pooling it is ``fc_norm``, which moves to ``norm``.
    """
    body.reset_classifier(0)
    last = getattr(body, "norm", None)
    behind = getattr(body, "fc_norm", None)
    if isinstance(behind, nn.Module):
        if norm and isinstance(last, nn.Identity):
            body.norm = behind
        body.fc_norm = nn.Identity()
    if not norm and isinstance(last, nn.Module):
        body.norm = nn.Identity()
    if isinstance(getattr(body, "attn_pool", None), nn.Module):
        body.attn_pool = None
    model: nn.Module = body
    return model
