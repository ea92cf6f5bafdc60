"""Which batches of pairs there are, in which order they are worked on, and who is done when.

Made once from names and shapes, no weight is read. What happens to the weights is in ``update``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quietvit.decay.limits import TrustRegion
from quietvit.decay.penalty import Penalty
from quietvit.decay.plan import LARGEST_BATCH, Batch, batches, block_size, windows
from quietvit.pairs import MatrixPair
from quietvit.tensors import gathered, is_sharded, untied
from quietvit.tracing.scales import is_scale, read_entry

_SAFE_LOGARITHM = 80.0
_SAFE_REACH = 1e10


class Source(Mapping[str, Tensor]):
    """Parameters by name, whole and detached; names tied to one parameter give one tensor.

    A parameter that FSDP2 keeps in parts is gathered when it is read, by all processes, and kept
    until released.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.parameters = {name: read_entry(model, name) for name in names}
        self.first = untied(self.parameters)
        self._whole: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        owner = self.first[name]
        if owner not in self._whole:
            self._whole[owner] = gathered(self.parameters[owner])
        return self._whole[owner]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def agree(self) -> None:
        """Average the scales of BatchNorms over all processes of the default group, if any.

        Under DDP each process has seen its own images, and all must move weights alike. A
        collective call where the pairs hold such scales.
        """
        import torch.distributed as dist

        names = [name for name in self.parameters if is_scale(name)]
        if not names or not (dist.is_available() and dist.is_initialized()):
            return
        sizes = [self.parameters[name].numel() for name in names]
        joined = torch.cat([self.parameters[name].float() for name in names])
        dist.all_reduce(joined)
        parts = (joined / dist.get_world_size()).split(sizes)
        self.parameters |= {
            name: part.to(self.parameters[name].dtype)
            for name, part in zip(names, parts, strict=True)
        }

    def release(self, owner: str) -> None:
        """Forget a parameter that was gathered."""
        self._whole.pop(owner, None)

    def in_parts(self, name: str) -> bool:
        return is_sharded(self.parameters[name])

    def stand_ins(self) -> dict[str, Tensor]:
        """Tensors of the same shapes, dtypes and devices that take no memory; tied ones are one."""
        made = {
            owner: torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
            for owner, p in self.parameters.items()
            if self.first[owner] == owner
        }
        return {name: made[owner] for name, owner in self.first.items()}

    def signature(self) -> tuple[object, ...]:
        return tuple(
            (p.shape, p.dtype, p.device, self.first[name]) for name, p in self.parameters.items()
        )

    def norms(self) -> Tensor:
        """Return an upper bound of the norm of each first-named parameter, float32; no sync.

        Exact but for rounding; of parameters in parts over copies it is larger.
        """
        owners = [name for name, owner in self.first.items() if owner == name]
        values: list[Tensor] = []
        meshes: dict[object, list[int]] = {}
        for place, name in enumerate(owners):
            parameter = self.parameters[name].detach()
            if is_sharded(parameter):
                meshes.setdefault(parameter.device_mesh, []).append(place)  # type: ignore[attr-defined]
                parameter = parameter.to_local()  # type: ignore[attr-defined]
            values.append(parameter)
        squares = torch.stack([norm.to(values[0].device) for norm in _norms(values)]).square()
        for mesh, places in meshes.items():
            squares[places] = _summed(squares[places], mesh)
        return squares.sqrt()


