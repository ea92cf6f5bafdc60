"""S2D, selective spectral decay: the leading singular values of layers that they dominate.

How a layer is judged is in ``dominance``, how a gradient is applied in ``attach``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from quietvit.decay.checks import number, refuse_unless_finite, whole_number
from quietvit.decay.choice import warn_of_left_out
from quietvit.decay.config import RunFacts, Share, Strength, WeightRegularizerConfig
from quietvit.decay.decoupled import PenaltyGradient
from quietvit.decay.dominance import Spectrum, dominances, leading
from quietvit.decay.schedule import Schedule
from quietvit.errors import QuietvitError
from quietvit.normalization import warn_unless_normalized
from quietvit.pairs.pair import COMPUTED
from quietvit.tensors import all_finite, wide
from quietvit.tracing import Site, Trace, WeightView, trace

logger = logging.getLogger("quietvit")


class SpectralConfig(WeightRegularizerConfig):
    """S2D, ``quietvit.SpectralDecay``: the leading singular values of layers they dominate.

    Source: arXiv 2602.14432, second-hand (docs/method.md).
    """

    strength: Strength = 5e-4
    """In units of the loss's gradient (coupled) or of the learning rate. 0 is off."""
    threshold: Share = 0.95
    """PCDR from which on a layer takes part, 0 to 1."""
    components: int = Field(default=3, ge=1)
    """Largest number of singular values of a layer."""
    refresh: int = Field(default=100, ge=1)
    """Applied steps between two selections of layers."""
    power: int = Field(default=2, ge=1)
    """The gradient is the singular value to this power."""
    coupled: bool = True
    """Add the gradient before the optimizer's step, as published; else a decoupled update."""
    images: int = Field(default=16, ge=1)
    """Training images whose activations select the layers."""

    def arguments(self, facts: RunFacts) -> dict[str, Any]:
        return super().arguments(facts) | {"images": facts.images(self.images)}


@dataclass(frozen=True)
class Layer:
    """A weight W (out, in) of linear sites, and the sites that multiply by it."""

    view: WeightView
    sites: tuple[str, ...]


