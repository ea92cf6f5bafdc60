"""Reading and changing the weights of traced sites in a model, through their views.

Only plain, unshared weights may be changed; ``why_fixed`` tells why another one may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing import Site, Trace


def why_fixed(model: nn.Module, trace: Trace, site: Site) -> str | None:
    """Return why a site's weight cannot be changed for this site alone; None if it can.

    It can if it is (part of) a parameter, and no other site reads that part.
    """
    if site.kind not in ("linear", "conv"):
        return f"{site.name} has no weight"
    if site.weight is None:
        return f"the weight of {site.name} is computed in the forward pass, so it is no parameter"
    name = site.weight.parameter_name
    for other in trace.sites:
        if other.name == site.name or other.weight is None:
            continue
        if other.weight.parameter_name == name and _overlap(model, site, other):
            return f"{name} is shared by {site.name} and {other.name}"
    whole = site.weight.parameter(model)
    twins = [n for n, p in model.named_parameters(remove_duplicate=False) if p is whole]
    readers = [
        other.name
        for other in trace.sites
        if other.weight is not None
        and other.name != site.name
        and other.weight.parameter_name in twins
        and other.weight.parameter_name != name
    ]
    return f"{name} is tied to the weight of {readers[0]}" if readers else None


def weight_axis(site: Site) -> int:
    """Return the output dim of a weight: 1 for a transposed convolution, else 0."""
    return 1 if "transpose" in site.function else 0


def read_weight(model: nn.Module, site: Site) -> Tensor:
    """Return the weight as the site reads it, (out, in, ...), a detached copy."""
    if site.weight is None or site.weight_shape is None:
        raise QuietvitError(f"{site.name} has no weight that is a parameter.")
    return site.weight.read(model).detach().reshape(site.weight_shape).clone()


def write_weight(model: nn.Module, site: Site, weight: Tensor) -> None:
    """Write a weight (out, in, ...) to where the site reads it; check ``why_fixed`` first."""
    if site.weight is None or tuple(weight.shape) != site.weight_shape:
        raise QuietvitError(
            f"{site.name} has a weight of shape {site.weight_shape}, not {tuple(weight.shape)}."
        )
    whole = site.weight.parameter(model)
    with torch.no_grad():
        entries = weight.reshape(site.weight.select(whole).shape).to(whole.dtype)
        site.weight.scatter_(whole, entries)


def refuse_inference_mode() -> None:
    """Raise QuietvitError inside ``torch.inference_mode``, which forbids gradients."""
    if torch.is_inference_mode_enabled():
        raise QuietvitError(
            "this method does not work inside torch.inference_mode, which forbids gradients. Call "
            "quantize outside of it; torch.no_grad is allowed."
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model gets a gradient inside. Raises QuietvitError in inference mode."""
    refuse_inference_mode()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _overlap(model: nn.Module, one: Site, other: Site) -> bool:
    assert one.weight is not None
    assert other.weight is not None
    marks = torch.zeros(one.weight.parameter(model).shape, dtype=torch.int32)
    for view in (one.weight, other.weight):
        view.scatter_add_(marks, torch.ones_like(view.select(marks)))
    return bool((marks > 1).any())
