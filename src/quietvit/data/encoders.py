"""Tell from the config of a transformers folder whether it holds an encoder, and which tower.

``huggingface`` builds the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def is_encoder(raw: Mapping[str, Any]) -> bool:
    """Whether the folder was saved as a model without a head, or is of a kind that has none.

    ``raw``: the keys of its ``config.json``.
    """
    from transformers.models.auto import modeling_auto as auto

    kind, saved = raw.get("model_type"), raw.get("architectures") or ()
    classifiers = dict(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    bare = {name for names in auto.MODEL_MAPPING_NAMES.values() for name in _names(names)}
    return kind in auto.MODEL_MAPPING_NAMES and (kind not in classifiers or bool(bare & set(saved)))


def _names(classes: str | Sequence[str]) -> Sequence[str]:
    """Return the names of the classes of one kind of model, in transformers' own tables."""
    return (classes,) if isinstance(classes, str) else classes


def image_tower(transformers: Any, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys of the image tower if the config has one beside a tower for text."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if "vision_config" not in raw:
        return raw
    found = _names(MODEL_MAPPING_NAMES.get(str(raw.get("model_type")), ()))
    if any(getattr(transformers, n).main_input_name == "pixel_values" for n in found):
        return raw
    rest = {key: value for key, value in raw.items() if key != "model_type"}
    whole = transformers.AutoConfig.for_model(str(raw.get("model_type")), **rest)
    tower: dict[str, Any] = whole.vision_config.to_dict()
    return tower
