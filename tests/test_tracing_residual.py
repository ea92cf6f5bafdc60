"""Laws of residual blocks: modules whose output is their input plus something, by data flow."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import quietvit
import zoo
from quietvit.data import create_model
from quietvit.detection import faster_rcnn, mask_rcnn, retinanet

VIT = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}
SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": 64}


def _four(pattern: str) -> list[str]:
    return [pattern.format(i) for i in range(4)]


STAGES = _four("model.backbone.model.encoder.stages.{}.layers.0")


def _vit() -> nn.Module:
    return create_model("vit_tiny_patch16_224", 0, **VIT)


def _swin() -> nn.Module:
    return create_model("swin_tiny_patch4_window7_224", 0, **SWIN)


def _of_transformers(kind: str) -> nn.Module:
    import detr_cases

    model: nn.Module = detr_cases.build(kind)
    return model


CASES: dict[str, tuple[Any, list[str]]] = {
    "vit": (_vit, ["blocks.0", "blocks.1"]),
    "swin": (_swin, _four("layers.{}.blocks.0")),
    "convnext": (
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        _four("stages.{}.blocks.0"),
    ),
    "resnet": (
        lambda: timm.create_model("resnet10t", channels=(8, 8, 16, 16)),
        [f"layer{i}.0" for i in range(1, 5)],
    ),
    "faster_rcnn": (
        lambda: faster_rcnn(_vit(), 3, channels=32, scales=(1,)),
        ["backbone.body.blocks.0", "backbone.body.blocks.1"],
    ),
    "mask_rcnn_with_fpn": (
        lambda: mask_rcnn(_swin(), 3, channels=32, box_channels=16, mask_channels=16),
        _four("backbone.body.layers.{}.blocks.0"),
    ),
    "retinanet_with_fpn": (
        lambda: retinanet(_swin(), 3, channels=32),
        _four("backbone.body.layers.{}.blocks.0"),
    ),
    "detr": (
        lambda: _of_transformers("detr"),
        [*STAGES, "model.encoder.layers.0", "model.decoder.layers.0", "model.decoder.layers.1"],
    ),
    "rt_detr": (
        lambda: _of_transformers("rt_detr"),
        [
            *STAGES,
            "model.encoder.aifi.0.layers.0",
            *(f"model.encoder.{way}_blocks.{i}" for way in ("fpn", "pan") for i in (0, 1)),
            "model.decoder.layers.0",
        ],
    ),
    "yolos": (
        lambda: _of_transformers("yolos"),
        ["vit.encoder.layer.0", "vit.encoder.layer.1"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_residual_blocks_of_a_model_are_these(name: str) -> None:
    build, expected = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    images = torch.rand(1, 3, 64, 64)
    assert list(quietvit.trace(model, images).blocks) == expected


@pytest.mark.parametrize("name", zoo.ZOO)
def test_blocks_lie_apart_and_hold_products(name: str) -> None:
    traced = quietvit.trace(*zoo.build(name))
    assert traced.blocks
    for block in traced.blocks:
        inside = [site for site in traced.sites if f"{site.module}.".startswith(f"{block}.")]
        assert any(site.macs for site in inside), block
        assert not any(f"{block}.".startswith(f"{o}.") for o in traced.blocks if o != block)


class Adding(nn.Module):
    """Adds something to its input, or to what it computed from it; ``how`` says what."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm, self.other, self.last = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        parts = {
            "input": lambda: x + self.last(self.norm(x)),
            "input in place": lambda: x.clone().add_(self.last(self.norm(x))),
            "reversed": lambda: self.last(self.other(x)) + x,
            "normed": lambda: self.norm(x + self.last(x)),
            "twice": lambda: x + self.other(x) + self.last(x),
            "projected": lambda: self.norm(self.other(x)) + self.last(self.last(x)),
            "scaled": lambda: x + 0.1 * self.last(x).relu(),
            "projected and bent": lambda: self.other(x) + self.last(x).relu(),
            "two projections": lambda: self.other(x) + self.last(x),
            "another input": lambda: given + self.last(x),
            "no product": lambda: x + self.norm(x).relu(),
            "own tensor": lambda: (y := self.other(x).relu()) + self.last(y),
            "inside": lambda: self.other(x + self.last(x)),
        }
        return parts[self.how]()


@pytest.mark.parametrize(
    ("how", "residual"),
    [
        *((how, True) for how in ("input", "input in place", "reversed", "normed", "twice")),
        *((how, True) for how in ("projected", "projected and bent", "scaled")),
        *((how, False) for how in ("two projections", "another input", "no product")),
        *((how, False) for how in ("own tensor", "inside")),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_block_adds_to_its_input_what_a_product_made_of_it(
    how: str, residual: bool, first: bool
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.beside, self.block = nn.Linear(8, 8), nn.Linear(8, 8), Adding(how)

        def forward(self, x: Tensor) -> Tensor:
            given = self.beside(x)
            return self.block(x if first else self.stem(x), given)

    blocks = quietvit.trace(Model().eval(), torch.rand(1, 5, 8)).blocks
    assert blocks == (("block",) if residual else ())


class Moved(nn.Module):
    """Moves cells that it finds in its images (1, 5, 8) by what a product makes of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        cells: Tensor = (images > 0.5).to(images).mean(dim=1)
        return cells + self.last(images.mean(dim=1))


def test_what_is_read_off_the_images_is_not_their_shortcut() -> None:
    """The proposals of a two-stage Deformable DETR come from the mask of the padding."""
    model = nn.Sequential(nn.Identity(), Moved()).eval()
    assert quietvit.trace(model, torch.rand(1, 5, 8)).blocks == ()
