"""Create transformers image classifiers, encoders and object detectors from a local folder.

``image_processor`` translates preprocessing, ``adapting`` resizes, ``encoders`` tells encoders from
classifiers; ``weights`` makes timm models.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quietvit.classes import name_classes
from quietvit.data.adapting import adapted, input_size_of
from quietvit.data.differences import differences, shown
from quietvit.data.encoders import image_tower, is_encoder
from quietvit.data.image_processor import check_translation, translated_preprocessing
from quietvit.data.prefixes import unwrapped
from quietvit.errors import QuietvitError, nearest

logger = logging.getLogger("quietvit")

_OWNED = {
    "num_labels": "data.num_classes",
    "id2label": "data.num_classes",
    "label2id": "data.num_classes",
    "model_type": "model.name",
}
_POOLER = "pooler."
_REMOTE = {"trust_remote_code": False}


class _Kind(NamedTuple):
    """What a model is, its class in transformers, and examples of such models."""

    name: str
    auto: str
    examples: str


CLASSIFIER = _Kind("image classifier", "AutoModelForImageClassification", "ViT, DeiT or Swin")
ENCODER = _Kind("image encoder", "AutoModel", "DINOv2, SigLIP or AIMv2")
DETECTOR = _Kind("object detector", "AutoModelForObjectDetection", "DETR, RT-DETR or YOLOS")


def create_hf_model(
    folder: str,
    num_classes: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    untrained: bool = False,
) -> nn.Module:
    """Build a transformers image classifier or encoder from ``config.json``, with its safetensors.

    The weights are float32. No pickle is read, and no code of the folder runs. Without a weights
    file the weights are random, and a log line says so. ``preprocessor_config.json`` becomes the
    model's data config (``quietvit.data.data_config``) and sets the image size.

    Args:
        folder: a local folder; anything that is not a path is a name on the Hugging Face hub.
        num_classes: classes of the head; None uses the config's. With another number the head is
            random, and a log line says so. 0 gives the encoder alone, as ``AutoModel`` builds it;
            so does None if the folder holds an encoder. Of an image and a text tower, it is the
            image tower.
        kwargs: changes to the config, such as ``image_size`` (or ``img_size``). For another size,
            position tables are resampled bicubically, as in transformers, and a log line says so.
        preprocessing: overrides in the data config: mean, std, interpolation, crop_pct, crop_mode.
        weights: name -> tensor, loaded strictly instead of the folder's.
        untrained: without ``weights``, use random ones and ignore the folder's.

    Raises:
        QuietvitError: transformers or the folder is missing, the hub is unreachable, the model is
            neither an image classifier nor an encoder, there are no safetensors, keys are unknown,
            weights have other shapes, or the preprocessing cannot be translated.
    """
    transformers = _transformers()
    source = _source(folder)
    raw, plain = _configs(transformers, source, {})
    kind = CLASSIFIER
    if num_classes == 0 or (num_classes is None and is_encoder(raw)):
        kind, num_classes = ENCODER, None
        raw, plain = _configs(transformers, source, {}, kind)
    changes = _changes(kwargs, raw, plain, source)
    prepared = _preprocessing(transformers, source, plain)
    if "image_size" not in changes and prepared["input_size"] != input_size_of(plain):
        changes["image_size"] = list(prepared["input_size"][1:])
    model = _model(kind, source, plain, changes, num_classes, weights, untrained)
    config: Any = model.config
    data = {**prepared, "input_size": input_size_of(config), **(preprocessing or {})}
    count = 0 if kind is ENCODER else config.num_labels
    model.pretrained_cfg = {**data, "num_classes": count}  # type: ignore[assignment]
    if kind is ENCODER:
        name_classes(model, None)
    return model


def create_hf_detector(
    folder: str,
    num_classes: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    untrained: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a transformers object detector like ``create_hf_model`` builds a classifier.

    Returns the model and the settings of its image processor, empty if the folder has none.
    ``quietvit.detection.hf_detector`` wraps it. Raises QuietvitError like ``create_hf_model``.
    """
    transformers = _transformers()
    source = _source(folder)
    raw, plain = _configs(transformers, source, {})
    changes = _changes(kwargs, raw, plain, source)
    settings: dict[str, Any] = {}
    path = Path(source)
    if not path.is_dir() or (path / "preprocessor_config.json").is_file():
        _, settings = _processor(transformers, source)
    return _model(DETECTOR, source, plain, changes, num_classes, weights, untrained), settings


