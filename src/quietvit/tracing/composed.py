"""RMSNorms written in single steps: x · rsqrt(mean(x²) + ε) · gain, found by data flow.

``record`` and ``intercept`` show every call to ``ComposedNorms``. It finds the last one, the
product with the gain, and lays it out as the call of a norm. Module names play no role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quietvit.tracing.ops import COMPOSED, Call

_CASTING = {
    *("to", "type", "type_as", "float", "half", "double", "bfloat16", "contiguous", "clone"),
}
_MULTIPLYING = {"mul", "multiply", "__mul__", "__rmul__"}
_DIVIDING = {"div", "true_divide", "divide", "__truediv__"}
_INVERTING = {"__rdiv__", "__rtruediv__"}
_ADDING = {"add", "__add__", "__radd__"}
_RAISING = {"pow", "__pow__"}


@dataclass(frozen=True)
class _Part:
    """What a tensor is: one ``step`` on the way from ``source`` to its normalized values.

    The steps are ``cast`` (x itself), ``square``, ``mean``, ``root``, ``inverse`` (1 / root) and
    ``normalized``. ``versions`` are those of the source and of the tensor, to notice writes.
    """

    step: str
    source: Tensor
    versions: tuple[int, int]
    eps: float | Tensor = 0.0
    dtype: torch.dtype | None = None


class ComposedNorms:
    """Follows the calls of one pass."""

    def __init__(self) -> None:
        self._parts = WeakTensorKeyDictionary()

    def find(self, func: Any, name: str, args: Sequence[Any], kwargs: Any) -> Call | None:
        """Return the call of the norm if this call multiplies normalized values with a gain.

        The gain is a vector (channels,). Its operand is x, before any cast, and ``run`` normalizes
        another x in the same way.
        """
        if name not in _MULTIPLYING or kwargs or len(args) != 2:
            return None
        parts = [self._part(each) for each in args]
        places = [i for i, part in enumerate(parts) if part and part.step == "normalized"]
        if len(places) != 1:
            return None
        place = places[0]
        part, gain = parts[place], args[1 - place]
        assert part is not None
        if not isinstance(gain, Tensor) or gain.shape != part.source.shape[-1:]:
            return None
        dtype = args[place].dtype

        def run(x: Tensor) -> Tensor:
            if x is not part.source:
                wide = x.to(part.dtype)
                mean = wide.square().mean(-1, keepdim=True)
                x = (wide * torch.rsqrt(mean + part.eps)).to(dtype)
            else:
                x = args[place]
            result: Tensor = func(*((x, gain) if place == 0 else (gain, x)))
            return result

        return Call("norm", (part.source,), run, gain=gain, function=COMPOSED)

    def follow(self, name: str, args: Sequence[Any], kwargs: Any, output: Any) -> None:
        """Note what a call made of the tensors that are followed."""
        if not isinstance(output, Tensor) or any(output is each for each in args):
            return
        if not args or not output.is_floating_point() or "out" in kwargs:
            return
        found = self._next(name, args, kwargs)
        if found is not None:
            step, source, eps, dtype = found
            versions = (_version(source), _version(output))
            self._parts[output] = _Part(step, source, versions, eps, dtype or output.dtype)

    def _next(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[str, Tensor, float | Tensor, torch.dtype | None] | None:
        """Return the step, source, ε and dtype of the statistics of a call's output."""
        first, other = args[0], args[1] if len(args) == 2 and not kwargs else None
        part = self._part(first)
        if name in _CASTING and isinstance(first, Tensor):
            if part is None:
                return "cast", first, 0.0, None
            return part.step, part.source, part.eps, part.dtype
        square = name == "square" or (name in _RAISING and _is(other, 2))
        if square or (name in _MULTIPLYING and first is other):
            if isinstance(first, Tensor) and (part is None or part.step == "cast"):
                return "square", self._root(first), 0.0, None
            return None
        if part is not None and part.step == "square":
            if name == "mean" and _over_last(args, kwargs, first.ndim):
                return "mean", part.source, 0.0, part.dtype
            return None
        if name in _ADDING:
            for mean, eps in ((part, other), (self._part(other), first)):
                number = eps.ndim == 0 if isinstance(eps, Tensor) else isinstance(eps, float | int)
                if eps is not None and number and mean is not None and mean.step == "mean":
                    return "mean", mean.source, mean.eps + eps, mean.dtype
            return None
        return self._after_mean(name, first, other, part)

    def _after_mean(
        self, name: str, first: Any, other: Any, part: _Part | None
    ) -> tuple[str, Tensor, float | Tensor, torch.dtype | None] | None:
        step = None if part is None else part.step
        if part is not None and step == "mean":
            rooted = {"sqrt": "root", "rsqrt": "inverse"}.get(name)
            if name in _RAISING:
                rooted = "root" if _is(other, 0.5) else "inverse" if _is(other, -0.5) else None
            return None if rooted is None else (rooted, part.source, part.eps, part.dtype)
        inverting = name == "reciprocal" or (name in _INVERTING and _is(other, 1))
        if part is not None and step == "root" and inverting:
            return "inverse", part.source, part.eps, part.dtype
        scaling = (name in _MULTIPLYING, "inverse"), (name in _DIVIDING, "root")
        for x, by in ((first, other), (other, first)):
            scale = self._part(by)
            for fits, needed in scaling:
                if not fits or scale is None or scale.step != needed or not isinstance(x, Tensor):
                    continue
                if needed == "root" and by is not other:
                    continue  # the root divided by x
                if self._root(x) is scale.source:
                    return "normalized", scale.source, scale.eps, scale.dtype
        return None

    def _part(self, tensor: Any) -> _Part | None:
        """Return what is known of a tensor, unless it or its source was written to since."""
        if not isinstance(tensor, Tensor):
            return None
        part: _Part | None = self._parts.get(tensor)
        if part is None or part.versions != (_version(part.source), _version(tensor)):
            return None
        return part

    def _root(self, tensor: Tensor) -> Tensor:
        """Return the tensor before its casts."""
        part = self._part(tensor)
        return part.source if part is not None and part.step == "cast" else tensor


def _is(value: Any, number: float) -> bool:
    return isinstance(value, float | int) and value == number


def _over_last(args: Sequence[Any], kwargs: Mapping[str, Any], ndim: int) -> bool:
    """Whether a mean is over the last dim alone and keeps it."""
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    if not isinstance(dims, tuple | list) or len(dims) != 1:
        return False
    return bool(keepdim) and dims[0] in (-1, ndim - 1)


def _version(tensor: Tensor) -> int:
    """Return the number of writes to a tensor; 0 in inference mode, which does not count them."""
    return 0 if tensor.is_inference() else tensor._version
