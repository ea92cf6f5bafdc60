"""The regularizers of a configuration: built in its order, attached, timed, let go.

What each does is in ``quietvit.decay``; when it is logged, in ``loop`` and ``watch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from quietvit.train.config import (
    ColinearityConfig,
    DecayConfig,
    StrengthScheduleConfig,
    TweoConfig,
    WeightRegularizerConfig,
)
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
        images: how to get the first n training images (n, 3, H, W) as the model takes them.

    Raises:
        QuietvitError: settings that a regularizer refuses, or a model without what it acts on.
    """
    from quietvit import decay

    built: dict[str, Any] = {}

    def schedule(
        section: StrengthScheduleConfig | Mapping[str, StrengthScheduleConfig] | None,
    ) -> Any:
        if section is None:
            return None
        if isinstance(section, Mapping):
            return {kind: schedule(own) for kind, own in section.items()}
        return decay.StrengthSchedule(
            shape=section.shape,
            start=round(section.start_epoch * steps_per_epoch),
            warmup=round(section.warmup_epochs * steps_per_epoch),
            total=None if section.shape == "constant" else total_steps,
            final=section.final,
        )

    def common(section: ColinearityConfig | WeightRegularizerConfig | TweoConfig) -> dict[str, Any]:
        shared = {"strength": section.strength, "schedule": schedule(section.schedule)}
        return shared if isinstance(section, TweoConfig) else {**shared, "every": section.every}

    cd, gains, weight = config.cd, config.norm_gains, config.weight
    if cd is not None and cd.active:
        built["cd"] = decay.ColinearityDecay(
            model,
            example,
            **common(cd),
            penalty=cd.penalty,
            kinds=cd.kinds,
            fold_gains=cd.fold_gains,
            products=cd.products,
            sharded=cd.sharded,
            compile=cd.compile,
        )
    if gains is not None and gains.active:
        built["norm_gains"] = decay.NormGainDecay(model, example, **common(gains))
    if weight is not None and weight.active:
        built["weight"] = decay.PairWeightDecay(
            model, example, **common(weight), kinds=weight.kinds
        )
    s2d, kure, tweo = config.s2d, config.kure, config.tweo
    if s2d is not None and s2d.active:
        built["s2d"] = decay.SpectralDecay(
            model,
            example,
            images=images(s2d.images),
            **common(s2d),
            threshold=s2d.threshold,
            components=s2d.components,
            refresh=s2d.refresh,
            power=s2d.power,
            coupled=s2d.coupled,
        )
    if kure is not None and kure.active:
        built["kure"] = decay.KurtosisRegularization(
            model, example, **common(kure), target=kure.target, coupled=kure.coupled
        )
    if tweo is not None and tweo.active:
        built["tweo"] = decay.TWEO(
            model, example, **common(tweo), threshold=tweo.threshold, power=tweo.power
        )
    return built


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
