"""Regularizers that quiet weights or activations at the steps of an optimizer, each by one line.

Most act on ordered matrix pairs. Knows models only through ``quietvit.pairs`` and
``quietvit.tracing``, and nothing of quantization.
"""

from quietvit.decay.activations import ActivationWatch, largest_activation
from quietvit.decay.amplification import amplifications, worst_amplification
from quietvit.decay.colinearity import ColinearityDecay
from quietvit.decay.gains import NormGainDecay
from quietvit.decay.kurtosis import KurtosisRegularization
from quietvit.decay.penalties import PENALTIES
from quietvit.decay.regularizer import Regularizer
from quietvit.decay.schedule import StrengthSchedule
from quietvit.decay.spectral import SpectralDecay
from quietvit.decay.tweo import TWEO
from quietvit.decay.weight import PairWeightDecay

__all__ = [
    "PENALTIES",
    "TWEO",
    "ActivationWatch",
    "ColinearityDecay",
    "KurtosisRegularization",
    "NormGainDecay",
    "PairWeightDecay",
    "Regularizer",
    "SpectralDecay",
    "StrengthSchedule",
    "amplifications",
    "largest_activation",
    "worst_amplification",
]
