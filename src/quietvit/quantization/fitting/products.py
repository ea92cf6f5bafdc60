"""Record what every matrix product multiplies on some calibration images, as plain matrices.

This module records rows and gradients; ``search`` uses them to search steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.outputs import LOGITS, tensors_of
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.fitting.layout import (
    Laid,
    few_matrices,
    lay_out,
    some_matrices,
    some_rows,
)
from quietvit.quantization.quantizers import AffineQuantizer
from quietvit.quantization.ranges import NOT_FINITE, OmseRange
from quietvit.quantization.weights import frozen
from quietvit.tracing import MATMUL_KINDS, Site
from quietvit.tracing.block_modules import first_tensor

_BATCH = 2
_LOOSE = 1 << 14

Range = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Product:
    """One product as matrices: left (D, H, R, K) times right (D, H, K, J) is its output less bias.

    D: matrices that share all steps. H: attention heads or groups of a convolution, else 1. All
    float32. A linear has D = H = 1, its tokens are the rows R and its input channels are K. The
    rows of a convolution are the patches that its kernel reads. Example: attention scores of 32
    images with 3 heads have left (32, 3, 197, 64) and right (32, 3, 64, 197).

    ``gradient``: (D, H, R, J), bfloat16, the derivative of the loss by the output, or None.
    ``ranges``: minimum and maximum of each operand over all values, including rows that were not
    kept. Each is (H,) for products of activations, else (1,).

    Some products have no such matrices: einsum, a matrix times a vector, grouped transposed
    convolutions. Then ``loose`` holds some values of each operand.
    """

    site: Site
    ranges: tuple[Range, ...]
    left: Tensor | None = None
    right: Tensor | None = None
    gradient: Tensor | None = None
    loose: tuple[Tensor, ...] = ()


@dataclass(eq=False)
class _Call:
    """One call in matrix layout that waits for its gradient."""

    site: Site
    laid: Laid
    gradient: list[Tensor] = field(default_factory=list)


class _Stack:
    """Pieces joined along ``dim``; memory is allocated once if the size estimate holds."""

    def __init__(self, dim: int) -> None:
        self.dim, self.used = dim, 0
        self.whole: Tensor | None = None

    def put(self, piece: Tensor, share: float) -> None:
        """Add a piece, which is about ``share`` of the expected total."""
        size = piece.shape[self.dim]
        if self.whole is None or self.used + size > self.whole.shape[self.dim]:
            shape = list(piece.shape)
            shape[self.dim] = max(math.ceil(size / share), self.used + size)
            wider = piece.new_empty(shape)
            if self.whole is not None:
                wider.narrow(self.dim, 0, self.used).copy_(self.finish())
            self.whole = wider
        self.whole.narrow(self.dim, self.used, size).copy_(piece)
        self.used += size

    def finish(self) -> Tensor:
        assert self.whole is not None
        return self.whole.narrow(self.dim, 0, self.used)


@dataclass(eq=False)
class _Kept:
    left: _Stack
    right: _Stack
    gradient: _Stack
    weighed: bool = True
    owed: float = 0.0


class Recorder:
    """Records products, batch by batch; see ``record``."""

    def __init__(self, wanted: Callable[[Site], bool], share: float | None, seed: int) -> None:
        self.wanted, self.share = wanted, share
        self.generator = torch.Generator().manual_seed(seed)
        self.calls: list[_Call] = []
        self.kept: dict[str, _Kept] = {}
        self.loose: dict[str, list[tuple[Tensor, ...]]] = {}
        self.ranges: dict[str, tuple[Range, ...]] = {}
        self.sites: dict[str, Site] = {}

    def handle(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        """Run a site unchanged and record its operands: a handler for ``intercept``."""
        output = run(*operands)
        if not self.wanted(site):
            return output
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output.detach().requires_grad_().clone()
        self.sites[site.name] = site
        with torch.no_grad():
            plain = tuple(operand.detach() for operand in operands)
            ranges = tuple(_range(site, operand) for operand in plain)
            before = self.ranges.get(site.name)
            self.ranges[site.name] = ranges if before is None else _wider(before, ranges)
            laid = lay_out(site, plain, output, run)
            if laid is None:
                values = tuple(self._some(operand) for operand in plain)
                self.loose.setdefault(site.name, []).append(values)
                return output
        call = _Call(site, laid)
        if output.requires_grad:
            output.register_hook(call.gradient.append)
        self.calls.append(call)
        return output

    def choose(self, images: int, of: int) -> None:
        """Keep some rows of the calls since the last time; they saw ``images`` of ``of`` images."""
        calls, self.calls = self.calls, []
        for call in calls:
            laid = call.laid
            gradient = laid.arrange(call.gradient[0].float()) if call.gradient else None
            budget = None if self.share is None else self.share * images
            if call.site.name not in self.kept:
                dim = 0 if laid.activations else 2
                self.kept[call.site.name] = _Kept(_Stack(dim), _Stack(0), _Stack(dim))
            kept = self.kept[call.site.name]
            if laid.activations:
                few = few_matrices(laid, budget, kept.owed, first=kept.left.whole is None)
                kept.owed = few.owed
                if not few.matrices:
                    continue
                left, right, some = some_matrices(laid, gradient, few, self.generator)
            else:
                left, right, some = some_rows(laid, gradient, budget, self.generator)
            kept.left.put(left, images / of)
            if laid.activations or kept.right.whole is None:
                kept.right.put(right, images / of if laid.activations else 1.0)
            if some is None:
                kept.weighed = False
            else:
                kept.gradient.put(some, images / of)

    def products(self) -> dict[str, Product]:
        products = {}
        for name, site in self.sites.items():
            if name in self.loose:
                columns = zip(*self.loose[name], strict=True)
                values = tuple(torch.cat(column) for column in columns)
                products[name] = Product(site, self.ranges[name], loose=values)
                continue
            kept = self.kept.pop(name)
            products[name] = Product(
                site,
                self.ranges[name],
                left=kept.left.finish(),
                right=kept.right.finish(),
                gradient=kept.gradient.finish() if kept.weighed else None,
            )
        return products

    def _some(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1).float()
        if flat.numel() <= _LOOSE:
            return flat.clone()
        chosen = torch.randint(flat.numel(), (_LOOSE,), generator=self.generator)
        return flat[chosen.to(flat.device)]


def record(
    calibration: Calibration,
    wanted: Callable[[Site], bool],
    *,
    rows: int | None,
    gradients: bool,
    seed: int,
    label: str,
) -> dict[str, Product]:
    """Run all images once through the float model and return every wanted product, by site name.

    ``rows``: number of left rows to keep per site and head over all images, drawn at random; None
    keeps all. With ``gradients`` (see ``curvature_root``), only rows with a nonzero gradient are
    drawn, because the others have no weight. After a classifier's last attention, that is only the
    class token. Parameters get no gradient, and keep their ``requires_grad``.

    Raises QuietvitError for gradients inside ``torch.inference_mode``.
    """
    source = calibration.images.source
    stream: Iterable[Tensor] = calibration.images
    if not isinstance(source, Tensor):
        # The number of images must be known beforehand.
        source = calibration.everything()
        stream = (source,)
    count = len(source)
    recorder = Recorder(wanted, None if rows is None else rows / count, seed)
    batches = (piece for batch in stream for piece in batch.split(_BATCH))
    for batch in calibration.track(batches, -(-count // _BATCH), label):
        if gradients:
            with frozen(calibration.model), torch.enable_grad():
                entered = batch.detach().clone().requires_grad_()
                result = calibration.run(entered.clone(), recorder.handle, kinds=MATMUL_KINDS)
                output, direction = curvature_root(result, recorder.generator)
                if output.requires_grad:
                    output.backward(direction)
        else:
            with torch.no_grad():
                calibration.run(batch, recorder.handle, kinds=MATMUL_KINDS)
        with torch.no_grad():
            recorder.choose(len(batch), count)
    return recorder.products()


def curvature_root(result: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the output z and a random v whose covariance is the loss's second derivative by z.

    Logits (N, C): the loss is KL(softmax(z0) || softmax(z)) at z = z0, with the second derivative
    diag(p) - p pᵀ. So v = √p·ξ - p (√p·ξ) with normal ξ. If J is the derivative of z by some
    values, the mean of (Jᵀv)² is the Hessian's diagonal (Gauss-Newton) for these values. Other
    outputs (features, maps, a single column): the loss is half the squared error, and v = ξ.

    Logits are the output of that name, or a matrix that is the only output. Derived here: the first
    derivative is zero at z0, so methods that weigh by it (PTQ4ViT) would weigh by rounding errors.
    """
    tensors = tensors_of(result)
    named = tensors.get(LOGITS)
    output = first_tensor(list(tensors.values())) if named is None else named
    noise = torch.randn(output.shape, generator=generator).to(output)
    logits = named is not None or (isinstance(result, Tensor) and output.dim() == 2)
    if not logits or output.shape[-1] < 2:
        return output, noise
    share = output.detach().softmax(-1)
    root = share.sqrt()
    return output, root * noise - share * (root * noise).sum(-1, keepdim=True)


