"""Names of a model's classes. Their one place is the attribute ``class_names`` of the model.

Where a data set has its names from is the matter of ``data``, as is the comparison of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quietvit.errors import QuietvitError

KEY = "class_names"
"""The key of the names in every file that holds them: a run, a .qvit, a weights file."""
_UNSAID = object()


def name_classes(model: Any, names: Sequence[str] | None) -> None:
    """Say how the classes of ``model`` are called, in the order of its logits.

    The names go with copies of the model, into a saved .qvit and into exported files. None says
    that nobody knows them: then ImageNet's names are not presumed either.

    Raises:
        QuietvitError: the model tells another number of classes apart.
    """
    setattr(model, KEY, None if names is None else checked_names(model, names))


def checked_names(model: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names. Raises QuietvitError where ``model`` has another number of classes."""
    named, count = tuple(map(str, names)), class_count(model)
    if count is not None and count != len(named):
        raise QuietvitError(
            f"{len(named)} names were given for the {count} classes of {type(model).__name__}; "
            "give one name for each class, in the order of the logits."
        )
    return named


def unname_classes(model: Any) -> None:
    """Take back that nobody knows the names, for weights of another origin were loaded."""
    if getattr(model, KEY, _UNSAID) is None:
        delattr(model, KEY)


def names_of(model: Any) -> tuple[str, ...] | None:
    """Return the names of a model's classes, one for each logit; None where nobody knows them.

    They are those that ``name_classes`` gave, else those of a transformers model's config. A timm
    model of which nothing was said has the names of its pretrained configuration, which are
    ImageNet's for most, where it tells as many classes apart as that configuration says.
    """
    stated = _stated(model)
    return _presumed(model) if stated is _UNSAID else stated


def are_presumed(model: Any) -> bool:
    """Whether the names of ``model`` are those of timm's configuration, and nobody said them."""
    return _stated(model) is _UNSAID and _presumed(model) is not None


def facts_of_names(model: Any) -> dict[str, Any]:
    """Return ``{KEY: names}`` for a file about ``model``; empty where nothing was ever said."""
    stated = _stated(model)
    return {} if stated is _UNSAID else {KEY: None if stated is None else list(stated)}


def take_names(model: Any, facts: Mapping[str, Any]) -> None:
    """Name the classes of ``model`` as a file's facts do; files without the key change nothing."""
    if KEY in facts:
        name_classes(model, facts[KEY])


def metadata_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a safetensors file for ``facts_of_names``."""
    return {"format": "pt", "quietvit": json.dumps(dict(facts))}


def names_in(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the facts in the metadata of a safetensors file; empty where it is not ours."""
    try:
        found = json.loads((metadata or {}).get("quietvit", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def fitted(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Return ``count`` names: what is too many is left out, what lacks is called ``class 7``."""
    return (*names[:count], *(f"class {index}" for index in range(len(names), count)))


def _stated(model: Any) -> Any:
    """The names that were given, None where they are said to be unknown, else ``_UNSAID``."""
    model = _bare(model)
    names = getattr(model, KEY, _UNSAID)
    if names is not _UNSAID:
        return names
    named = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(named, Mapping) or not named:
        return _UNSAID
    found = tuple(str(named[key]) for key in sorted(named, key=int))
    # transformers fills in LABEL_0, LABEL_1, ... where it was given no names.
    return None if found == tuple(f"LABEL_{index}" for index in range(len(found))) else found


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
    """Return how many classes a timm or transformers model says it has; None where it does not."""
    config = getattr(model, "config", None)
    count = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
    return count if isinstance(count, int) and count > 0 else None
