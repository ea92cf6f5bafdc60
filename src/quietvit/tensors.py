"""Tensors of any dtype, device and layout: wide copies, whole copies of sharded ones, finiteness.

Knows no model, no pair and no optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if it has that dtype already."""
    return tensor.to(wide_dtype(tensor))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 for a float64 tensor, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def widest(device: torch.device) -> torch.dtype:
    """Return the widest dtype of the device: float64, but float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices faster in bfloat16 than in float32.

    True for GPUs that support bfloat16, and for CPUs with AVX512-BF16 or AMX.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = (getattr(torch.cpu, name, None) for name in names)
    return any(check is not None and check() for check in checks)


def precision_on(device: torch.device, asked: str) -> str:
    """Return ``bfloat16`` or ``float32``, the precision of matrix products that was asked for.

    ``auto`` is bfloat16 where that is faster.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if has_fast_bfloat16(device) else "float32"


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 keeps the tensor in parts (a DTensor)."""
    # A DTensor can only exist where somebody has imported its module.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """Return the tensor whole and detached. All processes must call it if it is sharded."""
    whole: Any = tensor.detach()
    full: Tensor = whole.full_tensor() if is_sharded(whole) else whole
    return full


def all_gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor whole and detached; names of one tied parameter get one tensor.

    All processes must call it if one is sharded.
    """
    owner = untied(tensors)
    whole = {name: gathered(tensors[name]) for name in dict.fromkeys(owner.values())}
    return {name: whole[owner[name]] for name in tensors}


def sharded_like(parameter: Any, whole: Tensor) -> Tensor:
    """Return a tensor of full size, in the same parts as the parameter if that is sharded."""
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every process holds the same values, so none has to be sent: src_data_rank=None.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 gathered in a forward pass that no backward pass follows.

    Otherwise the next optimizer step changes the parts, and training goes on with the old whole.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None:
        for module in model.modules():
            if isinstance(module, kind):
                module.reshard()


def untied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first name of the very same tensor: tied weights have several."""
    owner: dict[int, str] = {}
    return {name: owner.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every entry of every tensor is finite. One device synchronization."""
    flags = [tensor.isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