def product_notes(name: str, products: Mapping[str, Product], *, gradients: bool) -> list[str]:
    """Return one line for each kind of product that could not be recorded, for the report."""
    loose = [key for key, product in products.items() if product.left is None]
    flat = [
        key
        for key, product in products.items()
        if gradients and product.left is not None and product.gradient is None
    ]
    notes = []
    if loose:
        notes.append(
            f"{name} used the steps of least squared operand error for {len(loose)} products that "
            f"are not of two matrices: {', '.join(loose)}"
        )
    if flat:
        notes.append(
            f"{name} had no gradient at {len(flat)} products, because the first output does not "
            f"depend on them. It weighed all their outputs alike: {', '.join(flat)}"
        )
    return notes


def has_heads(site: Site) -> bool:
    """Whether both operands are (batch, heads, ...), so that each head may have its own step."""
    shapes = [operand.shape for operand in site.operands]
    attention = site.role in ("query_key", "attention_value")
    return attention and all(len(s) == 4 and s[1] == shapes[0][1] > 1 for s in shapes)


def nearest_step(values: Tensor, bits: int) -> AffineQuantizer:
    """Return the symmetric uniform quantizer with the least squared error for these values."""
    watched = OmseRange(bits, symmetric=True, signed=True)
    watched.update(values)
    return AffineQuantizer.from_range(*watched.finish(), bits=bits, symmetric=True, signed=True)


def _range(site: Site, x: Tensor) -> Range:
    by_head = site.kind == "matmul" and x.dim() > 3
    rows = x.movedim(-3, 0).flatten(1) if by_head else x.reshape(1, -1)
    low, high = rows.aminmax(dim=1)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise QuietvitError(f"{site.name}: {NOT_FINITE}")
    return low.float(), high.float()


def _wider(one: tuple[Range, ...], other: tuple[Range, ...]) -> tuple[Range, ...]:
    return tuple(
        (torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1]))
        for a, b in zip(one, other, strict=True)
    )
