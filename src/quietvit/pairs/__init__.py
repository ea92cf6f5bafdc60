"""Ordered matrix pairs: which weight acts first, which second, and through what.

Pairs hold names, never tensors, so that they survive ``.to()``, ``load_state_dict(assign=True)``,
compilation and sharding. How pairs act on weights lives in ``decay``.
"""

from quietvit.pairs.find import find_pairs
from quietvit.pairs.pair import (
    DEFAULT_KINDS,
    DENSE_KINDS,
    KINDS,
    FoundPairs,
    MatrixPair,
)
from quietvit.tracing import WeightView

__all__ = [
    "DEFAULT_KINDS",
    "DENSE_KINDS",
    "KINDS",
    "FoundPairs",
    "MatrixPair",
    "WeightView",
    "find_pairs",
]
