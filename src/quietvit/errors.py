"""The one exception class of the library. Also the hint at names close to a wrong one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class QuietvitError(Exception):
    """Something the user can mend: the message names the site, the values and the remedy.

    The command line prints the message as one paragraph and exits with code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'"`` for up to three known names, or ``""`` for none.

    First the name is taken for a part of a known one: those that begin with its words, then those
    that have all its words, then those that contain it; of each kind the shortest first. Only where
    there are none is the name taken for misspelt: then those with the most letters in common.
    Upper and lower case, and the signs between words, make no difference.
    """
    names = list(dict.fromkeys(known))
    close = _holding(name, names) or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in close[:3])}" if close else ""


def _holding(name: str, known: list[str]) -> list[str]:
    wanted = _words(name)
    whole = "_".join(wanted)
    if len(whole) < 2:
        return []
    ranks: dict[str, tuple[int, int]] = {}
    for other in known:
        words = _words(other)
        joined = "_".join(words)
        tiers = (
            f"{joined}_".startswith(f"{whole}_"),
            len(whole) > 2 and joined.startswith(whole),
            set(wanted) <= set(words),
            len(whole) > 2 and whole in joined,
        )
        tier = next((place for place, holds in enumerate(tiers) if holds), None)
        if tier is not None:
            ranks[other] = tier, len(other)
    return sorted(ranks, key=lambda other: (*ranks[other], other))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", name.casefold()) if word]
