"""Quantization settings by name: ``W4A4`` and ``rtn-minmax``, and the method config they stand for.

How a method works lives in ``methods``; nothing is run here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from quietvit.errors import QuietvitError, nearest
from quietvit.quantization.method import Method, get_method, list_methods

RANGES = ("minmax", "percentile", "omse")
_BITS = re.compile(r"w(\d+)a(\d+)", re.IGNORECASE)


def parse_bits(text: str) -> tuple[int, int]:
    """Return (weight bits, activation bits) of ``W4A8``.

    Raises:
        QuietvitError: another form, or bits outside 2..16.
    """
    match = _BITS.fullmatch(text.strip())
    if match is None:
        raise QuietvitError(
            f"bits are written like W8A8 or W4A8 (weights 4, activations 8), not {text!r}."
        )
    bits = int(match[1]), int(match[2])
    for what, value in zip(("weights", "activations"), bits, strict=True):
        if not 2 <= value <= 16:
            raise QuietvitError(
                f"{text}: {value} bits for {what} are outside 2..16; choose bits in that range, "
                "such as W8A8, W6A6 or W4A4."
            )
    return bits


def parse_method(text: str, bits: str) -> Method:
    """Return the method config that e.g. ``rtn-omse`` at ``W4A4`` stands for.

    The part behind the last hyphen is the activation range where it is one of ``RANGES``.

    Raises:
        QuietvitError: unknown method or range, or bits outside 2..16.
    """
    weight_bits, activation_bits = parse_bits(bits)
    fields: dict[str, object] = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    name, _, estimator = text.strip().lower().rpartition("-")
    if estimator not in RANGES:
        known = list_methods()
        if text.strip().lower() not in known:
            forms = [f"{each}-{form}" for each in known for form in RANGES if _has_range(each)]
            raise QuietvitError(
                f"there is no method {text!r}{nearest(text, [*known, *forms])}; "
                "'quietvit methods' lists them."
            )
        return get_method(text.strip())(**fields)
    if not _has_range(name):
        raise QuietvitError(f"method {name!r} has no activation range; write {name!r} alone.")
    return get_method(name)(**fields, activation_range=estimator)


def _has_range(name: str) -> bool:
    return "activation_range" in get_method(name).model_fields


def setting_names(bits: Sequence[str], methods: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all combinations, ``W4A4 rtn-minmax``, each parsed beforehand."""
    for method in methods:
        for each in bits:
            parse_method(method, each)
    return tuple(
        f"{each.strip().upper()} {method.strip().lower()}" for each in bits for method in methods
    )
