"""The plan of an update: batches of pairs, their order, and when each parameter is done.

Made once, from names and shapes; no weight is read. ``update`` changes the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quietvit.decay.batches import LARGEST_BATCH, PairBatch, batches, block_size, windows
from quietvit.decay.limits import TrustRegion
from quietvit.decay.penalty import Penalty
from quietvit.pairs import MatrixPair
from quietvit.tensors import gathered, is_sharded, untied
from quietvit.tracing.scales import is_scale, read_entry

_SAFE_LOGARITHM = 80.0
_SAFE_REACH = 1e10


class Source(Mapping[str, Tensor]):
    """Parameters by name, whole and detached. Names of one tied parameter give one tensor.

    A sharded parameter is gathered when it is read and kept until ``release``. All processes must
    read it.
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
        """Average the scales of BatchNorms over the default process group, if there is one.

        Under DDP each process sees its own images, so their running variances differ, but all must
        move weights alike. If the pairs hold such scales, all processes must call it.
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
        """Return tensors of the same shapes, dtypes and devices that take no memory."""
        shells = {
            owner: torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
            for owner, p in self.parameters.items()
            if self.first[owner] == owner
        }
        return {name: shells[owner] for name, owner in self.first.items()}

    def signature(self) -> tuple[object, ...]:
        return tuple(
            (p.shape, p.dtype, p.device, self.first[name]) for name, p in self.parameters.items()
        )

    def norms(self) -> Tensor:
        """Return an upper bound of the norm of each parameter (tied ones once), float32.

        Without a device synchronization. It is exact up to rounding, and larger for a parameter
        that is sharded and replicated: each copy counts.
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
class UpdatePlan:
    """Batches in order, grouped into windows that hold about the parameters of one block.

    Sides are numbered: 2 i is the first matrix of pair i, and 2 i + 1 the second. Example: a batch
    of the pairs 0 and 2, then one of pair 1, give ``order`` (0, 4, 1, 5, 2, 3), and the first batch
    has the slices 0:2 (its A) and 2:4 (its B).

    Args:
        batches: in the order of the work.
        windows: the positions in ``batches`` of each window.
        region: the trust region of all pairs.
        order: the sides in the order of the batches.
        slices: for each batch, the slices of ``order`` for its first and second matrices.
        last_batch: for each parameter (its first name), the last batch that reads it.
        last_window: the same for windows.
        uses: for each batch, the parameters (first names) that it reads.
    """

    batches: tuple[PairBatch, ...]
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

    def cannot_overflow(self, norms: Tensor) -> Tensor:
        """Whether no product of the matrices of a pair can overflow, given ``Source.norms``.

        Without a device synchronization. False if a weight is NaN or infinite. The condition is
        sufficient: every intermediate of a penalty that ``stays_finite`` is at most the cube of
        |A| |B| |before| |between|^2. Its logarithm must be below 80; that of float32's largest
        number is 88.
        """
        device = norms.device
        if device not in self._indices:
            self._indices[device] = torch.tensor(self._index, device=device)
        logs = torch.cat([norms, norms.new_zeros(1)]).log1p()
        A, B, before, between = logs[self._indices[device]].unbind(1)
        return (3 * (A + B + before + 2 * between) < _SAFE_LOGARITHM).all()

    def has_safe_steps(self, steps: Sequence[float]) -> bool:
        """Whether the steps (learning rate x strength) are far from overflowing by themselves."""
        return max(steps) * self._smaller < _SAFE_REACH


def make_plan(
    pairs: Sequence[MatrixPair], source: Source, rule: Penalty, *, divided_by: int = 1
) -> UpdatePlan:
    """Plan the work on all pairs, divided among ``divided_by`` processes."""
    stand_ins = source.stand_ins()
    devices = {p.device.type for p in stand_ins.values()}
    room = block_size(pairs, stand_ins)
    # A batch holds copies of its matrices, their changes and one product: 9/4 of its numbers.
    joined = room * 4 // 9
    if devices != {"cpu"}:
        # On a GPU few large batches are faster, and a block is small beside the activations.
        total = sum(p.numel() for name, p in stand_ins.items() if source.first[name] == name)
        room = max(room, min(LARGEST_BATCH, math.ceil(total / divided_by)))
        joined = LARGEST_BATCH
    pair_batches: list[PairBatch] = []
    spans: list[range] = []
    for positions in windows(pairs, stand_ins, room):
        start = len(pair_batches)
        pair_batches += batches(pairs, stand_ins, positions, room=joined)
        spans.append(range(start, len(pair_batches)))
    order: list[int] = []
    slices: list[tuple[slice, slice]] = []
    for batch in pair_batches:
        ends = [len(order), len(order) + len(batch.members), len(order) + 2 * len(batch.members)]
        for side in (0, 1):
            order += [2 * member + side for member in batch.members]
        slices.append((slice(ends[0], ends[1]), slice(ends[1], ends[2])))
    uses = [
        tuple(dict.fromkeys(source.first[v.parameter_name] for p in batch.pairs for v in p.views))
        for batch in pair_batches
    ]
    last_batch = {owner: place for place, owners in enumerate(uses) for owner in owners}
    last_window = {
        owner: place for place, span in enumerate(spans) for i in span for owner in uses[i]
    }
    places = {name: i for i, name in enumerate(n for n, o in source.first.items() if n == o)}

    def place(view: object) -> int:
        name = getattr(view, "parameter_name", None)
        return len(places) if name is None else places[source.first[name]]

    return UpdatePlan(
        tuple(pair_batches),
        tuple(spans),
        TrustRegion(pairs, stand_ins, pair_batches, rule),
        tuple(order),
        tuple(slices),
        last_batch,
        last_window,
        tuple(uses),
        tuple((place(p.first), place(p.second), place(p.before), place(p.between)) for p in pairs),
        max(float(max(p.shape)) for p in stand_ins.values()),
    )


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Float32 norms of each tensor, one call for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    result: dict[int, Tensor] = {}
    for (_, dtype), places in groups.items():
        low = dtype not in (torch.float32, torch.float64)
        chosen = [tensors[place] for place in places]
        norms = torch._foreach_norm(chosen, 2, dtype=torch.float32 if low else None)
        result |= dict(zip(places, (norm.float() for norm in norms), strict=True))
    return [result[place] for place in range(len(tensors))]


def _summed(values: Tensor, mesh: object) -> Tensor:
    import torch.distributed as dist

    for dim in range(mesh.ndim):  # type: ignore[attr-defined]
        dist.all_reduce(values, group=mesh.get_group(dim))  # type: ignore[attr-defined]
    return values
