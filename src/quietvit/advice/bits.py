"""``choose_bits``: choose the bits of each operand under a budget, from the cost of each one.

``operands`` measures the costs, and ``program`` finds the best choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quietvit.advice.operands import operand_costs
from quietvit.advice.program import Program
from quietvit.advice.sizes import average_bits, weight_size
from quietvit.advice.switches import Switches, read_batches, refuse_text, refuse_unfit
from quietvit.errors import QuietvitError
from quietvit.files import finite, json_text, write_atomic
from quietvit.origin import Origins, origins_of, provenance
from quietvit.quantization import Method, OnTop, Slot
from quietvit.quantization.calibration import IMAGES_ALONE
from quietvit.quantization.on_top import SHARED
from quietvit.quantization.overrides_file import write_overrides
from quietvit.quantization.settings import parse_bits, parse_method, written_bits
from quietvit.tracing import Trace, plain_model, trace_images

CHOICES = ("W4A4", "W4A8", "W6A6", "W8A8")


@dataclass(frozen=True)
class BitChoice:
    """The bits chosen for each site.

    Attributes:
        overrides: bits for ``Method.overrides`` of any method. The keys are site names. If the two
            operands of a product of activations differ, they are names with the operand, such as
            ``blocks.0.attn.attention_value:left``.
        method: the given method with these bits, for ``quietvit.quantize(model, choice.method)``.
        cost: sum of the costs of all operands at their bits, in ``measure``.
        measure: ``kl``, or ``error`` for a model that is not a classifier (squares are summed).
        average_bits: mean over both operands and all multiply-accumulates. Float counts 32.
        weight_bytes: packed size of the weights of all matrix products, without scales.
        origins: how the images for calibration and for measuring were generated
            (``quietvit.synthesize``); None for real images.
        complete: False if Ctrl-C ended the search before all choices were measured.
    """

    overrides: Mapping[str, str]
    method: Method
    cost: float
    measure: str
    average_bits: float
    weight_bytes: float
    origins: Origins = (None, None)
    complete: bool = True

    def __str__(self) -> str:
        counts = Counter(self.overrides.values()).most_common()
        choices = ", ".join(f"{number} x {bits}" for bits, number in counts)
        tail = [] if self.complete else ["stopped early, before all choices were measured"]
        tail += provenance(self.origins)
        return (
            f"{self.average_bits:.2f} bits on average, weights {self.weight_bytes / 2**20:.2f} "
            f"MiB: {choices}; the sum of the costs ({self.measure}) is {self.cost:.3g}"
            + "".join(f"; {words}" for words in tail)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return overrides and numbers as plain data."""
        return finite({key: value for key, value in vars(self).items() if key != "method"})

    def to_json(self, path: str | Path) -> Path:
        """Write ``to_dict`` to ``path`` atomically. Returns the path."""
        return write_atomic(path, json_text(self.to_dict(), indent=1) + "\n")

    def to_toml(self, path: str | Path) -> Path:
        """Write all overrides of ``method`` to a TOML file atomically. Returns the path.

        The path can then stand for overrides: ``quietvit.RTN(overrides="bits.toml")``, ``quietvit
        quantize --keep bits.toml``, or ``overrides = "bits.toml"`` in the recipe section ``qat``.

        Raises QuietvitError if the path does not end with ``.toml``, or cannot be written.
        """
        return write_overrides(path, self.method.overrides.plain(), f"quietvit choose-bits: {self}")


def choose_bits(
    model: nn.Module,
    method: Method | str,
    images: Any,
    *,
    average: float | None = None,
    weight_bytes: float | None = None,
    choices: Sequence[str] = CHOICES,
    calibration: Any = None,
    estimate: bool = True,
    trace: Trace | None = None,
    progress: bool = True,
) -> BitChoice:
    """Choose the bits of each operand to minimize the change of the outputs under a budget.

    For each choice, the model is calibrated once, and the cost of each operand is measured or
    estimated (``quietvit.advice.operands``). The sum of the costs is minimized exactly. A site with
    a weight takes one of the choices. Each operand of a product of activations takes the activation
    bits of one choice, so attention maps and values can differ. For several budgets, call
    ``quietvit.advice.bit_costs`` once, and ``choose`` for each budget.

    Operands with overrides, exclusions or bits of their own in ``method`` keep them and count in
    the budget. By default, these are the patch embedding and the head.

    Args:
        model: the float model, in eval mode.
        method: a config or a name. Its working bits are replaced.
        images: as for ``quietvit.sensitivity``.
        average: budget of mean bits over both operands and all multiply-accumulates. Uniform W6A6
            has 6. A float operand counts 32.
        weight_bytes: budget for the weights of all matrix products. Give exactly one budget.
        choices: bits to choose from, such as ``W4A8``.
        calibration, trace, progress: as for ``quietvit.sensitivity``.
        estimate: estimate the cost of each operand instead of measuring it. This is faster, and
            less exact at few bits.

    Raises:
        QuietvitError: not exactly one budget, a budget below the least possible, fewer than two
            choices, no operand that can choose, or see ``quietvit.sensitivity``.
    """
    search = _Search(model, method, images, choices, trace)
    search.program().check(average, weight_bytes)
    costs = search.measure(calibration, estimate, progress)
    return costs.choose(average=average, weight_bytes=weight_bytes)


