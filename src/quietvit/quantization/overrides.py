"""``Overrides``: bits of single roles, sites or operands, which replace a method's working bits.

Parsing, lookup and checks are here; ``Method.slot_bits`` decides what comes before them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator

from quietvit.errors import QuietvitError, nearest
from quietvit.quantization.overrides_file import is_overrides_file, read_overrides
from quietvit.quantization.quantizers import MAX_BITS, MIN_BITS
from quietvit.quantization.slot import Slot
from quietvit.tracing import MATMUL_KINDS, Site, Trace

Bits = int | Literal["same"] | None
"""None is float, and ``"same"`` the working bits of the method."""
BitPair = tuple[Bits, Bits]
"""(weight bits, activation bits)."""

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "attention-maps-8": MappingProxyType({"post_softmax": 8}),
        "repq-vit-detection": MappingProxyType(
            {"patch_embed": ("same", 8), "head": "same", "conv_transpose2d": None}
        ),
    }
)
"""Overrides by name: ``RTN(weight_bits=4, activation_bits=4, overrides="attention-maps-8")``.

``repq-vit-detection`` is what the detection code of RepQ-ViT (arXiv 2212.08254) quantizes: all at
the working bits, but the input of the patch embedding at 8 bits and transposed convolutions float.
"""

_TRANSPOSED = tuple(f"conv_transpose{dims}d" for dims in (1, 2, 3))
"""Functions that are keys. They may match nothing: a preset names them for every model."""

_PAIR = re.compile(r"w(\d+)a(\d+)", re.IGNORECASE)


class Overrides(Mapping[str, BitPair]):
    """Bits by role, site or operand. Immutable, hashable, equal in any order.

    A key is a role, a site name or pattern (``blocks.0.*``), one of these names with an operand
    (``blocks.0.attn.qkv:weight``, ``*:right``), or ``conv_transpose2d``.
    """

    def __init__(self, pairs: Mapping[str, BitPair] | None = None) -> None:
        self._pairs = dict(pairs or {})

    def __getitem__(self, key: str) -> BitPair:
        return self._pairs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __hash__(self) -> int:
        return hash(frozenset(self._pairs.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Overrides) and self._pairs == other._pairs

    def __repr__(self) -> str:
        return repr(self.plain())

    def __str__(self) -> str:
        return ", ".join(f"{key} {_shown(pair)}" for key, pair in self._pairs.items()) or "none"

    def plain(self) -> dict[str, int | str | list[Bits] | None]:
        """Return a form that JSON can hold and that the field accepts again."""
        return {key: _plain(pair) for key, pair in self._pairs.items()}

    def key_for(self, slot: Slot) -> str | None:
        """Return the key that decides this operand's bits, or None.

        The most specific key decides: the name with its operand, then the site name, then a
        matching pattern with an operand, then one without, then ``conv_transpose2d``, then the
        operand's role, then the site's role. In patch embedding and head, only the site's role
        counts.
        """
        if slot.site.kind not in MATMUL_KINDS:
            return None
        named = next((name for name in _names(slot) if name in self._pairs), None)
        if named is not None:
            return named
        matching = [key for keys in self._patterns(slot) for key in keys]
        matching += [kind for kind in _kinds(slot) if kind in self._pairs]
        return matching[0] if matching else None

    def _patterns(self, slot: Slot) -> tuple[list[str], list[str]]:
        """Return the keys that match the name with its operand, and those that match the site."""
        operand, site = _names(slot)
        return (
            [key for key in self._pairs if ":" in key and fnmatch.fnmatchcase(operand, key)],
            [key for key in self._pairs if ":" not in key and fnmatch.fnmatchcase(site, key)],
        )

    def bits(self, key: str, slot: Slot) -> Bits:
        """Return the bits that ``key`` gives to an operand."""
        return self._pairs[key][0 if slot.is_weight else 1]

    def check(self, trace: Trace, excluded: Sequence[str]) -> None:
        """Raise QuietvitError for a key without effect, or for two keys that contradict.

        ``excluded``: patterns of sites that stay float. A key that matches only these is an error.
        """
        sites = [site for site in trace.sites if site.kind in MATMUL_KINDS]
        slots = [Slot(site, index) for site in sites for index in (0, 1)]
        for key in self._pairs:
            touched = [
                slot.site
                for slot in slots
                if key in (*_names(slot), *_kinds(slot), *_roles(slot.site))
                or any(key in keys for keys in self._patterns(slot))
            ]
            if not touched and key in _TRANSPOSED:
                continue
            if not touched:
                known = sorted({role for site in sites for role in _roles(site)})
                names = [_names(slot)[0 if ":" in key else 1] for slot in slots]
                raise QuietvitError(
                    f"overrides: {key!r} is not a role of this model and matches none of its "
                    f"{len(sites)} matrix products"
                    f"{nearest(key, [*known, *names])}. "
                    f"Roles here: {', '.join(known)}."
                )
            if all(any(fnmatch.fnmatchcase(s.name, p) for p in excluded) for s in touched):
                raise QuietvitError(
                    f"overrides: {key!r} only gives bits to sites that exclude keeps in float, "
                    f"such as {touched[0].name}. Remove one of the two."
                )
        for slot in slots:
            self._check_patterns(slot)

    def _check_patterns(self, slot: Slot) -> None:
        operand, site = _names(slot)
        if operand in self._pairs or site in self._pairs:
            return
        keys = next((keys for keys in self._patterns(slot) if keys), [])
        if len({self._pairs[key] for key in keys}) > 1:
            shown = " and ".join(f"{key!r} ({_shown(self._pairs[key])})" for key in keys)
            raise QuietvitError(
                f"overrides: {shown} both match {operand if ':' in keys[0] else site}. Narrow one "
                "pattern, or give the full name, which comes first."
            )


def _names(slot: Slot) -> tuple[str, str]:
    """Return the names of an operand, the most specific first: with its operand, and the site's."""
    return f"{slot.site.name}:{slot.operand}", slot.site.name


