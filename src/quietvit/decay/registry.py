"""The regularizers that a recipe can name: one row each, and how to add one of your own.

Nothing else knows them by name. What each does is in its own module, with its recipe section.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from quietvit.decay.colinearity import ColinearityConfig, ColinearityDecay
from quietvit.decay.config import RegularizerConfig, RunFacts
from quietvit.decay.gains import NormGainConfig, NormGainDecay
from quietvit.decay.kurtosis import KurtosisConfig, KurtosisRegularization
from quietvit.decay.regularizer import Regularizer
from quietvit.decay.spectral import SpectralConfig, SpectralDecay
from quietvit.decay.tweo import TWEO, TweoConfig
from quietvit.decay.weight import PairWeightConfig, PairWeightDecay
from quietvit.errors import QuietvitError
from quietvit.plugins import REGULARIZERS, load_plugins

Made = TypeVar("Made", bound=Callable[..., Regularizer])
_RESERVED = ("watch_every",)


@dataclass(frozen=True)
class RegularizerEntry:
    """A regularizer that recipes can name: its section ``decay.<name>``, and its class.

    ``make(model, example, **section.arguments(facts))`` builds it. If what it builds has a method
    ``loss``, it is a term of the loss; otherwise it acts at the optimizer's steps.
    """

    name: str
    config: type[RegularizerConfig]
    make: Callable[..., Regularizer]

    def build(
        self, section: RegularizerConfig, model: nn.Module, example: Tensor, facts: RunFacts
    ) -> Regularizer:
        """Build it from its section. Raises QuietvitError as its class does."""
        return self.make(model, example, **section.arguments(facts))


# In the order in which they act.
_ENTRIES: dict[str, RegularizerEntry] = {
    entry.name: entry
    for entry in (
        RegularizerEntry("cd", ColinearityConfig, ColinearityDecay),
        RegularizerEntry("norm_gains", NormGainConfig, NormGainDecay),
        RegularizerEntry("weight", PairWeightConfig, PairWeightDecay),
        RegularizerEntry("s2d", SpectralConfig, SpectralDecay),
        RegularizerEntry("kure", KurtosisConfig, KurtosisRegularization),
        RegularizerEntry("tweo", TweoConfig, TWEO),
    )
}


def registered_regularizers() -> tuple[RegularizerEntry, ...]:
    """Return all entries, in the order in which they act: the library's own come first."""
    load_plugins(REGULARIZERS)
    return tuple(_ENTRIES.values())


def register_regularizer(name: str, config: type[RegularizerConfig]) -> Callable[[Made], Made]:
    """Let recipes name a regularizer of your own, by a decorator of its class.

    Then ``decay.<name>.strength=...`` in a recipe, or ``-s`` on the command line, builds it,
    attaches it, logs its penalty and saves and resumes its state. Example, as a whole::

        class L1Config(WeightRegularizerConfig):
            strength: float = 0.01

        @quietvit.register_regularizer("l1", L1Config)
        class L1Decay(WholeUpdate):
            def __init__(self, model, example=None, **options):
                super().__init__(model, **options)

            def parameter_names(self):
                return tuple(n for n, p in self.model.named_parameters() if p.ndim > 1)

            def changes(self, parameters, rates):
                def change(w, step):
                    return -w.sign() * w.abs().clamp_max(step)
                return {n: change(parameters[n], self.strength * rates[n]) for n in rates}

            def penalties(self):
                return {n: float(w.abs().sum()) for n, w in self.parameters().items()}

    Base classes are in ``quietvit.decay``: ``WholeUpdate`` (a change after the optimizer's step),
    ``PenaltyGradient`` (a gradient before it), ``BaseRegularizer`` (anything else). A class with a
    method ``loss()`` adds a term to the loss.

    Args:
        name: the name of the section, a Python identifier.
        config: its section; its keys are the keyword arguments of the class. Registering a class of
            the same module and name again replaces it, as notebooks do.

    Raises:
        QuietvitError: the name is no identifier or taken, or ``config`` is no RegularizerConfig.
    """
    if not name.isidentifier() or name in _RESERVED:
        raise QuietvitError(
            f"register_regularizer({name!r}): this cannot name a section. Give an identifier such "
            f"as 'l1', and none of {', '.join(_RESERVED)}."
        )
    if not (isinstance(config, type) and issubclass(config, RegularizerConfig)):
        raise QuietvitError(
            f"register_regularizer({name!r}, {config!r}): give a subclass of "
            "quietvit.decay.RegularizerConfig, whose fields are the keys of the section."
        )

    def register(make: Made) -> Made:
        before = _ENTRIES.get(name)
        if before is not None and _origin(before.make) != _origin(make):
            raise QuietvitError(
                f"register_regularizer({name!r}): this name belongs to {_origin(before.make)}. "
                "Choose another one."
            )
        _ENTRIES[name] = RegularizerEntry(name, config, make)
        return make

    return register


def _origin(make: Any) -> str:
    return f"{make.__module__}.{make.__qualname__}"
