"""A model as every target and every comparison takes it: with float32 weights."""

from __future__ import annotations

import copy

import torch

from quietvit.quantization import QuantizedModel


def as_float32(quantized: QuantizedModel) -> QuantizedModel:
    """The model itself where its weights are float32, else a copy in float32."""
    floats = {p.dtype for p in quantized.parameters() if p.is_floating_point()}
    return quantized if floats <= {torch.float32} else copy.deepcopy(quantized).float()
