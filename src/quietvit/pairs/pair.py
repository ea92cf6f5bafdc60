"""An ordered pair of matrices, and the pairs of a model: plain data that names weights."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

from quietvit.tracing import WeightView

KINDS = ("mlp", "value_output", "gated_mlp", "norm_linear", "residual", "query_key")
DENSE_KINDS = ("mlp", "value_output", "gated_mlp")
DEFAULT_KINDS = (*DENSE_KINDS, "norm_linear")

# Why a weight is not, or only in part, in pairs.
COMPUTED = "a weight is computed in the forward pass and is no parameter"
ADAPTED = "an adapter adds to its output: pairs know its own weight alone, and none follows the sum"


@dataclass(frozen=True)
class MatrixPair:
    """An ordered pair: ``first`` (A) acts before ``second`` (B), and B A is defined.

    ``kind`` is one of ``KINDS``, see ``find_pairs``. ``head`` counts attention heads, ``through``
    names what stands between the two. ``before`` and ``between`` are gains of norms, as diagonal
    matrices, in front of A and between A and B: the map is then B diag(between) A diag(before).
    They are read by an update, not moved.
    """

    first: WeightView
    second: WeightView
    kind: str
    head: int | None = None
    through: tuple[str, ...] = ()
    before: WeightView | None = None
    between: WeightView | None = None

    @property
    def sides(self) -> tuple[WeightView, WeightView]:
        """The two matrices that an update moves."""
        return self.first, self.second

    @property
    def views(self) -> tuple[WeightView, ...]:
        """All weights that an update reads: both matrices and the gains there are."""
        gains = (view for view in (self.before, self.between) if view is not None)
        return (*self.sides, *gains)

    @property
    def name(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        return f"{self.kind}: {self.first.parameter_name} -> {self.second.parameter_name}{head}"


Finding = MatrixPair | tuple[str, str]  # a pair, or the name of what is none and the reason


@dataclass(frozen=True)
class FoundPairs(Sequence[MatrixPair]):
    """The pairs of a model, and those that look like one but are not, each with the reason."""

    pairs: tuple[MatrixPair, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @overload
    def __getitem__(self, index: int) -> MatrixPair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[MatrixPair, ...]: ...
    def __getitem__(self, index: int | slice) -> MatrixPair | tuple[MatrixPair, ...]:
        return self.pairs[index]

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"FoundPairs({len(self.pairs)} pairs, {len(self.skipped)} skipped)"

    def __str__(self) -> str:
        rows = [("kind", "first (A)", "second (B)", "heads", "through")]
        for (kind, first, second, through), heads in _by_weights(self.pairs).items():
            shown = "" if heads[0].head is None else str(len(heads))
            single = heads[0] if len(heads) == 1 else None
            a, b = (str(single.first), str(single.second)) if single else (first, second)
            rows.append((kind, a, b, shown, ", ".join(through)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        counts = Counter(pair.kind for pair in self.pairs)
        total = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        lines.append(f"{len(self)} pairs: {total}")
        alike: Counter[tuple[str, str]] = Counter()
        for name, reason in self.skipped:
            alike[re.sub(r"\b\d+\b", "*", name), reason] += 1
        lines += [f"no pair ({n}): {name}: {reason}" for (name, reason), n in alike.items()]
        return "\n".join(lines)


def _by_weights(
    pairs: Iterable[MatrixPair],
) -> dict[tuple[str, str, str, tuple[str, ...]], list[MatrixPair]]:
    groups = defaultdict(list)
    for pair in pairs:
        names = (pair.kind, pair.first.parameter_name, pair.second.parameter_name, pair.through)
        groups[names].append(pair)
    return groups
