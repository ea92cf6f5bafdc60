"""``QuantizedModel``: a traced model that fake-quantizes its operands while it runs; ``load``.

A method decides where quantizers are; ``storage`` defines the format of files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.classes import name_classes, names_of
from quietvit.errors import QuietvitError
from quietvit.quantization.adjustments import (
    SCALED_THROUGH,
    Adjustment,
    ChannelAffine,
    Compensation,
    channel_axis,
    module_key,
)
from quietvit.quantization.calibration import run_model
from quietvit.quantization.coverage import Coverage, coverage_of
from quietvit.quantization.floating import FloatingQuantizer
from quietvit.quantization.kept import State, state_of, unchanged
from quietvit.quantization.method import Method
from quietvit.quantization.quantizers import Quantizer
from quietvit.quantization.slot import OPERANDS, OUTPUT, Slot
from quietvit.quantization.storage import FORMAT, Contents, read, write, zero_image
from quietvit.tracing import MATMUL_KINDS, Site, Trace, evaluating, intercept
from quietvit.tracing.block_modules import first_tensor, watching_modules, with_first_tensor
from quietvit.tracing.intercept import Handler


class QuantizedModel(nn.Module):
    """A model with simulated quantization. Call it like the float model.

    Every operand with a quantizer is quantized and dequantized before it is used. Gradients pass
    straight through the rounding, so the model can be trained.

    In eval mode without gradients, quantized weights are cached between calls. The cache follows
    changes of weights and quantizers. Only a change behind autograd's back (``weight.data.mul_``)
    needs ``refresh()``. Copies and pickles do not carry the cache.

    Attributes:
        model: its own copy of the model, with float weights.
        quantizers: ModuleDict from ``Slot.key`` (site and operand) to Quantizer.
        trace, method: what it was made from.
        input_shape: (C, H, W) of the calibration images.
        notes: notes from calibration for the report.
        origin: how the calibration images were generated (``quietvit.synthesize``): method, seed,
            count, fields and iterations; None for real images.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        method: Method,
        quantizers: Mapping[Slot, Quantizer],
        *,
        input_shape: tuple[int, ...],
        adjustments: Mapping[str, Adjustment] | None = None,
        compensations: Mapping[str, Compensation] | None = None,
        notes: tuple[str, ...] = (),
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.trace = trace
        self.method = method
        self.input_shape = input_shape
        self.notes = notes
        self.origin = None if origin is None else dict(origin)
        self.quantizers = nn.ModuleDict()
        self._slots: dict[str, dict[int, Slot]] = {}
        for slot, quantizer in quantizers.items():
            if slot.key in self.quantizers:
                raise QuietvitError(f"two sites get the name {slot.key}. Rename one module.")
            self.quantizers[slot.key] = quantizer
            self._slots.setdefault(slot.site.name, {})[slot.index] = slot
        self._keys = {
            site: {index: slot.key for index, slot in slots.items()}
            for site, slots in self._slots.items()
        }
        self.adjustments = _by_name(adjustments or {})
        self.compensations = _by_name(compensations or {})
        changed = [*(slot.site for slot in quantizers), *map(trace.__getitem__, adjustments or ())]
        self._kinds = frozenset(site.kind for site in changed)
        self._blocks = tuple(compensations or ())
        self._adjusted = {name: module_key(name) for name in adjustments or ()}
        self._moved: dict[str, tuple[ChannelAffine, ChannelAffine]] = {}
        self._kept: dict[str, tuple[State, Tensor]] = {}
        self._observer: Handler | None = None
        self._replacement: Callable[[Slot, Tensor], Tensor] | None = None
        self._only: frozenset[str] | None = None
        self.train(model.training)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the model's classes, None if they are unknown."""
        return names_of(self.model)

    @class_names.setter
    def class_names(self, names: tuple[str, ...] | None) -> None:
        name_classes(self.model, names)

    @property
    def num_classes(self) -> int | None:
        """The number of classes that the float model states: 0 for an encoder, None if unknown."""
        count = getattr(self.model, "num_classes", None)
        return count if isinstance(count, int) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own output, computed on quantized operands."""
        handler = self._handle if self._observer is None else self._watched
        kinds = self._kinds if self._observer is None else self._kinds | MATMUL_KINDS
        if not kinds and not self._blocks:
            return self.model(*args, **kwargs)
        running = intercept(self.trace, handler, kinds=kinds)

        def compensate(name: str, inputs: Any, named: Any, output: Any) -> Any:
            with running.paused():
                x, y = first_tensor((inputs, named)), first_tensor(output)
                return with_first_tensor(output, self.compensations[module_key(name)](x, y))

        with watching_modules(self.model, self._blocks, compensate), running:
            return self.model(*args, **kwargs)

    @contextmanager
    def observe(self, handler: Handler) -> Iterator[None]:
        """Show every matrix product to ``handler`` while the model runs inside ``with``.

        ``handler(site, operands, run)`` gets the operands before they are quantized. Activations
        moved by a re-parametrization are moved back, so they compare with the float model's.
        ``run(*operands)`` quantizes and multiplies. The handler's result is the site's output.

        Raises QuietvitError inside another ``observe`` of this model.
        """
        if self._observer is not None:
            raise QuietvitError("this model is observed already. Leave that 'with' block first.")
        self._observer, self._moved = handler, self._moved_inputs()
        try:
            yield
        finally:
            self._observer = None

    @contextmanager
    def replacing(self, replacement: Callable[[Slot, Tensor], Tensor]) -> Iterator[None]:
        """Inside ``with``, call ``replacement(slot, operand)`` instead of every quantizer.

        Raises QuietvitError inside another ``replacing`` of this model.
        """
        if self._replacement is not None:
            raise QuietvitError("quantizers are replaced already. Leave that 'with' block first.")
        self._replacement = replacement
        try:
            yield
        finally:
            self._replacement = None

    @contextmanager
    def only(self, slots: Collection[Slot]) -> Iterator[None]:
        """Inside ``with``, quantize only these operands; all others stay in float.

        Adjustments and compensations still apply. An inner ``only`` replaces an outer one.
        """
        before, self._only = self._only, frozenset(slot.key for slot in slots)
        try:
            yield
        finally:
            self._only = before

    def _moved_inputs(self) -> dict[str, tuple[ChannelAffine, ChannelAffine]]:
        """For each reader of a re-parametrized norm: how its input was moved, and the inverse."""
        moved = {}
        for link in self.trace.links if self._adjusted else ():
            by = self.adjustments._modules.get(module_key(link.source))
            if not SCALED_THROUGH.issuperset(link.through):
                continue
            if isinstance(by, ChannelAffine) and self.trace[link.source].kind == "norm":
                forth = by.at(link.channels, channel_axis(self.trace[link.consumer]))
                moved[link.consumer] = forth, forth.inverse()
        return moved

    def _handle(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        keys = self._keys.get(site.name)
        if keys is not None:
            operands = tuple(
                self._quantize(site, keys[index], index, operand) if index in keys else operand
                for index, operand in enumerate(operands)
            )
        adjusted = self._adjusted.get(site.name)
        output: Tensor = (
            run(*operands) if adjusted is None else self.adjustments[adjusted](operands, run)
        )
        if keys is None or OUTPUT not in keys:
            return output
        return self._quantize(site, keys[OUTPUT], OUTPUT, output)

    def _watched(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        if site.kind not in MATMUL_KINDS or self._observer is None:
            return self._handle(site, operands, run)
        moved = self._moved.get(site.name)
        if moved is None:
            return self._observer(site, operands, lambda *changed: self._handle(site, changed, run))
        # A re-parametrized norm gives x' = gain x + shift, and the reader's weight undoes that. The
        # observer must see x, as in the float model. So x' is moved back for it, then forth again.
        forth, back = moved

        def quantized(x: Tensor, *rest: Tensor) -> Tensor:
            return self._handle(site, (forth.apply_to(x), *rest), run)

        return self._observer(site, (back.apply_to(operands[0]), *operands[1:]), quantized)

    def _quantize(self, site: Site, key: str, index: int, operand: Tensor) -> Tensor:
        if self._only is not None and key not in self._only:
            return operand
        if self._replacement is not None:
            return self._replacement(self._slots[site.name][index], operand)
        quantizer = self.quantizers[key]
        keepable = index == 1 and site.weight is not None and site.kind in ("linear", "conv")
        if self.training or torch.is_grad_enabled() or not keepable:
            return quantizer(operand)  # type: ignore[no-any-return]
        sources = (operand, *quantizer.parameters(), *quantizer.buffers())
        if any(source.is_inference() for source in sources):
            return quantizer(operand)  # type: ignore[no-any-return]
        # Rounding all weights takes as long as a small batch's products, and weights seldom change.
        kept = self._kept.get(key)
        if kept is not None and unchanged(kept[0], sources):
            return kept[1]
        result: Tensor = quantizer(operand)
        self._kept[key] = (state_of(sources), result)
        return result

    def refresh(self) -> None:
        """Clear the cache of quantized weights."""
        self._kept.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_observer": None, "_replacement": None, "_only": None}

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
        """Return an operand's quantizer (``input``, ``weight``, ``left``, ``right``, ``output``).

        None if it has none. Raises QuietvitError for an unknown site or operand.
        """
        own = self.trace[site]
        names = (*OPERANDS.get(own.kind, ("operand0", "operand1")), "output")
        if operand not in names:
            raise QuietvitError(f"{site} has operands {', '.join(names)}, not {operand!r}.")
        slot = Slot(own, OUTPUT if operand == "output" else names.index(operand))
        found_quantizer = self.quantizers._modules.get(slot.key)
        return found_quantizer if isinstance(found_quantizer, Quantizer) else None

    def slots(self) -> list[Slot]:
        return [slot for slots in self._slots.values() for slot in slots.values()]

    def adjusted(self) -> dict[str, Adjustment]:
        adjustments = {name: self.adjustments[key] for name, key in self._adjusted.items()}
        return {name: a for name, a in adjustments.items() if isinstance(a, Adjustment)}

    def compensated(self) -> dict[str, Compensation]:
        compensations = {name: self.compensations[module_key(name)] for name in self._blocks}
        return {name: c for name, c in compensations.items() if isinstance(c, Compensation)}

    @property
    def coverage(self) -> Coverage:
        """Multiply-accumulates on quantized operands, and each matrix product left out."""
        labels = {key: str(quantizer.label) for key, quantizer in self.quantizers.items()}
        return coverage_of(self.trace, self.method, labels, self.compensated())

    def report(self) -> str:
        """Return bits, first- and last-layer policy, notes and coverage as text."""
        what = "deployable: standard integer kernels compute with these codes"
        floating = {q.label for q in self.quantizers.values() if isinstance(q, FloatingQuantizer)}
        if floating:
            shown = ", ".join(sorted(floating))
            what = f"simulated: values are rounded to {shown}; no kernel computes with them here"
        elif not self.deployable:
            what = "simulated: no standard integer kernel computes with all of these codes"
        if self.coverage.quantized_macs == 0:
            what = "no product has both operands quantized: nothing computes in integers"
        lines = [f"quantized {type(self.model).__name__}: {self.method.policy()}", what]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, str(self.coverage)])

    @property
    def deployable(self) -> bool:
        """Whether there are integer products, and standard integer kernels compute them all.

        They need at most 8 bits, uniform steps, and one scale per tensor for activations.
        """
        quantizers = [(slot, self.quantizers[slot.key]) for slot in self.slots()]
        return (
            self.coverage.quantized_macs > 0
            and all(adjustment.deployable for adjustment in self.adjusted().values())
            and self.method.deployable
            and all(
                isinstance(q, Quantizer)
                and q.deployable
                and q.bits <= 8
                and (slot.is_weight or getattr(q, "axis", None) is None)
                for slot, q in quantizers
            )
        )

    def __str__(self) -> str:
        return self.report()

    def __repr__(self) -> str:
        """One line without the modules; ``print`` shows ``report``, ``.model`` the modules."""
        share = 100 * self.coverage.fraction
        policy = f"{self.method.name} {self.method.label}"
        return f"QuantizedModel({type(self.model).__name__}, {policy}, {share:.2f} % quantized)"

    def weights_in_use(self) -> dict[str, Tensor]:
        """Return the weight that each weight quantizer gets in one pass over zeros, by site.

        A model may compute a weight, for example divide it by its spectral norm. Then the simulated
        model multiplies by this weight, not by the parameter.
        """
        weights: dict[str, Tensor] = {}

        def keep(slot: Slot, x: Tensor) -> Tensor:
            if slot.is_weight:
                weights[slot.site.name] = x.detach()
            result: Tensor = self.quantizers[slot.key](x)
            return result

        with evaluating(self), torch.no_grad(), self.replacing(keep):
            run_model(self, zero_image(self.model, self.input_shape))
        return weights

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the folder ``path``: ``model.safetensors`` and ``quantization.json``. Returns it.

        Weights are stored as quantized codes: one byte for up to 8 bits, else two. A weight that is
        shared, computed or transposed stays float. The folder is written under a temporary name
        and then renamed.

        Raises QuietvitError if ``path`` exists. ``force`` replaces an earlier save, but never any
        other file or folder.
        """
        quantizers = {slot: self.quantizers[slot.key] for slot in self.slots()}
        contents = Contents(
            model=self.model,
            trace=self.trace,
            method=self.method,
            quantizers={s: q.fixed() for s, q in quantizers.items() if isinstance(q, Quantizer)},
            adjustments=self.adjusted(),
            compensations=self.compensated(),
            input_shape=self.input_shape,
            notes=self.notes,
            origin=self.origin,
        )
        path = Path(path)
        FORMAT.refuse(path, force)
        write(path, contents, self.weights_in_use(), self.coverage)
        return path


def load(path: str | Path, model: nn.Module | None = None) -> QuantizedModel:
    """Read what ``QuantizedModel.save`` wrote. Its outputs are the same bit for bit.

    timm or transformers builds the architecture if the model came from there. Otherwise give
    ``model``, a float model of the same architecture with any weights; a copy of it is used. Class
    names come from the file, if it has any.

    Raises QuietvitError for a missing, truncated or foreign file. For a model of another
    architecture, the error names the first keys that differ.
    """
    contents = read(Path(path), model)
    device = next((p.device for p in contents.model.parameters()), torch.device("cpu"))
    loaded = QuantizedModel(**vars(contents))
    return loaded.to(device).eval()  # type: ignore[no-any-return]


def _by_name(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({module_key(name): module for name, module in modules.items()})
