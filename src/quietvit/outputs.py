"""What a model returned: its tensors by name and place, and the logits of a classifier.

Which tensor is exported is decided in ``deployment``; what is done with logits the callers decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from quietvit.errors import QuietvitError

LOGITS = "logits"


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The tensors in a model's output by their path: names and places joined by dots.

    The path of a tensor that is the whole output is empty.
    """
    return dict(_walked(output, ""))


def heads(output: Any) -> tuple[Tensor, ...]:
    """The logits (B, classes) of each head of a classifier.

    They are what the output has under the name ``logits``, as a mapping or as an object. Otherwise
    they are the output itself: one tensor, or a tuple or list with one for each head, as a
    distilled DeiT returns in training. Their shapes are not checked.

    Raises:
        QuietvitError: the output has neither.
    """
    found = tensors_of(output)
    named = [x for path, x in found.items() if path.partition(".")[0] == LOGITS]
    if named:
        return tuple(named)
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, tuple | list) and output and all(isinstance(x, Tensor) for x in output):
        return tuple(output)
    names = f" with {', '.join(found)}" if found else ""
    raise QuietvitError(
        f"the model returned {type(output).__name__}{names}, not logits of shape (batch, classes); "
        "wrap it so that it returns one tensor, or name one 'logits'."
    )


def logits_of(output: Any) -> Tensor:
    """The logits (B, classes) of a classifier of one head, in any form that ``heads`` takes.

    Raises:
        QuietvitError: there are several heads, or the shape is another.
    """
    found = heads(output)
    if len(found) == 1 and found[0].ndim == 2:
        return found[0]
    shown = ", ".join(str(tuple(x.shape)) for x in found)
    raise QuietvitError(
        f"the model returned {shown}, not logits of shape (batch, classes) of one head; a "
        "classifier is needed."
    )


def _walked(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    items: Any = ()
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif hasattr(value, LOGITS):
        items = [(LOGITS, getattr(value, LOGITS))]
    for key, inner in items:
        yield from _walked(inner, f"{path}.{key}" if path else str(key))
