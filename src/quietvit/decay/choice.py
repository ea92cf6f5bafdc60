"""Which pairs a regularizer acts on, and how strongly by kind.

How pairs are found is in ``quietvit.pairs``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from quietvit.errors import QuietvitError, nearest
from quietvit.pairs import DEFAULT_KINDS, MatrixPair, find_pairs
from quietvit.pairs.pair import ADAPTED, COMPUTED

logger = logging.getLogger("quietvit")


def chosen_pairs(
    owner: str,
    model: nn.Module,
    example: Any,
    kinds: Sequence[str] | None,
    pairs: Sequence[MatrixPair] | None,
    *,
    fold_gains: bool = False,
    scheduled: Collection[str] = (),
) -> tuple[MatrixPair, ...]:
    """Return the pairs of ``kinds``: among ``pairs`` if given, else found in the model.

    Log lines name weights that cannot be in a pair, and kinds without a pair.

    Args:
        owner: how messages call the regularizer.
        example: input for ``find_pairs``; needed unless ``pairs`` is given.
        kinds: None means all of ``pairs``, or ``DEFAULT_KINDS`` of the model.
        fold_gains: as in ``find_pairs``; refused with ``pairs``.
        scheduled: further kinds that the user named, by a schedule.

    Raises:
        QuietvitError: no kind or no pair is left, or neither an example nor pairs are given.
    """
    if isinstance(kinds, str):
        raise QuietvitError(f"kinds={kinds!r}: give a sequence of kinds, such as ({kinds!r},).")
    if kinds is not None and not kinds:
        raise QuietvitError(f"{owner}: kinds={kinds}: no kind is left; give at least one.")
    if pairs is None:
        if example is None:
            raise QuietvitError(
                f"{owner} needs an example input to find the pairs (one image is enough), or "
                "pairs=..."
            )
        wanted = tuple(kinds or DEFAULT_KINDS)
        result = find_pairs(model, example, kinds=wanted, fold_gains=fold_gains)
        warn_of_left_out(owner, [s for s in result.skipped if s[1] in (COMPUTED, ADAPTED)])
        _warn_of_unused_kinds(owner, (*(kinds or ()), *scheduled), result)
        return tuple(result)
    if fold_gains:
        raise QuietvitError(
            f"{owner}: fold_gains is for pairs that are found, and pairs are given; give "
            "find_pairs(model, example, fold_gains=True), or leave pairs out."
        )
    have = sorted({pair.kind for pair in pairs})
    for kind in kinds or ():
        if have and kind not in have:
            raise QuietvitError(
                f"no pair is of kind {kind!r}{nearest(kind, have)}; the pairs given are of {have}."
            )
    chosen = tuple(pair for pair in pairs if kinds is None or pair.kind in kinds)
    if not chosen:
        raise QuietvitError("no pairs: give at least one MatrixPair, or pairs=None.")
    return chosen


def warn_of_left_out(owner: str, left: Sequence[tuple[str, str]]) -> None:
    """Warn of layers or pairs that ``owner`` cannot act on: (name, reason) of each."""
    if not left:
        return
    name, reason = left[0]
    logger.warning(
        "%s leaves out, or sees in part, %d layers or pairs whose weight is no parameter or "
        "not the whole map (first %s: %s). To include them, remove parametrizations and merge "
        "adapters before you build it.",
        owner,
        len(left),
        name,
        reason,
    )


def _warn_of_unused_kinds(owner: str, kinds: Sequence[str], result: Sequence[MatrixPair]) -> None:
    """Warn of ``kinds`` that the user named and that have no pair."""
    have = dict.fromkeys(pair.kind for pair in result)
    without = [kind for kind in dict.fromkeys(kinds) if kind not in have]
    if without:
        logger.warning(
            "%s acts on no pair of kind %s, only of %s, so what is given for it does nothing. "
            "Remove it, or look with find_pairs(model, example, kinds=...) what the model has.",
            owner,
            ", ".join(without),
            ", ".join(have),
        )


def asked_kinds(
    kinds: Sequence[str] | None, strength: float | Mapping[str, float]
) -> Sequence[str] | None:
    """Return the kinds whose strength is not 0, or None for the default kinds.

    Raises QuietvitError if a kind has no strength, or if no kind is left.
    """
    if isinstance(strength, float) or isinstance(kinds, str):
        return kinds
    for kind in kinds or ():
        if kind not in strength:
            raise QuietvitError(
                f"kind {kind!r} has no strength{nearest(kind, strength)}; strength is given for "
                f"{sorted(strength)}."
            )
    left = [kind for kind in (strength if kinds is None else kinds) if strength[kind] > 0]
    if not left:
        raise QuietvitError(
            f"strength={strength}, kinds={kinds}: no kind is left. Give one a strength above 0."
        )
    return left


def checked_strength(strength: float | Mapping[str, float]) -> float | dict[str, float]:
    """Return the strength as a float, or as a dict of floats. Raises QuietvitError if unusable."""

    def checked(value: Any, where: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and number >= 0):
            raise QuietvitError(
                f"strength={value!r}{where}: give a finite number, 0 or more, in weight-decay "
                "units (2.0 decays like weight_decay=2.0 where the partner's spectrum is flat)."
            )
        return number

    if isinstance(strength, Mapping):
        return {str(kind): checked(value, f" for {kind}") for kind, value in strength.items()}
    return checked(strength, "")
