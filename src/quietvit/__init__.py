"""Train vision transformers whose activations stay quiet, to survive low-bit quantization.

The public surface; every name is imported on first use, so that ``import quietvit`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quietvit.errors import QuietvitError

if TYPE_CHECKING:
    from quietvit.decay import (
        TWEO,
        ColinearityDecay,
        KurtosisRegularization,
        NormGainDecay,
        PairWeightDecay,
        SpectralDecay,
        StrengthSchedule,
        register_regularizer,
    )
    from quietvit.deployment import check, export, predict
    from quietvit.measure import diagnose
    from quietvit.pairs import MatrixPair, find_pairs
    from quietvit.quantization import (
        BRECQ,
        ERQ,
        GPTQ,
        HPTQ,
        RTN,
        AdaLog,
        DopQViT,
        FQViT,
        PTQ4ViT,
        QDrop,
        QwT,
        RepQViT,
        SmoothQuant,
        list_methods,
        load,
        quantize,
    )
    from quietvit.tracing import WeightView, trace

__version__ = "0.1.0"

_HOMES = {
    "trace": "quietvit.tracing",
    "WeightView": "quietvit.tracing",
    "find_pairs": "quietvit.pairs",
    "MatrixPair": "quietvit.pairs",
    "ColinearityDecay": "quietvit.decay",
    "NormGainDecay": "quietvit.decay",
    "SpectralDecay": "quietvit.decay",
    "TWEO": "quietvit.decay",
    "KurtosisRegularization": "quietvit.decay",
    "PairWeightDecay": "quietvit.decay",
    "StrengthSchedule": "quietvit.decay",
    "register_regularizer": "quietvit.decay",
    "diagnose": "quietvit.measure",
    "export": "quietvit.deployment",
    "check": "quietvit.deployment",
    "predict": "quietvit.deployment",
    "quantize": "quietvit.quantization",
    "RTN": "quietvit.quantization",
    "SmoothQuant": "quietvit.quantization",
    "FQViT": "quietvit.quantization",
    "PTQ4ViT": "quietvit.quantization",
    "RepQViT": "quietvit.quantization",
    "DopQViT": "quietvit.quantization",
    "AdaLog": "quietvit.quantization",
    "GPTQ": "quietvit.quantization",
    "ERQ": "quietvit.quantization",
    "BRECQ": "quietvit.quantization",
    "QDrop": "quietvit.quantization",
    "QwT": "quietvit.quantization",
    "HPTQ": "quietvit.quantization",
    "load": "quietvit.quantization",
    "list_methods": "quietvit.quantization",
}

__all__ = [
    "BRECQ",
    "ERQ",
    "GPTQ",
    "HPTQ",
    "RTN",
    "TWEO",
    "AdaLog",
    "ColinearityDecay",
    "DopQViT",
    "FQViT",
    "KurtosisRegularization",
    "MatrixPair",
    "NormGainDecay",
    "PTQ4ViT",
    "PairWeightDecay",
    "QDrop",
    "QuietvitError",
    "QwT",
    "RepQViT",
    "SmoothQuant",
    "SpectralDecay",
    "StrengthSchedule",
    "WeightView",
    "check",
    "diagnose",
    "export",
    "find_pairs",
    "list_methods",
    "load",
    "predict",
    "quantize",
    "register_regularizer",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quietvit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
