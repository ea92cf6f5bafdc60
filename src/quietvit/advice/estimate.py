"""The fast estimate of ``sensitivity``, from forward and backward passes through two models.

``sensitivity`` builds the result from it. All formulas are derived here.

Alone: the cost of quantizing only one site, from the float model. The local noise n of a site is
its output on quantized operands minus its output on float operands. To first order, n changes the
logits z by J n. For a small change, KL(z ‖ z + J n) is ½ (J n)ᵀ F (J n), with F = diag(p) − p pᵀ
and p = softmax z. Let e be random signs and u = √p∘e − p (√p·e). Then E[u uᵀ] = F. So the KL is
½ E[(g·n)²], where g = ∇(uᵀz) is the gradient at the site's output. One backward pass gives g for
all sites. The products g·n of several sites add up before squaring. If the model is not a
classifier, u is random signs, and E[(g·n)²] = ‖J n‖².

Without: the effect of quantizing everything except one site, from the quantized model. Let g be the
gradient of KL(p ‖ q) at the site's output. To second order, removing the noise lowers the KL by
g·n − ½ nᵀH n. The last term is approximated by the KL of the noise alone. If the model is not a
classifier, ‖ŷ − y‖² replaces the KL.

The first operand of a site gets the noise that it causes alone, and the second gets the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quietvit.advice.effects import Effect, divergence
from quietvit.advice.switches import Switches
from quietvit.progress import tracked
from quietvit.quantization import Slot
from quietvit.tracing import Site

BATCH = 2
"""Images per pass. It is small, because the noise of all sites is held in memory."""
PROBES = 4
"""Random vectors u for each image. Each costs one backward pass."""
_SEED = 0

Key = tuple[str, str]


def estimated_effects(
    switches: Switches, whole: Effect, progress: bool = False
) -> tuple[dict[Key, Effect], dict[Key, Effect], int]:
    """Return the estimated effects ``alone`` and ``without``, and the number of images used.

    The effects are by (``role`` or ``site``, name). Only matrix products are estimated, not norms,
    for example. Ctrl-C ends the passes, and the images so far give the estimate.
    """
    alone, gains = _Scores(), _Scores()
    signal, seen = 0.0, 0
    generator = torch.Generator().manual_seed(_SEED)
    parts = _parts(switches)
    try:
        with closing(tracked(parts, len(parts), "estimating", progress)) as steps:
            for images in steps:
                switches.check()
                own_costs, own_gains = _Scores(), _Scores()
                output = _probe(switches, images, own_costs, generator)
                _follow(switches, images, output, own_gains)
                alone.join(own_costs)
                gains.join(own_gains)
                signal += float(output.float().square().sum())
                seen += len(images)
    except KeyboardInterrupt:
        if not seen:
            return {}, {}, 0
    groups = {("role", name): slots for name, slots in switches.roles.items()}
    groups |= {("site", name): slots for name, slots in switches.sites.items()}
    first, second = {}, {}
    for key, slots in groups.items():
        if not alone.knows(slots):
            continue
        square = alone.square(slots)
        gain = float(gains.total(slots).sum())
        if switches.floats.classifies:
            cost = square / 2 / seen
            first[key] = Effect(kl=cost)
            second[key] = Effect(kl=(whole.kl or 0.0) - gain / seen + cost)
        elif signal:
            first[key] = Effect(error=math.sqrt(square / signal))
            left = (whole.error or 0.0) ** 2 - (gain - square) / signal
            second[key] = Effect(error=math.copysign(math.sqrt(abs(left)), left))
    return first, second, seen


def estimated_costs(switches: Switches) -> dict[Slot, float]:
    """Return the estimated cost of each operand alone: the KL, or the squared relative error."""
    scores, signal = _Scores(), 0.0
    generator = torch.Generator().manual_seed(_SEED)
    for images in _parts(switches):
        output = _probe(switches, images, scores, generator)
        signal += float(output.float().square().sum())
    scale = 2 * switches.images if switches.floats.classifies else signal
    return {slot: scores.square([slot]) / scale if scale else 0.0 for slot in scores.found}


def _parts(switches: Switches) -> list[Tensor]:
    """Return the images in parts of at most ``BATCH``."""
    return [part for batch in switches.floats.batches for part in batch.split(BATCH)]


def _probe(
    switches: Switches, images: Tensor, scores: _Scores, generator: torch.Generator
) -> Tensor:
    """Add the scores g·n for ``PROBES`` random u in the float model. Returns its output."""
    listener = _Listener(switches, quantize=False)
    z = listener.run(images)
    for probe in range(PROBES):
        signs = torch.randint(2, z.shape, generator=generator).mul_(2).sub_(1).float().to(z.device)
        u = signs
        if switches.floats.classifies:
            p = z.detach().float().softmax(-1)
            u = p.sqrt() * signs - p * (p.sqrt() * signs).sum(-1, keepdim=True)
        listener.score((u * z).sum(), scores, probe, last=probe == PROBES - 1)
    return z.detach()


def _follow(switches: Switches, images: Tensor, wanted: Tensor, scores: _Scores) -> None:
    """Add the scores g·n of the KL (or squared error) in the quantized model."""
    listener = _Listener(switches, quantize=True)
    z = listener.run(images)
    if switches.floats.classifies:
        loss = divergence(wanted.float(), z.float()).sum()
    else:
        loss = (z.float() - wanted.float()).square().sum()
    listener.score(loss, scores, 0, last=True)


@dataclass
class _Scores:
    """The scores g·n by operand and probe: one vector (images,) for each batch."""

    found: dict[Slot, dict[int, list[Tensor]]] = field(default_factory=dict)

    def add(self, slot: Slot, probe: int, scores: Tensor) -> None:
        self.found.setdefault(slot, {}).setdefault(probe, []).append(scores)

    def join(self, other: _Scores) -> None:
        """Append the scores of further images."""
        for slot, by_probe in other.found.items():
            for probe, parts in by_probe.items():
                for part in parts:
                    self.add(slot, probe, part)

    def knows(self, slots: Iterable[Slot]) -> bool:
        return all(slot in self.found for slot in slots)

    def total(self, slots: Iterable[Slot]) -> Tensor:
        """Return the sum of scores over operands, (probes, images)."""
        each = [
            torch.stack([torch.cat(parts) for parts in self.found[slot].values()]) for slot in slots
        ]
        return torch.stack(each).sum(0)

    def square(self, slots: Iterable[Slot]) -> float:
        """Return the squared total, averaged over probes and summed over images."""
        return float(self.total(slots).square().mean(0).sum())


class _Listener:
    """Observe the quantized model, and keep each site's output and the noise of each operand.

    ``quantize``: run the sites quantized. Otherwise they run in float.
    """

    def __init__(self, switches: Switches, *, quantize: bool) -> None:
        self._switches, self._quantize = switches, quantize
        self._outputs: list[Tensor] = []
        self._noise: list[list[tuple[Slot, Tensor]]] = []
        self._images = 0

    def run(self, images: Tensor) -> Tensor:
        """Run the model once with gradients. Returns its output through ``FloatOutputs.read``."""
        quantized = self._switches.quantized
        self._images = len(images)
        chosen = quantized.slots() if self._quantize else ()
        with torch.enable_grad(), quantized.only(chosen), quantized.observe(self._see):
            return self._switches.floats.read(quantized(images))

    def score(self, loss: Tensor, scores: _Scores, probe: int, *, last: bool) -> None:
        """Add g·n of each operand for the gradient g of ``loss``. ``last`` frees the graph."""
        gradients = torch.autograd.grad(
            loss, self._outputs, retain_graph=not last, allow_unused=True
        )
        for noise, gradient in zip(self._noise, gradients, strict=True):
            for slot, n in noise:
                products = torch.zeros_like(n) if gradient is None else gradient * n
                scores.add(slot, probe, self._by_image(products))

    def _by_image(self, products: Tensor) -> Tensor:
        """Sum the products of each image, (images,).

        Windows or heads can be in the first dim: (images * windows, tokens, dim). A tensor without
        images, such as a shared position table, counts for the first image. Scores of different
        images are independent, so the sum of squares stays right.
        """
        if products.ndim and products.shape[0] % self._images == 0:
            return products.float().reshape(self._images, -1).sum(1).cpu().double()
        total = torch.zeros(self._images, dtype=torch.float64)
        total[0] = float(products.float().sum())
        return total

    def _see(self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        output = run(*operands)
        slots = self._switches.sites.get(site.name, [])
        if not slots:
            return output
        only = self._switches.quantized.only
        held = tuple(operand.detach() for operand in operands)
        with torch.no_grad():
            with only(()):
                clean = run(*held)
            with only(slots):
                noise = run(*held) - clean
            shares = [noise]
            if len(slots) > 1:
                with only(slots[:1]):
                    first = run(*held) - clean
                shares = [first, noise - first, *(torch.zeros_like(noise) for _ in slots[2:])]
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self._outputs.append(output)
        self._noise.append(list(zip(slots, shares, strict=True)))
        return output.clone()  # protects ``output`` from later in-place operations
