"""Convert preprocessing to timm's data config, the form stored in exported files.

It reads timm's configs, transformers' image processors, torchvision's ``weights.transforms()`` and
a Compose of resize, centre crop and normalization.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from quietvit.data.image_processor import check_translation, translated_preprocessing
from quietvit.errors import QuietvitError, nearest

KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
ASK = (
    "Give timm's data config (a dict with mean, std, interpolation and crop_pct), an image "
    "processor of transformers, weights.transforms() of torchvision, or a torchvision Compose of "
    "Resize, CenterCrop, ToTensor and Normalize."
)


def plain_preprocessing(spec: Any, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """Return ``spec`` as timm's data config for images of ``shape`` (C, H, W); None for None.

    A timm config gets the size ``shape``, like in timm for a model built at another size. Any other
    form must produce images of that size. Transforms are compared with timm's on two pictures.

    Raises QuietvitError for an unknown form, values that JSON cannot hold, another image size, and
    steps that timm's evaluation transform does not have.
    """
    if spec is None:
        return None
    if hasattr(spec, "image_processor"):  # a processor of images and texts, as CLIP's
        spec = spec.image_processor
    if isinstance(spec, Mapping) and "image_mean" not in spec:
        return _of_timm(spec) | {"input_size": list(shape)}
    channels, height, width = shape
    if isinstance(spec, Mapping):
        config = translated_preprocessing(spec, (channels, height, width), "the preprocessing")
    elif hasattr(spec, "to_json_string"):
        settings = json.loads(spec.to_json_string())
        config = translated_preprocessing(settings, (channels, height, width), "the preprocessing")
        _tried(spec, config)
    else:
        config = _of_torchvision(spec, channels)
        _tried(_as_processor(spec), config)
    if tuple(config["input_size"]) != tuple(shape):
        raise QuietvitError(
            f"the preprocessing makes images of {tuple(config['input_size'])}, but the model was "
            f"quantized with images of {tuple(shape)}; give the preprocessing of this model."
        )
    return _json(config)


def transform_of(config: Mapping[str, Any] | None, path: Path) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform for a file's preprocessing: PIL RGB -> (C, H, W).

    Raises QuietvitError if the file at ``path`` has no preprocessing (``config`` is None).
    """
    if config is None:
        raise QuietvitError(
            f"{path} carries no preprocessing, so images cannot be prepared for it; export it with "
            f"preprocessing=... {ASK}"
        )
    from timm.data.transforms_factory import create_transform

    settings: dict[str, Any] = dict(config)
    settings["input_size"] = tuple(settings["input_size"])
    transform: Callable[[Image.Image], Tensor] = create_transform(**settings, is_training=False)
    return transform


def _tried(processor: Any, config: Mapping[str, Any]) -> None:
    """Raise QuietvitError if timm's transform of ``config`` and ``processor`` differ on images."""
    try:
        check_translation(processor, config, "the preprocessing")
    except QuietvitError as error:  # replace its remedy, which is for transformers folders
        told = str(error).partition(" Take preprocessor_config.json")[0]
        raise QuietvitError(f"{told} {ASK}") from error


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``KEYS`` of a data config. A whole ``pretrained_cfg`` may have more keys."""
    from timm.models import PretrainedCfg

    known = {*KEYS, *PretrainedCfg.__dataclass_fields__}
    unknown = [str(key) for key in config if key not in known]
    if unknown:
        raise QuietvitError(
            f"the preprocessing has an unknown key {unknown[0]!r}{nearest(unknown[0], KEYS)}; "
            f"timm's data config has {', '.join(KEYS)}."
        )
    missing = [key for key in ("mean", "std") if config.get(key) is None]
    if missing:
        raise QuietvitError(f"the preprocessing has no {' and no '.join(missing)}. {ASK}")
    return _json({key: config[key] for key in KEYS if config.get(key) is not None})


def _json(content: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(content)))
    except TypeError as error:
        raise QuietvitError(
            f"the preprocessing {dict(content)} has a value that is not a number, text or list "
            f"({error}); give plain values, such as interpolation='bicubic'."
        ) from error
    return plain


def _of_torchvision(chain: Any, channels: int) -> dict[str, Any]:
    from torchvision.transforms._presets import ImageClassification

    if isinstance(chain, ImageClassification):
        return _config(
            chain.resize_size,
            chain.crop_size,
            chain.mean,
            chain.std,
            chain.interpolation,
            channels,
        )
    steps = getattr(chain, "transforms", None)
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        what = f"the class {chain.__name__}" if isinstance(chain, type) else type(chain).__name__
        raise QuietvitError(f"preprocessing={what} is not understood. {ASK}")
    by_name = {type(step).__name__: step for step in steps}
    resize = by_name.get("Resize") or by_name.get("ResizeKeepRatio")
    crop, normalize = by_name.get("CenterCrop"), by_name.get("Normalize")
    if resize is None or normalize is None:
        raise QuietvitError(
            f"the preprocessing is {' -> '.join(by_name)}, which is not understood. {ASK}"
        )
    return _config(
        resize.size,
        resize.size if crop is None else crop.size,
        normalize.mean,
        normalize.std,
        resize.interpolation,
        channels,
    )


def _config(
    resized: Any, cropped: Any, mean: Any, std: Any, interpolation: Any, channels: int
) -> dict[str, Any]:
    before, after = _sides(resized), _sides(cropped)
    final = (after[0], after[-1])
    share = final[0] / before[0]
    if int(final[0] / share) != before[0]:  # timm resizes to floor(final / crop_pct)
        share = final[0] / (before[0] + 0.5)
    return {
        "input_size": (channels, *final),
        "mean": _numbers(mean),
        "std": _numbers(std),
        "interpolation": str(getattr(interpolation, "value", interpolation)),
        "crop_pct": share,
        "crop_mode": "center" if len(before) == 1 else "squash",
    }


def _sides(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(int(side) for side in size)


def _numbers(values: Any) -> tuple[float, ...]:
    """Return the numbers of a list or float32 tensor, rounded to the decimals people wrote."""
    flat = values.flatten().tolist() if hasattr(values, "flatten") else values
    return tuple(round(float(value), 6) for value in flat)


def _as_processor(transform: Callable[[Any], Any]) -> Any:
    """Wrap a transform so that it is called like a transformers processor, for ``_tried``."""

    def processor(picture: Any, return_tensors: str) -> dict[str, Any]:
        return {"pixel_values": transform(picture)[None]}

    return processor
