"""Ordered matrix pairs: which weight acts first, which second, and what stands between.

Pairs hold names, not tensors, so they survive ``.to()``, ``load_state_dict(assign=True)``,
compilation and sharding. ``decay`` applies pairs to weights.
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
