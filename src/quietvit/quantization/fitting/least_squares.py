"""Layers as least squares: input rows of a weight, damped Gram matrices, rounding with feedback.

Methods choose the rows and write the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.adjustments import ChannelAffine
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.quantizers import AffineQuantizer, affine_fake
from quietvit.quantization.ranges import RangeName, make_range
from quietvit.quantization.weights import why_fixed
from quietvit.tracing import SITE_KINDS, EndOfPass, Site

Look = Callable[[Site, tuple[Tensor, ...], Callable[..., Tensor]], None]


def rows(x: Tensor, weight: Tensor, run: Callable[..., Tensor]) -> Iterator[Tensor]:
    """Yield what a weight of a linear or convolution multiplies: (groups, rows, features).

    The dtype is float32. A linear gives its input, as one group. A convolution gives its patches,
    image by image, with the features of weight[0]. It runs on one-hot kernels, so stride, padding,
    dilation and groups are its own (derived here). A 3 x 3 kernel on 64 channels has 576 features.
    """
    spatial = weight.dim() - 2
    if spatial == 0:
        yield x.reshape(1, -1, x.shape[-1]).float()
        return
    outputs, features = weight.shape[0], weight[0].numel()
    groups = x.shape[-spatial - 1] // weight.shape[1]
    at_once = outputs // groups
    for image in x.split(1) if x.dim() == weight.dim() else (x,):
        bias = run(image, torch.zeros_like(weight))
        parts = []
        for start in range(0, features, at_once):
            count = min(at_once, features - start)
            kernels = weight.new_zeros(groups, at_once, features)
            kernels[:, :count, start : start + count] = torch.eye(count).to(weight)
            products = (run(image, kernels.view_as(weight)) - bias).movedim(-spatial - 1, -1)
            parts.append(products.reshape(-1, groups, at_once)[..., :count])
        yield torch.cat(parts, -1).movedim(1, 0).float()


def grouped(weight: Tensor, groups: int) -> Tensor:
    """Reshape a weight (out, in/groups, ...) to (groups, out/groups, features), float64."""
    return weight.double().reshape(groups, weight.shape[0] // groups, -1)


class Gram:
    """Sum of leftᵀ right over rows, (groups, left features, right features), float32; row count."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def update(self, left: Tensor, right: Tensor) -> None:
        """Add left (groups, rows, features) and right of the same layout."""
        product = left.mT @ right
        self.total = product if self.total is None else self.total.add_(product)
        self.rows += left.shape[1]

    def finish(self, site: str) -> Tensor:
        """Return the sum, float64. Raises QuietvitError if it is not finite."""
        if self.total is None or not bool(torch.isfinite(self.total).all()):
            raise QuietvitError(
                f"{site}: its calibration inputs are missing, hold NaN or inf, or are too large to "
                "be squared. Check the images, and whether this model overflows in half precision."
            )
        return self.total.double()


