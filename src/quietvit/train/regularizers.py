"""The regularizers of a run: built from the recipe, attached, timed, detached.

What each does is in ``quietvit.decay``. ``loop`` and ``watch`` say when it is logged.
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
    """Build the active regularizers of ``config`` by name, in the order in which they act.

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
    """Return those that add a term to the loss."""
    return [each for each in regularizers.values() if hasattr(each, "loss")]


def figures(regularizers: Mapping[str, Any]) -> dict[str, float]:
    """Return what is logged of each: ``penalty_<name>``, and its own figures if it has some."""
    values: dict[str, float] = {}
    for name, each in regularizers.items():
        values[f"penalty_{name}"] = float(each.penalty())
        own = each.figures() if hasattr(each, "figures") else {}
        values |= {f"{key}_{name}": float(value) for key, value in own.items()}
    return values


def attach(regularizers: Mapping[str, Any], optimizer: Optimizer, stopwatch: Stopwatch) -> None:
    """Attach all of them to ``optimizer``, and time their hooks before and after its steps."""
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
    """Detach them inside, for steps that train nothing."""
    detach(regularizers, stopwatch)
    try:
        yield
    finally:
        attach(regularizers, optimizer, stopwatch)
