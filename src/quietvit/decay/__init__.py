"""Decoupled updates that act on ordered matrix pairs after each optimizer step.

Knows models only through ``quietvit.pairs``, and nothing of quantization.
"""

from quietvit.decay.colinearity import ColinearityDecay
from quietvit.decay.gains import NormGainDecay
from quietvit.decay.penalties import PENALTIES

__all__ = ["PENALTIES", "ColinearityDecay", "NormGainDecay"]
