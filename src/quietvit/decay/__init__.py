"""Regularizers that keep weights or activations small, attached to an optimizer by one line.

Most act on ordered matrix pairs. Knows models only through ``quietvit.pairs`` and
``quietvit.tracing``, and nothing of quantization.
"""

from quietvit.decay.activations import ActivationWatch, largest_activation
from quietvit.decay.amplification import amplifications, worst_amplification
from quietvit.decay.colinearity import ColinearityDecay
from quietvit.decay.config import RegularizerConfig, WeightRegularizerConfig
from quietvit.decay.decoupled import DecoupledUpdate, PenaltyGradient, WholeUpdate
from quietvit.decay.gains import NormGainDecay
from quietvit.decay.kurtosis import KurtosisRegularization
from quietvit.decay.penalties import PENALTIES
from quietvit.decay.registry import register_regularizer, registered_regularizers
from quietvit.decay.regularizer import BaseRegularizer, Regularizer
from quietvit.decay.schedule import StrengthSchedule
from quietvit.decay.spectral import SpectralDecay
from quietvit.decay.totals import strength_for_total
from quietvit.decay.tweo import TWEO
from quietvit.decay.weight import PairWeightDecay

__all__ = [
    "PENALTIES",
    "TWEO",
    "ActivationWatch",
    "BaseRegularizer",
    "ColinearityDecay",
    "DecoupledUpdate",
    "KurtosisRegularization",
    "NormGainDecay",
    "PairWeightDecay",
    "PenaltyGradient",
    "Regularizer",
    "RegularizerConfig",
    "SpectralDecay",
    "StrengthSchedule",
    "WeightRegularizerConfig",
    "WholeUpdate",
    "amplifications",
    "largest_activation",
    "register_regularizer",
    "registered_regularizers",
    "strength_for_total",
    "worst_amplification",
]
