"""``advise``: try methods and bits on a model, explain the errors and recommend next steps.

``ladder`` measures, ``causes`` explains, ``steps`` recommends, and ``advice`` holds the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.advice.advice import Advice
from quietvit.advice.budget import Budget, OutOfTimeError
from quietvit.advice.causes import Cause, find_causes
from quietvit.advice.effects import FloatOutputs
from quietvit.advice.ladder import BITS, METHODS, Ladder, Row, lowest_first, settings
from quietvit.advice.sensitivity import measured
from quietvit.advice.steps import GOOD, next_steps
from quietvit.advice.switches import (
    Switches,
    number_above_0,
    read_batches,
    refuse_text,
    refuse_unfit,
)
from quietvit.errors import QuietvitError
from quietvit.origin import origins_of
from quietvit.quantization.calibration import BATCH, IMAGES_ALONE
from quietvit.quantization.settings import parse_method
from quietvit.tracing import Trace, plain_model, trace_images

LEAST = 16
CALIBRATION = 32
EXPLAINED = (16, 8, 4)
"""Number of images to find and explain the worst sites, from much time to little."""
EXPLAINER = "rtn-omse"
"""Sites are explained for this method, because it only chooses ranges."""
_PASSES = 50
"""Time to explain the sites, in quantized forward passes on the same images, rounded up.

