"""``MatrixPair`` and ``FoundPairs``: plain data that names weights."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from quietvit.tracing import WeightView

KINDS = ("mlp", "value_output", "gated_mlp", "norm_linear", "residual", "query_key")
DENSE_KINDS = ("mlp", "value_output", "gated_mlp")
DEFAULT_KINDS = (*DENSE_KINDS, "norm_linear")

# Reasons for a missing pair.
COMPUTED = "a weight is computed in the forward pass and is not a parameter"
ADAPTED = "an adapter adds to its output: only its own weight is paired, and only as second matrix"


@dataclass(frozen=True)
class MatrixPair:
    """An ordered pair: ``first`` (A) acts before ``second`` (B), and B A is defined.

    ``kind``: one of ``KINDS``, see ``find_pairs``. ``head``: the number of the attention head.
    ``through``: the steps between A and B. ``before`` and ``between`` are gains of norms as
    diagonal matrices: the map is B diag(between) A diag(before). An update only reads them.
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
        """The two matrices that an update changes."""
        return self.first, self.second

    @property
    def views(self) -> tuple[WeightView, ...]:
        """All weights that an update reads: both matrices, and the gains if any."""
        gains = (view for view in (self.before, self.between) if view is not None)
        return (*self.sides, *gains)

    @property
    def name(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        return f"{self.kind}: {self.first.parameter_name} -> {self.second.parameter_name}{head}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data. A gain of a norm that is absent is None."""
        return {
            "kind": self.kind,
            "first": self.first.parameter_name,
            "second": self.second.parameter_name,
            "head": self.head,
            "first_view": str(self.first),
            "second_view": str(self.second),
            "through": list(self.through),
            "before": None if self.before is None else str(self.before),
            "between": None if self.between is None else str(self.between),
        }


Finding = MatrixPair | tuple[str, str]  # a pair, or (name, reason) of a skipped one


@dataclass(frozen=True)
class FoundPairs(Sequence[MatrixPair]):
    """The pairs of a model. ``skipped``: (name, reason) of what looks like a pair but is not."""

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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: all pairs, each head on its own, and what was skipped."""
        return {
            "pairs": [pair.to_dict() for pair in self.pairs],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }

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
