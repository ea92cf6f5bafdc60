"""Small transformers image classifiers, and local folders of them as ``save_pretrained`` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = HIDDEN | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", PLAIN),
    "DeiT": ("DeiT", PLAIN),
    "Dinov2": ("Dinov2", HIDDEN | {"image_size": 32, "patch_size": 8}),
    "Swin": ("Swin", SWIN),
    "Swin-absolute": ("Swin", SWIN | {"use_absolute_embeddings": True}),
}


def classifier(family: str, classes: int) -> nn.Module:
    """One of ``FAMILIES`` for images of 32 x 32, as transformers starts it."""
    transformers = pytest.importorskip("transformers")
    prefix, settings = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**settings, num_labels=classes)
    model: nn.Module = getattr(transformers, f"{prefix}ForImageClassification")(config)
    return model


def processor(**settings: Any) -> dict[str, Any]:
    plain = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "size": {"height": 32, "width": 32},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
    }
    return {**plain, **settings}


def saved(folder: Path, model: nn.Module, **settings: Any) -> str:
    """The name by which ``create_model`` takes the folder, written here."""
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "preprocessor_config.json").write_text(json.dumps(processor(**settings)))
    return f"hf:{folder}"
