"""``intercept``: run a traced model again and pass each site's operands to a handler.

Sites are recognized by their place (``places``), so the pass must make the traced products and
norms. Otherwise the error names the site at which the pass differs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quietvit.errors import QuietvitError
from quietvit.tracing import ops
from quietvit.tracing.composed import ComposedNorms
from quietvit.tracing.places import STEADY, Places
from quietvit.tracing.sites import Site, Trace
from quietvit.tracing.standins import STANDINS
from quietvit.tracing.wrappers import eagerly

Handler = Callable[[Site, tuple[Tensor, ...], Callable[..., Tensor]], Tensor]


class intercept(TorchFunctionMode):  # noqa: N801 - a context manager, used like a function
    """Call ``handler`` for every site of the chosen kinds while a traced model runs in ``with``.

    ``handler(site, operands, run)`` returns the site's output. The operands are:

    - (input, weight) for linear and conv, with a weight of shape (out, in, ...);
    - (left, right) for matmul, einsum and add;
    - (input,) for softmax, norm and activation.

    ``run(*operands)`` executes the call with these operands, bias included. The batch size is free,
    and gradients flow. Each ``with`` covers exactly one forward pass, which runs uncompiled. The
    pass may leave out sites that are neither products nor norms.

    Raises QuietvitError if products or norms differ from the trace, and for a pass with gradients
    under gradient checkpointing: its backward pass would recompute without the handler.
    """

    def __init__(
        self, trace: Trace, handler: Handler, *, kinds: Collection[str] = ops.MATMUL_KINDS
    ) -> None:
        super().__init__()
        self._trace = trace
        self._handler = handler
        self._families = {ops.FAMILIES[kind] for kind in kinds}
        self._kinds = frozenset(kinds)
        self._sites = {
            (ops.FAMILIES[site.kind], site.place): site
            for site in trace.sites
            if site.kind in ops.FAMILIES and ops.FAMILIES[site.kind] in self._families
        }
        self._places = Places()
        self._composed: ComposedNorms | None = None
        self._depth = 0
        self._trains = False
        self._paused = False
        self._eager: AbstractContextManager[None]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore calls inside ``with`` that do not belong to the traced model, such as a hook's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __enter__(self) -> intercept:
        if self._depth == 0:
            self._places = Places()
            composed = any(site.function == ops.COMPOSED for site in self._sites.values())
            self._composed = ComposedNorms() if composed else None
            self._trains = torch.is_grad_enabled()
            self._eager = eagerly()
            self._eager.__enter__()
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            self._composed = None
            self._eager.__exit__(None, None, None)
            if error[0] is None:
                self._check_complete()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func in STANDINS:
            with self:
                return STANDINS[func](*args, **kwargs)
        call = ops.classify(func, args, kwargs)
        if call is None and self._composed is not None:
            call = self._composed.find(func, ops.name_of(func), args, kwargs)
        if call is None:
            return self._untouched(func, args, kwargs)
        family = ops.FAMILIES[call.kind]
        place = self._places.next(family)
        if family not in self._families:
            return self._untouched(func, args, kwargs)
        site = self._sites.get((family, place))
        if site is None:
            if place.ordinal >= self._trace.counts.get(family, math.inf):
                self._refuse(f"made {family} call number {place.ordinal + 1} ({func.__name__})")
            return self._untouched(func, args, kwargs)
        if site.kind == "linear" and call.kind == "matmul":
            call = ops.weight_first(call)
        if (difference := _difference(site, call)) is not None:
            if family in STEADY:
                self._refuse(difference)
            return func(*args, **kwargs)
        if site.kind not in self._kinds:
            return func(*args, **kwargs)
        if self._trains:
            self._check_not_checkpointed(site)
        return self._handler(site, call.operands, call.run)

    def _untouched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that is no chosen site. It may be a step of a composed norm."""
        result = func(*args, **kwargs)
        if self._composed is not None:
            self._composed.follow(ops.name_of(func), args, kwargs, result)
        return result

    def _check_not_checkpointed(self, site: Site) -> None:
        frame = sys._getframe() if not torch.compiler.is_compiling() else None
        while frame is not None:
            if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                raise QuietvitError(
                    f"{site.name} of {self._trace.model_name} runs under gradient checkpointing. "
                    "The backward pass would recompute it without the handler, so the gradients "
                    "would be wrong. Switch checkpointing off (set_grad_checkpointing(False), "
                    "gradient_checkpointing_disable()), or run under torch.no_grad()."
                )
            frame = frame.f_back

    def _check_complete(self) -> None:
        for family in sorted(self._families & STEADY):
            called, traced = self._places.counts[family], self._trace.counts[family]
            if called != traced:
                self._refuse(f"made {called} {family} calls")

    def _refuse(self, what: str) -> None:
        counts = {family: self._trace.counts[family] for family in sorted(self._families & STEADY)}
        raise QuietvitError(
            f"the control flow of {self._trace.model_name} changed since it was traced: this pass "
            f"{what}; the traced pass made {counts}. Trace it again with an example that takes the "
            "same path (image size, mode, arguments), and run one forward pass at a time."
        )


def _difference(site: Site, call: ops.Call) -> str | None:
    """Describe how a call differs from the site traced at its place; None if it matches."""
    shapes = [tuple(operand.shape) for operand in call.operands]
    if site.kind != call.kind:
        return f"came to {site.name} with a {call.kind} of shapes {shapes}"
    if site.weight_shape is not None and site.weight_shape != shapes[1]:
        return f"came to {site.name} with a weight of shape {shapes[1]}, not {site.weight_shape}"
    for operand, shape in zip(site.operands, shapes, strict=False):
        if len(operand.shape) != len(shape):
            return f"came to {site.name} with shapes {shapes}, not {operand.shape}"
    return None
