"""Split a site's name into its block number and a name that all blocks share.

Only plots use it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?:(.*)_)?(\d+)")
_LEVELS = frozenset({"blocks", "block", "layers", "layer"})


def place_of(name: str) -> tuple[str, str]:
    """Return the name with ``*`` for the block number, and that number, or "" if it has none.

    ``blocks.3.attn.qkv`` gives ``blocks.*.attn.qkv`` and ``3``; ``layers.0.blocks.1.mlp.fc1`` gives
    ``layers.*.blocks.*.mlp.fc1`` and ``0.1``.
    """
    parts = name.split(".")
    numbers: list[str] = []
    last = -1
    for i, part in enumerate(parts[:-1]):
        match = _NUMBER.fullmatch(part)
        if match is None:
            continue
        if numbers and not (i == last + 1 or (i == last + 2 and parts[i - 1] in _LEVELS)):
            break
        numbers.append(match[2])
        parts[i] = "*" if match[1] is None else f"{match[1]}_*"
        last = i
        if len(numbers) == 2:
            break
    return ".".join(parts), ".".join(numbers)


def depths_of(names: Sequence[str]) -> list[str]:
    """Return each name's block number, ``stem`` before the first block, or ``head`` after it.

    ``names`` are in the order of the forward pass.
    """
    numbers = [place_of(name)[1] for name in names]
    first = next((i for i, number in enumerate(numbers) if number), len(numbers))
    return [number or ("stem" if i < first else "head") for i, number in enumerate(numbers)]
