"""Registries of classes that saved models refer to by name: quantizers and adjustments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from quietvit.errors import QuietvitError, nearest

C = TypeVar("C", bound=type[Any])


def registering(table: dict[str, Any], name: str, what: str) -> Callable[[C], C]:
    """Class decorator: put a class into ``table`` under ``name`` and set ``cls.kind``."""

    def add(cls: C) -> C:
        if name in table and table[name] is not cls:
            raise QuietvitError(f"{what} named {name!r} is registered already; choose another")
        cls.kind = name
        table[name] = cls
        return cls

    return add


def rebuild(table: dict[str, Any], kind: str, config: dict[str, Any], what: str) -> Any:
    """Rebuild the object of ``kind`` and ``config()``. Raises QuietvitError for an unknown kind."""
    if kind not in table:
        raise QuietvitError(f"unknown {what} {kind!r}{nearest(kind, table)}")
    return table[kind].from_config(config)
