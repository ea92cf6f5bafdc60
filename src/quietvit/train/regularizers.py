"""The regularizers of a configuration: built in its order, attached, timed, let go.

What each does is in ``quietvit.decay``; when it is logged, in ``loop`` and ``watch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from quietvit.train.config import DecayConfig, StrengthScheduleConfig
from quietvit.train.metrics import Stopwatch


def build_regularizers(
    config: DecayConfig,
    model: nn.Module,
    example: Tensor,
    images: Callable[[int], Tensor],
    steps_per_epoch: int,
    total_steps: int,
) -> dict[str, Any]:
    """Build what ``config`` asks for by the names of its sections, in the order they stand there.

    Args:
        example: one image (1, 3, H, W) as the model takes it.
        images: how to get n training images (n, 3, H, W) as the model takes them.

    Raises:
        QuietvitError: settings that a regularizer refuses, or a model without what it acts on.
    """
    from quietvit import decay

    classes = {
        "cd": decay.ColinearityDecay,
        "norm_gains": decay.NormGainDecay,
        "weight": decay.PairWeightDecay,
        "s2d": decay.SpectralDecay,
        "kure": decay.KurtosisRegularization,
        "tweo": decay.TWEO,
    }
    built: dict[str, Any] = {}
    for name in DecayConfig.model_fields:
        section = getattr(config, name)
        if name not in classes or section is None or not section.active:
            continue
        # The keys of a section are the arguments of its class.
        options = {key: getattr(section, key) for key in type(section).model_fields}
        options["schedule"] = _schedule(section.schedule, steps_per_epoch, total_steps)
        if name == "s2d":
            options["images"] = images(section.images)
        built[name] = classes[name](model, example, **options)
    return built


def _schedule(
    section: StrengthScheduleConfig | Mapping[str, StrengthScheduleConfig] | None,
    steps_per_epoch: int,
    total_steps: int,
) -> Any:
    if section is None:
        return None
    if isinstance(section, Mapping):
        return {kind: _schedule(own, steps_per_epoch, total_steps) for kind, own in section.items()}
    from quietvit.decay import StrengthSchedule

    return StrengthSchedule(
        shape=section.shape,
        start=round(section.start_epoch * steps_per_epoch),
        warmup=round(section.warmup_epochs * steps_per_epoch),
        total=None if section.shape == "constant" else total_steps,
        final=section.final,
    )


def figures(regularizers: Mapping[str, Any]) -> dict[str, float]:
    """Return what is logged: the penalty of each, of S2D also on how many layers it acts."""
    found = {f"penalty_{name}": float(part.penalty()) for name, part in regularizers.items()}
    if "s2d" in regularizers:
        found["layers_s2d"] = len(regularizers["s2d"].selected)
    return found


def attach(regularizers: Mapping[str, Any], optimizer: Optimizer, stopwatch: Stopwatch) -> None:
    """Let all of them follow ``optimizer``, their time before and after its steps measured."""
    with stopwatch.around_hooks(optimizer):
        for regularizer in regularizers.values():
            regularizer.attach(optimizer)


def detach(regularizers: Mapping[str, Any], stopwatch: Stopwatch) -> None:
    """Undo ``attach``."""
    for regularizer in regularizers.values():
        regularizer.detach()
    stopwatch.unhook()


@contextmanager
def detached(
    regularizers: Mapping[str, Any], optimizer: Optimizer, stopwatch: Stopwatch
) -> Iterator[None]:
    """Let go of the optimizer inside, for steps that train nothing."""
    detach(regularizers, stopwatch)
    try:
        yield
    finally:
        attach(regularizers, optimizer, stopwatch)
