"""The base of every part of a configuration: what all of them refuse.

Each part says which keys it has. ``train.recipe`` explains mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from quietvit.signatures import ReadableModel


class Section(ReadableModel):
    """Frozen, with finite numbers and no unknown keys.

    ``true`` is refused where a number is expected; pydantic alone would take it for 1. Where a
    whole section is optional, ``false`` leaves it out, as ``none`` does.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        parts = list(_parts(cls.model_fields[info.field_name or ""].annotation))
        if bool in parts or Any in parts:
            return value
        optional = NoneType in parts
        off = "; none leaves it out" if optional else ""
        section = next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)
        if section is not None:
            if optional and (value is None or value is False):
                return None
            if not isinstance(value, Mapping | BaseModel):
                key = f"{info.field_name}.{next(iter(section.model_fields))}"
                raise ValueError(f"this is a section; set its keys, such as {key}{off}")
            return value
        values = [value]
        if isinstance(value, Mapping | list | tuple):
            values = list(value.values() if isinstance(value, Mapping) else value)
        truth = next((entry for entry in values if isinstance(entry, bool)), None)
        if truth is not None:
            raise ValueError(f"give a value, not {str(truth).lower()}{off}")
        return value


def low_to_high(ends: tuple[float, float]) -> tuple[float, float]:
    """Return the ends of a range. Raises ValueError, for a validator, if the higher comes first."""
    if ends[0] > ends[1]:
        raise ValueError(f"the lower number comes first; write [{ends[1]:g}, {ends[0]:g}]")
    return ends


def _parts(annotation: Any) -> Iterator[Any]:
    """A type and, of a union or container, all that are in it."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
