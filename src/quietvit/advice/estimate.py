"""The fast estimate of ``sensitivity``: one forward pass each through the float and the quantized
model, and a few backward passes. ``sensitivity`` says what the numbers are used for.

Derived here.

Alone. Let n be the local noise of a site: its output on quantized operands minus its output on
float operands. To first order it moves the logits z by J n. For a small move, KL(z ‖ z + J n) is
½ (J n)ᵀ F (J n) with F = diag(p) − p pᵀ and p = softmax z. Let e hold random signs, and let
u = √p∘e − p (√p·e). Then E[u uᵀ] = F, so the KL is ½ E[(g·n)²] with the gradient g = ∇(uᵀz) at the
site's output. One backward pass gives g for all sites. The noise of several sites adds before
squaring. Without a classifier, u holds the random signs, and E[(g·n)²] = ‖J n‖².

All but it. In the quantized model, let g be the gradient of KL(p ‖ q) at the site's output. Without
the noise, the KL is smaller by g·n − ½ nᵀH n to second order. The last term is taken to be the KL
that the noise makes alone. Without a classifier, ‖ŷ − y‖² takes the place of the KL.

The noise of a site has two parts: what its first operand makes alone, and the rest, which counts
for the second operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quietvit.advice.effects import Effect, divergence
from quietvit.advice.switches import Switches
from quietvit.quantization import Slot
from quietvit.tracing import Site

BATCH = 2
"""Images at a time: the noise of all sites is held in memory."""
PROBES = 4
"""Random vectors u for each image. Each costs one backward pass."""
_SEED = 0

Key = tuple[str, str]


def estimated_effects(
    switches: Switches, whole: Effect
) -> tuple[dict[Key, Effect], dict[Key, Effect]]:
    """Return the estimated effects alone and without, by (``role`` or ``site``, name).

    Sites that are no matrix products, such as norms, are left out.
    """
    alone, gains = _Scores(), _Scores()
    signal = 0.0
    generator = torch.Generator().manual_seed(_SEED)
    for batch in switches.floats.batches:
        for images in batch.split(BATCH):
            output = _probe(switches, images, alone, generator)
            signal += float(output.float().square().sum())
            _follow(switches, images, output, gains)
    groups = {("role", name): slots for name, slots in switches.roles.items()}
    groups |= {("site", name): slots for name, slots in switches.sites.items()}
    first, second = {}, {}
    for key, slots in groups.items():
        if not alone.knows(slots):
            continue
        square = float(alone.total(slots).square().mean(0).sum())
        gain = float(gains.total(slots).sum())
        if switches.floats.classifies:
            cost = square / 2 / switches.images
            first[key] = Effect(kl=cost)
            second[key] = Effect(kl=(whole.kl or 0.0) - gain / switches.images + cost)
        elif signal:
            first[key] = Effect(error=math.sqrt(square / signal))
            left = (whole.error or 0.0) ** 2 - (gain - square) / signal
            second[key] = Effect(error=math.copysign(math.sqrt(abs(left)), left))
    return first, second


def _probe(
    switches: Switches, images: Tensor, scores: _Scores, generator: torch.Generator
) -> Tensor:
    """Add the scores g·n of ``PROBES`` random u in the float model. Returns the float output."""
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
    """Add the scores g·n of the outputs' difference in the quantized model."""
    listener = _Listener(switches, quantize=True)
    z = listener.run(images)
    if switches.floats.classifies:
        loss = divergence(wanted.float(), z.float()).sum()
    else:
        loss = (z.float() - wanted.float()).square().sum()
    listener.score(loss, scores, 0, last=True)


@dataclass
class _Scores:
    """g·n of each operand, for each probe: a vector for each batch, with one entry per image."""

    found: dict[Slot, dict[int, list[Tensor]]] = field(default_factory=dict)

    def add(self, slot: Slot, probe: int, scores: Tensor) -> None:
        self.found.setdefault(slot, {}).setdefault(probe, []).append(scores)

    def knows(self, slots: Iterable[Slot]) -> bool:
        return all(slot in self.found for slot in slots)

    def total(self, slots: Iterable[Slot]) -> Tensor:
        """Return the sum over operands, (probes, images)."""
        each = [
            torch.stack([torch.cat(parts) for parts in self.found[slot].values()]) for slot in slots
        ]
        return torch.stack(each).sum(0)


class _Listener:
    """Observer of the quantized model. It keeps each site's output and the noise of each operand.

    ``quantize``: whether the sites run quantized; otherwise they run in float.
    """

    def __init__(self, switches: Switches, *, quantize: bool) -> None:
        self._switches, self._quantize = switches, quantize
        self._outputs: list[Tensor] = []
        self._noise: list[list[tuple[Slot, Tensor]]] = []
        self._images = 0

    def run(self, images: Tensor) -> Tensor:
        """Run the model once, with gradients. Returns what ``FloatOutputs.read`` reads."""
        quantized = self._switches.quantized
        self._images = len(images)
        chosen = quantized.slots() if self._quantize else ()
        with torch.enable_grad(), quantized.only(chosen), quantized.observe(self._see):
            return self._switches.floats.read(quantized(images))

    def score(self, loss: Tensor, scores: _Scores, probe: int, *, last: bool) -> None:
        """Add g·n of each operand for the gradient g of ``loss``; ``last`` frees the graph."""
        gradients = torch.autograd.grad(
            loss, self._outputs, retain_graph=not last, allow_unused=True
        )
        for noise, gradient in zip(self._noise, gradients, strict=True):
            for slot, n in noise:
                products = torch.zeros_like(n) if gradient is None else gradient * n
                scores.add(slot, probe, self._by_image(products))

    def _by_image(self, products: Tensor) -> Tensor:
        """Sum over everything but the images, (images,).

        A tensor that is not laid out by images, such as a table shared by all, counts for the first
        image. Scores of different images are independent, so squares still add up as they should.
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
        return output.clone()  # an in-place operation behind the site must not change ``output``
