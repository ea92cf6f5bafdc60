"""Golden numbers of every method on DeiT-Tiny with its ImageNet weights and 32 real images, 96 px.

The error is that of the logits, ‖quantized - float‖ / ‖float‖. Roundings fall otherwise with other
builds of torch and other processors; ``TOLERANCE`` covers what was seen of it, and is far below
what a wrong formula does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quietvit
from quietvit.data import calibration_images, create_model, evaluation_transform, load_dataset
from quietvit.quantization import get_method, list_methods

pytestmark = pytest.mark.slow
TOLERANCE = 0.15
# Reduced where the published setting takes minutes; the rest as the defaults are.
FIELDS: dict[str, dict[str, Any]] = {
    "ptq4vit": {"candidates": 30, "rounds": 1, "rows": 256},
    "adalog": {"rounds": 1, "rows": 256},
    "brecq": {"iterations": 10, "batch_size": 8, "base": "repq-vit"},
    "qdrop": {"iterations": 10, "batch_size": 8, "base": "repq-vit"},
    "gptq": {"base": "repq-vit"},
    "qwt": {"base": "repq-vit"},
}
# Method: error at W8A8, at W4A4; 16 calibration images, seed 0. None where a run takes ten seconds
# and more: the same code runs at 4 bits.
GOLDEN: dict[str, tuple[float | None, float]] = {
    "adalog": (None, 0.7235),
    "brecq": (None, 0.7582),
    "dopq-vit": (0.1792, 0.8165),
    "erq": (None, 0.8353),
    "fq-vit": (0.5333, 0.9941),
    "gptq": (None, 0.8237),
    "hptq": (0.7021, 0.9918),
    "ptq4vit": (None, 0.9773),
    "qdrop": (None, 0.7487),
    "qwt": (0.3383, 0.936),
    "repq-vit": (0.3147, 0.8162),
    "rtn": (0.1628, 0.9394),
    "smoothquant": (0.1546, 0.9308),
}


@pytest.fixture(scope="module")
def real(test_data):
    weights = test_data / "deit_tiny_patch16_224.safetensors"
    model = create_model("deit_tiny_patch16_224", weights=weights, img_size=96).eval()
    transform = evaluation_transform(model)
    table = load_dataset(
        f"table:{test_data / 'imagenette_calibration_1024.parquet'}", split="train"
    )
    shown = load_dataset(f"table:{test_data / 'imagenet_dev_1000.parquet'}", split="train")
    images = torch.stack([transform(shown[i][0]) for i in range(32)])
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in images.split(16)])
    return model, calibration_images(table, 16, transform, seed=0), images, wanted


def error(real, name, bits):
    model, calibration, images, wanted = real
    method = get_method(name)(weight_bits=bits, activation_bits=bits, **FIELDS.get(name, {}))
    quantized = quietvit.quantize(model, method, calibration, progress=False)
    with torch.no_grad():
        got = torch.cat([quantized(part) for part in images.split(16)])
    return float((got - wanted).norm() / wanted.norm())


def test_every_method_has_its_numbers():
    assert set(GOLDEN) == set(list_methods())


CASES = [(name, bits) for name in GOLDEN for bits in (8, 4) if GOLDEN[name][bits == 4]]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_error_of_the_logits_is_as_it_was(real, name, bits):
    wanted = GOLDEN[name][bits == 4]
    assert error(real, name, bits) == pytest.approx(wanted, rel=TOLERANCE)
