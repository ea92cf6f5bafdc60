"""Parameters as whole tensors, also where FSDP2 keeps them in parts (DTensor).

Reading, laying out, and whether they are finite; who reads and who writes is elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing.scales import read_entry


def read(model: nn.Module, name: str) -> Tensor:
    """Return the parameter of this name, or the scale it stands for, as the model is now."""
    return read_entry(model, name)


def whole_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Every parameter, whole and detached; names tied to one parameter get one tensor.

    Where parameters are in parts, all processes have to call it.
    """
    found: dict[int, Tensor] = {}
    parameters = {name: read(model, name) for name in names}
    for parameter in parameters.values():
        if id(parameter) not in found:
            found[id(parameter)] = gathered(parameter)
    return {name: found[id(parameter)] for name, parameter in parameters.items()}


def untied(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name the first name that has the very same tensor."""
    owner: dict[int, str] = {}
    return {name: owner.setdefault(id(tensor), name) for name, tensor in parameters.items()}


def gathered(parameter: Tensor) -> Tensor:
    """Return the parameter detached, all of it."""
    whole: Any = parameter.detach()
    found: Tensor = whole.full_tensor() if is_sharded(whole) else whole
    return found


def like(parameter: Any, whole: Tensor) -> Tensor:
    """Return a full-size tensor laid out over processes as the parameter is."""
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 keeps whole after a forward pass that no backward pass follows.

    Else the next optimizer step would change the parts, and training go on with the old whole.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None:
        for module in model.modules():
            if isinstance(module, kind):
                module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; where nobody has loaded torch.distributed.tensor none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every entry of every tensor is finite: one synchronization."""
    flags = [tensor.isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def refuse_unless_finite(found: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise, naming the first parameter that is not finite or whose change in ``found`` is not.

    ``found`` is whatever was computed for each name. One synchronization.
    """
    if all_finite(found.values()):
        return
    for name in found:
        bad = int((~parameters[name].isfinite()).sum())
        if bad:
            raise QuietvitError(
                f"{name}: {bad} of its values are NaN or infinite; no weight was changed. Training "
                "diverged before this step: lower the learning rate, clip gradients, and resume "
                "from an earlier checkpoint or start anew."
            )
    for name, change in found.items():
        if not all_finite([change]):
            raise QuietvitError(
                f"{name}: its change overflows (largest weight "
                f"{float(parameters[name].abs().max()):.3g}); no weight was changed. Lower the "
                "learning rate or the strength, and resume from an earlier checkpoint or start "
                "anew."
            )
