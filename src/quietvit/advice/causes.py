"""Explain why a site is expensive: find its worst operand, and inspect the operand's values.

``quietvit.diagnose`` and one pass here measure the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from quietvit.advice.switches import Switches
from quietvit.errors import QuietvitError
from quietvit.measure import Diagnosis, diagnose
from quietvit.quantization import AffineQuantizer, Slot
from quietvit.tracing import Site

CHANNEL = 5.0
"""A channel is an outlier if its maximum is at least this many times the median channel's."""
TAIL = 20.0
"""A tail is long if max/rms is at least this. Gaussian data has about 5."""


@dataclass(frozen=True)
class Cause:
    """Why one site is expensive.

    Attributes:
        site, role: name and role of the site in the trace.
        cost: effect of quantizing this site alone: KL for a classifier, otherwise error.
        operand: the operand that costs most.
        share: cost of quantizing this operand alone, divided by the site's cost.
        kind: ``weight``, ``flat map``, ``outlier`` (of a channel), ``tail`` or ``bits``.
        why: one sentence with the measured numbers.
    """

    site: str
    role: str
    cost: float
    operand: str
    share: float
    kind: str
    why: str


def find_causes(switches: Switches, sites: Sequence[str], measure: str) -> Iterator[Cause]:
    """Yield the causes of the costs of these sites. ``measure``: ``kl`` or ``error``."""
    model, images = switches.model, torch.cat(list(switches.floats.batches))

    def cost(slots: Sequence[Slot]) -> float:
        return float(getattr(switches.effect(slots), measure) or 0.0)

    switches.check()
    try:
        diagnosis = diagnose(model, images, trace=switches.quantized.trace)
    except QuietvitError:  # the model has no pairs: measure only its sites
        diagnosis = diagnose(model, images, trace=switches.quantized.trace, pairs=())
    switches.check()
    rounding = _rounding(switches, sites)
    for name in sites:
        slots = switches.sites[name]
        whole, costs = cost(slots), {slot: cost([slot]) for slot in slots}
        worst = max(slots, key=lambda slot: costs[slot])
        kind, why = _why(switches, worst, rounding.get(worst), diagnosis)
        share = costs[worst] / whole if whole else 0.0
        yield Cause(name, worst.site.role, whole, worst.operand, share, kind, why)


@dataclass
class _Rounding:
    """Sums over the values x of one operand: x^2, (x - q(x))^2, |x|, and |x| where q(x) = 0."""

    squares: float = 0.0
    noise: float = 0.0
    mass: float = 0.0
    lost: float = 0.0

    def update(self, x: Tensor, quantized: Tensor) -> None:
        x, quantized = x.float(), quantized.float()
        self.squares += float(x.square().sum())
        self.noise += float((x - quantized).square().sum())
        self.mass += float(x.abs().sum())
        self.lost += float(x.abs()[quantized == 0].sum())


def _rounding(switches: Switches, sites: Sequence[str]) -> dict[Slot, _Rounding]:
    """Measure the rounding error of each operand of these sites in one float pass."""
    found: dict[Slot, _Rounding] = {}
    quantized = switches.quantized

    def look(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        for slot in switches.sites[site.name] if site.name in sites else ():
            if not slot.is_output:
                x = operands[slot.index]
                found.setdefault(slot, _Rounding()).update(x, quantized.quantizers[slot.key](x))
        return run(*operands)

    with torch.no_grad(), quantized.only(()):
        for batch in switches.floats.batches:
            with quantized.observe(look):
                quantized(batch)
    return found


def _why(
    switches: Switches, slot: Slot, rounding: _Rounding | None, diagnosis: Diagnosis
) -> tuple[str, str]:
    quantizer: nn.Module = switches.quantized.quantizers[slot.key]
    noise = 0.0
    if rounding is not None and rounding.squares:
        noise = 100 * (rounding.noise / rounding.squares) ** 0.5
    rounded = f"{quantizer.bits} bits change it by {noise:.0f} % (rms)"
    if slot.is_weight:
        return "weight", f"its weight is the expensive operand; {rounded}"
    if slot.role == "post_softmax" and rounding is not None and rounding.mass:
        lost = 100 * rounding.lost / rounding.mass
        step = float(quantizer.scale) if isinstance(quantizer, AffineQuantizer) else None
        size = "" if step is None else f" ({step / 2:.3f})"
        return "flat map", (
            f"the attention map is too flat for {quantizer.bits} bits: {lost:.0f} % of the "
            f"attention rounds to 0, because it is on probabilities below half a step{size}"
        )
    side = slot.operand
    statistics = next(
        (s for s in diagnosis.sites if s.site == slot.site.name and s.operand == side), None
    )
    if statistics is None:
        return "bits", rounded
    ratio = max(statistics.channel_max) / (median(statistics.channel_max) or 1.0)
    if ratio >= CHANNEL:
        kind = "outlier"
        text = (
            f"outlier in channel {statistics.worst_channel}: it reaches "
            f"{statistics.worst_value:.3g}, {ratio:.0f} times the median channel; {rounded}"
        )
    elif statistics.max_over_rms >= TAIL:
        kind = "tail"
        text = (
            "long tail over many channels: the largest value is "
            f"{statistics.worst_value:.3g}, {statistics.max_over_rms:.0f} times the rms; {rounded}"
        )
    else:
        return "bits", f"no outlier (max/rms {statistics.max_over_rms:.0f}); {rounded}"
    sources = _sources(switches, slot)
    cause = next((c for c in diagnosis.root_causes if c.site in sources), None)
    if cause is not None:
        text += (
            f"; pair {cause.pair.replace('.weight', '')}, singular direction "
            f"{cause.contribution.direction + 1}, makes {100 * cause.share:.0f} % of the largest "
            f"value behind it"
        )
    return kind, text


def _sources(switches: Switches, slot: Slot) -> set[str]:
    """Return the sites that feed the operand, directly or via one norm, activation or addition."""
    by_name = {site.name: site for site in switches.quantized.trace.sites}
    near = set(slot.site.operands[slot.index].fed_by) if slot.index >= 0 else set()
    behind = {
        source
        for name in near
        if by_name[name].macs == 0
        for operand in by_name[name].operands
        for source in operand.fed_by
    }
    return near | behind
