"""The penalties of ordered pairs by name: ``energy``, and the others, which are for research."""

from __future__ import annotations

from quietvit.decay.energy import Energy
from quietvit.decay.other_penalties import Cosine, Peak, Top
from quietvit.decay.penalty import Basis, Operator, Penalty
from quietvit.errors import QuietvitError, nearest

__all__ = [
    "PENALTIES",
    "Basis",
    "Cosine",
    "Energy",
    "Operator",
    "Peak",
    "Penalty",
    "Top",
    "penalty_named",
]

PENALTIES: dict[str, type[Penalty]] = {kind.name: kind for kind in (Energy, Peak, Cosine, Top)}


def penalty_named(penalty: str | Penalty) -> Penalty:
    """Return the penalty of this name, or ``penalty`` itself. Unknown names raise QuietvitError."""
    if isinstance(penalty, Penalty):
        return penalty
    if penalty not in PENALTIES:
        raise QuietvitError(
            f"penalty {penalty!r} is unknown{nearest(str(penalty), PENALTIES)}; known: "
            f"{', '.join(PENALTIES)}."
        )
    return PENALTIES[penalty]()
