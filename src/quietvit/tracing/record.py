"""Record the calls of one forward pass as raw sites and links.

``trace`` derives what a user sees: roles, names and tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from quietvit.tracing import carry, labels, ops
from quietvit.tracing.composed import ComposedNorms
from quietvit.tracing.labels import CONSTANT, Flow, Value
from quietvit.tracing.places import Place, Places
from quietvit.tracing.raw import ModuleCall, RawLink, Record, ScoreLink
from quietvit.tracing.scales import has_scale
from quietvit.tracing.standins import STANDINS
from quietvit.tracing.weights import view_of
from quietvit.tracing.wrappers import plain_name


class _FlopCount(TorchDispatchMode):
    """Counts the flops of all dispatched matrix products with torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


def _tensors(nested: Any) -> list[Tensor]:
    """Return the tensors in a module's arguments or output."""
    return [leaf for leaf in tree_flatten(nested)[0] if isinstance(leaf, Tensor)]


class Recorder(TorchFunctionMode):
    """Records every site of the forward pass that runs inside ``with``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.records: list[Record] = []
        self.links: list[RawLink] = []
        self.scores: list[ScoreLink] = []
        self.calls: list[ModuleCall] = []
        self.places = Places()
        self._composed = ComposedNorms()
        self._values = WeakTensorKeyDictionary()
        self.by_key: dict[str, Record] = {}
        self._written: dict[int, Value] = {}
        self._shared: list[Tensor] = []
        self._flops = _FlopCount()
        self._seen_flops = 0
        self._stack: list[str] = [""]
        self._starts: list[int] = []
        self._model = model
        self._paths = {id(module): plain_name(name) for name, module in model.named_modules()}
        self._hooks: list[Any] = []
        self.leaf_modules = frozenset(
            plain_name(name)
            for name, module in model.named_modules()
            if not any(True for _ in module.children())
            and not any(True for _ in module.parameters())
        )
        self._parameters = {plain_name(name): p for name, p in model.named_parameters()}
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        for module in model.modules():
            for value in tree_flatten(vars(module))[0]:  # buffers and cached tensors
                if isinstance(value, Tensor):
                    self._keep(value, CONSTANT)

    def mark_inputs(self, inputs: Any) -> None:
        for tensor in tree_flatten(inputs)[0]:
            if isinstance(tensor, Tensor):
                self._keep(tensor, Value(depends=True))

    def __enter__(self) -> Recorder:
        if not self._hooks:
            self._flops.__enter__()
            self._hooks = [
                nn.modules.module.register_module_forward_pre_hook(self._enter_module),
                nn.modules.module.register_module_forward_hook(
                    self._leave_module, with_kwargs=True, always_call=True
                ),
            ]
        super().__enter__()
        return self

    def finish(self) -> int:
        """Remove the hooks; return the flops of matrix products that no recorded call made."""
        for hook in self._hooks:
            hook.remove()
        self._flops.__exit__(None, None, None)
        return self._flops.total - self._seen_flops

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._paths.get(id(module), self._stack[-1]))
        self._starts.append(len(self.records))

    def _leave_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        path, start = self._stack.pop(), self._starts.pop()
        given, result = _tensors((args, kwargs)), next(iter(_tensors(output)), None)
        if id(module) not in self._paths or result is None:
            return
        values = [(x, self.value(x)) for x in given]
        constant = any(x.shape == result.shape and not value.depends for x, value in values)
        whole = any(
            x.numel() == result.numel() and value.depends and not value.origin
            for x, value in values
        )
        origin = self.value(result).origin
        self.calls.append(ModuleCall(path, start, len(self.records), origin, constant, whole))

    def _keep(self, tensor: Tensor, value: Value) -> None:
        if not tensor.numel():  # for example the boxes of an image without detections
            value = replace(value, flows={}, parameter=None)
        self._values[tensor] = value

    def value(self, tensor: Tensor) -> Value:
        """Return what is known of a tensor; an unknown one counts as depending on the input."""
        name = self._names.get(id(tensor))
        if name is not None:
            entries = torch.arange(tensor.numel(), device=tensor.device)
            return Value(parameter=(name, entries.view(tensor.shape)))
        known: Value | None = self._values.get(tensor)
        if known is None:
            return Value(depends=tensor.is_floating_point() or tensor.is_complex())
        if self._written and not known.depends:
            return self._written.get(tensor.untyped_storage().data_ptr(), known)
        return known

    def _write(self, tensor: Tensor, value: Value) -> None:
        """Note an in-place write: all tensors that share this memory now depend on the input."""
        if value.depends and not self.value(tensor).depends:
            self._written[tensor.untyped_storage().data_ptr()] = labels.merge([value])
            self._shared.append(tensor)  # alive, so that no other tensor gets this address

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in STANDINS:
            with self:
                return STANDINS[func](*args, **kwargs)
        name = ops.name_of(func)
        call = ops.classify(func, args, kwargs) or self._composed.find(func, name, args, kwargs)
        result = func(*args, **kwargs)
        self._composed.follow(name, args, kwargs, result)
        outputs = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        flops = self._flops.total - self._seen_flops
        self._seen_flops += flops
        if call is not None and len(outputs) == 1:
            value = self._site(call, func, call.function or name, outputs[0])
            if outputs[0] is call.operands[0]:
                self._write(outputs[0], value)
            self._keep(outputs[0], value)
        elif outputs or name == "__setitem__":
            if flops:
                self.opaque(name, flops // 2)
            self._carry(func, name, args, kwargs, outputs)
        return result

    def _site(self, call: ops.Call, func: Any, name: str, output: Tensor) -> Value:
        family = ops.FAMILIES[call.kind]
        place = self.places.next(family)
        if call.kind == "matmul" and call.operands[1].ndim == 2:
            # x @ W with a constant W (in, out) is recorded as a linear with the weight (out, in).
            right = self.value(call.operands[1])
            if not right.depends and self.value(call.operands[0]).depends:
                if right.parameter is not None:
                    right = Value(parameter=(right.parameter[0], right.parameter[1].mT))
                call = ops.weight_first(call)
                self._keep(call.operands[1], right)
        values = [self.value(tensor) for tensor in call.operands]
        shapes = [tuple(tensor.shape) for tensor in call.operands]
        if call.kind == "add" and not self._is_residual(values, shapes):
            return labels.combine(values, shapes, output.shape, adding=True)
        weighted = call.kind in ("linear", "conv")
        record = Record(
            key=f"{family}:{place.after}:{place.ordinal}",
            kind=call.kind,
            function=name,
            module=self._stack[-1],
            place=place,
            inputs=values[:1] if weighted else values,
            shapes=shapes[:1] if weighted else shapes,
            output_shape=tuple(output.shape),
            macs=ops.macs(call, func, output),
            weight_shape=shapes[1] if weighted else None,
        )
        gain = CONSTANT if call.gain is None else self.value(call.gain)
        part = (values[1] if weighted else gain).parameter
        if part is not None:
            record.parameter = part[0]
            record.weight = view_of(part, self._parameters, gain=not weighted)
        self.records.append(record)
        self.by_key[record.key] = record
        value = self._after_site(record, call, output)
        record.inputs = [replace(value, flows={}, parameter=None) for value in record.inputs]
        return value

    def _has_scale(self, record: Record) -> bool:
        """Whether a norm only multiplies each channel by a stored factor and adds an offset."""
        view = record.weight
        if record.function != "batch_norm" or view is None or view.rows is not None:
            return False
        return view.attribute == "weight" and has_scale(self._model.get_submodule(view.module))

    @staticmethod
    def _is_residual(values: Sequence[Value], shapes: Sequence[tuple[int, ...]]) -> bool:
        both = all(value.depends for value in values)
        known = any(value.origin for value in values)
        return both and known and shapes[0] == shapes[1] and len(shapes[0]) >= 2

    def _after_site(self, record: Record, call: ops.Call, output: Tensor) -> Value:
        key, inputs = record.key, record.inputs
        depends = any(value.depends for value in inputs)
        merged = labels.merge(inputs)
        flows: dict[str, Flow] = {}
        probability = "mixed" if merged.probability else None
        if call.kind in ("linear", "conv"):
            # Channels: last dim of a linear's output, dim 1 of (B, C, H, W), dim 0 of (C, H, W).
            dim = -1 if call.kind == "linear" else 1 - (output.ndim == call.operands[1].ndim - 1)
            if "transpose" in record.function:  # weight (in, out, ...): no pairs are made of it
                return Value(depends, frozenset({key} if depends else ()), {}, None, probability)
            self._link(record, inputs[0], dim)
            channels = call.operands[1].shape[0]
            if call.kind == "conv" and call.operands[1].shape[1] == 1 and channels > 1:
                step = f"depthwise{labels.AT}{key}"
                flows |= {s: f.via(step) for s, f in inputs[0].flows.items()}
                flows = {s: f for s, f in flows.items() if f.labels.shape[dim] == channels}
                flows = labels.spread(flows, dim, output.shape)
            if output.shape[dim] == channels:
                flows[key] = labels.start(output.shape, dim, output.device)
        elif call.kind in ("matmul", "einsum"):
            if all(value.depends for value in inputs):
                probability = None
            if call.kind == "einsum":
                flows = self._through_einsum(key, call, inputs, output)
            elif all(len(shape) >= 2 for shape in record.shapes):
                flows = self._through_matmul(key, inputs[0], inputs[1], output.shape)
        elif call.kind == "softmax":
            probability = "pure"
        elif call.kind == "norm":
            record.has_scale = self._has_scale(record)
            step = f"batch_norm{labels.AT}{key}" if record.has_scale else "norm"
            flows = {s: f.via(step) for s, f in inputs[0].flows.items()}
            gain = call.gain
            if gain is not None and gain.ndim == 1 and record.weight is not None:
                dim = ops.norm_channel_dim(record.function)
                flows[key] = labels.start(output.shape, dim, output.device)
            probability = merged.probability
        elif call.kind == "activation":
            flows = {s: f.via(record.function.strip("_")) for s, f in inputs[0].flows.items()}
            probability = merged.probability
        elif call.kind == "add":
            combined = labels.combine(inputs, record.shapes, output.shape, adding=True)
            flows, probability = dict(combined.flows), combined.probability
        origin = frozenset({key}) if depends else frozenset()
        return Value(depends, origin, flows, None, probability)

    def _through_matmul(
        self, key: str, left: Value, right: Value, output: Sequence[int]
    ) -> dict[str, Flow]:
        for query, other, heads, through in labels.score_channels(left, right):
            sources = carry.base(query), carry.base(other)
            if not any(self.by_key[source].kind == "norm" for source in sources):
                self.scores.append(ScoreLink(key, *sources, heads, through))
        return labels.through_matmul(left, right, output)

    def _through_einsum(
        self, key: str, call: ops.Call, inputs: Sequence[Value], output: Tensor
    ) -> dict[str, Flow]:
        """Return the flows of an einsum that is a batched matrix product; else none.

        Example: "bnhd,bmhd->bhnm" has batch b, h; rows n; columns m; summed d. Both sides become
        (b, h, n, d) and (b, h, d, m), and the flows of the product are permuted back.
        """
        left, right, out = call.letters
        batch = [c for c in out if c in left and c in right]
        summed = [c for c in left if c in right and c not in out]
        rows, cols = [c for c in out if c not in right], [c for c in out if c not in left]
        whole = len(left) + len(right) == 2 * len(batch) + 2 * len(summed) + len(rows) + len(cols)
        if not whole or any(len(set(term)) < len(term) for term in call.letters):
            return {}
        a = labels.arrange(inputs[0], left, ("".join(batch), "".join(rows), "".join(summed)))
        b = labels.arrange(inputs[1], right, ("".join(batch), "".join(summed), "".join(cols)))
        ordered = [*batch, *rows, *cols]
        sizes = [output.shape[out.index(c)] for c in ordered]
        n = len(batch)
        tall, wide = math.prod(sizes[n : n + len(rows)]), math.prod(sizes[n + len(rows) :])
        back = [ordered.index(c) for c in out]
        flows = self._through_matmul(key, a, b, (*sizes[:n], tall, wide))
        return {s: Flow(f.labels.reshape(sizes).permute(back), f.through) for s, f in flows.items()}

    def _link(self, record: Record, value: Value, channel_dim: int) -> None:
        for source, flow in value.flows.items():
            columns, through = labels.columns(flow.labels, channel_dim), flow.through
            if columns is None and {"attention", "channel_attention"} & set(through):
                # Link it without channels, so that ``pairs`` can say why V and proj are no pair.
                lost = "scrambled" if bool((flow.labels >= 0).any()) else "added"
                if lost == "scrambled" or bool((flow.labels == labels.MIXED).any()):
                    columns = torch.full((flow.labels.shape[channel_dim],), labels.NONE)
                    through = (*through, lost)
            if columns is not None:
                partial = bool((flow.labels == labels.NONE).any())
                self.links.append(
                    RawLink(carry.base(source), record.key, columns.cpu(), through, partial)
                )

    def opaque(self, function: str, macs: int) -> None:
        count = sum(record.kind == "opaque" for record in self.records)
        self.records.append(
            Record(
                f"opaque:{count}",
                "opaque",
                function,
                self._stack[-1],
                Place(count),
                [],
                [],
                (),
                macs,
            )
        )

    def _carry(self, func: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Give the outputs of a call that is not a site what its inputs carried."""
        if name == "__setitem__":
            target, _, source = args
            values = [self.value(target)]
            if isinstance(source, Tensor):
                values.append(self.value(source))
            merged = labels.merge(values)
            self._write(target, merged)
            self._keep(target, merged)
            return
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        values = [self.value(tensor) for tensor in tensors]
        if name in ops.AT_BOXES:  # the boxes say where, not what
            values[1:] = [CONSTANT] * (len(values) - 1)
        results = carry.carried(func, name, args, kwargs, outputs, tensors, values, self._descends)
        for output, result in zip(outputs, results, strict=True):
            if any(output is tensor for tensor in tensors):
                self._write(output, result)
            self._keep(output, result)

    def _descends(self, origin: frozenset[str], source: str) -> bool:
        """Whether one of the sites ``origin`` is computed from the site ``source``."""
        waiting, seen = list(origin), set(origin)
        while waiting:
            key = waiting.pop()
            if key == source:
                return True
            fresh = {k for value in self.by_key[key].inputs for k in value.origin} - seen
            seen |= fresh
            waiting += fresh
        return False
