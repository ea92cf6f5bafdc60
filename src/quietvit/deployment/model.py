"""A model as every target and every comparison takes it: float32 weights, one tensor of logits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization import QuantizedModel


def as_float32(quantized: QuantizedModel) -> QuantizedModel:
    """The model itself where its weights are float32, else a copy in float32."""
    floats = {p.dtype for p in quantized.parameters() if p.is_floating_point()}
    return quantized if floats <= {torch.float32} else copy.deepcopy(quantized).float()


def logits_of(output: Any) -> Tensor:
    """The one tensor a model gives: its ``logits`` where it has such, or its only tensor.

    Raises QuietvitError where it gives several.
    """
    found = getattr(output, "logits", output)
    tensors = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, Tensor)]
    if len(tensors) != 1:
        raise QuietvitError(
            f"the model gives {len(tensors)} tensors, not logits; export a classifier, or wrap "
            "the model so that it returns one tensor."
        )
    return tensors[0]