def bit_costs(
    model: nn.Module,
    method: Method | str,
    images: Any,
    *,
    choices: Sequence[str] = CHOICES,
    calibration: Any = None,
    estimate: bool = True,
    trace: Trace | None = None,
    progress: bool = True,
) -> BitCosts:
    """Measure the cost of each operand at each choice of bits. See ``choose_bits`` for arguments.

    Ctrl-C ends the search. The result then has the choices so far, if there are at least two.
    """
    search = _Search(model, method, images, choices, trace)
    return search.measure(calibration, estimate, progress)


@dataclass(frozen=True)
class BitCosts:
    """The cost of each operand at each choice of bits.

    Attributes:
        trace: trace of the model.
        settings: the method at each choice.
        costs: costs by operand and its bits, in ``measure``. Costs in ``error`` are squared.
        measure: ``kl`` or ``error``.
        origins: as in ``BitChoice``.
        complete: False if Ctrl-C ended the search.
    """

    trace: Trace
    settings: Mapping[str, Method]
    costs: Mapping[tuple[Slot, int], float]
    measure: str
    origins: Origins
    complete: bool

    def choose(
        self, *, average: float | None = None, weight_bytes: float | None = None
    ) -> BitChoice:
        """Choose the bits of each operand under a budget, as ``choose_bits`` does."""
        program = Program(self.trace, self.settings)
        overrides, cost = program.solve(self.costs, average, weight_bytes)
        lowest = next(iter(self.settings.values()))
        every = {**lowest.overrides.plain(), **overrides}
        final = with_bits(lowest, lowest.weight_bits, lowest.activation_bits, every)
        return BitChoice(
            overrides=overrides,
            method=final,
            cost=cost,
            measure=self.measure,
            average_bits=average_bits(self.trace, final),
            weight_bytes=weight_size(self.trace, final),
            origins=self.origins,
            complete=self.complete,
        )


class _Search:
    """The checked arguments of ``choose_bits``, and the measurement of costs."""

    def __init__(
        self,
        model: nn.Module,
        method: Method | str,
        images: Any,
        choices: Sequence[str],
        trace: Trace | None,
    ) -> None:
        refuse_unfit(model)
        refuse_text("choices", choices, "['W4A4', 'W8A8']")
        # The fewest bits come first: they meet the budget, also if Ctrl-C ends the search.
        names = sorted(
            dict.fromkeys(map(written_bits, choices)), key=lambda name: sum(parse_bits(name))
        )
        if len(names) < 2:
            shown = ", ".join(names) or "none"
            raise QuietvitError(f"choices is {shown}. Give at least two choices of bits.")
        given = parse_method(method) if isinstance(method, str) else method
        self.settings = {name: with_bits(given, *parse_bits(name)) for name in names}
        self.model = plain_model(model)
        self.images = images
        self.batches = read_batches(images, self.model)
        self.trace = trace or trace_images(self.model, self.batches[0][:1], IMAGES_ALONE)

    def program(self) -> Program:
        return Program(self.trace, self.settings)

    def measure(self, calibration: Any, estimate: bool, progress: bool) -> BitCosts:
        costs: dict[tuple[Slot, int], float] = {}
        finished, measure = 0, "kl"
        try:
            for setting in self.settings.values():
                switches = Switches(
                    self.model,
                    setting,
                    self.batches,
                    calibration=calibration,
                    trace=self.trace,
                    progress=progress,
                )
                measure = "kl" if switches.floats.classifies else "error"
                bits = {slot: setting.slot_bits(slot) or 0 for slot in switches.quantized.slots()}
                known = [slot for slot, own in bits.items() if (slot, own) in costs]
                new = operand_costs(switches, skipped=known, estimate=estimate, progress=progress)
                costs |= {(slot, bits[slot]): cost for slot, cost in new.items()}
                finished += 1
        except KeyboardInterrupt:
            if finished < 2:
                raise
        return BitCosts(
            trace=self.trace,
            settings=dict(list(self.settings.items())[:finished]),
            costs=costs,
            measure=measure,
            origins=origins_of(self.images, calibration),
            complete=finished == len(self.settings),
        )


def with_bits(
    method: Method,
    weight_bits: int | None,
    activation_bits: int | None,
    overrides: Mapping[str, Any] | None = None,
) -> Method:
    """Return the method with other working bits and, if given, other overrides."""
    if isinstance(method, OnTop):
        base = with_bits(method.base, weight_bits, activation_bits, overrides)
        own = {key: value for key, value in method if key not in (*SHARED, "base")}
        return type(method)(**own, base=base)
    fields = dict(method) | {"weight_bits": weight_bits, "activation_bits": activation_bits}
    if overrides is not None:
        fields["overrides"] = overrides
    return type(method)(**fields)
