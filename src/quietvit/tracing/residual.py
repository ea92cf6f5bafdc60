"""Find the residual blocks of a model by data flow.

``record`` observes the calls. ``block_modules`` gives the result to its users.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quietvit.tracing.ops import MATMUL_KINDS
from quietvit.tracing.raw import ModuleCall, Record

_PASSING = ("norm", "activation")
"""Kinds behind a sum that leave it the output of its block (post-norm, ReLU of a ResNet)."""
_INPUT = -1
"""Stands for the model's input, in front of the first site."""


@dataclass(frozen=True)
class _Sum:
    """A residual sum, all as places in the list of sites: the tensor ``fork`` on two ways.

    ``shortcut`` feeds the sum directly. ``branch`` are the sites on the other way.
    """

    place: int
    shortcut: frozenset[int]
    fork: frozenset[int]
    branch: frozenset[int]


def residual_blocks(records: Sequence[Record], calls: Sequence[ModuleCall]) -> tuple[str, ...]:
    """Return the paths of the modules whose output is their input plus something, in order.

    A sum is residual if it adds a tensor to what at least one product made of this tensor. On the
    short way there may be one linear or convolution (the projection of a ResNet's stage), if the
    other way has more products and activations. The block is the smallest module that holds the sum
    and the other way. Its output must be the sum, through norms and activations at most, and its
    input must reach the output through short ways alone. Blocks inside another block are dropped.

    So no block: a feature pyramid, whose inputs are several maps; boxes that are moved by offsets;
    a module that adds to a tensor it computed itself. Derived here (BRECQ, arXiv 2102.05426,
    selects the blocks of a ResNet by name).
    """
    flow = _Flow(records)
    by_size = sorted((c for c in calls if c.path), key=lambda c: (c.end - c.start, -len(c.path)))
    found: dict[str, None] = {}
    for each in flow.sums.values():
        inside = {each.place, *each.branch}
        for call in by_size:
            if (
                call.start <= min(inside)
                and each.place < call.end
                and flow.adds_to_input(each, call)
            ):
                found[call.path] = None
                break
    return tuple(path for path in found if not any(path.startswith(f"{other}.") for other in found))


class _Flow:
    """What feeds what, as places in the list of sites."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self._order = {record.key: place for place, record in enumerate(records)}
        self._sources = [
            [self._places(value.origin, value.depends) for value in record.inputs]
            for record in records
        ]
        self.sums: dict[int, _Sum] = {}
        for place, record in enumerate(records):
            if record.kind == "add" and (residual := self._residual(place)):
                self.sums[place] = residual

    def adds_to_input(self, wanted: _Sum, call: ModuleCall) -> bool:
        """Whether ``wanted`` is on the short way from the input of a call to its output.

        If an input is a constant (the queries in the first layer of a decoder), no site computed
        it. Then it is enough that the output has its shape. If no site is in front of an input (the
        images, or the mask of their padding), one input needs as many entries as the output.
        """
        waiting, seen = [self._order[key] for key in call.origin], set[int]()
        reached, entered = False, call.from_constant
        while waiting:
            place = waiting.pop()
            if place in seen:
                continue
            seen.add(place)
            if place < call.start:
                entered |= place != _INPUT or call.from_input
            elif place in self.sums:
                reached |= place == wanted.place
                # The fork too, because a projection lies on the short way.
                waiting += [*self.sums[place].shortcut, *self.sums[place].fork]
            elif self._records[place].kind in (*_PASSING, "add"):
                waiting += [source for sources in self._sources[place] for source in sources]
        return reached and entered

    def _places(self, origin: frozenset[str], depends: bool) -> frozenset[int]:
        if not origin:
            return frozenset({_INPUT} if depends else ())
        return frozenset(self._order[key] for key in origin)

    def _residual(self, place: int) -> _Sum | None:
        """Describe the sum at ``place`` if it is residual."""
        left, right = self._sources[place]
        for shortcut, other in ((left, right), (right, left)):
            for fork, passed in self._forks(shortcut):
                branch = self._between(fork, other, passed)
                if any(self._records[each].kind in MATMUL_KINDS for each in branch):
                    return _Sum(place, shortcut, fork, branch)
        return None

    def _forks(self, shortcut: frozenset[int]) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
        """Yield where the short way may start, and the sites on it."""
        passed: frozenset[int] = frozenset()
        yield shortcut, passed
        while len(shortcut) == 1 and _INPUT not in shortcut:
            (place,) = shortcut
            kind = self._records[place].kind
            if place in self.sums:  # x + f(x) + g(x)
                shortcut = self.sums[place].fork
            elif kind in ("linear", "conv", *_PASSING):
                shortcut = self._sources[place][0]
            else:
                return
            passed |= {place}
            yield shortcut, passed
            if kind in ("linear", "conv"):
                return

    def _steps(self, place: int) -> int:
        """Return 1 for a product or an activation, else 0."""
        return self._records[place].kind in (*MATMUL_KINDS, "activation")

    def _between(
        self, fork: frozenset[int], end: frozenset[int], passed: frozenset[int]
    ) -> frozenset[int]:
        """Return the sites on all ways from ``fork`` to ``end`` that avoid the ``passed``.

        Returns nothing if one of the fork does not reach the end, or not in more steps than the
        ``passed`` have.
        """
        if not fork or not end:
            return frozenset()
        most = dict.fromkeys(end, 0)  # of each site: the most steps between it and the end
        before = []
        for place in range(max(end), min(fork), -1):
            if place not in most or place in fork or place in passed:
                continue
            before.append(place)
            count = most[place] + self._steps(place)
            for source in {each for sources in self._sources[place] for each in sources}:
                most[source] = max(most.get(source, 0), count)
        least = sum(map(self._steps, passed))
        if any(most.get(place, 0) <= least for place in fork):
            return frozenset()
        between: set[int] = set()
        for place in reversed(before):
            sources = {each for sources in self._sources[place] for each in sources}
            if not sources.isdisjoint(fork) or not sources.isdisjoint(between):
                between.add(place)
        return frozenset(between)
