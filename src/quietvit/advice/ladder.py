"""The ladder of ``advise``: one row for each method and bits, measured on images kept aside.

``advise`` chooses what to try; ``effects`` compares outputs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor, nn

from quietvit.advice.effects import Effect, FloatOutputs
from quietvit.advice.sizes import average_bits, stored_bytes
from quietvit.errors import QuietvitError
from quietvit.quantization import Method, quantize
from quietvit.quantization.calibration import tracked
from quietvit.quantization.settings import parse_method, written_bits
from quietvit.tracing import Trace

METHODS = ("rtn-omse", "smoothquant", "repq-vit", "repq-vit+gptq", "erq")
"""Methods that ``advise`` tries, the cheap ones first."""
BITS = ("W8A8", "W6A6", "W4A8", "W4A4+attention-maps-8")
_MAPS = "+attention-maps-8"


@dataclass(frozen=True)
class Row:
    """One quantized model.

    Attributes:
        method, bits: as on the command line, such as ``rtn-omse`` and ``W4A4+attention-maps-8``.
        effect: on the images that were kept aside.
        mib: size of the weights, packed at their bits.
        average_bits: of both operands, over all multiply-accumulates; float counts 32.
        integer_share: share of the multiply-accumulates with two quantized operands.
        deployable: whether standard integer kernels compute all of these codes.
        seconds: that calibration took.
    """

    method: str
    bits: str
    effect: Effect
    mib: float
    average_bits: float
    integer_share: float
    deployable: bool
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.method} {self.bits}"

    @property
    def agreement(self) -> float | None:
        """Share of images whose class stays that of the float model; None without a classifier."""
        return None if self.effect.changed is None else 1 - self.effect.changed

    @property
    def quality(self) -> tuple[float, float]:
        """Larger is better: the agreement, then the smaller KL; or the smaller error."""
        if self.agreement is None:
            return -(self.effect.error or 0.0), 0.0
        return self.agreement, -(self.effect.kl or 0.0)

    def beats(self, other: Row) -> bool:
        """Whether nothing speaks for ``other``: as good, as cheap, as deployable, one better."""
        costs = [(row.average_bits, row.mib, not row.deployable) for row in (self, other)]
        no_worse = self.quality >= other.quality and all(
            a <= b for a, b in zip(*costs, strict=True)
        )
        return no_worse and (self.quality, costs[0]) != (other.quality, costs[1])


def pareto(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the rows that no other row beats, in their order."""
    return tuple(row for row in rows if not any(other.beats(row) for other in rows))


def settings(
    methods: Sequence[str], bits: Sequence[str], trace: Trace
) -> list[tuple[str, str, Method]]:
    """Return (method, bits, config) of all rows in the order in which they are tried.

    A model without attention has no maps to keep at 8 bits, so the preset is left out there.
    """
    maps = any(o.role == "post_softmax" for site in trace.sites for o in site.operands)
    names = [written_bits(each) for each in bits]
    if not maps:
        names = list(dict.fromkeys(name.replace(_MAPS, "") for name in names))
    return [(m, name, parse_method(m, name)) for m in methods for name in names]


class Ladder:
    """Quantizes one model in many ways and measures each, until the time is up.

    Attributes:
        rows: what was measured, in order.
        failed: (setting, reason) of what the method refused.
        skipped: settings for which the time did not suffice.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        calibration: Sequence[Tensor],
        floats: FloatOutputs,
    ) -> None:
        self.rows: list[Row] = []
        self.failed: list[tuple[str, str]] = []
        self.skipped: list[str] = []
        self._model, self._trace, self._calibration = model, trace, calibration
        self._floats = floats
        self._seconds: dict[str, float] = {}

    def climb(
        self, tries: Sequence[tuple[str, str, Method]], deadline: float, progress: bool
    ) -> None:
        """Measure the tries for which the time suffices; the first one always runs.

        ``deadline``: on the clock of ``time.monotonic``. Ctrl-C passes through; ``rows`` stay.
        """
        with closing(tracked(tries, len(tries), "trying methods", progress)) as steps:
            for method, bits, config in steps:
                if self.rows and time.monotonic() + self._expected(method) > deadline:
                    self.skipped.append(f"{method} {bits}")
                else:
                    self._measure(method, bits, config)

    def _expected(self, method: str) -> float:
        """Seconds of a try: as for this method before, else as the slowest one so far."""
        return self._seconds.get(method) or max(self._seconds.values(), default=0.0)

    def _measure(self, method: str, bits: str, config: Method) -> None:
        start = time.monotonic()
        try:
            quantized = quantize(
                self._model, config, self._calibration, trace=self._trace, progress=False
            )
            seconds = time.monotonic() - start
            effect = self._floats.effect(quantized)
        except QuietvitError as error:
            self.failed.append((f"{method} {bits}", str(error)))
            return
        self.rows.append(
            Row(
                method=method,
                bits=bits,
                effect=effect,
                mib=stored_bytes(quantized) / 2**20,
                average_bits=average_bits(self._trace, config),
                integer_share=quantized.coverage.fraction,
                deployable=quantized.deployable,
                seconds=seconds,
            )
        )
        self._seconds[method] = time.monotonic() - start
