"""``synthesize``: generate calibration images from a model alone.

``settings`` defines the methods, and ``loop`` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.origin import mark
from quietvit.synthesis.checks import (
    checked_numbers,
    refuse_model,
    refuse_statistics,
    without_statistics,
)
from quietvit.synthesis.dgh import Statistics
from quietvit.synthesis.loop import Optimization, Outcome, optimize
from quietvit.synthesis.priors import noise, pink
from quietvit.synthesis.psaq import PatchSimilarity, looks_at_model
from quietvit.synthesis.scale import PixelScale, Size, pixel_scale
from quietvit.synthesis.settings import DGH, PSAQ, Generator, Pink, generator_of
from quietvit.synthesis.watching import has_attention, has_statistics
from quietvit.tensors import precision_on
from quietvit.tracing import Trace, call, plain_copy, refusing, trace


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
    refuse_model(model)
    count, seed = checked_numbers(count, seed, minutes)
    scale = pixel_scale(model, size)
    # A copy made in inference mode would give inference tensors, which have no gradient.
    with torch.inference_mode(False), torch.enable_grad():
        own = plain_copy(model).eval().float().requires_grad_(False)
        chosen = generator_of(method) if method is not None else _fitting(own)
        parameter = next(own.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        random = torch.Generator().manual_seed(seed)
        with _model_draws(seed, device):
            images, outcome = _generated(
                own, chosen, count, scale, random, device, minutes, progress
            )
        images = scale.to_model(images.to(device))
    origin: dict[str, Any] = {
        "synthetic": True,
        "method": chosen.name,
        "seed": seed,
        "count": count,
        "fields": chosen.model_dump(mode="json"),
    }
    if outcome is not None:
        origin |= {"iterations_done": outcome.iterations, "stopped": outcome.stopped}
        origin["precision"] = precision_on(device, getattr(chosen, "precision", "float32"))
    return mark(images, origin)


@contextmanager
def _model_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators, for models that draw in a pass (MAE). Restore them at the end.

    Only those of the CPU and, if it is CUDA, of ``device``.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


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
    if not isinstance(chosen, PSAQ | DGH):
        if isinstance(chosen, Pink):
            drawn = pink(count, scale, random, chosen)
        else:
            drawn = noise(count, scale, random)
        with torch.no_grad(), refusing(partial(_does_not_run, model, scale)):
            call(model, scale.to_model(drawn[:1].to(device)))
        return drawn, None
    example = scale.to_model(torch.randn(1, *scale.size, generator=random).to(device))
    recorded = _traced(model, scale, example)
    work: Optimization
    if isinstance(chosen, DGH):
        if not any(map(has_statistics, model.modules())):
            other = "psaq" if has_attention(recorded) else "pink"
            raise QuietvitError(
                f"{without_statistics(model)}, so method 'dgh' cannot match them. Use method "
                f"'{other}', which needs no BatchNorm."
            )
        refuse_statistics(model)
    if isinstance(chosen, PSAQ):
        if not looks_at_model(chosen):
            raise QuietvitError(
                "entropy, stretching and classes are all 0, so the images would not depend on the "
                "model. Set one of these weights above 0, or use method 'pink'."
            )
        start = torch.randn(count, *scale.size, generator=random).to(device)
        work = PatchSimilarity(model, recorded, chosen, start, scale, random)
    else:
        work = Statistics(model, recorded, chosen, count, scale, random, device)
    outcome = optimize(work, chosen.iterations, random, minutes=minutes, progress=progress)
    return torch.cat(work.finished()), outcome


def _traced(model: nn.Module, scale: PixelScale, example: Tensor) -> Trace:
    try:
        return trace(model, example)
    except QuietvitError as error:
        cause = error.__cause__
        why = str(error) if cause is None else f"{type(cause).__name__}: {cause}"
        raise QuietvitError(_does_not_run(model, scale, why)) from error


def _does_not_run(model: nn.Module, scale: PixelScale, why: str) -> str:
    channels, height, width = scale.size
    return (
        f"images with {channels} channels of {height} x {width} pixels cannot be generated for "
        f"{type(model).__name__}, because it does not run on them ({why.splitlines()[0]}). Give "
        "another size (size=...), or set model.pretrained_cfg['input_size']. The model must take "
        "a batch of images and nothing else."
    )


def _fitting(model: nn.Module) -> Generator:
    return DGH() if any(map(has_statistics, model.modules())) else PSAQ()
