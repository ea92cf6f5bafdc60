"""Tiny detectors of transformers for the tests: DETR, YOLOS, RT-DETR."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

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
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
NO_TIMM = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
EDGES = {"size": {"shortest_edge": 64, "longest_edge": 96}, "image_mean": [0.5] * 3}


def detr() -> Any:
    backbone = transformers.ResNetConfig(**RESNET, layer_type="basic", out_features=["stage4"])
    names = {0: "disc", 1: "square"}
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(backbone_config=backbone, **DETR, **NO_TIMM, id2label=names)
    )


def yolos() -> Any:
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


def rt_detr() -> Any:
    backbone = transformers.RTDetrResNetConfig(
        **RESNET, layer_type="basic", out_features=["stage2", "stage3", "stage4"]
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        num_queries=20,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_labels=2,
    )
    return transformers.RTDetrForObjectDetection(config)