@dataclass(frozen=True)
class Layout:
    """Batches in order, grouped into windows whose parameters are about one block's.

    ``slices``: for each batch the slices of ``order`` (and so of the vector of steps made by it)
    that belong to its first and second matrices. ``last_batch`` and ``last_window``: where each
    first-named parameter is used for the last time.
    """

    plan: tuple[Batch, ...]
    windows: tuple[range, ...]
    region: TrustRegion
    order: tuple[int, ...]
    slices: tuple[tuple[slice, slice], ...]
    last_batch: dict[str, int]
    last_window: dict[str, int]
    uses: tuple[tuple[str, ...], ...]
    _index: tuple[tuple[int, int, int, int], ...] = ()
    _smaller: float = 1.0
    _indices: dict[torch.device, Tensor] = field(default_factory=dict)

    def is_tame(self, norms: Tensor) -> Tensor:
        """Whether no product of the matrices of a pair can overflow, given norms; no sync.

        False where a weight is NaN or infinite. A sufficient condition: every intermediate of a
        tame penalty is at most the cubes of both norms, gains included.
        """
        device = norms.device
        if device not in self._indices:
            self._indices[device] = torch.tensor(self._index, device=device)
        logs = torch.cat([norms, norms.new_zeros(1)]).log1p()
        A, B, before, between = logs[self._indices[device]].unbind(1)
        return (3 * (A + B + before + 2 * between) < _SAFE_LOGARITHM).all()

    def is_short(self, steps: Sequence[float]) -> bool:
        """Whether the steps (learning rate x strength) are far from overflowing themselves."""
        return max(steps) * self._smaller < _SAFE_REACH


def lay_out(
    pairs: Sequence[MatrixPair], source: Source, rule: Penalty, *, divided_by: int = 1
) -> Layout:
    """Plan the work on all pairs; ``divided_by``: among how many processes."""
    stand_ins = source.stand_ins()
    devices = {p.device.type for p in stand_ins.values()}
    room = block_size(pairs, stand_ins)
    # Of joined matrices, copies, changes and one product are held at once: 9/4 of their numbers.
    joined = room * 4 // 9
    if devices != {"cpu"}:
        # Few large batches, for the sake of speed: there, a block is little beside activations.
        total = sum(p.numel() for name, p in stand_ins.items() if source.first[name] == name)
        room = max(room, min(LARGEST_BATCH, math.ceil(total / divided_by)))
        joined = LARGEST_BATCH
    plan: list[Batch] = []
    spans: list[range] = []
    for positions in windows(pairs, stand_ins, room):
        start = len(plan)
        plan += batches(pairs, stand_ins, positions, room=joined)
        spans.append(range(start, len(plan)))
    order: list[int] = []
    slices: list[tuple[slice, slice]] = []
    for batch in plan:
        ends = [len(order), len(order) + len(batch.members), len(order) + 2 * len(batch.members)]
        for side in (0, 1):
            order += [2 * member + side for member in batch.members]
        slices.append((slice(ends[0], ends[1]), slice(ends[1], ends[2])))
    uses = [tuple(dict.fromkeys(source.first[name] for name in _read_by(batch))) for batch in plan]
    last_batch = {owner: place for place, owners in enumerate(uses) for owner in owners}
    last_window = {
        owner: place for place, span in enumerate(spans) for i in span for owner in uses[i]
    }
    places = {name: i for i, name in enumerate(n for n, o in source.first.items() if n == o)}

    def place(view: object) -> int:
        name = getattr(view, "parameter_name", None)
        return len(places) if name is None else places[source.first[name]]

    return Layout(
        tuple(plan),
        tuple(spans),
        TrustRegion(pairs, stand_ins, plan, rule),
        tuple(order),
        tuple(slices),
        last_batch,
        last_window,
        tuple(uses),
        tuple((place(p.first), place(p.second), place(p.before), place(p.between)) for p in pairs),
        max(float(max(p.shape)) for p in stand_ins.values()),
    )


def _read_by(batch: Batch) -> Iterator[str]:
    for pair in batch.pairs:
        for view in (pair.first, pair.second, pair.before, pair.between):
            if view is not None:
                yield view.parameter_name


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Float32 norms of each tensor, one call for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    found: dict[int, Tensor] = {}
    for (_, dtype), places in groups.items():
        low = dtype not in (torch.float32, torch.float64)
        chosen = [tensors[place] for place in places]
        norms = torch._foreach_norm(chosen, 2, dtype=torch.float32 if low else None)
        found |= dict(zip(places, (norm.float() for norm in norms), strict=True))
    return [found[place] for place in range(len(tensors))]


def _summed(values: Tensor, mesh: object) -> Tensor:
    import torch.distributed as dist

    for dim in range(mesh.ndim):  # type: ignore[attr-defined]
        dist.all_reduce(values, group=mesh.get_group(dim))  # type: ignore[attr-defined]
    return values
