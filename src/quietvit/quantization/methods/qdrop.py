"""QDrop: block reconstruction in which activations are left float at random.

The loop lives in ``reconstruct``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from quietvit.quantization.fitting.reconstruct import Reconstruction
from quietvit.quantization.method import register_method


@register_method("qdrop")
class QDrop(Reconstruction):
    """QDrop (Wei et al., arXiv 2203.05740) on top of ``base``; see ``Reconstruction`` for the fit.

    While a block is fitted, each entry of an activation stays float with probability ``drop``: in
    the block's input, where the float model's own is taken instead, and behind each quantizer of an
    activation inside. drop = 0 is BRECQ. Probabilities are multiples of 1/256.

    Differs from the authors' setting: (1) weights have symmetric codes by default, as the base's.
    (2) Layers outside residual blocks whose input a re-parametrization moved take the float input
    moved alike.
    """

    summary: ClassVar[str] = "block reconstruction with activations randomly left float"
    source: ClassVar[str] = "arXiv 2203.05740; AdaRound arXiv 2004.10568, LSQ arXiv 1902.08153"
    published: ClassVar[str] = "DeiT-T W4A4 64.95 (float 72.21), 1024 images, 20000 iterations"

    drop: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that an entry of an activation stays float while a block is fitted."""

    @property
    def keep(self) -> float:
        return self.drop
