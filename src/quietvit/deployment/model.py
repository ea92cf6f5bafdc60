"""Convert a model to float32 weights and fixed steps, which all targets and comparisons need."""

from __future__ import annotations

import copy

import torch

from quietvit.quantization import QuantizedModel
from quietvit.quantization.learned import with_fixed_steps


def as_float32(quantized: QuantizedModel) -> QuantizedModel:
    """Return the model itself if its weights are float32 and its steps fixed, else such a copy."""
    quantized = with_fixed_steps(quantized)
    floats = {p.dtype for p in quantized.parameters() if p.is_floating_point()}
    return quantized if floats <= {torch.float32} else copy.deepcopy(quantized).float()
