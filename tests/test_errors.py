from __future__ import annotations

import pytest

from quietvit.errors import nearest

MODELS = ["rdnet_tiny", "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224", "vitamin_base",
          "vit_base_patch16_224", "vit_base_patch14_dinov2", "levit_128"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit_tiny", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]),
        ("DeiT-Tiny", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]),
        ("tiny_deit", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]),
        ("vit", ["vit_base_patch16_224", "vit_base_patch14_dinov2", "vitamin_base"]),
        ("dinov2", ["vit_base_patch14_dinov2"]),
        ("evit", ["levit_128"]),
        ("rdnte_tiny", ["rdnet_tiny"]),
        ("zzzz", []),
        ("_", []),
    ],
)
def test_a_part_of_a_name_is_found_before_names_spelt_alike(name, expected):
    told = nearest(name, MODELS)
    assert told.split("'")[1::2] == expected
