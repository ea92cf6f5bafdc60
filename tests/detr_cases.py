"""Tiny detectors of transformers whose boxes and classes depend on the image.

A new model with transformers' initial weights hardly looks at its image: all weights are close to
0, or a head starts at 0. Then a wrong product changes nothing that a test could see. So ``build``
draws larger weights, and asserts that two images give different results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

LEAST_CHANGE = 0.15
"""Least relative change (L2) of the logits, and of the boxes, between the two ``pictures``."""

DETR = {
    "d_model": 32,
    "num_queries": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
HGNET = {
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 16, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 16, 16, 16],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 16, 16],
}
REAL_TIME = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 16, 16],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "num_queries": 20,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "num_labels": 2,
}
LAST_STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
NO_TIMM = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}


def _detr() -> Any:
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    names = {0: "disc", 1: "square"}
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(backbone_config=backbone, **DETR, **NO_TIMM, id2label=names)
    )


def _yolos() -> Any:
    config = transformers.YolosConfig(
        image_size=[64, 64],
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_detection_tokens=8,
        num_labels=2,
    )
    return transformers.YolosForObjectDetection(config)


def _rt_detr() -> Any:
    backbone = transformers.RTDetrResNetConfig(**RESNET, **LAST_STAGES)
    return transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(backbone_config=backbone, **REAL_TIME, decoder_layers=1)
    )


def _rt_detr_v2() -> Any:
    backbone = transformers.RTDetrResNetConfig(**RESNET, **LAST_STAGES)
    return transformers.RTDetrV2ForObjectDetection(
        transformers.RTDetrV2Config(backbone_config=backbone, **REAL_TIME, decoder_layers=2)
    )


def _d_fine() -> Any:
    backbone = transformers.HGNetV2Config(**HGNET, **LAST_STAGES, return_idx=[1, 2, 3])
    return transformers.DFineForObjectDetection(
        transformers.DFineConfig(backbone_config=backbone, **REAL_TIME, decoder_layers=2)
    )


def _deformable_detr() -> Any:
    backbone = transformers.ResNetConfig(**RESNET, **LAST_STAGES)
    levels = {"num_feature_levels": 3, "with_box_refine": True, "two_stage": True}
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone, **DETR, **levels, two_stage_num_proposals=8, num_labels=2
    )
    return transformers.DeformableDetrForObjectDetection(config)


LW_DETR = {
    "d_model": 32,
    "num_queries": 8,
    "group_detr": 2,
    "c2f_num_blocks": 1,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_n_points": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_labels": 2,
}
VIT = {
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "out_indices": [1, 2],
}


def _rf_detr() -> Any:
    backbone = transformers.RfDetrDinov2Config(**VIT, num_windows=2)
    return transformers.RfDetrForObjectDetection(
        transformers.RfDetrConfig(backbone_config=backbone, **LW_DETR)
    )


def _lw_detr() -> Any:
    backbone = transformers.LwDetrViTConfig(
        **VIT, pretrain_image_size=32, num_windows=4, window_block_indices=[0]
    )
    config = transformers.LwDetrConfig(
        backbone_config=backbone, **LW_DETR, projector_scale_factors=[2.0, 0.5]
    )
    return transformers.LwDetrForObjectDetection(config)


def _deimv2() -> Any:
    backbone = transformers.DINOv3ViTConfig(
        image_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_register_tokens=1,
        out_indices=[0, 1, 2],
        apply_layernorm=False,
    )
    return transformers.Deimv2ForObjectDetection(
        transformers.Deimv2Config(backbone_config=backbone, **REAL_TIME, decoder_layers=2)
    )


def _conditional_detr() -> Any:
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    return transformers.ConditionalDetrForObjectDetection(
        transformers.ConditionalDetrConfig(backbone_config=backbone, **DETR, num_labels=2)
    )


def _table_transformer() -> Any:
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    return transformers.TableTransformerForObjectDetection(
        transformers.TableTransformerConfig(backbone_config=backbone, **DETR, num_labels=2)
    )


def _dab_detr() -> Any:
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    widths = {key: value for key, value in DETR.items() if key != "d_model"}
    return transformers.DabDetrForObjectDetection(
        transformers.DabDetrConfig(backbone_config=backbone, hidden_size=32, **widths, num_labels=2)
    )


EDGES = {"size": {"shortest_edge": 64, "longest_edge": 96}, "image_mean": [0.5] * 3}
PADDED = {"image_processor_type": "DetrImageProcessor", **EDGES}
SIGMOID = {"image_processor_type": "DeformableDetrImageProcessor", **EDGES}
SQUARE = {
    "image_processor_type": "RTDetrImageProcessor",
    "size": {"height": 64, "width": 64},
    "do_normalize": False,
}


class Kind(NamedTuple):
    """``gain``: the size of the weights, as a factor of what keeps the variance of a linear."""

    make: Callable[[], Any]
    gain: float
    processor: dict[str, Any]
    size: tuple[int, int] = (64, 64)
    stretch: bool = True


KINDS = {
    "detr": Kind(_detr, 1.5, PADDED, (64, 96), False),
    "yolos": Kind(_yolos, 2.0, {}),
    "rt_detr": Kind(_rt_detr, 1.0, SQUARE),
    "rt_detr_v2": Kind(_rt_detr_v2, 1.0, SQUARE),
    "d_fine": Kind(_d_fine, 1.0, SQUARE),
    "deformable_detr": Kind(_deformable_detr, 1.0, SIGMOID, (64, 96), False),
    "rf_detr": Kind(_rf_detr, 1.0, {**SQUARE, "image_processor_type": "RfDetrImageProcessor"}),
    "lw_detr": Kind(_lw_detr, 1.0, SQUARE),
    "deimv2": Kind(_deimv2, 1.0, SQUARE),
    "conditional_detr": Kind(_conditional_detr, 1.7, SIGMOID, (64, 96), False),
    "table_transformer": Kind(_table_transformer, 1.5, PADDED, (64, 96), False),
    "dab_detr": Kind(_dab_detr, 1.5, SIGMOID, (64, 96), False),
}


@torch.no_grad()
def build(kind: str) -> Any:
    """Build a tiny detector that looks at its image."""
    torch.manual_seed(0)
    model = KINDS[kind].make().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            size = module.weight[0].numel()
            nn.init.normal_(module.weight, std=KINDS[kind].gain / math.sqrt(size))
            if module.bias is not None:  # of class heads: so far below 0 that all scores are low
                nn.init.zeros_(module.bias)
    for what, change in changes(model).items():
        assert change > LEAST_CHANGE, f"{kind}: the {what} hardly depend on the image: {change:.3f}"
    return model


def write(kind: str, folder: Path) -> Path:
    """Write the model and its image processor's config as transformers does."""
    build(kind).save_pretrained(folder)
    if settings := KINDS[kind].processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


class Folders(dict[str, Path]):
    """The folder of each kind, written when it is asked for."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, kind: str) -> Path:
        self[kind] = write(kind, self._make(kind))
        return self[kind]


def pictures() -> Tensor:
    """Return two images (2, 3, 64, 64) in 0..1: noise with a bright and a dark rectangle."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    images[0, :, 8:40, 12:30] = torch.tensor([1.0, 0.8, 0.1])[:, None, None]
    images[1, :, 30:60, 5:55] = torch.tensor([0.0, 0.1, 0.6])[:, None, None]
    return images


@torch.no_grad()
def changes(model: nn.Module) -> dict[str, float]:
    """Return the relative change of logits and boxes between two images, of queries in order."""
    output = model(pixel_values=pictures())
    found: dict[str, Tensor] = {"logits": output.logits, "boxes": output.pred_boxes}
    return {
        what: float((first - second).norm() / first.norm())
        for what, (first, second) in found.items()
    }