def damped(hessian: Tensor, share: float) -> Tensor:
    """H + share · mean(diag H) · I for each group, (groups, f, f).

    Unused features (diag 0) get 1 on the diagonal, so they do not affect other features.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    extra = share * diagonal.mean(-1, keepdim=True).expand_as(diagonal)
    return hessian + torch.diag_embed(torch.where(diagonal == 0, torch.ones_like(extra), extra))


def ridge(gram: Tensor, right: Tensor, strength: float) -> Tensor:
    """(gram + strength · I)⁻¹ right, (groups, f, outputs), float64; gram (groups, f, f)."""
    # Float32 sums may leave eigenvalues below zero by about this much.
    extra = strength + torch.finfo(torch.float32).eps * _trace(gram)
    factor = torch.linalg.cholesky(gram + torch.diag_embed(extra.expand(gram.shape[:2])))
    return torch.cholesky_solve(right, factor)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)


def weight_grid(weight: Tensor, bits: int, name: RangeName, symmetric: bool) -> AffineQuantizer:
    """Return a uniform quantizer of a weight (out, in, ...), one range per output channel."""
    estimator = make_range(
        name,
        bits=bits,
        symmetric=symmetric,
        signed=True if symmetric else None,
        axis=0,
        exact=True,
    )
    estimator.update(weight)
    return AffineQuantizer.from_range(
        *estimator.finish(),
        bits=bits,
        symmetric=symmetric,
        signed=True if symmetric else None,
        axis=0,
    )


def nearest(grid: AffineQuantizer, columns: Tensor) -> Tensor:
    """Quantize columns (groups, out/groups, n) of a weight with the quantizer of their channels."""
    shape = (*columns.shape[:2], 1)
    scale, zero = grid.scale.view(shape), grid.zero_point.view(shape)
    return affine_fake(columns.float(), scale, zero, *grid.code_range).to(columns.dtype)


def round_with_feedback(
    weight: Tensor,
    hessian: Tensor,
    rounding: Callable[[Tensor], Tensor],
    *,
    block: int = 128,
    act_order: bool = False,
) -> Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1): round each column, and spread its error over the rest.

    U is the upper Cholesky factor of H⁻¹. q_j = round(w_j), and w_k -= (w_j - q_j)/U_jj · U_jk for
    all k > j. Within a ``block`` of columns this happens at once. Later columns are updated at the
    block's end, with one matrix product. ``act_order``: columns with large diag H come first.

    weight (groups, outputs, f) and hessian (groups, f, f), positive definite, are float64.
    ``rounding`` takes (groups, outputs, 1). Returns the weight's shape; every column is a result of
    ``rounding``.
    """
    if act_order:
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        columns = order[:, None, :].expand_as(weight)
        hessian = hessian.gather(-2, order[:, :, None].expand_as(hessian))
        hessian = hessian.gather(-1, order[:, None, :].expand_as(hessian))
        ordered = round_with_feedback(weight.gather(-1, columns), hessian, rounding, block=block)
        return torch.empty_like(weight).scatter_(-1, columns, ordered)
    weight = weight.clone()
    features = weight.shape[-1]
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as problem:  # type: ignore[attr-defined]
        raise QuietvitError(
            f"a Hessian of {features} inputs is not positive definite ({problem}); raise damp, "
            "0.01 is usual."
        ) from problem
    rounded = torch.empty_like(weight)
    for start in range(0, features, block):
        end = min(start + block, features)
        errors = torch.empty_like(weight[..., start:end])
        for j in range(start, end):
            here = weight[..., j : j + 1]
            rounded[..., j : j + 1] = rounding(here)
            error = (here - rounded[..., j : j + 1]) / upper[:, j, None, j, None]
            weight[..., j + 1 : end] -= error * upper[:, None, j, j + 1 : end]
            errors[..., j - start] = error[..., 0]
        weight[..., end:] -= errors @ upper[:, start:end, end:]
    return rounded


def run_to(
    calibration: Calibration,
    calibrated: Calibrated,
    last: Site,
    look: Look,
    *,
    quantized: bool,
    label: str | None = None,
) -> None:
    """Run all calibration images through the model up to the site ``last``, showing each site.

    ``look(site, operands, run)`` gets the operands of linears and convolutions. If ``quantized``,
    ``calibrated`` quantizes them first. A ``label`` shows progress.
    """

    def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        if quantized:
            operands = calibrated.quantize(site, operands)
        if site.kind in ("linear", "conv"):
            look(site, operands, run)
            if site.name == last.name:
                raise EndOfPass  # later sites are not needed
        return calibrated.adjust(site, operands, run)

    images: Iterable[Tensor] = calibration.images
    if label is not None:
        images = calibration.track(images, calibration.images.batches_expected(), label)
    with torch.no_grad():
        for batch in images:
            try:
                calibration.run(batch, handler, kinds=SITE_KINDS)
            except EndOfPass:
                continue


def passes(
    calibration: Calibration, lots: list[list[Site]], label: str
) -> Iterator[tuple[list[Site], str | None]]:
    """Yield the lots that are not empty, each with the progress label of its own pass.

    Several lots share one progress bar that counts lots, so their passes get no label.
    """
    lots = [lot for lot in lots if lot]
    if len(lots) == 1:
        yield lots[0], label
        return
    for lot in calibration.track(lots, len(lots), label):
        yield lot, None


def movable(
    calibration: Calibration, calibrated: Calibrated, wanted: Callable[[Site], bool], what: str
) -> list[Site]:
    """Return the ``wanted`` linears and convolutions that may be changed, in execution order.

    A note names those that may not. Raises QuietvitError if the base compensates blocks, because
    these compensations fit the unchanged weights.
    """
    if calibrated.compensations:
        raise QuietvitError(
            f"{what} cannot work on a base that compensates whole blocks "
            f"({', '.join(list(calibrated.compensations)[:3])}): make it the base of that method."
        )
    sites, left = [], []
    for site in calibration.trace.matmuls:
        if site.kind not in ("linear", "conv") or not wanted(site):
            continue
        if "transpose" in site.function:
            left.append(f"{site.name}: a transposed convolution")
        elif (reason := why_fixed(calibration.model, calibration.trace, site)) is not None:
            left.append(f"{site.name}: {reason}")
        elif not isinstance(calibrated.adjustments.get(site.name), ChannelAffine | None):
            left.append(f"{site.name}: the base changes its output")
        else:
            sites.append(site)
    if left:
        calibrated.notes.append(
            f"{what} kept the base's rounding of {len(left)} weights: {'; '.join(left)}"
        )
    return sites
