"""Quantized weights kept between calls: whether what they were made from is still the same."""

from __future__ import annotations

from torch import Tensor

State = tuple[tuple[Tensor, int], ...]


def state_of(sources: tuple[Tensor, ...]) -> State:
    """What to compare with later: the tensors' memory and versions.

    Aliases that stay with the memory of now, where a parameter's ``data`` may be replaced; held,
    so that the memory cannot be given to another tensor: equal places are equal data.
    """
    return tuple((source.detach(), source._version) for source in sources)


def unchanged(kept: State, sources: tuple[Tensor, ...]) -> bool:
    """Whether the tensors are still those that ``state_of`` saw."""
    return len(kept) == len(sources) and all(
        version == source._version
        and held.data_ptr() == source.data_ptr()
        and held.shape == source.shape
        and held.stride() == source.stride()
        and held.dtype == source.dtype
        and held.device == source.device
        for (held, version), source in zip(kept, sources, strict=True)
    )
