"""Signatures and help pages that a reader understands: of pydantic configs and of plain classes.

Only what ``inspect.signature`` and ``help`` show is changed here; validation is not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

if TYPE_CHECKING:  # pydantic exports its metaclass under no public name
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class PlainText(str):
    """An annotation that is shown without quotes: ``lr: float``, not ``lr: 'float'``."""

    def __repr__(self) -> str:
        return str(self)


class _PublicNames(ModelMetaclass):
    """Hides the inside of pydantic from ``dir(cls)``, and so from ``help(cls)``."""

    def __dir__(self) -> list[str]:
        own = [base for base in self.__mro__ if base not in BaseModel.__mro__]
        names = {name for base in own for name in vars(base) if not name.startswith("_")}
        return sorted(names - {"model_config"})


class ReadableModel(BaseModel, metaclass=_PublicNames):
    """A pydantic model whose signature shows plain types and whose docstring lists its fields.

    A subclass says what a field means by a docstring below the field, or by
    ``Field(description=...)``. Limits such as ``ge=0`` are listed without being told again::

        class TweoConfig(ReadableModel, use_attribute_docstrings=True):
            strength: Annotated[float, Field(ge=0)] = 0.01
            '''Factor of the penalty in the loss.'''

        TweoConfig(*, strength: float = 0.01)
        Fields:
            strength: float = 0.01 (>= 0)
                Factor of the penalty in the loss.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.__signature__ = _with_types(
            inspect.signature(cls), lambda name: cls.model_fields[name].annotation
        )
        own = inspect.cleandoc(vars(cls).get("__doc__") or "")
        cls.__doc__ = "\n\n".join(filter(None, (own, _fields_text(cls))))


def show_plain_types(cls: type) -> None:
    """Let the signature of a class show the annotations of its ``__init__`` without quotes."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    own = list(signature.parameters.values())[1:]
    plain = _with_types(
        signature.replace(parameters=own, return_annotation=inspect.Signature.empty),
        lambda name: signature.parameters[name].annotation,
    )
    cls.__signature__ = plain  # type: ignore[attr-defined]


def type_text(annotation: Any) -> str:
    """Return a type as one writes it, without the metadata of ``Annotated``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, str):
        return annotation
    if annotation in (None, NoneType):
        return "None"
    if annotation is Ellipsis:
        return "..."
    if isinstance(annotation, list | tuple):  # the parameters of a Callable
        return f"[{', '.join(map(type_text, annotation))}]"
    if origin is Annotated:
        return type_text(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(type_text, arguments)))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    name = getattr(annotation, "__name__", None) or str(annotation).removeprefix("typing.")
    if arguments and origin is not None:
        return f"{name.partition('[')[0]}[{', '.join(map(type_text, arguments))}]"
    return name


def _with_types(
    signature: inspect.Signature, annotation_of: Callable[[str], Any]
) -> inspect.Signature:
    def shown(parameter: inspect.Parameter) -> inspect.Parameter:
        if parameter.annotation is parameter.empty:
            return parameter
        return parameter.replace(annotation=PlainText(type_text(annotation_of(parameter.name))))

    return signature.replace(parameters=[shown(each) for each in signature.parameters.values()])


def _fields_text(cls: type[BaseModel]) -> str:
    """The section ``Fields:`` of a docstring."""
    lines = ["Fields:"]
    for name, field in cls.model_fields.items():
        lines.append(f"    {name}: {type_text(field.annotation)}{_default(field)}")
        if field.description:
            lines += [f"        {line}" for line in field.description.splitlines()]
    return "\n".join(lines) if len(lines) > 1 else ""


def _default(field: FieldInfo) -> str:
    """The default of a field as ``= 0.01``, and its limits as ``(>= 0)``."""
    default = field.default
    is_empty = isinstance(default, BaseModel) and default == type(default).model_construct()
    shown = f"{type(default).__name__}()" if is_empty else repr(default)
    if field.default_factory is not None:
        shown = "..."
    limits = [
        f"{sign} {getattr(limit, key):g}"
        for limit in field.metadata
        for key, sign in _LIMITS.items()
        if isinstance(getattr(limit, key, None), int | float)
    ]
    stated = "" if field.is_required() else f" = {shown}"
    return stated + (f" ({', '.join(limits)})" if limits else "")
