"""The names of a model's classes, stored in its attribute ``class_names``.

``data`` reads the names of a data set and compares them with the model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quietvit.errors import QuietvitError

KEY = "class_names"
"""The key of the names in files: of a run, a .qvit, a weights file."""
_UNSAID = object()


def name_classes(model: Any, names: Sequence[str] | None) -> None:
    """Set the class names of ``model``, in the order of its logits.

    Copies of the model, saved .qvit files and exported files keep them. None marks them as unknown,
    so that ImageNet's names are not presumed.

    Raises:
        QuietvitError: the model has another number of classes.
    """
    setattr(model, KEY, None if names is None else checked_names(model, names))


def checked_names(model: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names. Raises QuietvitError if ``model`` has another number of classes."""
    named, count = tuple(map(str, names)), class_count(model)
    if count is not None and count != len(named):
        raise QuietvitError(
            f"{len(named)} names were given for the {count} classes of {type(model).__name__}; "
            "give one name for each class, in the order of the logits."
        )
    return named


def unname_classes(model: Any) -> None:
    """Remove a mark that the names are unknown, after loading weights of another origin."""
    if getattr(model, KEY, _UNSAID) is None:
        delattr(model, KEY)


def names_of(model: Any) -> tuple[str, ...] | None:
    """Return the names of a model's classes, one per logit, or None if they are unknown.

    Sources, in this order: ``name_classes``; the config of a transformers model; the pretrained
    configuration of a timm model (mostly ImageNet's names), if it has as many classes.
    """
    stated = _stated(model)
    return _presumed(model) if stated is _UNSAID else stated


def are_presumed(model: Any) -> bool:
    """Whether the names of ``model`` are only presumed, from timm's pretrained configuration."""
    return _stated(model) is _UNSAID and _presumed(model) is not None


def facts_of_names(model: Any) -> dict[str, Any]:
    """Return ``{KEY: names}`` for a file about ``model``; empty if no names were ever given."""
    stated = _stated(model)
    return {} if stated is _UNSAID else {KEY: None if stated is None else list(stated)}


def take_names(model: Any, facts: Mapping[str, Any]) -> None:
    """Set the class names from the facts of a file. Facts without the key change nothing."""
    if KEY in facts:
        name_classes(model, facts[KEY])


def metadata_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return ``facts_of_names`` as the metadata of a safetensors file."""
    return {"format": "pt", "quietvit": json.dumps(dict(facts))}


def names_in(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the facts in the metadata of a safetensors file; empty if quietvit wrote none."""
    try:
        content = json.loads((metadata or {}).get("quietvit", "{}"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def fitted(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Return ``count`` names: cut ``names``, or add names such as ``class 7``."""
    return (*names[:count], *(f"class {index}" for index in range(len(names), count)))


def _stated(model: Any) -> Any:
    """Return the given names, None if they are marked as unknown, or ``_UNSAID``."""
    model = _bare(model)
    names = getattr(model, KEY, _UNSAID)
    if names is not _UNSAID:
        return names
    named = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(named, Mapping) or not named:
        return _UNSAID
    stated = tuple(str(named[key]) for key in sorted(named, key=int))
    # transformers fills in LABEL_0, LABEL_1, ... if it was given no names.
    return None if stated == tuple(f"LABEL_{index}" for index in range(len(stated))) else stated


def _presumed(model: Any) -> tuple[str, ...] | None:
    model = _bare(model)
    config = getattr(model, "pretrained_cfg", None)
    count = getattr(model, "num_classes", None)
    if not isinstance(config, dict) or not count or config.get("num_classes") != count:
        return None
    named = config.get("label_names")
    if named:
        return tuple(named) if len(named) == count else None
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    return None if subset is None else tuple(ImageNetInfo(subset).label_descriptions())


def _bare(model: Any) -> Any:
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    return model.module if isinstance(model, DataParallel | DistributedDataParallel) else model


def class_count(model: Any) -> int | None:
    """Return the number of classes of a timm or transformers model, or None if unknown."""
    config = getattr(model, "config", None)
    count = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
    return count if isinstance(count, int) and count > 0 else None
