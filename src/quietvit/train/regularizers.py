"""Build the regularizers of a run from the recipe, attach, time and detach them.

The regularizers themselves are in ``quietvit.decay``. ``loop`` logs their figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from quietvit.decay import registered_regularizers
from quietvit.decay.config import RunFacts
from quietvit.train.config import DecayConfig
from quietvit.train.metrics import Stopwatch


def build_regularizers(
    config: DecayConfig, model: nn.Module, example: Tensor, facts: RunFacts
) -> dict[str, Any]:
    """Build the active regularizers of ``config``: name -> regularizer, in the order they act.

    Args:
        example: one image (1, 3, H, W) as the model takes it.

    Raises:
        QuietvitError: a regularizer refuses its settings, or the model lacks what it acts on.
    """
    sections = config.sections()
    return {
        entry.name: entry.build(sections[entry.name], model, example, facts)
        for entry in registered_regularizers()
        if entry.name in sections and sections[entry.name].active
    }


def loss_terms(regularizers: Mapping[str, Any]) -> list[Any]:
    """Return the regularizers that add a term to the loss."""
    return [regularizer for regularizer in regularizers.values() if hasattr(regularizer, "loss")]


def figures(regularizers: Mapping[str, Any]) -> dict[str, float]:
    """Return what is logged: ``penalty_<name>`` of each, and its own ``<figure>_<name>``."""
    values: dict[str, float] = {}
    for name, regularizer in regularizers.items():
        values[f"penalty_{name}"] = float(regularizer.penalty())
        own = regularizer.figures() if hasattr(regularizer, "figures") else {}
        values |= {f"{key}_{name}": float(value) for key, value in own.items()}
    return values


def attach(regularizers: Mapping[str, Any], optimizer: Optimizer, stopwatch: Stopwatch) -> None:
    """Attach the regularizers to ``optimizer`` and time their step hooks."""
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
    """Detach the regularizers inside, for optimizer steps that train nothing."""
    detach(regularizers, stopwatch)
    try:
        yield
    finally:
        attach(regularizers, optimizer, stopwatch)
