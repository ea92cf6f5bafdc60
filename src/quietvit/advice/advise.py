"""``advise``: try methods and bits on a model, explain the errors and recommend next steps.

``ladder`` measures, ``causes`` explains, ``steps`` recommends, and ``advice`` holds the result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.advice.advice import Advice
from quietvit.advice.causes import Cause, find_causes
from quietvit.advice.effects import FloatOutputs
from quietvit.advice.ladder import BITS, METHODS, Ladder, Row, settings
from quietvit.advice.sensitivity import measured
from quietvit.advice.steps import GOOD, next_steps
from quietvit.advice.switches import Switches, read_batches, refuse_training
from quietvit.errors import QuietvitError
from quietvit.quantization.calibration import BATCH
from quietvit.quantization.settings import parse_method
from quietvit.tracing import Trace, plain_model
from quietvit.tracing import trace as trace_model

LEAST = 16
CALIBRATION = 32
EXPLAINED = 16
"""Number of images to find and explain the worst sites."""
EXPLAINER = "rtn-omse"
"""Sites are explained for this method, because it only chooses ranges."""
_LADDER = 0.7
"""Share of the time for the ladder. The rest is for causes and for roles at 8 bits."""


def advise(
    model: nn.Module,
    images: Any,
    *,
    minutes: float = 10.0,
    methods: Sequence[str] = METHODS,
    bits: Sequence[str] = BITS,
    progress: bool = True,
) -> Advice:
    """Try methods and bits on a model, explain what costs most, and recommend next steps.

    No labels are needed. Half of the images, at most 32, calibrate. The rest measure how often the
    quantized model predicts the same class as the float model. The settings are tried method by
    method until the time is up. Then the three most expensive sites are explained, at the lowest
    bits with rtn-omse. The model never changes. Ctrl-C ends the search and returns its results.

    Args:
        model: a float model in eval mode.
        images: at least 16, as for ``quietvit.quantize``. They are held in memory. Every second one
            of the first 64 calibrates.
        minutes: total time. A setting that has started is finished.
        methods: names as for ``quietvit.quantize``. The first one is the baseline.
        bits: such as ``W4A8``, or with overrides ``W4A4+attention-maps-8``. Give the lowest last.
        progress: show a progress bar after 3 seconds.

    Raises:
        QuietvitError: there are fewer than 16 images, a method or bits are unknown, or the model is
            in training mode or cannot be traced or quantized.
    """
    refuse_training(model)
    if not minutes > 0:
        raise QuietvitError(f"minutes is {minutes:g}; give more than 0, such as 10.")
    if not methods or not bits:
        raise QuietvitError("give at least one method and one setting of bits.")
    start = time.monotonic()
    model = plain_model(model)
    calibration, aside = _parted(read_batches(images, model))
    trace = trace_model(model, calibration[0][:1])
    tries = settings(methods, bits, trace)
    floats = FloatOutputs(model, trace, aside)
    ladder = Ladder(model, trace, calibration, floats)
    found = _Findings()
    complete = True
    try:
        ladder.climb(tries, start + 60 * _LADDER * minutes, progress)
        if not ladder.rows:
            reasons = {why: name for name, why in reversed(ladder.failed)}
            shown = " ".join(f"{name}: {why}" for why, name in reasons.items())
            raise QuietvitError(f"no method could quantize this model. {shown}")
        found.target = _target(ladder.rows)
        if found.target is not None:
            try:
                _explain(found, ladder, model, trace, calibration, aside, start + 60 * minutes)
            except QuietvitError as error:  # keep the measured rows if the explanation fails
                ladder.failed.append((f"explaining {found.target.name}", str(error)))
    except KeyboardInterrupt:
        if not ladder.rows:
            raise
        complete = False
    return Advice(
        model=trace.model_name,
        images=(sum(map(len, calibration)), sum(map(len, aside))),
        rows=tuple(ladder.rows),
        target=None if found.target is None else found.target.name,
        causes=found.causes,
        steps=next_steps(ladder.rows, found.target, found.kept, found.causes),
        failed=tuple(ladder.failed),
        skipped=tuple(ladder.skipped),
        seconds=time.monotonic() - start,
        complete=complete,
    )


@dataclass
class _Findings:
    """The target row (lowest bits, not good yet), its causes, and trials with roles at 8 bits."""

    target: Row | None = None
    kept: list[tuple[str, Row]] = field(default_factory=list)
    causes: tuple[Cause, ...] = ()


def _explain(
    found: _Findings,
    ladder: Ladder,
    model: nn.Module,
    trace: Trace,
    calibration: Sequence[Tensor],
    aside: Sequence[Tensor],
    deadline: float,
) -> None:
    """Explain the worst sites at the target's bits, then try the worst two roles at 8 bits."""
    target = found.target
    assert target is not None
    switches = Switches(
        model,
        parse_method(EXPLAINER, target.bits),
        torch.cat(list(aside))[:EXPLAINED],
        calibration=calibration,
        trace=trace,
        progress=False,
    )
    costs = measured(switches, estimate=True)
    causes = find_causes(switches, [part.name for part in costs.worst_sites[:3]], costs.measure)
    found.causes = tuple(sorted(causes, key=lambda cause: -cause.cost))
    for role in _wide(switches, [part.name for part in costs.worst_roles])[:2]:
        bits = f"{target.bits}+{role}=8"
        before = len(ladder.rows)
        ladder.climb([(target.method, bits, parse_method(target.method, bits))], deadline, False)
        found.kept += [(role, row) for row in ladder.rows[before:]]


def _parted(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split images alternately for calibration and measuring, in case they are sorted by class."""
    images = torch.cat(list(batches))
    if len(images) < LEAST:
        raise QuietvitError(
            f"advice needs at least {LEAST} images, because one half calibrates and the other half "
            f"measures, but there are {len(images)}. Give more images. They need no labels."
        )
    count = min(CALIBRATION, len(images) // 2)
    numbers = torch.arange(len(images))
    chosen = (numbers % 2 == 0) & (numbers < 2 * count)
    return list(images[chosen].split(BATCH)), list(images[~chosen].split(BATCH))


def _target(rows: Sequence[Row]) -> Row | None:
    """Return the first method's row with the fewest bits, or None if that row is good."""
    own = [row for row in rows if row.method == rows[0].method]
    lowest = min(own, key=lambda row: row.average_bits)
    good = lowest.agreement is not None and lowest.agreement >= GOOD
    return None if good else lowest


def _wide(switches: Switches, roles: Sequence[str]) -> list[str]:
    """Return the roles below 8 bits that have no override yet."""
    method = switches.quantized.method
    return [
        role
        for role in roles
        if role not in method.overrides
        and any((method.slot_bits(slot) or 8) < 8 for slot in switches.roles[role])
    ]
