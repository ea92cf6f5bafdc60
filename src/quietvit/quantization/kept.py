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
        and tensor.data_ptr() == source.data_ptr()
        and tensor.shape == source.shape
        and tensor.stride() == source.stride()
        and tensor.dtype == source.dtype
        and tensor.device == source.device
        for (tensor, version), source in zip(kept, sources, strict=True)
    )
