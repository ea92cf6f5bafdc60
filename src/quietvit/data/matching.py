"""The classes of a data set as the numbers a model gives them, found by their names.

Where the names come from is in ``folder``, ``table``, ``shards`` and ``hub``, and in ``classes``.
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
    """Return ``dataset`` with labels that are the numbers of ``owner``'s ``count`` classes.

    Where both sides have names, a class is found by its name, and a log line says so unless both
    have the same names in the same order. Names of ImageNet are found by their WordNet id as well.
    Where one side has no names, labels stay; a warning then tells of unequal numbers of classes.

    Args:
        names: of the classes of ``owner``, in the order of its logits; None if unknown.
        count: how many classes ``owner`` tells apart.

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
    """Return what to index by the labels of a loader's batches to get a model's class numbers.

    None: labels are these numbers already, as far as can be known. The data set is the
    ``loader.dataset``, in any wrapping; ``classes`` of torchvision's data sets count as names.
    ``names``, ``count`` and errors: see ``matched``.
    """
    data: Any = getattr(loader, "dataset", None)
    while hasattr(data, "dataset"):
        data = data.dataset
    if isinstance(data, ImageDataset):
        own, total, labels, name = data.class_names, data.num_classes, data.labels, data.name
    else:
        own = getattr(data, "classes", None)
        if not isinstance(own, list | tuple) or not all(isinstance(one, str) for one in own):
            return None
        total, name = len(own), type(data).__name__
        labels = np.asarray(getattr(data, "targets", range(total)), dtype=np.int64)
    table = _numbers(own, total, np.unique(labels), names, count, name, "the model")
    return None if table is None else torch.from_numpy(table)


def in_words(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as people read them: WordNet ids of ImageNet-1k in words, others as is."""
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
    """The number with ``owner`` of each of the ``total`` classes, -1 where it has none, (total,).

    None where each class has its own number there. ``present``: the labels that occur.
    """
    if own is None or names is None:
        _compare_counts(total, present, count, data, owner)
        return None
    if tuple(own) == tuple(names):
        return None
    found = _found(own, names)
    missing = [own[label] for label in present if found[label] < 0]
    if missing:
        told = "; ".join(f"{name!r}{nearest(name, names)}" for name in missing[:_SHOWN])
        more = f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise QuietvitError(
            f"{data} has images of {len(missing)} classes that {owner} does not know by these "
            f"names: {told}{more}. It knows {count}: {_listed(names)}. Give the classes the names "
            "that are used there (rename the folders), or leave their images out."
        )
    used = found[present]
    if len(np.unique(used)) < len(used):
        first = next(int(place) for place in used if (used == place).sum() > 1)
        both = [own[label] for label in present if found[label] == first]
        raise QuietvitError(
            f"{data} has several classes that all are {names[first]!r} with {owner}: "
            f"{_listed(both)}. Put their images into one class."
        )
    if np.array_equal(found[present], present):
        return None
    logger.warning(
        "%s: its classes are found by name: images of %d of the %d classes of %s.",
        data, len(present), count, owner,
    )  # fmt: skip
    return found


def _compare_counts(total: int, present: np.ndarray, count: int, data: str, owner: str) -> None:
    beyond = present[present >= count]
    if len(beyond):
        raise QuietvitError(
            f"{data} has the label {int(beyond[-1])}, and {owner} tells only {count} classes apart "
            f"(0..{count - 1}). Names to match the classes by are not known on both sides. Take "
            "data of the classes it was trained on."
        )
    if total != count:
        logger.warning(
            "%s has %d classes, and %s tells %d apart. Names to match them by are not known on "
            "both sides, so label 0 is taken for its class 0, label 1 for its class 1, and so on. "
            "If that is wrong, so is the accuracy.", data, total, owner, count,
        )  # fmt: skip


def _found(own: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """The place of each of ``own`` among ``names``, -1 where it is not found or not unique."""
    found = np.full(len(own), -1, np.int64)
    for spelling in (_exact, _alike, _imagenet):
        places: dict[str, int] = {}
        for place, keys in enumerate(spelling(names)):
            for key in keys:
                places[key] = place if places.get(key, place) == place else -1
        for label, keys in enumerate(spelling(own)):
            hits = [places[key] for key in keys if places.get(key, -1) >= 0]
            if found[label] < 0 and hits:
                found[label] = hits[0]
        if (found >= 0).all():
            break
    return found


def _exact(names: Sequence[str]) -> list[list[str]]:
    return [[name] for name in names]


def _alike(names: Sequence[str]) -> list[list[str]]:
    """Upper and lower case, blanks, hyphens and underlines make no difference."""
    return [[_plain(name)] for name in names]


def _imagenet(names: Sequence[str]) -> list[list[str]]:
    """The WordNet id of each name of ImageNet-1k: of an id, of all its words, of one synonym."""
    ids, words, synonyms = _wordnet()
    if tuple(names) == tuple(ids.values()):  # two classes are called "crane"
        return [[wnid] for wnid in ids]
    found = []
    for name in names:
        plain = _plain(name)
        known = [plain] if plain in ids else words.get(plain, synonyms.get(plain, []))
        found.append(known if len(known) == 1 else [])
    return found


@cache
def _wordnet() -> tuple[dict[str, str], dict[str, list[str]], dict[str, list[str]]]:
    """ImageNet-1k's words by WordNet id; the ids of all words of a class, and of each synonym."""
    from timm.data.imagenet_info import ImageNetInfo

    ids: Any = ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
    words: dict[str, list[str]] = {}
    synonyms: dict[str, list[str]] = {}
    for wnid, description in ids.items():
        words.setdefault(_plain(description), []).append(wnid)
        for part in dict.fromkeys(map(_plain, description.split(","))):
            synonyms.setdefault(part, []).append(wnid)
    return ids, words, synonyms


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown}, ..."
