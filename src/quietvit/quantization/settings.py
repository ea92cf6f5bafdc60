"""Quantization settings by name, such as ``W4A4`` and ``rtn-minmax``, parsed into method configs.

How a method works is in ``methods``; nothing runs here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from quietvit.errors import QuietvitError, nearest
from quietvit.quantization.method import Method, get_method, list_methods
from quietvit.quantization.on_top import SHARED, OnTop
from quietvit.quantization.overrides import PRESETS
from quietvit.quantization.overrides_file import is_overrides_file, read_overrides

RANGES = ("minmax", "percentile", "omse")
_BITS = re.compile(r"w(\d+)a(\d+)", re.IGNORECASE)


def parse_bits(text: str) -> tuple[int, int]:
    """Return (weight bits, activation bits) of ``W4A8``. Raises QuietvitError for other texts."""
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


def written_bits(text: str) -> str:
    """Return the normal spelling: ``w4a4 + post_softmax=8`` becomes ``W4A4+post_softmax=8``."""
    first, *kept = (part.strip() for part in text.split("+"))
    return "+".join([first.upper(), *kept])


def parse_keep(texts: Iterable[str]) -> dict[str, Any]:
    """Parse ``post_softmax=8``, ``*.fc1=W4A8`` or ``head=float`` into overrides.

    A text without ``=`` names a preset, such as ``attention-maps-8``, or a file of overrides, such
    as ``bits.toml``. The keys are checked later, when the method is built and used.

    Raises:
        QuietvitError: a text of another form, an unreadable file, or a key that is given twice.
    """
    overrides: dict[str, Any] = {}
    for text in texts:
        new = _kept(text.strip())
        twice = sorted(overrides.keys() & new.keys())
        if twice:
            raise QuietvitError(f"{twice[0]!r} has bits twice; give it once.")
        overrides |= new
    return overrides


def _kept(text: str) -> dict[str, Any]:
    if is_overrides_file(text):
        return read_overrides(text)
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals and key in PRESETS:
        return dict(PRESETS[key])
    if not (key and value):
        raise QuietvitError(
            f"{text!r} does not say which bits to keep{nearest(key, PRESETS)}; write a role or "
            "a pattern of site names with its bits, such as post_softmax=8, '*.fc1=W4A8' or "
            f"head=float, a file such as bits.toml, or a preset: {', '.join(PRESETS)}."
        )
    return {key: int(value) if value.isdecimal() else value}


def parse_method(
    text: str, bits: str | None = None, options: Iterable[str] = (), keep: Iterable[str] = ()
) -> Method:
    """Parse a method's name, such as ``rtn-omse`` or ``repq-vit+qwt``, into a method config.

    Args:
        text: the name of a method. A suffix from ``RANGES``, such as ``-omse``, sets its activation
            range. A method after ``+`` works on top of the one before it.
        bits: such as ``W4A8``, see ``parse_bits``. Text after a ``+`` is read like ``keep``, as in
            ``W4A4+attention-maps-8``. None takes the method's defaults.
        options: ``field=value``, the value as JSON or plain text. Fields that all methods share
            (bits, ``exclude``) go to the first method, others to the last method that has them.
        keep: bits of single roles or sites, see ``parse_keep``.

    Raises:
        QuietvitError: unknown method, range or field, or bits outside 2..16.
    """
    parts = [_parse_name(part) for part in text.split("+")]
    fields: list[dict[str, Any]] = [{} for _ in parts]
    for n, (cls, estimator) in enumerate(parts):
        if estimator is not None:
            fields[n]["activation_range"] = estimator
        if n > 0 and not issubclass(cls, OnTop):
            raise QuietvitError(
                f"{text!r}: {cls.name} does not work on top of another method; "
                f"{', '.join(_on_top())} do."
            )
    for option in options:
        key, equals, value = option.partition("=")
        holders = [n for n, (cls, _) in enumerate(parts) if key.strip() in cls.model_fields]
        if not equals or not holders:
            known = sorted({name for cls, _ in parts for name in cls.model_fields})
            raise QuietvitError(
                f"{option!r} is not an option of {text}{nearest(key.strip(), known)}; write "
                f"field=value with one of {', '.join(known)}."
            )
        fields[holders[0 if key.strip() in SHARED else -1]][key.strip()] = _value(value.strip())
    working, *with_bits = (bits or "").split("+")
    kept = parse_keep([*with_bits, *keep])
    if kept and "overrides" in fields[0]:
        raise QuietvitError(
            "bits of single roles are given twice: by --keep or + and by overrides=. Give one of "
            "the two."
        )
    shared: dict[str, Any] = {"overrides": kept} if kept else {}
    if bits is not None:
        shared["weight_bits"], shared["activation_bits"] = parse_bits(working)
    fields[0] = shared | fields[0]
    method = parts[0][0](**fields[0])
    for (cls, _), own in zip(parts[1:], fields[1:], strict=True):
        method = cls(**own, base=method)
    return method


def _parse_name(text: str) -> tuple[type[Method], str | None]:
    """Return the method and the activation range of a name such as ``rtn-omse``."""
    whole = text.strip().lower()
    known = list_methods()
    if whole in known:
        return get_method(whole), None
    name, _, estimator = whole.rpartition("-")
    if estimator not in RANGES or name not in known:
        raise QuietvitError(
            f"there is no method {text!r}{nearest(whole, [*known, *method_forms()])}; "
            "'quietvit methods' lists them."
        )
    if not _has_range(name):
        raise QuietvitError(f"method {name!r} has no activation range; write {name!r} alone.")
    return get_method(name), estimator


def method_forms() -> list[str]:
    """Return the names of methods with each range, such as ``rtn-omse``."""
    return [f"{name}-{form}" for name in list_methods() for form in RANGES if _has_range(name)]


def _value(text: str) -> Any:
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _on_top() -> list[str]:
    return [name for name in list_methods() if issubclass(get_method(name), OnTop)]


def _has_range(name: str) -> bool:
    return "activation_range" in get_method(name).model_fields


def setting_names(bits: Sequence[str], methods: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all combinations, such as ``W4A4 rtn-minmax``, after checking each."""
    for method in methods:
        for width in bits:
            parse_method(method, width)
    return tuple(
        f"{written_bits(width)} {method.strip().lower()}" for width in bits for method in methods
    )
