"""The one exception class of the library. Nothing else lives here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuietvitError(Exception):
    """Something the user can mend: the message names the site, the values and the remedy.

    The command line prints the message as one paragraph and exits with code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'"`` for the closest known names, or ``""`` for none."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in close)}" if close else ""
