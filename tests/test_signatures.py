"""What ``help`` and ``inspect.signature`` show of configs, methods and regularizers."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from quietvit.signatures import ReadableModel, show_plain_types, type_text


def _int(value: Any) -> Any:
    return int(value)


class Small(ReadableModel, use_attribute_docstrings=True):
    """A small config. Source: here."""

    bits: Annotated[int | None, BeforeValidator(_int)] = 8
    """Bits of the weights."""
    rate: float = Field(default=0.5, gt=0, le=1, description="Share of the channels.")
    names: tuple[str, ...] = ()

    def use(self) -> None:
        """Use it."""


class Nested(Small):
    """Another config."""

    small: Small = Small()
    kind: Literal["a", "b"]


def test_signature_shows_plain_types() -> None:
    shown = str(inspect.signature(Nested))
    assert shown.startswith("(*, bits: int | None = 8, rate: float = 0.5, names: tuple[str, ...]")
    assert "kind: Literal['a', 'b']" in shown
    assert "Validator" not in shown


def test_help_lists_fields_and_nothing_of_pydantic() -> None:
    page = pydoc.render_doc(Nested, renderer=pydoc.plaintext)
    assert "Another config." in page
    assert "A small config" not in page
    assert "bits: int | None = 8\n |          Bits of the weights." in page
    assert "rate: float = 0.5 (> 0, <= 1)\n |          Share of the channels." in page
    assert "small: Small = Small()" in page
    assert "Use it." in page
    assert "pydantic_" not in page
    assert "model_dump" not in page


def test_validation_stays() -> None:
    assert Nested(bits="4", kind="a").bits == 4  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Nested(rate=2.0, kind="a")


def test_plain_class() -> None:
    class Plain:
        def __init__(self, model: Any, *, strength: float | dict[str, float] = 1.0) -> None: ...

    show_plain_types(Plain)
    assert str(inspect.signature(Plain)) == (
        "(model: Any, *, strength: float | dict[str, float] = 1.0)"
    )


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Optional[int], "int | None"),  # noqa: UP045
        (dict[str, Annotated[int | None, "hidden"]], "dict[str, int | None]"),
        (Callable[[int], BaseModel], "Callable[[int], BaseModel]"),
        (Callable[..., Any], "Callable[..., Any]"),
        (type[Small], "type[Small]"),
    ],
)
def test_type_text(annotation: Any, text: str) -> None:
    assert type_text(annotation) == text
