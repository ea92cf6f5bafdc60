"""Which pairs a regularizer acts on: those given, or those found in the model, of some kinds.

How pairs are found is in ``quietvit.pairs``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
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
    """Return the pairs of ``kinds``, of ``pairs`` where given, else found by ``example``.

    ``kinds`` None: all of ``pairs``, else ``DEFAULT_KINDS``. ``fold_gains`` is that of
    ``find_pairs``. Of what is found, log lines say which weights no pair can have, and which kinds,
    of those given and those ``scheduled``, have no pair. Raises QuietvitError where no kind or no
    pair is left, where ``pairs`` have none of a kind or are to be folded, and without an example to
    find them by.
    """
    if isinstance(kinds, str):
        raise QuietvitError(f"kinds={kinds!r}: give a sequence of kinds, such as ({kinds!r},).")
    if kinds is not None and not kinds:
        raise QuietvitError(f"{owner}: kinds={kinds}: no kind is left; give at least one.")
    if pairs is None:
        if example is None:
            raise QuietvitError(
                f"{owner} needs an example input to find the pairs (a batch of one image is "
                "enough), or pairs=..."
            )
        asked = tuple(kinds or DEFAULT_KINDS)
        found = find_pairs(model, example, kinds=asked, fold_gains=fold_gains)
        say_left_out(owner, [s for s in found.skipped if s[1] in (COMPUTED, ADAPTED)])
        _say_without_pair(owner, (*(kinds or ()), *scheduled), found)
        return tuple(found)
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


def say_left_out(owner: str, left: Sequence[tuple[str, str]]) -> None:
    """Log once how many layers or pairs ``owner`` cannot act on: (name, reason) of each."""
    if not left:
        return
    name, reason = left[0]
    logger.warning(
        "%s leaves out, or sees in part, %d layers or pairs whose weight is no parameter or not "
        "the whole map (first %s: %s). To have them in, remove parametrizations and merge adapters "
        "before it is built.",
        owner,
        len(left),
        name,
        reason,
    )


def _say_without_pair(owner: str, kinds: Sequence[str], found: Sequence[MatrixPair]) -> None:
    """Log once of which of ``kinds``, named by the user, there is no pair."""
    have = dict.fromkeys(pair.kind for pair in found)
    without = [kind for kind in dict.fromkeys(kinds) if kind not in have]
    if without:
        logger.warning(
            "%s acts on no pair of kind %s, only of %s, so what is given for it does nothing: "
            "leave it out, or see with find_pairs(model, example, kinds=...) what the model has.",
            owner,
            ", ".join(without),
            ", ".join(have),
        )
