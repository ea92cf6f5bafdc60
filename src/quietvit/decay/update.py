"""The update of all pairs, batch by batch, on one process or divided among several.

Invariant: every change is computed from the values before the update. So a parameter is written
only after the last batch that reads it, and the new values of about one block are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quietvit.decay.batches import AdjacentViews, Operands
from quietvit.decay.penalty import Basis, Penalty
from quietvit.decay.plan import Source, UpdatePlan
from quietvit.decay.products import product_dtype
from quietvit.tensors import sharded_like, wide

Factors = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Directed = Callable[[Operands, Basis | None, torch.dtype | None, Tensor, Tensor], Factors]


def directed(rule: Penalty, *, compiled: bool = False) -> Directed:
    """Return a pure function of one batch that gives ((PA, fA), (PB, fB)).

    A (n, h, d) changes by fA PA and B (n, o, h) by fB PB, with factors (n,). The function takes the
    operands, the basis, the dtype of products and the steps of A and of B. The steps are tensors
    (n,), so that a compiled function serves every learning rate and strength.
    """

    def changes(
        A: Tensor,
        B: Tensor,
        before: Tensor | None,
        between: Tensor | None,
        basis: Basis | None,
        products: torch.dtype | None,
        step_A: Tensor,
        step_B: Tensor,
    ) -> Factors:
        (PA, fA), (PB, fB) = Operands(A, B, before, between).apply(
            lambda A, B: rule.factored(A, B, basis, products)
        )
        return (PA, _factor(fA, step_A)), (PB, _factor(fB, step_B))

    run: Any = changes
    if compiled:
        run = torch.compile(changes, fullgraph=True, dynamic=False)

    def call(
        operands: Operands,
        basis: Basis | None,
        products: torch.dtype | None,
        step_A: Tensor,
        step_B: Tensor,
    ) -> Factors:
        matrices = (operands.A, operands.B, operands.before, operands.between)
        if not compiled:
            return run(*matrices, basis, products, step_A, step_B)
        # torch compiles one graph for each shape of pairs. Swin has more than its limit of eight.
        with torch._dynamo.config.patch(recompile_limit=256):
            return run(*matrices, basis, products, step_A, step_B)

    return call


class Update:
    """One update of all pairs.

    The caller has made sure that the changes are finite and within the trust region.

    Args:
        steps: (learning rate)(strength)(share) of the first and second side of each pair in turn.
        moving: names of the parameters that may change.
        products: precision of the matrix products, see ``ColinearityDecay``.
    """

    def __init__(
        self,
        plan: UpdatePlan,
        source: Source,
        run: Directed,
        bases: Sequence[Basis | None],
        steps: Sequence[float],
        moving: Mapping[str, float],
        products: str,
    ) -> None:
        self._plan, self._source, self._run, self._bases = plan, source, run, bases
        self._moving = {source.first[name] for name in moving}
        self._products = products
        # In the order of the batches, so that each batch reads its steps as slices of one vector.
        self._signed = [-steps[i] for i in plan.order]
        self._vectors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def write(self) -> None:
        """Change the parameters, each after the last batch that reads it.

        Example: fc1 is in the pairs (fc1, fc2) and (norm2, fc1). The batch of (fc1, fc2) comes
        first and writes fc2 at once. The new fc1 waits, because (norm2, fc1) must read the old one.
        """
        waiting: dict[str, Tensor] = {}
        for place in range(len(self._plan.batches)):
            self._add(place, waiting)
            for owner in self._plan.uses[place]:
                if self._plan.last_batch[owner] != place:
                    continue
                if owner in waiting:
                    parameter = self._source.parameters[owner]
                    parameter.copy_(sharded_like(parameter, waiting.pop(owner).to(parameter.dtype)))
                self._source.release(owner)

    def _add(self, place: int, waiting: dict[str, Tensor]) -> None:
        """Add the changes of one batch to new values that wait, or directly to parameters."""
        for run, matrices, factors in self._changes(place):
            owner = self._source.first[run.view.parameter_name]
            if owner not in waiting and not self._is_direct(owner, place):
                whole = self._source[owner]
                waiting[owner] = whole.to(wide(whole).dtype, copy=True)
            target = waiting[owner] if owner in waiting else self._source[owner]
            run.add_scaled_(target, matrices, factors)

    def write_divided(self) -> None:
        """Do what ``write`` does, with the windows divided among the default process group.

        In each round process r computes window ``start + r`` and broadcasts its changes, so all
        write the same numbers. All processes must call it, and gather sharded parameters in the
        same order, or they would wait for each other forever.
        """
        import torch.distributed as dist

        rank, world = dist.get_rank(), dist.get_world_size()
        waiting: dict[str, Tensor] = {}
        for start in range(0, len(self._plan.windows), world):
            round_ = range(start, min(start + world, len(self._plan.windows)))
            mine = None
            for window in round_:
                owners = self._owners(window)
                for owner in owners:
                    if self._source.in_parts(owner):
                        _ = self._source[owner]  # a collective call of all processes
                if window - start == rank:
                    mine = self._window_changes(window)
                for owner in owners:
                    if self._source.in_parts(owner):
                        self._source.release(owner)
            for window in round_:
                moved = self._moved(window)
                if moved:
                    flat = mine if window - start == rank else self._flat(moved)
                    assert flat is not None
                    dist.broadcast(flat, src=window - start)
                    self._collect(window, self._split(flat, moved), waiting)
                for owner in self._owners(window):
                    if self._plan.last_window[owner] == window and owner in waiting:
                        parameter = self._source.parameters[owner]
                        parameter.add_(sharded_like(parameter, waiting.pop(owner)))

    def _collect(
        self, window: int, changes: Mapping[str, Tensor], waiting: dict[str, Tensor]
    ) -> None:
        """Add the changes of a window to those that wait.

        ``changes`` are views of one buffer for the window. Those that wait for later windows are
        copied, so that the buffer can be freed.
        """
        for owner, change in changes.items():
            if owner in waiting:
                waiting[owner] += change
            elif self._plan.last_window[owner] != window:
                waiting[owner] = change.clone()
            else:
                waiting[owner] = change

    def _changes(self, place: int) -> list[tuple[AdjacentViews, Tensor, Tensor]]:
        """The changes of one batch: adjacent views, their matrices, and the factor of each matrix.

        Sides with a step of 0, and frozen parameters, are left out.
        """
        batch, slices = self._plan.batches[place], self._plan.slices[place]
        if not any(self._signed[slices[0].start : slices[1].stop]):
            return []
        operands = batch.read(self._source)
        vector = self._vector(operands.A)
        dtype = product_dtype(self._products, operands.A)
        step_A, step_B = (vector[own] for own in slices)
        changes = self._run(operands, self._bases[place], dtype, step_A, step_B)
        result = []
        for runs, own, (matrices, factors) in zip(
            (batch.firsts, batch.seconds), slices, changes, strict=True
        ):
            for run in runs:
                rows = slice(run.start, run.start + run.count)
                if self._source.first[run.view.parameter_name] in self._moving and any(
                    self._signed[own.start + run.start : own.start + run.start + run.count]
                ):
                    result.append((run, matrices[rows], factors[rows]))
        return result

    def _vector(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        if key not in self._vectors:
            self._vectors[key] = torch.tensor(self._signed, dtype=like.dtype, device=like.device)
        return self._vectors[key]

    def _is_direct(self, owner: str, place: int) -> bool:
        """Whether changes can be added to the parameter itself, without a copy.

        No later batch may read it, and it must be float32 or float64, or several additions would
        each be rounded.
        """
        whole = self._source[owner]
        return (
            self._plan.last_batch[owner] == place
            and not self._source.in_parts(owner)
            and wide(whole) is whole
        )

    def _owners(self, window: int) -> list[str]:
        """The parameters that the batches of a window use."""
        places = self._plan.windows[window]
        return list(dict.fromkeys(owner for i in places for owner in self._plan.uses[i]))

    def _moved(self, window: int) -> list[str]:
        """The parameters that the batches of a window change."""
        batches, first = self._plan.batches, self._source.first
        names = (name for i in self._plan.windows[window] for name in batches[i].names)
        return [o for o in dict.fromkeys(first[name] for name in names) if o in self._moving]

    def _window_changes(self, window: int) -> Tensor | None:
        moved = self._moved(window)
        if not moved:
            return None
        flat = self._flat(moved).zero_()
        wholes = self._split(flat, moved)
        for place in self._plan.windows[window]:
            for run, matrices, factors in self._changes(place):
                owner = self._source.first[run.view.parameter_name]
                run.add_scaled_(wholes[owner], matrices, factors)
        return flat

    def _flat(self, moved: Sequence[str]) -> Tensor:
        parameters = [self._source.parameters[owner] for owner in moved]
        double = any(p.dtype == torch.float64 for p in parameters)
        dtype = torch.float64 if double else torch.float32
        numbers = sum(p.numel() for p in parameters)
        return torch.empty(numbers, dtype=dtype, device=parameters[0].device)

    def _split(self, flat: Tensor, moved: Sequence[str]) -> dict[str, Tensor]:
        shapes = [self._source.parameters[owner].shape for owner in moved]
        parts = flat.split([shape.numel() for shape in shapes])
        return {o: part.view(s) for o, part, s in zip(moved, parts, shapes, strict=True)}


def _factor(factor: Tensor | None, step: Tensor) -> Tensor:
    """factor x step, cut at the largest number, because 0 x inf would be NaN."""
    if factor is None:
        return step
    largest = torch.finfo(step.dtype).max
    return (factor * step).clamp(-largest, largest)
