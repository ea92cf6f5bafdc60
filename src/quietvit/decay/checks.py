"""Checks that regularizers share: of their arguments, and of weights before they are changed.

What a schedule may be is checked in ``schedule``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.tensors import all_finite


def number(value: Any, name: str, owner: str, *, least: float = 0.0) -> float:
    """Return ``value`` as a float. Raises QuietvitError if it is not finite or below ``least``."""
    try:
        result = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not (math.isfinite(result) and result >= least):
        raise QuietvitError(
            f"{owner}({name}={value!r}): give one finite number, {least:g} or more."
        )
    return result


def whole_number(value: Any, name: str, owner: str, *, least: int = 1) -> int:
    """Return ``value``. Raises QuietvitError if it is not an int, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise QuietvitError(f"{owner}({name}={value!r}): give a whole number, {least} or more.")
    return value


def refuse_unless_finite(changes: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse to write ``changes`` that are not finite. One device synchronization.

    Args:
        changes: what was computed for each parameter, by name.
        parameters: the parameters before the change, by name.

    Raises:
        QuietvitError: names the first parameter that is NaN or infinite, or whose change overflows.
    """
    if all_finite(changes.values()):
        return
    for name in changes:
        bad = int((~parameters[name].isfinite()).sum())
        if bad:
            raise QuietvitError(
                f"{name}: {bad} of its values are NaN or infinite; no weight was changed. Training "
                "diverged before this step. Lower the learning rate or clip gradients, and resume "
                "from an earlier checkpoint or start anew."
            )
    for name, change in changes.items():
        if not all_finite([change]):
            raise QuietvitError(
                f"{name}: its change overflows (largest weight "
                f"{float(parameters[name].abs().max()):.3g}); no weight was changed. Lower the "
                "learning rate or the strength, and resume from an earlier checkpoint or start "
                "anew."
            )
