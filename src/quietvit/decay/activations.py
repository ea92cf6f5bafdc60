"""The largest output of any block while a model trains or evaluates: a number for logs.

``tweo`` penalizes it. What hurts quantization is in ``measure``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing import Trace, call, eagerly, evaluating, plain_model, trace
from quietvit.tracing.block_modules import first_tensor, residual_modules


class ActivationWatch:
    """The largest |output| of each residual block, over forward passes while the watch is on.

    It is on between ``start()`` and ``stop()``, or inside ``with watch:``. What it saw stays until
    ``reset()``. It reads each block's output once, and no value leaves the device before
    ``largest()``. All passes count, in any mode. A compiled model does not call hooks that were
    added later, so run the watched pass under ``torch.compiler.set_stance("force_eager")``. Under
    DDP each process sees its own images.

    ``traced`` is ``quietvit.trace`` of the model. Raises QuietvitError for a model without residual
    blocks.
    """

    def __init__(self, model: nn.Module, traced: Trace) -> None:
        self.model = plain_model(model)
        self.blocks: tuple[str, ...] = tuple(residual_modules(traced))
        if not self.blocks:
            raise QuietvitError(
                f"{traced.model_name} has no residual block (a module below a container, whose "
                "output is a sum with its input), so there is no output to watch."
            )
        self._peaks: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def start(self) -> Self:
        """Watch from now on. Does nothing where it is on already."""
        if not self._handles:
            for name in self.blocks:
                module = self.model.get_submodule(name)
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def stop(self) -> None:
        """Watch no longer; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def reset(self) -> None:
        """Forget what was seen."""
        self._peaks = {}

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.stop()

    def largest(self) -> tuple[str, float]:
        """Return the block with the largest output and its magnitude; NaN counts as largest.

        One sync. Raises QuietvitError where no pass was seen.
        """
        peaks = self.peaks()
        name = max(
            peaks, key=lambda name: float("inf") if peaks[name] != peaks[name] else peaks[name]
        )
        return name, peaks[name]

    def peaks(self) -> dict[str, float]:
        """Return the largest |output| of each block by its name. One sync."""
        if not self._peaks:
            raise QuietvitError(
                f"no forward pass of this {type(self.model).__name__} was seen: it has to run "
                "between start() and stop(), and not compiled."
            )
        device = next(iter(self._peaks.values())).device
        values = torch.stack([peak.to(device) for peak in self._peaks.values()]).tolist()
        return dict(zip(self._peaks, values, strict=True))

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            with torch.no_grad():
                low, high = first_tensor(output).detach().aminmax()
                peak = torch.maximum(-low, high).float()
                seen = self._peaks.get(name)
                self._peaks[name] = peak if seen is None else torch.maximum(seen, peak)

        return look


@torch.no_grad()
def largest_activation(
    model: nn.Module, example: Any, traced: Trace | None = None
) -> tuple[str, float]:
    """Return the block with the largest output on ``example``, and that magnitude.

    ``example``: images (N, 3, H, W) or what else the model takes; run once in eval mode, the model
    is left as it was. ``traced`` saves tracing it again. NaN counts as largest.
    """
    watch = ActivationWatch(model, traced if traced is not None else trace(model, example))
    with evaluating(watch.model), eagerly(), watch:
        call(watch.model, example)
    return watch.largest()
