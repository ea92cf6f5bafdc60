"""The ladder of ``advise``: one row per method and bits, measured on held-out images.

``advise`` chooses the settings, and ``effects`` compares outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor, nn

from quietvit.advice.budget import Budget
from quietvit.advice.effects import Effect, FloatOutputs
from quietvit.advice.sizes import average_bits, stored_bytes
from quietvit.errors import QuietvitError
from quietvit.progress import tracked
from quietvit.quantization import Method, quantize
from quietvit.quantization.settings import parse_method, written_bits
from quietvit.tracing import Trace

METHODS = ("rtn-omse", "smoothquant", "repq-vit", "repq-vit+gptq", "erq")
"""Methods that ``advise`` tries by default, cheap ones first."""
BITS = ("W8A8", "W6A6", "W4A8", "W4A4+attention-maps-8")
_MAPS = "+attention-maps-8"
Try = tuple[str, str, Method]
"""(method, bits, config) of one setting."""


@dataclass(frozen=True)
class Row:
    """One quantized model and its measured numbers.

    Attributes:
        method, bits: as on the command line, such as ``rtn-omse`` and ``W4A4+attention-maps-8``.
        effect: effect on the held-out images.
        mib: packed size of the parameters in MiB.
        average_bits: mean over both operands and all multiply-accumulates. Float counts 32.
        integer_share: share of the multiply-accumulates with two quantized operands.
        deployable: whether standard integer kernels can compute all of its codes.
        seconds: time of the calibration.
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
        """Share of images with the float model's class. None if the model is not a classifier."""
        return None if self.effect.changed is None else 1 - self.effect.changed

    @property
    def quality(self) -> tuple[float, float]:
        """(agreement, -KL) of a classifier, otherwise (-error, 0). Larger is better."""
        if self.agreement is None:
            return -(self.effect.error or 0.0), 0.0
        return self.agreement, -(self.effect.kl or 0.0)

    def beats(self, other: Row) -> bool:
        """Whether this row is better than ``other`` in one aspect and worse in none."""
        costs = [(row.average_bits, row.mib, not row.deployable) for row in (self, other)]
        no_worse = self.quality >= other.quality and all(
            a <= b for a, b in zip(*costs, strict=True)
        )
        return no_worse and (self.quality, costs[0]) != (other.quality, costs[1])


def pareto(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the rows that no other row beats, in the given order."""
    return tuple(row for row in rows if not any(other.beats(row) for other in rows))


def settings(methods: Sequence[str], bits: Sequence[str], trace: Trace) -> list[Try]:
    """Return (method, bits, config) of all rows, in the order of the trials.

    A model without attention has no maps, so the preset ``attention-maps-8`` is dropped there.
    """
    maps = any(o.role == "post_softmax" for site in trace.sites for o in site.operands)
    names = [written_bits(each) for each in bits]
    if not maps:
        names = list(dict.fromkeys(name.replace(_MAPS, "") for name in names))
    return [(m, name, parse_method(m, name)) for m in methods for name in names]


def lowest_first(tries: Sequence[Try]) -> list[Try]:
    """Return the settings in another order, for a search that may end early.

    The first method comes first, with all bits. The others start at the last bits, which are the
    lowest: methods differ most there.
    """
    first = tries[0][0]
    bits = [name for method, name, _ in tries if method == first]
    others = [each for each in tries if each[0] != first]
    others.sort(key=lambda each: -bits.index(each[1]))
    return [each for each in tries if each[0] == first] + others


class Ladder:
    """Quantize one model with each setting and measure it, until the time is up.

    Attributes:
        rows: the measured settings, in order.
        failed: (setting, reason) for each setting that raised an error.
        skipped: settings that did not fit into the time.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        calibration: Sequence[Tensor],
        floats: FloatOutputs,
        budget: Budget,
    ) -> None:
        self.rows: list[Row] = []
        self.failed: list[tuple[str, str]] = []
        self.skipped: list[str] = []
        self._model, self._trace, self._calibration = model, trace, calibration
        self._floats, self._now = floats, budget.now
        self._seconds: dict[str, float] = {}
        self.pass_seconds = 0.0
        """Largest time of a quantized forward pass, per image."""

    def climb(
        self,
        tries: Sequence[Try],
        fits: Callable[[float], bool],
        progress: bool,
    ) -> None:
        """Measure the settings that fit into the time. The first one always runs.

        ``fits`` tells whether work of this many seconds fits. Ctrl-C raises, and ``rows`` stay.
        """
        with closing(tracked(tries, len(tries), "trying methods", progress)) as steps:
            for method, bits, config in steps:
                if self.rows and not fits(self.expected(method)):
                    self.skipped.append(f"{method} {bits}")
                else:
                    self._measure(method, bits, config)

    def expected(self, method: str) -> float:
        """Return the last time of this method in seconds, or else that of the slowest method."""
        return self._seconds.get(method) or max(self._seconds.values(), default=0.0)

    def _measure(self, method: str, bits: str, config: Method) -> None:
        start = self._now()
        try:
            quantized = quantize(
                self._model, config, self._calibration, trace=self._trace, progress=False
            )
            seconds = self._now() - start
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
        self._seconds[method] = self._now() - start
        passes = (self._seconds[method] - seconds) / self._floats.images
        self.pass_seconds = max(self.pass_seconds, passes)
