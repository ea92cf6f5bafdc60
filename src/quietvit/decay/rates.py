"""The rate at which an optimizer really moves a parameter, if it is not ``group["lr"]`` alone.

``attach`` uses the rate. What an optimizer averages is in ``averages``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quietvit.errors import QuietvitError

Group = Mapping[str, Any]

# Settings of optimizers that scale each step by a number they do not keep.
_NOT_KEPT = {
    "trust_coeff": "a trust ratio of each layer (LARS)",
    "trust_coefficient": "a trust ratio of each layer (LARS, LARC)",
    "init_eta": "a distance from the start (DoG)",
    "reps_rel": "a distance from the start (DoG)",
}
# Settings of optimizers that find their own steps, for which the rate is only a start.
_FOUND = {
    "step_sizes": "a step for each weight by the signs of its gradients (Rprop)",
    "line_search_fn": "the size of each step by a line search (LBFGS)",
}


def refuse_unknown_rate(optimizer: Any, group: Group, owner: str) -> None:
    """Raise QuietvitError if the real rate of a group cannot be known.

    That is so if the optimizer has no learning rate, or scales its steps by a number that it does
    not keep.
    """
    name = type(optimizer).__name__
    for key, scale in _NOT_KEPT.items():
        if key in group:
            raise QuietvitError(
                f"{name} multiplies its rate (lr={group.get('lr')!r}) by {scale} and does not keep "
                f"the product, so {owner} cannot know how fast to decay. Use an optimizer whose "
                "rate is known (AdamW, SGD, LAMB, Prodigy), or a coupled regularizer."
            )
    for key, what in _FOUND.items():
        if group.get(key) is not None:
            raise QuietvitError(
                f"{name} finds {what}, so its lr={group.get('lr')!r} is no rate, and {owner} "
                "cannot know how fast to decay. Use an optimizer whose rate is known (AdamW, SGD, "
                "LAMB, Prodigy), or a coupled regularizer."
            )
    if not _computes_rates(optimizer, group):
        _learning_rate(optimizer, group, owner)


def estimated(group: Group) -> float:
    """Return what the optimizer multiplies ``group["lr"]`` by in the next step.

    Prodigy and D-Adaptation keep it as ``d``, some with a bias correction. It is 1 for others. Call
    it before the step: these optimizers step by the old ``d`` and then keep a new one.
    """
    shared = group.get("shared_d") if group.get("split_groups_mean") else None
    d = group.get("d") if shared is None else shared
    if d is None:
        return 1.0
    result = float(d)
    if group.get("use_bias_correction") and "k" in group:
        result *= _correction(group)
    return result


class StepRates:
    """The rates of the step that an optimizer has just made.

    ``estimates`` are what ``estimated`` returned before the step, by the id of the group. For other
    groups the present value is taken. What a group shares is read once.
    """

    def __init__(self, optimizer: Any, estimates: Mapping[int, float], owner: str) -> None:
        self._optimizer, self._estimates, self._owner = optimizer, estimates, owner
        self._of_group: dict[int, float] = {}

    def of(self, group: Group, parameter: Tensor) -> float:
        """Return the rate of one parameter of ``group``.

        Raises:
            QuietvitError: the optimizer states no rate.
        """
        state: Mapping[str, Any] = getattr(self._optimizer, "state", {}).get(parameter, {})
        if _computes_rates(self._optimizer, group):
            # Without a state the parameter had no gradient yet, and Adafactor no rate for it.
            return float(self._optimizer._get_lr(dict(group), state)) if state else 0.0
        if id(group) not in self._of_group:
            self._of_group[id(group)] = self._shared(group)
        rate = self._of_group[id(group)]
        if "fallback_lr_scale" in group and state and "momentum_buffer" not in state:
            rate *= float(group["fallback_lr_scale"])  # what timm's Muon leaves to AdamW
        if parameter.ndim < 2 and not group.get("optimize_1d", True):
            rate *= float(group["lr_1d_factor"])  # what timm's Mars leaves to AdamW
        if group.get("lr_decay") and state:  # Adagrad
            rate /= 1 + float(group["lr_decay"]) * (float(state["step"]) - 1)
        if "lambd" in group and "eta" in state:  # ASGD; the kept eta is that of the next step
            reduced = 1 + float(group["lambd"]) * rate * (float(state["step"]) - 1)
            rate /= reduced ** float(group["alpha"])
        return rate

    def _shared(self, group: Group) -> float:
        rate = _learning_rate(self._optimizer, group, self._owner)
        before = self._estimates.get(id(group))
        rate *= estimated(group) if before is None else before
        if "g0_norm" in group:  # D-Adaptation's SGD
            rate /= float(group["g0_norm"])
        return rate


def _computes_rates(optimizer: Any, group: Group) -> bool:
    """Whether it is an Adafactor (timm, transformers, fairseq), whose rates are those of a rule."""
    return "scale_parameter" in group and callable(getattr(optimizer, "_get_lr", None))


def _learning_rate(optimizer: Any, group: Group, owner: str) -> float:
    """The rate as schedule-free optimizers keep it, warm-up included, else ``group["lr"]``."""
    result = group.get("lr")
    if "scheduled_lr" in group and group.get("k"):
        result = group["scheduled_lr"]
    try:
        rate = float(result)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        rate = math.nan
    if not math.isfinite(rate):
        raise QuietvitError(
            f"a group of this {type(optimizer).__name__} has lr={result!r}, so {owner} cannot know "
            "how fast to decay. Give the optimizer a learning rate, one number for each group."
        )
    return rate


def _correction(group: Group) -> float:
    """The bias correction of the step to come: Adam's, or RAdam's where ``beta3`` and ``d_prev``.

    The first is of prodigyopt and dadaptation (k counts from 0), the second of
    prodigy-plus-schedule-free (k counts from 1).
    """
    beta1, beta2 = group["betas"][:2]
    if "d_prev" not in group:
        step = group["k"] + 1
        return math.sqrt(1 - beta2**step) / (1 - beta1**step)
    power = beta2 ** group["k"]
    most = 2 / (1 - beta2) - 1
    length = most - 2 * group["k"] * power / (1 - power)
    if length <= 4:
        return 0.0
    most, length = float(most), float(length)
    return math.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length))
