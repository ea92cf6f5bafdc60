"""RepQ-ViT: per-channel quantizers after norms, turned into one by re-parametrization.

Ranges and algebra are in ``postnorm``; ``reparametrize`` changes the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration, refuse_unreached
from quietvit.quantization.fitting.postnorm import (
    ChannelSteps,
    Layerwise,
    blocks,
    layerwise,
    percentile_range,
    quantiles,
)
from quietvit.quantization.method import EdgeBits, Method, register_method
from quietvit.quantization.nonuniform import LogQuantizer, squared_error
from quietvit.quantization.quantizers import AffineQuantizer, Quantizer
from quietvit.quantization.reparametrize import (
    NormLink,
    NormLinks,
    hidden_norm_links,
    reparametrize,
)
from quietvit.quantization.slot import Slot
from quietvit.quantization.weights import weight_axis
from quietvit.tracing import MATMUL_KINDS, Site
from quietvit.tracing.ops import norm_channel_dim

NOMINAL_BITS = 8
"""Bits for the re-parametrization if activations stay float."""


@register_method("repq-vit")
class RepQViT(Method):
    """RepQ-ViT (Li et al., arXiv 2212.08254), after its paper and its authors' code.

    Weights are asymmetric per output channel, activations asymmetric per tensor. Both ranges are
    the quantiles (1 - p, p), p in {.999, .9999, .99999}, of least squared error over the
    calibration images. After norms, ranges (s_j, z_j) are per channel. ``postnorm.layerwise`` turns
    them into one (s̃, z̃), and weights are calibrated after that. Attention maps get a log √2
    quantizer at the activation bits, whose scale is the p-quantile of least squared error. It has
    one value more than the bits hold, like theirs. The patch embedding has 8 bits, the head the
    working bits.

    Differs from the authors' code, on purpose: (1) There is one pass, in order. Each range comes
    from the outputs of the quantized layers before it, with re-parametrization. Theirs only
    recalibrates weights after norms. (2) z̃ is rounded, so that codes stay. (3) Per-tensor and
    weight ranges contain zero. (4) The patch embedding's weight has 8 bits, like its input; theirs
    has the working bits. (5) Constant channels, see ``layerwise``.

    As in theirs, norms before the head keep per-tensor ranges. So do norms without a link (see
    ``norm_links``). Attention maps with negative values get a uniform quantizer. Notes name all of
    these. All images go through the model at once. If activations stay float, norms are
    re-parametrized as for 8 bits.
    """

    summary: ClassVar[str] = "scale re-parametrization behind norms, log √2 attention maps"
    source: ClassVar[str] = "arXiv 2212.08254"
    published: ClassVar[str] = "DeiT-T W4A4 57.43, W6A6 70.76 (float 72.21), 32 images"
    deployable: ClassVar[bool] = False

    head_bits: EdgeBits = "same"
    """Bits of both operands of the last layer: a number, None for float, or ``"same"``."""

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Run one pass of all images; set ranges and weights site by site on the way."""
        norm_links = self._links(calibration)
        links = {link.norm.name: link for link in norm_links.links}
        calibrated = Calibrated(notes=norm_links.notes(f"{self.name}'s re-parametrization"))
        missed: list[str] = []

        def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
            try:
                if site.name in links:
                    self._move(calibration, calibrated, links[site.name], run(*operands))
                elif site.kind in MATMUL_KINDS:
                    missed.extend(self._add_quantizers(calibrated, site, operands))
            except QuietvitError as error:
                raise QuietvitError(f"{site.name}: {error}") from error
            return calibrated.handle(site, operands, run)

        with torch.no_grad():
            calibration.run(calibration.everything(), handler, label=f"{self.name} {self.label}")
        refuse_unreached(missed)
        return calibrated

    def layerwise(self, steps: ChannelSteps) -> Layerwise:
        """Return one quantizer for all channels, from the means of scales and zero points."""
        return layerwise(steps)

    def attention_quantizer(self, x: Tensor, bits: int) -> Quantizer:
        """Return the log √2 quantizer of attention maps with the scale of least squared error."""
        rows = x.detach().float().reshape(1, -1)
        choice = [LogQuantizer.sqrt2(high[0], bits=bits) for _, high in quantiles(rows)]

        def error(quantizer: Quantizer) -> float:
            return sum(squared_error(quantizer, block).item() for block in blocks(rows))

        return min(choice, key=error)

    def _links(self, calibration: Calibration) -> NormLinks:
        """Return linked norms, except before the head or if all consumers are excluded."""
        hidden = hidden_norm_links(calibration.model, calibration.trace)
        links = (
            link
            for link in hidden.links
            if any(self.excluded_by(site) is None for site in link.consumers)
        )
        return NormLinks(tuple(links), hidden.skipped)

    def _move(
        self, calibration: Calibration, calibrated: Calibrated, link: NormLink, x: Tensor
    ) -> None:
        """Re-parametrize a norm for its output x and give its consumers their quantizer.

        If consumers differ in bits, the smallest bits decide. The others get a range of what they
        read afterwards.
        """
        slots = [Slot(site, 0) for site in link.consumers]
        bits = {slot: self.slot_bits(slot) for slot in slots}
        used = min((b for b in bits.values() if b is not None), default=NOMINAL_BITS)
        axis = norm_channel_dim(link.norm.function)
        low, high = percentile_range(x, used, axis=axis, hold_zero=False)
        moved = self.layerwise(ChannelSteps.of(low, high, used))
        reparametrize(calibration.model, link, calibrated, gain=moved.gain, shift=moved.shift)
        for slot, wanted in bits.items():
            if wanted == used:
                calibrated.quantizers[slot] = copy.deepcopy(moved.quantizer)

    def _add_quantizers(
        self, calibrated: Calibrated, site: Site, operands: tuple[Tensor, ...]
    ) -> Iterator[str]:
        """Add the quantizers of a product. Yield its name if an operand to quantize is empty."""
        for index, x in enumerate(operands):
            slot = Slot(site, index)
            bits = self.slot_bits(slot)
            if bits is None or slot in calibrated.quantizers:
                continue
            if not x.numel():
                yield site.name
                continue
            attention = site.kind in ("matmul", "einsum") and slot.role == "post_softmax"
            if attention and bool((x < 0).any()):
                attention = False
                calibrated.notes.append(
                    f"{site.name}: attention maps with negative values take a uniform quantizer"
                )
            calibrated.quantizers[slot] = (
                self.attention_quantizer(x, bits) if attention else _uniform(slot, x, bits)
            )


def _uniform(slot: Slot, x: Tensor, bits: int) -> AffineQuantizer:
    """Return an asymmetric quantizer: weights per output channel, activations per tensor."""
    axis = None
    if slot.is_weight:
        axis = weight_axis(slot.site)
    low, high = percentile_range(x, bits, axis=axis)
    return AffineQuantizer.from_range(low, high, bits=bits, symmetric=False, axis=axis)
