"""Find class names beside numeric labels: in a table's columns and metadata, in samples' JSON.

``table`` and ``shards`` read rows and images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

logger = logging.getLogger("quietvit")

COLUMNS = ("label_name", "class_name", "label_text")
"""Table columns, and JSON keys in a shard, that may hold the name of an image's class."""


class NamesByLabel:
    """Collects label -> name from single images, and detects labels with two names."""

    def __init__(self, pairs: Iterable[tuple[int, str]] = ()) -> None:
        self.names: dict[int, str] = {}
        self.conflict: tuple[int, str, str] | None = None
        for label, name in pairs:
            self.add(label, name)

    def add(self, label: int, name: str) -> None:
        """Add one image's label and class name."""
        if self.names.setdefault(label, name) != name and self.conflict is None:
            self.conflict = label, self.names[label], name

    def tuple(self, where: str) -> tuple[str, ...] | None:
        """Return the names in order of the labels; None if there are none or they conflict."""
        if self.conflict is not None:
            label, one, other = self.conflict
            logger.warning(
                "%s has two names for the class of label %d, %r and %r: its names are not used.",
                where, label, one, other,
            )  # fmt: skip
            return None
        if not self.names:
            return None
        return tuple(self.names.get(i, f"class {i}") for i in range(max(self.names) + 1))


class DictionaryLabels:
    """Numbers labels that are stored as dictionaries of names, equally in all files of a table."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def numbers(self, column: Any) -> np.ndarray:
        """Return the labels (N,) of a column without nulls; each new name gets the next number."""
        parts = [np.zeros(0, np.int64)]
        for chunk in column.chunks:
            own = [str(name) for name in chunk.dictionary.to_pylist()]
            self.names += [name for name in dict.fromkeys(own) if name not in self.names]
            places = np.array([self.names.index(name) for name in own], np.int64)
            parts.append(places[chunk.indices.to_numpy(zero_copy_only=False)])
        return np.concatenate(parts)


def is_dictionary(kind: Any) -> bool:
    """Whether a column's type is a dictionary of strings."""
    import pyarrow as pa

    return bool(pa.types.is_dictionary(kind)) and _is_text(kind.value_type)


def names_in_metadata(schema: Any) -> tuple[str, ...] | None:
    """Return the names of the ``ClassLabel`` that Hugging Face's datasets stores in a file."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = noted["info"]["features"]["label"]
        names = feature["names"] if feature.get("_type") == "ClassLabel" else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return tuple(map(str, names)) if names else None


def names_column(schema: Any) -> str | None:
    """Return the text column that may hold the class names, or None."""
    return next((n for n in COLUMNS if n in schema.names and _is_text(schema.field(n).type)), None)


def pairs_of(labels: Any, names: Any) -> list[tuple[int, str]]:
    """Return the distinct (label, name) pairs of two columns, sorted."""
    import pyarrow as pa

    if pa.types.is_dictionary(names.type):
        names = names.cast(names.type.value_type)
    distinct = pa.table({"label": labels, "name": names}).group_by(["label", "name"]).aggregate([])
    pairs = zip(distinct["label"].to_pylist(), distinct["name"].to_pylist(), strict=True)
    return sorted((int(label), str(name)) for label, name in pairs if name is not None)


def name_in_json(content: Mapping[str, Any]) -> str | None:
    """Return the class name in the JSON of a sample, or None."""
    values = [content.get(key) for key in COLUMNS]
    return next((value for value in values if isinstance(value, str)), None)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
