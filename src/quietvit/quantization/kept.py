"""Check whether a cached quantized weight still matches its sources (weight and quantizer)."""

from __future__ import annotations

from torch import Tensor

State = tuple[tuple[Tensor, int], ...]


def state_of(sources: tuple[Tensor, ...]) -> State:
    """Return the tensors' memory and versions, to compare with later.

    The detached aliases keep the current memory alive, even if a parameter's ``data`` is replaced.
    So no other tensor can get the same address, and equal addresses mean equal data.
    """
    return tuple((source.detach(), source._version) for source in sources)


def unchanged(kept: State, sources: tuple[Tensor, ...]) -> bool:
    """Whether the tensors are still in the state that ``state_of`` recorded."""
    return len(kept) == len(sources) and all(
        version == source._version
        and held.data_ptr() == source.data_ptr()
        and held.shape == source.shape
        and held.stride() == source.stride()
        and held.dtype == source.dtype
        and held.device == source.device
        for (held, version), source in zip(kept, sources, strict=True)
    )
