"""Check that a gradient reaches the pixels, with one image, before images are optimized.

Without it, only the terms that do not run the model would move the pixels, and nobody would see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.synthesis.watching import run_watched
from quietvit.tracing import SITE_KINDS, Site, Trace

_CUT = (
    "Its input was detached, or this part runs under torch.no_grad() or torch.inference_mode(): "
    "look for detach(), .data, numpy() and casts to integers."
)
_ZERO = (
    "The gradient there is 0 for every pixel, as after round(), floor(), sign() or a comparison."
)


def refuse_unreached(
    model: nn.Module,
    trace: Trace,
    image: Tensor,
    to_model: Callable[[Tensor], Tensor],
    seen: Callable[[Tensor], Sequence[Tensor]],
) -> None:
    """Raise QuietvitError, with the first site that blocks, unless a gradient reaches the image.

    Args:
        image: (1, C, H, W).
        to_model: maps it to the model's input.
        seen: runs the model on it and returns the tensors from which the loss is computed.
    """
    pixels = image.detach().clone().requires_grad_()
    if _reaches(seen(pixels), pixels):
        return
    place = _first_blocked(model, trace, pixels, to_model)
    raise QuietvitError(
        f"no gradient reaches the pixels through {type(model).__name__}, so its images cannot be "
        f"optimized. {place} Change this, or use method 'pink', which needs no gradient."
    )


def _reaches(tensors: Sequence[Tensor], pixels: Tensor) -> bool:
    """Whether the gradient of a random projection of the tensors is not 0 for every pixel."""
    random = torch.Generator().manual_seed(0)
    parts = [
        (x.float() * torch.randn(x.shape, generator=random).to(x.device)).sum()
        for x in tensors
        if x.requires_grad and x.numel()
    ]
    if not parts:
        return False
    (gradient,) = torch.autograd.grad(
        torch.stack(parts).sum(), pixels, retain_graph=True, allow_unused=True
    )
    return gradient is not None and bool(gradient.any())


def _first_blocked(
    model: nn.Module, trace: Trace, pixels: Tensor, to_model: Callable[[Tensor], Tensor]
) -> str:
    """Return a sentence about the first site that depends on the pixels without a gradient."""
    outputs = _outputs(model, trace, to_model(pixels))
    others = [x.detach() for _, x in _outputs(model, trace, to_model(-pixels.detach()))]
    last = ""
    for number, (site, output) in enumerate(outputs):
        other = others[number] if number < len(others) else None
        if other is not None and torch.equal(output.detach(), other):
            continue  # constant, such as positions or the queries of a decoder
        if not output.requires_grad:
            return f"{site} is the first part without one. {_CUT}"
        if not _reaches([output], pixels):
            return f"{site} is the first part without one. {_ZERO}"
        last = site
    if last:
        return f"It is lost after {last}. {_CUT}"
    return "None of its parts depends on the pixels."


def _outputs(model: nn.Module, trace: Trace, images: Tensor) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []

    def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        output = run(*operands)
        found.append((site.name, output))
        return output

    run_watched(model, trace, handler, SITE_KINDS, images)
    return found