def _changes(
    kwargs: Mapping[str, Any] | None, raw: Mapping[str, Any], plain: Any, source: str
) -> dict[str, Any]:
    changes = {("image_size" if k == "img_size" else k): v for k, v in (kwargs or {}).items()}
    _check(changes, raw, plain, source)
    return changes


def _model(
    kind: _Kind,
    source: str,
    plain: Any,
    changes: Mapping[str, Any],
    num_classes: int | None,
    weights: Mapping[str, Tensor] | None,
    untrained: bool,
) -> nn.Module:
    """Build the model with the changed config, and load ``weights`` or those of the folder."""
    transformers = _transformers()
    _, config = _configs(transformers, source, changes, kind)
    if num_classes is not None and num_classes != config.num_labels:
        config.num_labels = num_classes
    for settings in (plain, config):
        if getattr(settings, "use_pretrained_backbone", False):
            settings.use_pretrained_backbone = False  # the folder holds the backbone's weights
    model = _built(kind, source, config)
    if weights is not None:
        state = unwrapped(model.state_dict(), weights, "the weights")[0]
        _load(_fitting_pooler(kind, model, state, "the weights"), state, "the weights")
    elif not untrained and _without_weights(source):
        logger.warning("%s holds no weights: the model's weights are random.", source)
    elif not untrained:
        state = _pretrained(kind, source, plain)
        _fitting_pooler(kind, model, state, source)
        _load(model, adapted(state, model, plain, config, source), source)
    return model


def _fitting_pooler(
    kind: _Kind, model: nn.Module, state: Mapping[str, Tensor], source: str
) -> nn.Module:
    """Remove the pooler of an encoder in place if ``state`` has no weights for it."""
    own = any(key.startswith(_POOLER) for key in model.state_dict())
    if kind is ENCODER and own and not any(key.startswith(_POOLER) for key in state):
        logger.warning("%s: no weights of a pooler; the model gives its tokens alone.", source)
        model.pooler = None  # type: ignore[assignment]
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise QuietvitError(
            "models named 'hf:...' need transformers, which is not installed; pip install "
            "'quietvit[transformers]'."
        ) from error
    return transformers


def _source(folder: str) -> str:
    path = Path(folder).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            names = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
            raise QuietvitError(
                f"{path} holds no config.json (it holds {names}); give the folder that "
                "save_pretrained() of a transformers image classifier wrote."
            )
        return str(path)
    if not folder or folder[0] in "/.~" or folder.count("/") > 1:
        raise QuietvitError(
            f"the folder {path} of the model does not exist; give 'hf:' and the folder that "
            "save_pretrained() wrote."
        )
    return folder


def _local(source: str) -> dict[str, Any]:
    return _REMOTE | {"local_files_only": Path(source).is_dir()}


def _configs(
    transformers: Any, source: str, changes: Mapping[str, Any], kind: _Kind = CLASSIFIER
) -> tuple[Any, Any]:
    """Return the keys of ``config.json``, and the config with ``changes`` in them."""
    try:
        raw, _ = transformers.PretrainedConfig.get_config_dict(source, **_local(source))
        raw = image_tower(transformers, raw) if kind is ENCODER else raw
        rest = {key: value for key, value in raw.items() if key != "model_type"}
        config = transformers.AutoConfig.for_model(
            str(raw.get("model_type")), **{**rest, **changes}
        )
    except Exception as error:
        changed = ", ".join(f"{key}={value!r}" for key, value in changes.items())
        if changed:
            problem = f"{source} cannot be built with {changed}: {_first(error)}; change or remove"
            raise QuietvitError(f"{problem} that argument.") from error
        raise QuietvitError(f"{_unreadable(source, 'config.json', error)}") from error
    return raw, config


def _unreadable(source: str, what: str, error: Exception) -> str:
    if Path(source).is_dir():
        return (
            f"{what} in {source} could not be read for a transformers model that needs no code of "
            f"its own: {_first(error)}; save it again with save_pretrained()."
        )
    return (
        f"{source!r} is not a folder here, and loading {what} from the Hugging Face hub failed: "
        f"{_first(error)}; check the name and the connection, or download it on another machine "
        "and give the folder: hf:/path/to/folder."
    )


