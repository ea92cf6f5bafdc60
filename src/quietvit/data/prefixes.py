"""Remove the prefix that a wrapper adds to all weight names, by comparing them with the model's.

Lightning adds ``model.``, DDP ``module.``, DINO ``backbone.``. Other prefixes are found, too.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from quietvit.errors import QuietvitError

logger = logging.getLogger("quietvit")

# If a file holds two copies of a model, one of these prefixes marks the average over the steps.
_AVERAGE = {"ema", "ema_model", "model_ema", "teacher", "teacher_model", "swa_model"}


def unwrapped(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], str]:
    """Return ``state`` under the names of the model's ``own`` weights, and the removed prefix.

    A prefix is removed if at least half of the names (of the smaller side) match only without it.
    Weights without the prefix are left out, and a log line says so. If the model's names have a
    prefix that the file lacks, it is added. Shapes are not compared.

    Raises:
        QuietvitError: the file holds several copies of the model, and not exactly one average.
    """
    least = min(len(own), len(state)) / 2
    if sum(key in own for key in state) >= least:
        return dict(state), ""
    prefixes = _fitting(own, state, least)
    averages = [prefix for prefix in prefixes if _AVERAGE & set(prefix.split("."))]
    if len(prefixes) > 1 and len(averages) != 1:
        raise QuietvitError(
            f"{source} holds several copies of the model, below {', '.join(map(repr, prefixes))}; "
            "save the weights of only one of them."
        )
    if prefixes:
        prefix = (averages or prefixes)[0]
        below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        rest = [key for key in state if not key.startswith(prefix)]
        if rest:
            logger.warning(
                "%s: the weights below '%s' are used; left out: %s%s.", source, prefix,
                ", ".join(rest[:3]), f" and {len(rest) - 3} more" * (len(rest) > 3),
            )  # fmt: skip
        return below, prefix
    lacking = _fitting(state, own, least)
    if len(lacking) == 1:
        return {lacking[0] + key: value for key, value in state.items()}, ""
    return dict(state), ""


def _fitting(inner: Mapping[str, Tensor], outer: Mapping[str, Tensor], least: float) -> list[str]:
    """Return the prefixes in ``outer`` below which at least ``least`` names of ``inner`` lie."""
    counts: Counter[str] = Counter()
    for key in outer:
        for place in (place for place, letter in enumerate(key) if letter == "."):
            if key[place + 1 :] in inner:
                counts[key[: place + 1]] += 1
    return [prefix for prefix, count in counts.items() if count >= least]
