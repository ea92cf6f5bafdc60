"""Tiny quantized models and their exported files, made once for all tests of a process."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quietvit
import zoo
from quietvit.quantization import QuantizedModel
from test_quantization_model import make

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

SIZES = {"timm-swin": 64, "hf-swin": 64, "tv-swin": 64, "timm-eva-swiglu": 28}


def pictures(model: str, count: int = 8, seed: int = 0) -> Tensor:
    size = SIZES.get(model, 32)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@cache
def quantized(model: str, method: str = "rtn", **fields: Any) -> QuantizedModel:
    """A model of the zoo, or of test_quantization_model, under a method; do not change it."""
    built = zoo.build(model)[0] if model in zoo.ZOO else make(model)
    config = quietvit.quantization.get_method(method)(**fields)
    return quietvit.quantize(built, config, pictures(model), progress=False)


@cache
def exported(
    model: str, method: str = "rtn", as_: str | None = None, opset: int = 21, **fields: Any
) -> quietvit.deployment.Artifact:
    """The ONNX file of ``quantized``; do not change it."""
    folder = Path(tempfile.mkdtemp(prefix="quietvit-test-"))
    return quietvit.export(
        quantized(model, method, **fields), folder / "model.onnx", as_=as_, opset=opset
    )
