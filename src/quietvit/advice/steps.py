"""Recommend next steps from the numbers that ``advise`` measured.

Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quietvit.advice.causes import Cause
from quietvit.advice.ladder import Row

CLEAR = 0.1
"""A method helps or hurts if the relative change of the divergence exceeds this."""
GOOD = 0.99
"""A row is good if at least this share of images keep their class."""


@dataclass(frozen=True)
class Step:
    """One recommendation, and the measured numbers behind it."""

    do: str
    because: str


def next_steps(
    rows: Sequence[Row],
    target: Row | None,
    kept: Sequence[tuple[str, Row]],
    causes: Sequence[Cause],
) -> tuple[Step, ...]:
    """Return the recommended steps.

    Args:
        rows: the rows of the ladder.
        target: the row with the lowest bits, if it is not good yet.
        kept: (role, row) for ``target`` with this role at 8 bits.
        causes: the causes of the worst sites.
    """
    steps = []
    ready = [row for row in rows if row.deployable and row.quality >= (GOOD, float("-inf"))]
    if ready and ready[0].agreement is not None:
        best = min(ready, key=lambda row: (row.average_bits, row.mib))
        steps.append(
            Step(
                f"Deploy {best.name} if small enough: quietvit quantize, then quietvit export",
                f"{result(best)}, {best.mib:.1f} MiB, deployable",
            )
        )
    if target is None:
        return tuple(steps)
    better = [(role, row) for role, row in kept if _gain(target, row) > CLEAR]
    for role, row in sorted(better, key=lambda pair: -_gain(target, pair[1]))[:1]:
        steps.append(
            Step(
                f"Keep {role} at 8 bits: --keep {role}=8",
                f"{target.name}: {result(target)}. With this role at 8 bits: {result(row)}, at "
                f"{row.average_bits:.1f} instead of {target.average_bits:.1f} bits on average",
            )
        )
    steps += _methods(rows, target)
    same = [row for row in rows if row.bits == target.bits]
    best = max(same, key=lambda row: row.quality)
    if best.agreement is None or best.agreement < GOOD:
        why = f"the best of {len(same)} methods tried at {target.bits} is {best.method}"
        if len(same) == 1:
            why = f"only {best.method} was tried at {target.bits}"
        why += f": {result(best)}"
        steps.append(
            Step(
                f"Use more bits than {target.bits}, or train the quantized model on: recipe "
                "section qat, or quietvit.learn_steps",
                why,
            )
        )
        outliers = [cause for cause in causes if cause.kind in ("outlier", "tail")]
        if outliers:
            steps.append(
                Step(
                    "If you train the model anyway, compare with and without Colinearity Decay: "
                    "quietvit compare",
                    f"{why}; {outliers[0].site}: {outliers[0].why}",
                )
            )
    return tuple(steps)


def _methods(rows: Sequence[Row], target: Row) -> list[Step]:
    """Return steps from the comparison of all methods with the target's at the same bits."""
    same = {row.method: row for row in rows if row.bits == target.bits}
    steps = []
    for method, row in same.items():
        if method == target.method or _gain(target, row) <= CLEAR:
            continue
        kind = "deployable" if row.deployable else "simulated only: no standard integer kernel"
        steps.append(
            (
                _gain(target, row),
                Step(
                    f"Use {method} for this model",
                    f"at {target.bits}: {result(row)} ({kind}); {target.method}: {result(target)}",
                ),
            )
        )
    steps.sort(key=lambda pair: -pair[0])
    found = [step for _, step in steps[:2]]
    smooth = same.get("smoothquant")
    if smooth is not None and smooth is not target and _gain(target, smooth) < -CLEAR:
        found.append(
            Step(
                "Do not use SmoothQuant for this model",
                f"at {target.bits}: {result(smooth)}; {target.method}: {result(target)}",
            )
        )
    return found


def _gain(before: Row, after: Row) -> float:
    """Return the relative decrease of the divergence. An increase is negative."""
    old, new = (_divergence(row) for row in (before, after))
    return (old - new) / old if old else 0.0


def _divergence(row: Row) -> float:
    return (row.effect.error if row.effect.kl is None else row.effect.kl) or 0.0


def result(row: Row) -> str:
    """Return ``class kept on 97.0 % (KL 0.02)``, or the error if it is not a classifier."""
    if row.agreement is None:
        return f"error {100 * (row.effect.error or 0.0):.1f} %"
    return f"class kept on {100 * row.agreement:.1f} % (KL {row.effect.kl or 0.0:.3g})"
