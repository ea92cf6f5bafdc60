"""The largest output of any block while a model trains or evaluates: a number for logs.

``tweo`` penalizes it. ``measure`` finds what hurts quantization.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.tracing import Trace, call, eagerly, evaluating, plain_model, trace
from quietvit.tracing.block_modules import first_tensor


class ActivationWatch:
    """Record the largest |output| of each residual block over all forward passes.

    The watch is on between ``start()`` and ``stop()``, or inside ``with watch:``. It keeps its
    values until ``reset()``. Passes in train and eval mode count. It reads each block's output
    once, and does not synchronize before ``largest()`` or ``peaks()``. A compiled model does not
    call hooks added later, so run the watched pass under
    ``torch.compiler.set_stance("force_eager")``. Under DDP each process sees its own images.

    ``traced`` is ``quietvit.trace`` of the model. Raises QuietvitError if the model has no residual
    block.
    """

    def __init__(self, model: nn.Module, traced: Trace) -> None:
        self.model = plain_model(model)
        self.blocks: tuple[str, ...] = traced.blocks
        if not self.blocks:
            raise QuietvitError(
                f"{traced.model_name} has no residual block to watch (a module whose output is "
                "its input plus something)."
            )
        self._peaks: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def start(self) -> Self:
        """Start watching. Does nothing if the watch is on already."""
        if not self._handles:
            for name in self.blocks:
                module = self.model.get_submodule(name)
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def stop(self) -> None:
        """Stop watching and keep the values."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def reset(self) -> None:
        """Forget all values."""
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
        """Return the block with the largest |output|, and that value. NaN counts as largest.

        One synchronization. Raises QuietvitError if no forward pass was seen.
        """
        peaks = self.peaks()
        name = max(
            peaks, key=lambda name: float("inf") if peaks[name] != peaks[name] else peaks[name]
        )
        return name, peaks[name]

    def peaks(self) -> dict[str, float]:
        """Return the largest |output| by block name. Synchronizes and raises like ``largest``."""
        if not self._peaks:
            raise QuietvitError(
                f"no forward pass of this {type(self.model).__name__} was seen. Run it uncompiled, "
                "between start() and stop()."
            )
        device = next(iter(self._peaks.values())).device
        values = torch.stack([peak.to(device) for peak in self._peaks.values()]).tolist()
        return dict(zip(self._peaks, values, strict=True))

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            with torch.no_grad():
                low, high = first_tensor(output).detach().aminmax()
                peak = torch.maximum(-low, high).float()
                largest = self._peaks.get(name)
                self._peaks[name] = peak if largest is None else torch.maximum(largest, peak)

        return look


@torch.no_grad()
def largest_activation(
    model: nn.Module, example: Any, traced: Trace | None = None
) -> tuple[str, float]:
    """Return the block with the largest |output| on ``example``, and that value.

    ``example`` is images (N, 3, H, W) or another input of the model. The model runs once in eval
    mode and gets its mode back. ``traced`` saves a second trace. NaN counts as largest.
    """
    watch = ActivationWatch(model, traced if traced is not None else trace(model, example))
    with evaluating(watch.model), eagerly(), watch:
        call(watch.model, example)
    return watch.largest()