class SpectralDecay(PenaltyGradient):
    """S2D: penalize the leading singular values of the linear layers that they dominate.

    PCDR_k is the share of an activation that the k leading components make. For a neuron i and an
    input row x it is |sum_{r<=k} s_r u_ir (v_r . x)| / |(W x)_i|. A layer takes part with the
    smallest k <= ``components`` whose PCDR_k is at least ``threshold``. The penalty is
    ``strength / (power + 1) sum_{r<=k} s_r^(power + 1)``, the gradient
    ``strength sum_{r<=k} s_r^power u_r v_r^T``. Power 1 is an L2 penalty of these components.

    Coupled (as published), the gradient enters ``.grad``, see ``PenaltyGradient``. Decoupled, the
    weight loses the learning rate times it, and no component is carried through zero.

    Layers are selected every ``refresh`` applied steps, by one forward pass of ``images`` in eval
    mode without gradient and by the singular vectors of every layer. In between the vectors stay,
    and s_r = u_r . W v_r is current. If no layer is selected, nothing is penalized, and the logger
    ``quietvit`` warns the first time. ``selected`` and ``dominance`` tell of the last selection.

    Source: arXiv 2602.14432, second-hand (docs/method.md). Derived here, because it is not public:
    PCDR of a layer is the mean over at most 1024 input rows, each for its neuron with the largest
    |W x|, bias left out; k stays below the rank of W; the layer that writes the logits is left
    alone; singular values are current between selections.

    Args:
        model: the model whose parameters the optimizer holds, built before FSDP or compilation.
        example: input for ``quietvit.trace``.
        images: (N, C, H, W) whose activations give PCDR, the same in every process, of any size N
            that passes through the model at once; default ``example``.
        strength: at least 0, in units of the loss's gradient (coupled) or of the rate (decoupled).
        threshold: of PCDR, 0 to 1.
        components: largest k.
        refresh: applied steps between two selections.
        power: n, at least 1.
        coupled, every, schedule: see ``PenaltyGradient``, ``ColinearityDecay``.

    Raises:
        QuietvitError: bad values, or a model without linear layers. While training: weights or
            activations are NaN or infinite (no weight is changed then), or steps pass without a
            call.

    One device synchronization per step.
    """

    concerns = "weights of linear layers"

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        images: Any = None,
        strength: float = 5e-4,
        threshold: float = 0.95,
        components: int = 3,
        refresh: int = 100,
        power: int = 2,
        coupled: bool = True,
        every: int = 1,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(model, strength=strength, coupled=coupled, every=every, schedule=schedule)
        own = type(self).__name__
        self.threshold = number(threshold, "threshold", own)
        if self.threshold > 1:
            raise QuietvitError(f"{own}(threshold={threshold!r}): PCDR is a share, give 0 to 1.")
        self.components = whole_number(components, "components", own)
        self.refresh = whole_number(refresh, "refresh", own)
        self.power = whole_number(power, "power", own)
        self.images = example if images is None else images
        warn_unless_normalized(images, model, "SpectralDecay's")
        self.dominance: dict[str, tuple[float, ...]] = {}
        self._trace = trace(self.model, example)
        self.layers = _layers(self.model, self._trace)
        warn_of_left_out(own, _left_out(self._trace))
        self._chosen: dict[str, tuple[Tensor, Tensor]] | None = None
        self._refreshed = 0
        self._warned = False

    @property
    def selected(self) -> dict[str, int]:
        """The layers that take part since the last refresh, each with its k."""
        return {name: u.shape[1] for name, (u, _) in (self._chosen or {}).items()}

    def figures(self) -> dict[str, float]:
        """Return the number of selected layers, as ``layers``."""
        return {"layers": len(self.selected)}

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """Return sum_{r<=k} s_r^(power + 1) / (power + 1) of each layer, 0 where not selected.

        Before the first step the layers are selected for this call alone: one forward pass.
        """
        parameters = self.parameters()
        chosen = self._selection(parameters)[0] if self._chosen is None else self._chosen
        result = dict.fromkeys((str(layer.view) for layer in self.layers), 0.0)
        for layer in self.layers:
            if str(layer.view) in chosen:
                _, _, s = self._components(layer, chosen, parameters)
                total = s.abs().pow(self.power + 1).sum() / (self.power + 1)
                result[str(layer.view)] = float(total)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the step counter, the settings, and the singular vectors of selected layers."""
        state = super().state_dict()
        if self._chosen is not None:
            state["refreshed"] = self._refreshed
            state["chosen"] = {name: [u, v] for name, (u, v) in self._chosen.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave. Raises QuietvitError where the settings differ."""
        super().load_state_dict(state)
        chosen = state.get("chosen")
        known = {str(layer.view) for layer in self.layers}
        for name in chosen or ():
            if name not in known:
                raise QuietvitError(
                    f"the state has singular vectors of {name}, which is no linear layer of this "
                    f"{type(self.model).__name__}. Build it for the model that was trained, or "
                    "start without loading the state."
                )
        self._refreshed = int(state.get("refreshed", 0))
        self._chosen = None if chosen is None else {n: (u, v) for n, (u, v) in chosen.items()}

    def parameter_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.view.parameter_name for layer in self.layers))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "penalty": "spectral",
            "layers": len(self.layers),
            "threshold": self.threshold,
            "components": self.components,
            "refresh": self.refresh,
            "power": self.power,
        }

    def gradients(
        self, parameters: Mapping[str, Tensor], names: Collection[str]
    ) -> dict[str, Tensor]:
        return self._along(parameters, names, lambda name, s: self._slope(s))

    def changes(
        self, parameters: Mapping[str, Tensor], rates: Mapping[str, float]
    ) -> dict[str, Tensor]:
        def shrunk(name: str, s: Tensor) -> Tensor:
            change = (self._slope(s) * rates[name]).abs()
            return -torch.minimum(change, s.abs()) * s.sign()

        return self._along(parameters, rates, shrunk)

    def _slope(self, s: Tensor) -> Tensor:
        return s.sign() * s.abs().pow(self.power) * self.strength

    def _along(
        self,
        parameters: Mapping[str, Tensor],
        names: Collection[str],
        amount: Callable[[str, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Sum of amount(s)_r u_r v_r^T over the leading r of selected layers, shaped like W."""
        applied = self.steps // self.every
        if self._chosen is None or applied - self._refreshed >= self.refresh:
            self._chosen, self.dominance = self._selection(parameters)
            self._refreshed = applied
            self._warn_of_none()
        result: dict[str, Tensor] = {}
        for layer in self.layers:
            name = layer.view.parameter_name
            if name not in names or str(layer.view) not in self._chosen:
                continue
            u, v, s = self._components(layer, self._chosen, parameters)
            whole = wide(parameters[name])
            if name not in result:
                result[name] = torch.zeros_like(whole, memory_format=torch.contiguous_format)
            layer.view.scatter_add_(result[name], (u * amount(name, s)) @ v.mT)
        refuse_unless_finite(result, parameters)
        return result

    def _warn_of_none(self) -> None:
        """Warn once that no layer was selected, and how near the nearest came."""
        if self._chosen or self._warned:
            return
        self._warned = True
        name, share = max(self.dominance.items(), key=lambda result: max(result[1]))
        logger.warning(
            "SpectralDecay selects none of its %d layers, so it changes nothing yet: no PCDR "
            "reaches threshold=%g with components=%d. The largest is %.3g (%s). It selects again "
            "every %d applied steps. A lower threshold or more components would select some.",
            len(self.layers),
            self.threshold,
            self.components,
            max(share),
            name,
            self.refresh,
        )

    def _components(
        self,
        layer: Layer,
        chosen: Mapping[str, tuple[Tensor, Tensor]],
        parameters: Mapping[str, Tensor],
    ) -> Spectrum:
        W = wide(layer.view.select(parameters[layer.view.parameter_name]))
        u, v = (vectors.to(W) for vectors in chosen[str(layer.view)])
        return u, v, ((W @ v) * u).sum(0)

    def _selection(
        self, parameters: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[float, ...]]]:
        """Singular vectors of the layers that are dominated by them, and PCDR of every layer."""
        weights = {
            str(layer.view): wide(layer.view.select(parameters[layer.view.parameter_name]))
            for layer in self.layers
        }
        if not all_finite(weights.values()):
            refuse_unless_finite({n: parameters[n] for n in self.parameter_names()}, parameters)
        spectra = {
            name: leading(W, min(self.components, min(W.shape) - 1)) for name, W in weights.items()
        }
        of_site = {site: str(layer.view) for layer in self.layers for site in layer.sites}
        shares = dominances(self.model, self._trace, self.images, weights, spectra, of_site)
        chosen = {}
        for name, share in shares.items():
            enough = [k for k, value in enumerate(share, 1) if value >= self.threshold]
            if enough:
                u, v, _ = spectra[name]
                chosen[name] = u[:, : enough[0]].contiguous(), v[:, : enough[0]].contiguous()
        return chosen, shares


def _left_out(traced: Trace) -> list[tuple[str, str]]:
    """The linear sites beside the head whose weight is no matrix of parameters, and why."""
    return [(site.name, COMPUTED) for site in _linears(traced) if site.weight is None]


def _linears(traced: Trace) -> Iterator[Site]:
    """The linear sites that act on activations, beside the head."""
    for site in traced.sites:
        if site.kind == "linear" and site.role not in ("constant", "head"):
            yield site


def _layers(model: nn.Module, traced: Trace) -> tuple[Layer, ...]:
    """Weights of linear sites, each once however many sites and names it has."""
    result: dict[object, tuple[WeightView, list[str]]] = {}
    for site in _linears(traced):
        view = site.weight
        if view is None or min(view.read(model).shape) < 2:
            continue
        key = (id(view.parameter(model)), view.rows, view.cols)
        first, sites = result.setdefault(key, (view, []))
        if first.transposed == view.transposed:
            sites.append(site.name)
    if not result:
        raise QuietvitError(
            f"SpectralDecay has nothing to act on: {traced.model_name} has no linear layer (beside "
            "the head) whose weight is a matrix of parameters. "
            "print(quietvit.trace(model, example)) shows what it has."
        )
    return tuple(Layer(view, tuple(sites)) for view, sites in result.values())
