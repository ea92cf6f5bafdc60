"""The matrix products and sums of squares that penalties use, and their precision.

Pure functions of batched matrices. ``penalties`` gives them their meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.tensors import has_fast_bfloat16, wide_dtype

PRECISIONS = ("auto", "float32", "bfloat16")
_BFLOAT16_ROOM = 1 + 2.0**-5


def product_dtype(products: str, like: Tensor) -> torch.dtype | None:
    """Return the dtype of matrix products for weights like ``like``, or None for their own dtype.

    ``auto`` is bfloat16 if the device multiplies it faster than float32: GPUs that support it, and
    CPUs with AVX512-BF16 or AMX. float64 weights keep float64. Sums are always float32.
    """
    if products == "float32" or like.dtype == torch.float64:
        return None
    if products == "bfloat16" or has_fast_bfloat16(like.device):
        return torch.bfloat16
    return None


def checked_products(products: str) -> str:
    """Return ``products``. Raises QuietvitError if it is not in ``PRECISIONS``."""
    if products not in PRECISIONS:
        raise QuietvitError(f"products={products!r}: give one of {', '.join(PRECISIONS)}.")
    return products


def mm(X: Tensor, Y: Tensor) -> Tensor:
    """Return X @ Y, (n, a, b) times (n, b, c). For n = 1 a 2-D product is faster."""
    if X.shape[0] == 1:
        return (X[0] @ Y[0]).unsqueeze(0)
    return X @ Y


def both_products(
    A: Tensor, B: Tensor, dtype: torch.dtype | None = None, *, weighed: bool = False
) -> tuple[Tensor, Tensor]:
    """Return B^T D B A and D B A A^T in the cheaper order, in ``dtype`` if it is given.

    D is the identity, or the diagonal matrix of ``shares`` if ``weighed``.
    """
    if A.ndim == 2:
        AA = A.square()[:, None, :]
        if not weighed:
            return A * B.square().sum(1), B * AA
        weights, _ = shares((B.square() * AA).sum(-1))
        DB = B * weights[:, :, None]
        PA = A * (DB * B).sum(1)
        return PA, DB.mul_(AA)
    if dtype is not None:
        A, B = A.to(dtype), B.to(dtype)
    (h, d), o = A.shape[1:], B.shape[1]
    # Multiply-accumulates / h of four products with an (h, h) matrix, or of three with B A (o, d).
    # ViT-Tiny: a head's (v, proj) has h = 64, o = d = 192: (h, h) wins. For (fc1, fc2), h = 768.
    if 2 * h * (o + d) < 3 * o * d:
        BAA = mm(B, mm(A, A.mT))
        if not weighed:
            return mm(mm(B.mT, B), A), BAA
        energy = (BAA.to(wide_dtype(BAA)) * B).sum(-1).clamp_min(0)
        weights = shares(energy)[0].to(B.dtype)[:, :, None]
        return mm(mm(B.mT, B * weights), A), BAA * weights
    BA = mm(B, A)
    if weighed:
        weights, _ = shares(BA.to(wide_dtype(BA)).square().sum(-1))
        BA = BA * weights.to(BA.dtype)[:, :, None]
    return mm(B.mT, BA), mm(BA, A.mT)


def channel_energy(A: Tensor, B: Tensor) -> Tensor:
    """Return a_k = |A^T b_k|^2 for every output channel k, shape (n, o)."""
    return (B * A[:, None, :] if A.ndim == 2 else B @ A).square().sum(-1)


def shares(energy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares w = a / c, shape (n, o), and c = sum(a^2) / sum(a), shape (n,)."""
    total = energy.sum(-1)
    part = scaled(energy, inverse(total))
    concentration = part.square().sum(-1)
    return scaled(part, inverse(concentration)), total * concentration


def largest_rate(M: Tensor, dtype: torch.dtype | None = None, squarings: int = 0) -> Tensor:
    """Return an upper bound of s_max^2 / nu(M), shape (n,). It is exact if M is diagonal.

    Schatten norms: s_max^2 / nu <= |G^m|^(1/m) with the Gram matrix G = M M^T / nu(M) of the
    smaller side and m = 2^squarings. Each squaring is one more product, in the dtype of M. The
    bound is at most (smaller side)^(1/2m) times the true value. In bfloat16 it has a margin for
    the rounding of M and G: if |E| <= 2^-9 |M|, s_max of M + E differs by at most 2^-9 |M|.
    """
    if M.ndim == 2:
        return M.square().amax(-1) * inverse(mean_square(M))
    low = M if dtype is None else M.to(dtype)
    gram = mm(low, low.mT) if M.shape[1] <= M.shape[2] else mm(low.mT, low)
    gram = scaled(gram.to(M.dtype), inverse(mean_square(M)))
    size = square(gram).sqrt()
    if not squarings:
        return size if dtype is None else size * _BFLOAT16_ROOM
    for _ in range(squarings):
        gram = mm(gram, gram)
    bound = square(gram) ** (0.5 / 2**squarings)
    if dtype is None:
        return bound
    rounding = 2.0**-9
    return ((bound + rounding * size).sqrt() + rounding * smaller(M) ** 0.5).square() * (
        1 + rounding
    )


def mean_square(M: Tensor) -> Tensor:
    """Return nu(M) = |M|^2 / min(shape), the mean squared singular value, shape (n,)."""
    return square(M) / smaller(M)


def inverse(x: Tensor) -> Tensor:
    """Return 1 / x, but 0 if x is below the smallest normal number (a zero matrix)."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(x < tiny, 0.0, 1 / x.clamp_min(tiny))


def scaled(M: Tensor, factor: Tensor) -> Tensor:
    """Return each matrix or vector of M times its factor (n,), in the wider of the two dtypes."""
    return M * factor.view(-1, *([1] * (M.ndim - 1)))


def square(M: Tensor) -> Tensor:
    """Return |M|^2 of each matrix or vector, shape (n,)."""
    return M.flatten(1).square().sum(1)


def smaller(M: Tensor) -> float:
    """Return min(shape) of each matrix. A vector stands for a diagonal matrix."""
    return float(M.shape[1] if M.ndim == 2 else min(M.shape[1:]))