def _first(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _check(changes: Mapping[str, Any], raw: Mapping[str, Any], config: Any, source: str) -> None:
    known = {*raw, *config.to_dict(), "image_size"} - set(_OWNED)
    for key in changes:
        if key in _OWNED:
            raise QuietvitError(f"model.kwargs.{key} is not allowed; set {_OWNED[key]} instead.")
        if key not in known:
            raise QuietvitError(
                f"the config of {source} has no key {key!r}{nearest(key, known)}; model.kwargs of "
                f"a transformers model are keys of its {type(config).__name__}."
            )


def _built(kind: _Kind, source: str, config: Any) -> nn.Module:
    try:
        auto = getattr(_transformers(), kind.auto)
        model: nn.Module = auto.from_config(config, dtype=torch.float32, **_REMOTE)
    except Exception as error:
        encoder = " To quantize an encoder, give 0 classes." if kind is CLASSIFIER else ""
        raise QuietvitError(
            f"{source} is not an {kind.name} that transformers can build from its config: "
            f"{_first(error)}; give the folder of a {kind.examples} or the like.{encoder}"
        ) from error
    return model


def _without_weights(source: str) -> bool:
    """Whether a folder holds no weights. Raises QuietvitError if it holds only pickled ones."""
    path = Path(source)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return False
    pickled = [
        f.name for f in sorted(path.iterdir()) if f.suffix in (".bin", ".pt", ".h5", ".ckpt")
    ]
    if pickled:
        raise QuietvitError(
            f"{source} holds its weights as {pickled[0]} and not as safetensors; load it where you "
            "trust it and write it again with save_pretrained()."
        )
    return True


def _pretrained(kind: _Kind, source: str, config: Any) -> dict[str, Tensor]:
    """Read the weights under this transformers' names, with the size and classes of ``config``."""
    try:
        with _without_bars():
            model, info = getattr(_transformers(), kind.auto).from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **_local(source),
            )
    except Exception as error:
        raise QuietvitError(_unreadable(source, "the weights", error)) from error
    missing = sorted(info["missing_keys"])
    state: dict[str, Tensor] = model.state_dict()
    if kind is ENCODER and missing and all(key.startswith(_POOLER) for key in missing):
        return {key: value for key, value in state.items() if key not in missing}
    lacking = [key for key in missing if kind is ENCODER or not _of_head(key)]
    if lacking:
        raise QuietvitError(
            f"{source} lacks the weights {', '.join(lacking[:3])} ({len(lacking)} in all) of a "
            f"{type(model).__name__}; give the folder of such a model."
        )
    if missing:
        logger.warning(
            "%s has no head: '%s' starts anew, so its classes mean nothing before training. To "
            "quantize the encoder alone, give 0 classes.",
            source,
            missing[0].rpartition(".")[0],
        )
    if info["unexpected_keys"]:
        extra = sorted(info["unexpected_keys"])
        logger.warning("%s: %d weights are not used (first %s).", source, len(extra), extra[0])
    return state


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' bars; reading a local file takes a moment."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _of_head(key: str) -> bool:
    return "classifier" in key or "class_embed" in key or key.startswith(("head.", "fc."))


def _load(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    problems = differences(model.state_dict(), state)
    if problems:
        raise QuietvitError(
            f"{source} cannot be loaded into {type(model).__name__} as built here: "
            f"{shown(problems)}. Give the folder, arguments and transformers version that saved "
            "the weights."
        )
    model.load_state_dict(state, strict=True)


def _preprocessing(transformers: Any, source: str, config: Any) -> dict[str, Any]:
    """Translate the folder's image processor into timm's data config."""
    path = Path(source)
    if path.is_dir() and not (path / "preprocessor_config.json").is_file():
        logger.warning(
            "%s holds no preprocessor_config.json: images are resized without a crop and "
            "normalized by ImageNet's mean and std; set model.preprocessing if that is wrong.",
            source,
        )
        return {
            "input_size": input_size_of(config),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
    processor, settings = _processor(transformers, source)
    translated = translated_preprocessing(settings, input_size_of(config), source)
    check_translation(processor, translated, source)
    return translated


def _processor(transformers: Any, source: str) -> tuple[Any, dict[str, Any]]:
    """Return the folder's image processor and its settings."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source, **_local(source))
        return processor, json.loads(processor.to_json_string())
    except Exception as error:
        raise QuietvitError(_unreadable(source, "preprocessor_config.json", error)) from error
