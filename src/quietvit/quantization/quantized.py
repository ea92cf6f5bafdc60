"""``QuantizedModel``: a traced model whose operands are fake-quantized while it runs; its coverage.

Which quantizer stands where is decided by a method; files are read and written in ``storage``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.quantization.calibration import Handler
from quietvit.quantization.method import OPERANDS, Method, Slot
from quietvit.quantization.quantizers import Quantizer
from quietvit.tracing import MATMUL_KINDS, Site, Trace, intercept


@dataclass(frozen=True)
class Coverage:
    """Which share of the multiply-accumulates runs on quantized operands, and what does not.

    A product counts as quantized when both its operands are. ``untouched``: every other matrix
    multiplication, with the reason.
    """

    quantized_macs: int
    total_macs: int
    untouched: tuple[tuple[str, str], ...]
    untouched_macs: tuple[int, ...]

    @property
    def fraction(self) -> float:
        """quantized_macs / total_macs, 0 for a model without any."""
        return self.quantized_macs / self.total_macs if self.total_macs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "quantized_macs": self.quantized_macs,
            "total_macs": self.total_macs,
            "fraction": self.fraction,
            "untouched": [
                {"site": site, "macs": macs, "reason": reason}
                for (site, reason), macs in zip(self.untouched, self.untouched_macs, strict=True)
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"coverage {100 * self.fraction:.2f} %: {self.quantized_macs / 1e6:.2f} of "
            f"{self.total_macs / 1e6:.2f} MMACs an image on quantized operands"
        ]
        width = max((len(site) for site, _ in self.untouched), default=0)
        for (site, reason), macs in zip(self.untouched, self.untouched_macs, strict=True):
            lines.append(f"  float: {site:<{width}}  {macs / 1e6:>9.2f} MMACs  {reason}")
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("float site", "MMACs", "reason")
        for (site, reason), macs in zip(self.untouched, self.untouched_macs, strict=True):
            table.add_row(site, f"{macs / 1e6:.2f}", reason)
        return Group(str(self).splitlines()[0], *([table] if self.untouched else []))


class QuantizedModel(nn.Module):
    """A model with simulated quantization: its forward pass with every chosen operand quantized.

    ``model`` is an own copy with float weights, ``quantizers`` a ModuleDict from site and operand
    (``Slot.key``) to Quantizer, ``trace`` and ``method`` what it was made from. Called as the model
    is. Gradients go straight through the rounding, so it can be trained on. In eval mode without
    gradient quantized weights are kept between calls; they follow every change of weights and
    quantizers but one in place behind autograd's back (``weight.data.mul_``), which needs
    ``refresh()``. Copies and pickles do not carry them.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        method: Method,
        quantizers: Mapping[Slot, Quantizer],
        *,
        input_shape: tuple[int, ...],
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.trace = trace
        self.method = method
        self.input_shape = input_shape
        self.notes = notes
        self.quantizers = nn.ModuleDict()
        self._slots: dict[str, dict[int, Slot]] = {}
        for slot, quantizer in quantizers.items():
            if slot.key in self.quantizers:
                raise QuietvitError(f"two sites lead to the name {slot.key}; rename one module.")
            self.quantizers[slot.key] = quantizer
            self._slots.setdefault(slot.site.name, {})[slot.index] = slot
        self._keys = {
            site: {index: slot.key for index, slot in slots.items()}
            for site, slots in self._slots.items()
        }
        self._kinds = frozenset(slot.site.kind for slot in quantizers)
        self._kept: dict[str, tuple[_State, Tensor]] = {}
        self._observer: Handler | None = None
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output, computed on quantized operands."""
        if self._observer is not None:
            observer, inner = self._observer, self._handle

            def watched(
                site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
            ) -> Tensor:
                return observer(site, operands, lambda *given: inner(site, given, run))

            with intercept(self.trace, watched):
                return self.model(*args, **kwargs)
        if not self._kinds:
            return self.model(*args, **kwargs)
        with intercept(self.trace, self._handle, kinds=self._kinds):
            return self.model(*args, **kwargs)

    @contextmanager
    def observe(self, handler: Handler) -> Iterator[None]:
        """Show every matrix product to ``handler`` while the model runs inside ``with``.

        ``handler(site, operands, run)`` gets the operands before they are quantized;
        ``run(*operands)`` quantizes them and multiplies; what it returns goes on. One at a time:
        raises QuietvitError inside another ``observe`` of this model.
        """
        if self._observer is not None:
            raise QuietvitError("this quantized model is being observed already; leave that first.")
        self._observer = handler
        try:
            yield
        finally:
            self._observer = None

    def _handle(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        keys = self._keys.get(site.name)
        if keys is None:
            return run(*operands)
        return run(
            *(
                self._quantize(site, keys[index], index, operand) if index in keys else operand
                for index, operand in enumerate(operands)
            )
        )

    def _quantize(self, site: Site, key: str, index: int, operand: Tensor) -> Tensor:
        quantizer = self.quantizers[key]
        keepable = index == 1 and site.weight is not None and site.kind in ("linear", "conv")
        if self.training or torch.is_grad_enabled() or not keepable:
            return quantizer(operand)  # type: ignore[no-any-return]
        sources = (operand, *quantizer.parameters(), *quantizer.buffers())
        if any(source.is_inference() for source in sources):
            return quantizer(operand)  # type: ignore[no-any-return]
        kept = self._kept.get(key)
        if kept is not None and _unchanged(kept[0], sources):
            return kept[1]
        result: Tensor = quantizer(operand)
        self._kept[key] = (_state(sources), result)
        return result

    def refresh(self) -> None:
        """Forget the quantized weights kept from earlier calls."""
        self._kept.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_observer": None}

    def train(self, mode: bool = True) -> QuantizedModel:
        self.refresh()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModel:
        self.refresh()
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.refresh()
        return super().load_state_dict(*args, **kwargs)

    def quantizer(self, site: str, operand: str) -> Quantizer | None:
        """The quantizer of a site's operand (``input``, ``weight``, ``left``, ``right``), if any.

        Raises QuietvitError for an unknown site or operand.
        """
        found = self.trace[site]
        names = OPERANDS.get(found.kind, ("operand0", "operand1"))
        if operand not in names:
            raise QuietvitError(f"{site} has operands {', '.join(names)}, not {operand!r}.")
        slot = Slot(found, names.index(operand))
        found_quantizer = self.quantizers._modules.get(slot.key)
        return found_quantizer if isinstance(found_quantizer, Quantizer) else None

    def slots(self) -> list[Slot]:
        """Every slot that has a quantizer."""
        return [slot for slots in self._slots.values() for slot in slots.values()]

    @property
    def coverage(self) -> Coverage:
        """Multiply-accumulates on quantized operands, and each matrix product left out."""
        done, untouched, macs = 0, [], []
        for site in self.trace.matmuls:
            if site.kind not in MATMUL_KINDS:
                reasons = [f"inside {site.function}, which cannot be taken apart"]
            else:
                slots = (Slot(site, 0), Slot(site, 1))
                reasons = [self._reason(s) for s in slots if s.key not in self.quantizers]
            if reasons:
                untouched.append((site.name, "; ".join(dict.fromkeys(reasons))))
                macs.append(site.macs)
            else:
                done += site.macs
        return Coverage(done, self.trace.macs, tuple(untouched), tuple(macs))

    def _reason(self, slot: Slot) -> str:
        if self.method.slot_bits(slot) is None:
            return f"{slot.operand} float: {self.method.why_float(slot)}"
        return f"{slot.operand} float: left so by {self.method.name}"

    def report(self) -> str:
        """Bits, first- and last-layer policy, notes and coverage, as text."""
        what = "deployable: standard integer kernels compute with these codes"
        if not self.deployable:
            what = "simulated: no standard integer kernel computes with all of these codes"
        lines = [f"quantized {type(self.model).__name__}: {self.method.policy()}", what]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, str(self.coverage)])

    @property
    def deployable(self) -> bool:
        """Whether standard integer kernels compute with all the codes there are.

        At most 8 bits, uniform, and activations with one scale for the tensor.
        """
        found = [(slot, self.quantizers[slot.key]) for slot in self.slots()]
        return (
            bool(found)
            and self.method.deployable
            and all(
                isinstance(q, Quantizer)
                and q.deployable
                and q.bits <= 8
                and (slot.is_weight or getattr(q, "axis", None) is None)
                for slot, q in found
            )
        )

    def __str__(self) -> str:
        return self.report()

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the folder ``path``; see ``storage.save``."""
        from quietvit.quantization.storage import save

        return save(self, path, force)


_State = tuple[tuple[Tensor, int], ...]


def _state(sources: tuple[Tensor, ...]) -> _State:
    # Aliases that stay with the memory of now, where a parameter's ``data`` may be replaced; held,
    # so that the memory cannot be given to another tensor: equal places are equal data.
    return tuple((source.detach(), source._version) for source in sources)


def _unchanged(kept: _State, sources: tuple[Tensor, ...]) -> bool:
    return len(kept) == len(sources) and all(
        version == source._version
        and held.data_ptr() == source.data_ptr()
        and held.shape == source.shape
        and held.stride() == source.stride()
        and held.dtype == source.dtype
        and held.device == source.device
        for (held, version), source in zip(kept, sources, strict=True)
    )
