"""``synthesize``: generate calibration images from a model alone.

``settings`` defines the methods, and ``loop`` runs them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.origin import mark
from quietvit.quantization import QuantizedModel
from quietvit.synthesis.dgh import Statistics
from quietvit.synthesis.loop import Optimization, Outcome, optimize
from quietvit.synthesis.priors import noise, pink
from quietvit.synthesis.psaq import PatchSimilarity
from quietvit.synthesis.scale import PixelScale, Size, pixel_scale
from quietvit.synthesis.settings import DGH, PSAQ, Generator, Pink, generator_of
from quietvit.synthesis.watching import has_statistics
from quietvit.tracing import Trace, plain_copy, trace


def synthesize(
    model: nn.Module,
    count: int,
    method: Generator | str | None = None,
    *,
    seed: int = 0,
    size: Size = None,
    minutes: float | None = None,
    progress: bool = True,
) -> Tensor:
    """Generate calibration images for a model without any data.

    Pass the result to ``quietvit.quantize``. The quantized model records how its calibration images
    were generated. The given model never changes. Ctrl-C stops early and returns current images.

    Args:
        model: a float model. Its normalization comes from ``model.pretrained_cfg`` (set by timm and
            ``quietvit.data.create_model``), or is torchvision's.
        count: number of images.
        method: ``"dgh"`` matches the statistics of BatchNorms. ``"psaq"`` makes the patches of a
            vision transformer differ. ``"pink"`` and ``"noise"`` draw noise, without optimization.
            You can also give settings, such as ``quietvit.synthesis.PSAQ(iterations=200)``. None
            takes ``"dgh"`` for a model with BatchNorm, otherwise ``"psaq"``.
        seed: the same seed gives the same images on the same machine.
        size: side, or height and width, in pixels. None takes the model's own.
        minutes: stop after this time and return the current images.
        progress: show a progress bar with the time left.

    Returns:
        Images (count, C, H, W), float32, in the model's own preprocessing, on its device.

    Raises:
        QuietvitError: the model is quantized, holds NaN, or has an unknown normalization; or an
            argument does not fit. ``"dgh"`` needs BatchNorm, ``"psaq"`` needs attention.
    """
    _check(model, count, seed, minutes)
    own = plain_copy(model).eval().float().requires_grad_(False)
    chosen = generator_of(method) if method is not None else _fitting(own)
    scale = pixel_scale(model, size)
    parameter = next(own.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    random = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        images, outcome = _generated(own, chosen, count, scale, random, device, minutes, progress)
    origin: dict[str, Any] = {
        "synthetic": True,
        "method": chosen.name,
        "seed": seed,
        "count": count,
        "fields": chosen.model_dump(mode="json"),
    }
    if outcome is not None:
        origin |= {"iterations_done": outcome.iterations, "stopped": outcome.stopped}
    return mark(scale.to_model(images.to(device)), origin)


def _generated(
    model: nn.Module,
    chosen: Generator,
    count: int,
    scale: PixelScale,
    random: torch.Generator,
    device: torch.device,
    minutes: float | None,
    progress: bool,
) -> tuple[Tensor, Outcome | None]:
    """Return images in natural units, and the outcome of the optimization, if any."""
    if isinstance(chosen, Pink):
        return pink(count, scale, random, chosen), None
    if not isinstance(chosen, PSAQ | DGH):
        return noise(count, scale, random), None
    example = scale.to_model(torch.randn(1, *scale.size, generator=random).to(device))
    recorded = _traced(model, example)
    work: Optimization
    if isinstance(chosen, PSAQ):
        start = torch.randn(count, *scale.size, generator=random).to(device)
        work = PatchSimilarity(model, recorded, chosen, start, scale, random)
    else:
        work = Statistics(model, recorded, chosen, count, scale, random, device)
    outcome = optimize(work, chosen.iterations, random, minutes=minutes, progress=progress)
    return torch.cat(work.finished()), outcome


def _traced(model: nn.Module, example: Tensor) -> Trace:
    try:
        return trace(model, example)
    except QuietvitError as error:
        height, width = example.shape[-2:]
        raise QuietvitError(
            f"images of {height} x {width} pixels cannot be generated for {type(model).__name__}, "
            f"because it does not run on them. Give another size (size=...). {error}"
        ) from error


def _fitting(model: nn.Module) -> Generator:
    return DGH() if any(map(has_statistics, model.modules())) else PSAQ()


def _check(model: Any, count: Any, seed: Any, minutes: float | None) -> None:
    """Raise QuietvitError for arguments that cannot work."""
    if not isinstance(model, nn.Module):
        raise QuietvitError(
            f"the model is a {type(model).__name__}, not a torch.nn.Module. Give the float model, "
            "because gradients cannot flow through an exported one."
        )
    if any(isinstance(module, QuantizedModel) for module in model.modules()):
        raise QuietvitError(
            f"this {type(model).__name__} is quantized. Generate images from the original float "
            "model."
        )
    if type(count) is not int or count < 1:
        raise QuietvitError(f"{count!r} images were requested. Request at least 1; 32 is usual.")
    if type(seed) is not int or seed < 0:
        raise QuietvitError(f"the seed is {seed!r}. Give an integer of at least 0.")
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise QuietvitError(f"minutes is {minutes!r}. Give a number above 0, or leave it out.")
    bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    bad += [name for name, b in model.named_buffers() if bool(b.isnan().any())]  # masks hold -inf
    if bad:
        raise QuietvitError(
            f"{bad[0]} of {type(model).__name__} holds NaN or inf, so no images can be generated "
            "from it. Reload the weights, or train the model again."
        )