def _kinds(slot: Slot) -> tuple[str, str, str]:
    """Return the keys of an operand that are no names, the most specific first."""
    function = slot.site.function
    role = "" if slot.role == "weight" else slot.role  # no key means the weights of all sites
    return function if function in _TRANSPOSED else "", role, slot.site.role


def _roles(site: Site) -> set[str]:
    operands = () if site.role in ("patch_embed", "head") else site.operands
    return {site.role, *(operand.role for operand in operands)}


def _overrides(value: Any) -> Overrides:
    if isinstance(value, Overrides):
        return value
    if isinstance(value, str) and is_overrides_file(value):
        try:
            value = read_overrides(value)
        except QuietvitError as error:
            raise ValueError(str(error)) from error
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(
                f"there is no preset of that name{nearest(value, PRESETS)}; give one of "
                f"{', '.join(PRESETS)}, a file such as bits.toml, or a mapping such as "
                "{'post_softmax': 8}"
            )
        value = PRESETS[value]
    if not isinstance(value, Mapping):
        raise ValueError("give a mapping from roles or site names to bits: {'post_softmax': 8}")
    pairs: dict[str, BitPair] = {}
    for key, bits in value.items():
        if not isinstance(key, str) or not key:
            raise ValueError(f"{key!r} is neither a role nor a pattern of names")
        pairs[key] = _pair(key, bits)
    return Overrides(pairs)


def _pair(key: str, bits: Any) -> BitPair:
    """Parse bits: 8, None, ``"float"`` or ``"same"`` for both, ``"W4A8"``, (weight, activation)."""
    widths: Any = bits.strip().lower() if isinstance(bits, str) else bits
    if isinstance(bits, str) and widths not in ("float", "same"):
        match = _PAIR.fullmatch(bits.strip())
        widths = tuple(map(int, match.groups())) if match else "?"
    both = tuple(widths) if isinstance(widths, list | tuple) else (widths, widths)
    both = tuple(None if width == "float" else width for width in both)
    for width in both:
        whole = isinstance(width, int) and not isinstance(width, bool)
        fits = width in (None, "same") or (whole and MIN_BITS <= width <= MAX_BITS)
        if len(both) != 2 or not fits:
            raise ValueError(
                f"{key!r}: bits are an integer from {MIN_BITS} to {MAX_BITS}, 'W4A8' for weight "
                f"and activation, 'float', or 'same' for the working bits, not {bits!r}"
            )
    return both[0], both[1]


def _plain(pair: BitPair) -> int | str | list[Bits] | None:
    weight, activation = pair
    if weight == activation:
        return weight
    if isinstance(weight, int) and isinstance(activation, int):
        return f"W{weight}A{activation}"
    return [weight, activation]


def _shown(pair: BitPair) -> str:
    weight, activation = pair
    if weight == activation or "same" in pair:
        words = [_in_words(bits) for bits in pair]
        return words[0] if weight == activation else f"W {words[0]}, A {words[1]}"
    return f"W{weight or 32}A{activation or 32}"


def _in_words(bits: Bits) -> str:
    if bits == "same":
        return "at the working bits"
    return "float" if bits is None else f"{bits} bits"


OverridesField = Annotated[
    Overrides, PlainValidator(_overrides), PlainSerializer(lambda value: value.plain())
]
