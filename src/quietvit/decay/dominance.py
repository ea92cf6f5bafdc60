"""PCDR of S2D: the share of a layer's largest activations that leading singular components make.

Reads weights and one forward pass. ``spectral`` selects the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tensors import reshard, wide, widest
from quietvit.tracing import Site, Trace, call, evaluating, intercept

Spectrum = tuple[Tensor, Tensor, Tensor]
_ROWS = 1024


def leading(W: Tensor, count: int) -> Spectrum:
    """Return the ``count`` leading (u, v, s) of W (o, h): (o, k), (h, k) and (k,), s descending.

    By the eigenvectors of the Gram matrix of the smaller side, an order of magnitude faster than
    a whole decomposition. Components within rounding of zero are zero.
    """
    wide_side = W.shape[0] <= W.shape[1]
    M = W if wide_side else W.mT
    basis = torch.linalg.eigh(M @ M.mT)[1][:, -count:].flip(-1)
    image = M.mT @ basis
    s = image.norm(dim=0)
    noise = torch.finfo(W.dtype).eps * max(W.shape) * s.amax()
    kept = s > noise
    other = torch.where(kept, image / s.clamp_min(torch.finfo(W.dtype).tiny), 0.0)
    basis, s = torch.where(kept, basis, 0.0), torch.where(kept, s, 0.0)
    return (basis, other, s) if wide_side else (other, basis, s)


def shares(X: Tensor, W: Tensor, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """Return the sum over input rows X (m, h) of PCDR_k, shape (k,), and the number of rows.

    Of each row the neuron of largest |W x|; rows where W x is zero do not count.
    """
    u, v, s = spectrum
    Y = X @ W.mT
    neuron = Y.abs().argmax(1, keepdim=True)
    total = Y.gather(1, neuron).abs()
    parts = (u[neuron[:, 0]] * s * (X @ v)).cumsum(1).abs()
    kept = total != 0
    ratio = torch.where(kept, parts / torch.where(kept, total, 1.0), 0.0)
    return ratio.sum(0), kept.sum()


@torch.no_grad()
def dominances(
    model: nn.Module,
    traced: Trace,
    images: Any,
    weights: Mapping[str, Tensor],
    spectra: Mapping[str, Spectrum],
    of_site: Mapping[str, str],
) -> dict[str, tuple[float, ...]]:
    """Return PCDR_1, PCDR_2, ... of each weight (o, h) by its name, from one forward pass.

    ``of_site`` names the weight of each site that is looked at. Of each site at most 1024 rows,
    evenly spread. The model runs in eval mode and is left as it was. Raises QuietvitError where an
    activation is NaN or infinite.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        name = of_site.get(site.name)
        if name is not None:
            W = weights[name]
            X = operands[0].reshape(-1, W.shape[1])
            X = wide(X[:: -(-len(X) // _ROWS)]).to(W)
            with torch.autocast(W.device.type, enabled=False):
                result = shares(X, W, spectra[name])
            before = sums.get(name)
            sums[name] = (result[0] + before[0], result[1] + before[1]) if before else result
        return run(*operands)

    device = next(iter(weights.values())).device
    inputs = torch.utils._pytree.tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, images
    )
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        try:
            with intercept(traced, handler, kinds=("linear",)):
                call(model, inputs)
        finally:
            reshard(model)
    names = list(sums)
    means = [
        (total / count.clamp_min(1)).to(device, widest(device)) for total, count in sums.values()
    ]
    # One list for all, for one sync; narrow weights have fewer components.
    values = iter(torch.cat(means).tolist())
    table = [[next(values) for _ in mean] for mean in means]
    for name, row in zip(names, table, strict=True):
        if not all(value < float("inf") for value in row):
            raise QuietvitError(
                f"{name}: the activations of the images for SpectralDecay are NaN or infinite; no "
                "weight was changed. Training diverged before this step, or the images hold such "
                "values. Check the images; or resume from an earlier checkpoint or start anew."
            )
    return {name: tuple(row) for name, row in zip(names, table, strict=True)}
