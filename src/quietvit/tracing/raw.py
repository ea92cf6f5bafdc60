"""What the recorder notes of a pass, before roles and names are known.

What the notes mean for a user is decided in ``trace``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from quietvit.tracing.labels import Heads, Value
from quietvit.tracing.places import Place
from quietvit.tracing.weights import WeightView


@dataclass
class Record:
    """One call that is a site: everything the trace keeps of it, no tensors.

    ``parameter`` is the name of the parameter that its weight or gain is a part of, ``weight`` the
    view of that part, None if it is no matrix.
    """

    key: str
    kind: str
    function: str
    module: str
    place: Place
    inputs: list[Value]
    shapes: list[tuple[int, ...]]
    output_shape: tuple[int, ...]
    macs: int
    parameter: str | None = None
    weight: WeightView | None = None
    weight_shape: tuple[int, ...] | None = None
    feeds: set[str] = field(default_factory=set)
    has_scale: bool = False


@dataclass(frozen=True)
class RawLink:
    """Channels of ``source`` that reach the input columns of ``consumer``.

    A source that arrives in several factors of a product has one link for each. ``partial``: some
    positions carry no channel. Values of an attention carry none and pass "scrambled" where their
    channels lie in other columns at other tokens, "added" where other channels were added to them.
    """

    source: str
    consumer: str
    columns: Tensor
    through: tuple[str, ...]
    partial: bool


@dataclass(frozen=True)
class ScoreLink:
    """Output channels of two sources that meet in the scores at ``site``, head by head."""

    site: str
    query: str
    key: str
    heads: Heads
    through: tuple[str, ...]
