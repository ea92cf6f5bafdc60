"""Every registered method with settings that make it quick on tiny models, and do not change what
it does.
"""

from __future__ import annotations

from typing import Any

from quietvit.quantization import get_method, list_methods
from quietvit.quantization.method import Method

METHODS = list_methods()
QUICK: dict[str, dict[str, Any]] = {
    "brecq": {"iterations": 8, "batch_size": 4},
    "qdrop": {"iterations": 8, "batch_size": 4},
    # The input of the patch embedding is float in their authors' code, and by default.
    "ptq4vit": {"candidates": 20, "rounds": 1, "patch_input_bits": 8},
    "adalog": {"rounds": 1, "rows": 64, "patch_input_bits": 8},
}


def configured(name: str, **fields: Any) -> Method:
    """The method's config, quick."""
    return get_method(name)(**(QUICK.get(name, {}) | fields))
