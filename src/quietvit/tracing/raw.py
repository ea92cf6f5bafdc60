"""What the recorder stores about a pass, before roles and names are known.

``trace`` turns these records into the public ones of ``sites``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from quietvit.tracing.labels import Heads, Value
from quietvit.tracing.places import Place
from quietvit.tracing.weights import WeightView


@dataclass
class Record:
    """One call that is a site, without its tensors.

    ``key``: "family:after:ordinal", from its place. ``parameter``: the name of the parameter that
    contains its weight or gain. ``weight``: the view of that part; None if it is not a matrix.
    ``found``: the model returns its output as boxes, or beside boxes (scores, masks).
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
    found: bool = False


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: the records from ``start`` to before ``end`` were made inside.

    ``origin``: the sites that its first output comes from. ``from_constant``: one of its inputs
    does not depend on the model's input, and has the shape of that output. ``from_input``: one of
    its inputs is the model's input, and has as many entries as that output.
    """

    path: str
    start: int
    end: int
    origin: frozenset[str]
    from_constant: bool
    from_input: bool


@dataclass(frozen=True)
class RawLink:
    """Channels of ``source`` that reach the input columns of ``consumer``.

    A source that arrives in several factors of a product has one link for each. ``partial``: some
    positions carry no channel. An attention output whose columns have no single channel gets NONE
    for all, and an extra step: "scrambled" if the channels differ between tokens, "added" if other
    channels were added.
    """

    source: str
    consumer: str
    columns: Tensor
    through: tuple[str, ...]
    partial: bool


@dataclass(frozen=True)
class ScoreLink:
    """Output channels of two sources that multiply in the scores at ``site``, for each head."""

    site: str
    query: str
    key: str
    heads: Heads
    through: tuple[str, ...]
