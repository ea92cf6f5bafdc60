"""``sensitivity``: measure or estimate the cost of each site and role in a quantized model.

``switches`` turns operands on and off, ``estimate`` estimates, and ``result`` holds the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from torch import nn

from quietvit.advice.estimate import estimated_effects
from quietvit.advice.result import Part, Sensitivity
from quietvit.advice.switches import Switches
from quietvit.progress import tracked
from quietvit.quantization import Method, Slot
from quietvit.tracing import Trace


def sensitivity(
    model: nn.Module,
    method: Method | str,
    images: Any,
    *,
    bits: str | None = None,
    calibration: Any = None,
    estimate: bool = False,
    trace: Trace | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure what each site and each role costs when ``method`` quantizes the model.

    For each part, two effects are measured: of quantizing only it, and everything except it. An
    effect is the relative error, the KL divergence, and the share of images whose class changes. No
    labels are needed. The model is calibrated once, and the given model never changes.

    Measuring runs the model about twice for each site and role, on all images. Ctrl-C ends it and
    returns the results so far. The estimate needs one forward pass each through the float and the
    quantized model, and a few backward passes. It gives only the KL divergence, or the error if the
    model is not a classifier. See ``quietvit.advice.estimate`` and docs/bits.md.

    Args:
        model: the float model, in eval mode.
        method: as for ``quietvit.quantize``. It must not change weights to compensate for rounding.
        images: as for ``quietvit.quantize``. They are held in memory. 32 give a first impression.
        bits: such as ``W4A4``, for a method given by name.
        calibration: other images to calibrate on. None takes ``images``.
        estimate: estimate instead of measuring.
        trace: an earlier ``quietvit.trace`` of this model.
        progress: show a progress bar after 3 seconds.

    Raises:
        QuietvitError: the model is in training mode, the method changes weights, or
            ``quietvit.quantize`` refuses the arguments.
    """
    switches = Switches(
        model,
        method,
        images,
        bits=bits,
        calibration=calibration,
        trace=trace,
        progress=progress,
    )
    return measured(switches, estimate=estimate, progress=progress)


def measured(switches: Switches, *, estimate: bool = False, progress: bool = True) -> Sensitivity:
    """Measure or estimate all parts of the model in ``switches``."""
    whole = switches.effect(switches.quantized.slots())
    complete, seen = True, switches.images
    if estimate:
        alone, without, seen = estimated_effects(switches, whole, progress)
        complete = seen == switches.images
    else:
        alone, without = {}, {}
        jobs = list(_jobs(switches))
        try:
            with closing(tracked(jobs, len(jobs), "sensitivity", progress)) as steps:
                for key, slots, only in steps:
                    if only:
                        alone[key] = switches.effect(slots)
                    else:
                        without[key] = switches.effect(switches.others(slots))
        except KeyboardInterrupt:
            complete = False
    quantized = switches.quantized

    def parts(kind: str, groups: Any) -> tuple[Part, ...]:
        return tuple(
            Part(
                name=name,
                role=slots[0].site.role if kind == "site" else name,
                sites=len({slot.site.name for slot in slots}),
                macs=sum({slot.site.name: slot.site.macs for slot in slots}.values()),
                bits="/".join(map(str, sorted({_bits(switches, slot) for slot in slots}))),
                alone=alone.get((kind, name)),
                without=without.get((kind, name)),
            )
            for name, slots in groups.items()
        )

    return Sensitivity(
        model=quantized.trace.model_name,
        setting=f"{quantized.method.name} {quantized.method.label}",
        policy=quantized.method.policy(),
        images=switches.images,
        part_images=seen,
        origins=switches.origins,
        macs=quantized.trace.macs,
        whole=whole,
        roles=parts("role", switches.roles),
        sites=parts("site", switches.sites),
        estimated=estimate,
        complete=complete,
    )


def _jobs(switches: Switches) -> Iterator[tuple[tuple[str, str], list[Slot], bool]]:
    """Yield (key, operands, whether only these are quantized).

    Roles come first: they are few, and tell most if the user stops early.
    """
    for kind, groups in (("role", switches.roles), ("site", switches.sites)):
        for only in (True, False):
            for name, slots in groups.items():
                yield (kind, name), slots, only


def _bits(switches: Switches, slot: Slot) -> int:
    found: Any = switches.quantized.quantizers[slot.key].bits
    return int(found)
