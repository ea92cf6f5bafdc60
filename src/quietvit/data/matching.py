"""Map a data set's classes to a model's class numbers by their names.

The names come from ``folder``, ``table``, ``shards`` and ``hub``, and from ``classes``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quietvit.data.images import ImageDataset, relabelled
from quietvit.errors import QuietvitError, nearest

logger = logging.getLogger("quietvit")

_SHOWN = 5
_WORDNET_ID = re.compile(r"n\d{8}")


def matched(
    dataset: ImageDataset, names: Sequence[str] | None, count: int, owner: str = "the model"
) -> ImageDataset:
    """Return ``dataset`` with labels that are ``owner``'s class numbers.

    If both sides have names, classes are matched by name, and a log line says so unless the names
    are equal. ImageNet's classes match by WordNet id, too. If one side has no names, labels stay,
    and a warning reports different numbers of classes.

    Args:
        names: the names of ``owner``'s classes in the order of its logits; None if unknown.
        count: the number of ``owner``'s classes.

    Raises:
        QuietvitError: images of a class that ``owner`` does not know, or a label beyond its
            classes.
    """
    present = np.unique(dataset.labels)
    table = _numbers(
        dataset.class_names, dataset.num_classes, present, names, count, dataset.name, owner
    )
    if names is None or dataset.class_names in (None, tuple(names)):
        return dataset
    labels = dataset.labels if table is None else table[dataset.labels]
    return relabelled(dataset, labels, names)


def label_numbers(loader: Any, names: Sequence[str] | None, count: int) -> Tensor | None:
    """Return the table (classes,) from a loader's labels to a model's class numbers.

    None if the labels stay. The data set is the innermost ``loader.dataset``; torchvision's
    ``classes`` count as names. ``names``, ``count`` and errors: see ``matched``.
    """
    data: Any = getattr(loader, "dataset", None)
    while hasattr(data, "dataset"):
        data = data.dataset
    if isinstance(data, ImageDataset):
        own, total, labels, name = data.class_names, data.num_classes, data.labels, data.name
    else:
        own = getattr(data, "classes", None)
        if not isinstance(own, list | tuple) or not all(isinstance(text, str) for text in own):
            return None
        total, name = len(own), type(data).__name__
        labels = np.asarray(getattr(data, "targets", range(total)), dtype=np.int64)
    table = _numbers(own, total, np.unique(labels), names, count, name, "the model")
    return None if table is None else torch.from_numpy(table)


def in_words(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names with ImageNet-1k's WordNet ids replaced by words."""
    if not any(_WORDNET_ID.fullmatch(name) for name in names):
        return tuple(names)
    ids = _wordnet()[0]
    return tuple(ids.get(name, name) for name in names)


def _numbers(
    own: Sequence[str] | None,
    total: int,
    present: np.ndarray,
    names: Sequence[str] | None,
    count: int,
    data: str,
    owner: str,
) -> np.ndarray | None:
    """Return ``owner``'s number of each of the ``total`` classes, (total,), -1 for none.

    None if the numbers of all classes in ``present`` (the labels that occur) stay.
    """
    if own is None or names is None:
        _compare_counts(total, present, count, data, owner)
        return None
    if tuple(own) == tuple(names):
        return None
    numbers = _found(own, names)
    missing = [own[label] for label in present if numbers[label] < 0]
    if missing:
        told = "; ".join(f"{name!r}{nearest(name, names)}" for name in missing[:_SHOWN])
        more = f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise QuietvitError(
            f"{data} has images of {len(missing)} classes that {owner} does not know by these "
            f"names: {told}{more}. It knows {count}: {_listed(names)}. Rename the classes (their "
            "folders) to these names, or leave their images out."
        )
    used = numbers[present]
    if len(np.unique(used)) < len(used):
        first = next(int(place) for place in used if (used == place).sum() > 1)
        both = [own[label] for label in present if numbers[label] == first]
        raise QuietvitError(
            f"{data} has several classes that all match {names[first]!r} of {owner}: "
            f"{_listed(both)}. Put their images into one class."
        )
    if np.array_equal(numbers[present], present):
        return None
    logger.warning(
        "%s: classes are matched by name; it has images of %d of the %d classes of %s.",
        data, len(present), count, owner,
    )  # fmt: skip
    return numbers


def _compare_counts(total: int, present: np.ndarray, count: int, data: str, owner: str) -> None:
    beyond = present[present >= count]
    if len(beyond):
        raise QuietvitError(
            f"{data} has the label {int(beyond[-1])}, but {owner} has only {count} classes "
            f"(0..{count - 1}). The classes cannot be matched, because one side has no class "
            "names. Use data of the classes it was trained on."
        )
    if total != count:
        logger.warning(
            "%s has %d classes, but %s has %d. One side has no class names, so label 0 counts as "
            "class 0, label 1 as class 1, and so on. If this is wrong, the accuracy is wrong, too.",
            data, total, owner, count,
        )  # fmt: skip


def _found(own: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Return the index of each of ``own`` in ``names``; -1 if it is missing or ambiguous."""
    numbers = np.full(len(own), -1, np.int64)
    for spelling in (_exact, _alike, _imagenet):
        places: dict[str, int] = {}
        for place, keys in enumerate(spelling(names)):
            for key in keys:
                places[key] = place if places.get(key, place) == place else -1
        for label, keys in enumerate(spelling(own)):
            hits = [places[key] for key in keys if places.get(key, -1) >= 0]
            if numbers[label] < 0 and hits:
                numbers[label] = hits[0]
        if (numbers >= 0).all():
            break
    return numbers


def _exact(names: Sequence[str]) -> list[list[str]]:
    return [[name] for name in names]


def _alike(names: Sequence[str]) -> list[list[str]]:
    """Ignore case, and treat spaces, hyphens and underscores alike."""
    return [[_plain(name)] for name in names]


def _imagenet(names: Sequence[str]) -> list[list[str]]:
    """Return the WordNet id of each ImageNet-1k name: an id, a full description or a synonym."""
    ids, words, synonyms = _wordnet()
    if tuple(names) == tuple(ids.values()):  # two classes are called "crane"
        return [[wnid] for wnid in ids]
    wnids = []
    for name in names:
        plain = _plain(name)
        known = [plain] if plain in ids else words.get(plain, synonyms.get(plain, []))
        wnids.append(known if len(known) == 1 else [])
    return wnids


@cache
def _wordnet() -> tuple[dict[str, str], dict[str, list[str]], dict[str, list[str]]]:
    """Return ImageNet-1k's id -> description, full description -> ids, and synonym -> ids."""
    from timm.data.imagenet_info import ImageNetInfo

    ids: Any = ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
    words: dict[str, list[str]] = {}
    synonyms: dict[str, list[str]] = {}
    for wnid, description in ids.items():
        words.setdefault(_plain(description), []).append(wnid)
        for synonym in dict.fromkeys(map(_plain, description.split(","))):
            synonyms.setdefault(synonym, []).append(wnid)
    return ids, words, synonyms


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown}, ..."
