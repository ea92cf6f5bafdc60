"""The strength of a decoupled regularizer from the total that it shall do in a run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quietvit.decay.checks import number, whole_number
from quietvit.errors import QuietvitError

_OWN = "strength_for_total"


def strength_for_total(total: float, scheduler: Any, steps: int) -> float:
    """Return the strength with which strength times the sum of learning rates is ``total``.

    In fine-tunes of 83, 250 and 750 steps, totals of 0.04 to 0.08 were best for Colinearity Decay,
    and the best strength differed by a factor of 4 (docs/method.md). A decay of all weights at this
    strength would shrink them by a factor of about exp(-total) in the run. Derived here.

    Args:
        total: above 0, such as 0.06.
        scheduler: a torch scheduler of the optimizer that the regularizer is attached to. It is
            copied, and does not change. The rates are those of its first parameter group.
        steps: the number of steps that the scheduler will take. If it takes one per epoch, divide
            the result by the number of optimizer steps in an epoch.

    Raises:
        QuietvitError: a number is not above 0, the scheduler needs what only a run knows (such as
            ``ReduceLROnPlateau``), or all of its rates are 0.
    """
    whole_number(steps, "steps", _OWN)
    return strength_of(total, _rates(scheduler, steps))


def strength_of(total: float, rates: Sequence[float]) -> float:
    """Return ``total`` divided by the sum of the learning rates.

    Raises QuietvitError: ``total`` is not above 0, or the sum is not.
    """
    if number(total, "total", _OWN) == 0:
        raise QuietvitError(f"{_OWN}(total=0) would do nothing; give a total above 0.")
    if not (summed := sum(rates)) > 0:
        raise QuietvitError(
            f"the learning rates of {len(rates)} steps add up to {summed:g}, so no strength gives "
            f"the total {total:g}. Check the schedule."
        )
    return total / summed


def _rates(scheduler: Any, steps: int) -> list[float]:
    """Return the rates of the next steps, from a copy with an optimizer of one number a group."""
    name = type(scheduler).__name__
    optimizer = getattr(scheduler, "optimizer", None)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise QuietvitError(f"{_OWN} takes a scheduler of torch.optim.lr_scheduler, not {name}.")
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [nn.Parameter(torch.zeros(1))]}
        for group in optimizer.param_groups
    ]
    plain = torch.optim.SGD(groups, lr=0.0)
    rates = []
    try:
        own = copy.deepcopy(scheduler, {id(optimizer): plain})
        with warnings.catch_warnings():  # torch misses its own wrapper of the optimizer's step
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(steps):
                rates.append(float(plain.param_groups[0]["lr"]))
                own.step()
    except TypeError as error:
        raise QuietvitError(
            f"{name} takes its rates from what only a run knows, so {_OWN} cannot add them up. "
            "Give the strength itself."
        ) from error
    return rates