About 25 estimate the costs (DeiT-Tiny, results/sensitivity.csv). The rest find the causes.
"""
_TRIALS = 2
"""Number of roles that are tried at 8 bits."""


def advise(
    model: nn.Module,
    images: Any,
    *,
    calibration: Any = None,
    minutes: float = 10.0,
    methods: Sequence[str] = METHODS,
    bits: Sequence[str] = BITS,
    progress: bool = True,
) -> Advice:
    """Try methods and bits on a model, explain what costs most, and recommend next steps.

    No labels are needed. Half of the images, at most 32, calibrate, or ``calibration`` does. The
    rest measure how often the quantized model predicts the same class as the float model. Images
    that ``quietvit.synthesize`` generated are named in the result.

    The first method is tried at all bits, then the other methods, at the lowest bits first. Then
    the three most expensive sites are explained, at the lowest bits with rtn-omse, and two roles
    are tried at 8 bits. Up to half of the time is kept for this. What does not fit is skipped and
    named. The model never changes. Ctrl-C ends the search and returns its results.

    Args:
        model: a float model in eval mode.
        images: at least 16, as for ``quietvit.quantize``. They are held in memory. Every second one
            of the first 64 calibrates, unless ``calibration`` is given.
        calibration: images for calibration alone, such as ``quietvit.synthesize(model, 32)``.
        minutes: total time. A setting that has started is finished, and the first one always runs.
        methods: names as for ``quietvit.quantize``. The first one is the baseline.
        bits: such as ``W4A8``, or with overrides ``W4A4+attention-maps-8``. Give the lowest last.
        progress: show a progress bar after 3 seconds.

    Raises:
        QuietvitError: there are fewer than 16 images, a method or bits are unknown, or the model is
            in training mode or cannot be traced or quantized.
    """
    refuse_unfit(model)
    if not number_above_0(minutes):
        raise QuietvitError(f"minutes is {minutes!r}; give more than 0, such as 10.")
    refuse_text("methods", methods, "['rtn-omse', 'erq']")
    refuse_text("bits", bits, "['W8A8', 'W4A8']")
    if not methods or not bits:
        raise QuietvitError("give at least one method and one setting of bits.")
    plain, budget = plain_model(model), Budget(60 * minutes)
    return _within(budget, plain, images, calibration, methods, bits, progress)


def _within(
    budget: Budget,
    model: nn.Module,
    images: Any,
    calibration: Any,
    methods: Sequence[str],
    bits: Sequence[str],
    progress: bool,
) -> Advice:
    """Do the work of ``advise`` within a budget."""
    origins = origins_of(images, calibration)
    aside = read_batches(images, model)
    if calibration is None:
        calibration, aside = _parted(aside)
    else:
        calibration = read_batches(calibration, model)
        refuse_few(sum(map(len, aside)), calibrating=False)
    trace = trace_images(model, calibration[0][:1], IMAGES_ALONE)
    tries = lowest_first(settings(methods, bits, trace))
    for *_, method in tries:
        method.check_sites(trace)
    floats = FloatOutputs(model, trace, aside)
    ladder = Ladder(model, trace, calibration, floats, budget)
    search = _Search(budget, model, trace, calibration, torch.cat(aside), ladder)
    complete = True
    try:
        ladder.climb(tries, lambda needed: needed <= budget.left - search.reserved(), progress)
        if not ladder.rows:
            reasons = {why: name for name, why in reversed(ladder.failed)}
            shown = " ".join(f"{name}: {why}" for why, name in reasons.items())
            raise QuietvitError(f"no method could quantize this model. {shown}")
        search.target = _target(ladder.rows)
        if search.target is not None:
            search.explain(search.target)
    except KeyboardInterrupt:
        if not ladder.rows:
            raise
        complete = False
    causes = tuple(sorted(search.causes, key=lambda cause: -cause.cost))
    return Advice(
        model=trace.model_name,
        images=(sum(map(len, calibration)), sum(map(len, aside))),
        origins=origins,
        rows=tuple(ladder.rows),
        target=None if search.target is None else search.target.name,
        causes=causes,
        steps=next_steps(ladder.rows, search.target, search.kept, causes),
        failed=tuple(ladder.failed),
        skipped=tuple(ladder.skipped),
        seconds=budget.spent,
        complete=complete,
    )


@dataclass
class _Search:
    """What follows the ladder: causes of the target row, and trials with roles at 8 bits.

    ``target``: the row with the lowest bits, if it is not good yet. ``images``: those that measure.
    """

    budget: Budget
    model: nn.Module
    trace: Trace
    calibration: Sequence[Tensor]
    images: Tensor
    ladder: Ladder
    target: Row | None = None
    kept: list[tuple[str, Row]] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)

    def reserved(self) -> float:
        """Return the seconds kept for the work after the ladder, at most half of all."""
        trials = _TRIALS * self.ladder.expected(self.ladder.rows[0].method)
        return min(self.budget.seconds / 2, self._expected(EXPLAINED[0]) + trials)

    def explain(self, target: Row) -> None:
        """Explain the worst sites at the target's bits, then try the worst roles at 8 bits."""
        skipped = [f"causes of {target.name}", "roles at 8 bits"]
        count = next((n for n in EXPLAINED if self._expected(n) <= self.budget.left), None)
        if count is None:
            self.ladder.skipped += skipped
            return
        try:
            roles = self._explain(target, count)
        except OutOfTimeError:
            self.ladder.skipped += skipped
            return
        except QuietvitError as error:  # keep the measured rows if the explanation fails
            self.ladder.failed.append((f"explaining {target.name}", str(error)))
            return
        for role in roles:
            bits = f"{target.bits}+{role}=8"
            before = len(self.ladder.rows)
            tries = [(target.method, bits, parse_method(target.method, bits))]
            self.ladder.climb(tries, lambda needed: needed <= self.budget.left, False)
            self.kept += [(role, row) for row in self.ladder.rows[before:]]

    def _explain(self, target: Row, count: int) -> list[str]:
        """Find the causes on ``count`` images. Returns the roles to try at 8 bits."""
        switches = Switches(
            self.model,
            parse_method(EXPLAINER, target.bits),
            self.images[:count],
            calibration=self.calibration,
            trace=self.trace,
            progress=False,
            check=self.budget.check,
        )
        costs = measured(switches, estimate=True, progress=False)
        if not costs.complete:
            raise KeyboardInterrupt
        worst = [part.name for part in costs.worst_sites[:3]]
        self.causes.extend(find_causes(switches, worst, costs.measure))
        return _wide(switches, [part.name for part in costs.worst_roles])[:_TRIALS]

    def _expected(self, count: int) -> float:
        """Return the expected seconds to explain the sites on ``count`` images."""
        rows = self.ladder.rows
        own = [row.seconds for row in rows if row.method == EXPLAINER]
        calibrating = max(own or [row.seconds for row in rows])
        return calibrating + _PASSES * count * self.ladder.pass_seconds


def _parted(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split images alternately for calibration and measuring, in case they are sorted by class."""
    images = torch.cat(list(batches))
    refuse_few(len(images), calibrating=True)
    count = min(CALIBRATION, len(images) // 2)
    numbers = torch.arange(len(images))
    chosen = (numbers % 2 == 0) & (numbers < 2 * count)
    return list(images[chosen].split(BATCH)), list(images[~chosen].split(BATCH))


def refuse_few(count: int, calibrating: bool) -> None:
    """Raise QuietvitError for too few images. ``calibrating``: half of them calibrate."""
    if count < LEAST:
        both = "one half calibrates and the other half measures"
        why = both if calibrating else "they measure the settings"
        raise QuietvitError(
            f"advice needs at least {LEAST} images, because {why}, but there are {count}. Give "
            "more images. They need no labels."
        )


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
