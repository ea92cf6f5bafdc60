"""Tiny random models of every family the library claims to read, and an input for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from timm.layers import GroupNormAct, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn

Built = tuple[nn.Module, Any]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def _timm(name: str, size: int = 32, **kwargs: Any) -> Callable[[], Built]:
    def build() -> Built:
        return timm.create_model(name, img_size=size, **kwargs), torch.randn(1, 3, size, size)

    return build


def _hybrid() -> Built:
    """R26+ViT with fewer and narrow blocks: its own backbone has 14 million parameters."""
    convolution = partial(StdConv2dSame, eps=1e-8)
    backbone = ResNetV2(
        layers=(2, 1, 1, 1),
        channels=(16, 32, 64, 128),
        stem_chs=16,
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=convolution,
        norm_layer=partial(GroupNormAct, num_groups=4),
    )
    embed = partial(HybridEmbed, backbone=backbone)
    model = VisionTransformer(img_size=64, patch_size=1, embed_layer=embed, **TINY)
    return model, torch.randn(1, 3, 64, 64)


def _torchvision_vit() -> Built:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
    )
    return model, torch.randn(1, 3, 32, 32)


def _torchvision_swin() -> Built:
    model = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4]
    )
    return model, torch.randn(1, 3, 64, 64)


def _detr() -> Built:
    import pytest

    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in DETR.items()}
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        num_queries=5,
        **sizes,
    )
    example = {
        "pixel_values": torch.randn(1, 3, 32, 32),
        "pixel_mask": torch.ones(1, 32, 32, dtype=torch.long),
    }
    return transformers.DetrForObjectDetection(config), example


def detector(kind: str = "faster_rcnn") -> nn.Module:
    """A tiny detector of torchvision in eval mode; it takes lists of images, each (3, H, W)."""
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 4, 1))
    backbone.out_channels = 16
    anchors = AnchorGenerator(((8, 16),), ((1.0,),))
    sizes = {"num_classes": 3, "min_size": 64, "max_size": 96}
    if kind == "retinanet":
        sizes |= {"topk_candidates": 20, "detections_per_img": 5}
        model = detection.RetinaNet(backbone, anchor_generator=anchors, score_thresh=0.0, **sizes)
        return model.eval()
    return detection.FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_post_nms_top_n_test=8,
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 9, 16),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 3),
        num_classes=None,
        **{key: size for key, size in sizes.items() if key != "num_classes"},
        box_score_thresh=0.0,
        box_detections_per_img=5,
    ).eval()


def _encoder(norm_first: bool) -> Callable[[], Built]:
    def build() -> Built:
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return encoder, torch.randn(1, 10, 32)

    return build


def _transformers(config: str, model: str, **kwargs: Any) -> Callable[[], Built]:
    def build() -> Built:
        import pytest

        transformers = pytest.importorskip("transformers")
        size = kwargs["image_size"]
        side = size if isinstance(size, int) else size[0]
        built = getattr(transformers, model)(getattr(transformers, config)(**kwargs))
        return built, {"pixel_values": torch.randn(1, 3, side, side)}

    return build


HIDDEN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
DINOV2 = {key: value for key, value in HIDDEN.items() if key != "intermediate_size"}
DETR = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
SWIN = {"depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}

ZOO: dict[str, Callable[[], Built]] = {
    "timm-vit": _timm("vit_tiny_patch16_224", patch_size=8, **TINY),
    "timm-deit-distilled": _timm("deit_tiny_distilled_patch16_224", patch_size=8, **TINY),
    "timm-swin": _timm(
        "swin_tiny_patch4_window7_224",
        size=64,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
    ),
    "timm-beit": _timm("beit_base_patch16_224", patch_size=8, **TINY),
    "timm-eva-swiglu": _timm("eva02_tiny_patch14_224", size=28, patch_size=7, **TINY),
    "timm-dinov2-layerscale": _timm("vit_small_patch14_dinov2", size=28, patch_size=7, **TINY),
    "timm-hybrid": _hybrid,
    "timm-qk-norm": _timm("vit_base_patch16_224", patch_size=8, qk_norm=True, **TINY),
    "timm-convit-cached-table": _timm("convit_tiny", patch_size=8, **(TINY | {"embed_dim": 16})),
    "hf-detr": _detr,
    "hf-vit": _transformers("ViTConfig", "ViTForImageClassification", **HIDDEN),
    "hf-dinov2": _transformers("Dinov2Config", "Dinov2ForImageClassification", **DINOV2),
    "hf-swin": _transformers(
        "SwinConfig", "SwinForImageClassification", image_size=64, embed_dim=16, **SWIN
    ),
    "hf-siglip": _transformers("SiglipVisionConfig", "SiglipVisionModel", **HIDDEN),
    "hf-yolos": _transformers(
        "YolosConfig",
        "YolosForObjectDetection",
        **(HIDDEN | {"image_size": [32, 32], "num_detection_tokens": 5}),
    ),
    "tv-vit": _torchvision_vit,
    "tv-swin": _torchvision_swin,
    "nn-encoder-pre-norm": _encoder(norm_first=True),
    "nn-encoder-post-norm": _encoder(norm_first=False),
}


def build(name: str) -> Built:
    """A model of the zoo in eval mode, norms, biases and zeros random so that mistakes show."""
    torch.manual_seed(0)
    model, example = ZOO[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), example


def outputs(result: Any) -> list[torch.Tensor]:
    """All tensors of a model's output."""
    leaves = torch.utils._pytree.tree_flatten(result)[0]
    if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [value for value in result.values() if isinstance(value, torch.Tensor)]
