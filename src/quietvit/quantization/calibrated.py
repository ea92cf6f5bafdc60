"""``Calibrated``: everything that a method decided, and one forward pass under it.

Methods fill it in; ``quantized`` makes a model from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from quietvit.quantization.adjustments import Adjustment, ChannelAffine, Compensation
from quietvit.quantization.quantizers import Quantizer
from quietvit.quantization.slot import Slot
from quietvit.tracing import Site


@dataclass
class Calibrated:
    """Everything a method decides, except for weights it changes in ``Calibration.model``.

    A method may use it while filling it: ``handle`` runs a site with the current contents.

    Attributes:
        quantizers: by slot; operands without a quantizer stay float.
        adjustments: changes of sites' outputs, by site name.
        compensations: additions to blocks' outputs, by block name.
        notes: what the method left out, and why, for the report.
    """

    quantizers: dict[Slot, Quantizer] = field(default_factory=dict)
    adjustments: dict[str, Adjustment] = field(default_factory=dict)
    compensations: dict[str, Compensation] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def handle(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        """Run a site on quantized operands and adjust its output: a handler for ``intercept``."""
        return self.adjust(site, self.quantize(site, operands), run)

    def quantize(self, site: Site, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Quantize each operand of a site that has a quantizer."""
        quantizers = [self.quantizers.get(Slot(site, index)) for index in range(len(operands))]
        return tuple(x if q is None else q(x) for q, x in zip(quantizers, operands, strict=True))

    def adjust(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        """Run a site on the given operands, unquantized, and adjust its output."""
        adjustment = self.adjustments.get(site.name)
        return run(*operands) if adjustment is None else adjustment(operands, run)

    def add(self, site: Site, later: ChannelAffine) -> None:
        """Add an affine adjustment of a site's output, after any that is there already."""
        earlier = self.adjustments.get(site.name)
        assert earlier is None or isinstance(earlier, ChannelAffine)
        self.adjustments[site.name] = later if earlier is None else earlier.then(later)
