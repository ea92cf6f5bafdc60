"""Read a model's output: its tensors by path, and the logits of a classifier.

``deployment`` decides which tensor is exported, and callers decide what to do with logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from quietvit.errors import QuietvitError

LOGITS = "logits"


def tensors_of(output: Any) -> dict[str, Tensor]:
    """Return the tensors in a model's output by path: names and indices joined by dots.

    Example: ``{"boxes": [x, y]}`` gives "boxes.0" and "boxes.1". A lone tensor has the path "".
    """
    return dict(_walked(output, ""))


def heads(output: Any) -> tuple[Tensor, ...]:
    """Return the logits (B, classes) of each head of a classifier; shapes are not checked.

    They are the entry or attribute ``logits`` of the output. Otherwise they are the output itself:
    one tensor, or a tuple or list with one for each head (a distilled DeiT in training).

    Raises:
        QuietvitError: the output has neither form.
    """
    tensors = tensors_of(output)
    named = [x for path, x in tensors.items() if path.partition(".")[0] == LOGITS]
    if named:
        return tuple(named)
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, tuple | list) and output and all(isinstance(x, Tensor) for x in output):
        return tuple(output)
    names = f" with {', '.join(tensors)}" if tensors else ""
    raise QuietvitError(
        f"the model returned {type(output).__name__}{names}, not logits of shape (batch, classes). "
        "Wrap it so that it returns one tensor, or name one 'logits'."
    )


def logits_of(output: Any) -> Tensor:
    """Return the logits (B, classes) of a classifier with one head, in any form of ``heads``.

    Raises:
        QuietvitError: there are several heads, or the logits are not 2-D.
    """
    tensors = heads(output)
    if len(tensors) == 1 and tensors[0].ndim == 2:
        return tensors[0]
    shown = ", ".join(str(tuple(x.shape)) for x in tensors)
    raise QuietvitError(
        f"the model returned {shown}, not logits of shape (batch, classes) of one head. Give a "
        "classifier."
    )


def _walked(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    items: Any = ()
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif isinstance(getattr(value, "tensors", None), Mapping):  # detections, boxes not decoded
        items = value.tensors.items()
    elif dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif hasattr(value, LOGITS):
        items = [(LOGITS, getattr(value, LOGITS))]
    for key, inner in items:
        yield from _walked(inner, f"{path}.{key}" if path else str(key))
