"""Inputs and outputs of blocks over many images: how to call a block, and with what.

Methods decide what to fit to them; ``blocks`` finds the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quietvit.errors import QuietvitError
from quietvit.quantization.adjustments import ChannelAffine, channel_axis
from quietvit.quantization.blocks import Block, naming_block, run_block
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import ImageStream, run_model
from quietvit.quantization.weights import weight_axis
from quietvit.tracing import EndOfPass, Trace, intercept
from quietvit.tracing.block_modules import first_tensor, watching_modules, with_first_tensor

CHUNK = 16
"""Images per call of a block when nothing is learned."""

_tree = torch.utils._pytree

Leaves = list[Tensor]
"""The block's arguments that differ between images, each (images, rows, ...)."""


@dataclass(frozen=True)
class BlockLayout:
    """How to call a block: its flattened arguments, and which of them hold images.

    ``places``: (leaf, dim, rows per image along it), the block's first tensor first. ``output``:
    dim and rows of the block's first output tensor. ``chained``: the only such argument is the
    unchanged output of the block before.

    Example: Swin with 64 windows of 49 tokens is called on (images * 64, 49, channels). Then dim
    is 0 and rows is 64.
    """

    spec: Any
    leaves: tuple[Any, ...]
    places: tuple[tuple[int, int, int], ...]
    output: tuple[int, int]
    chained: bool
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def arguments(self, batch: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments and keyword arguments for these images."""
        leaves = list(self.leaves)
        for (place, dim, _), leaf in zip(self.places, batch, strict=True):
            leaves[place] = leaf.flatten(0, 1).movedim(0, dim)
        args, kwargs = _tree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leaves:
        """Return the arguments that hold images, as ``Leaves``."""
        leaves = _tree.tree_flatten((args, kwargs))[0]
        return [by_image(leaves[place], dim, rows) for place, dim, rows in self.places]

    def split_output(self, output: Any) -> Tensor:
        return by_image(first_tensor(output), *self.output)


def by_image(x: Tensor, dim: int, rows: int) -> Tensor:
    """Return (images, rows, ...) from a tensor whose ``dim`` has ``rows`` entries per image."""
    return x.detach().movedim(dim, 0).unflatten(0, (-1, rows))


def layouts(
    model: nn.Module, blocks: Sequence[Block], image: Tensor
) -> tuple[dict[str, BlockLayout], dict[str, str]]:
    """Return each block's layout, and the reason for each block without. ``image``: (1, C, H, W).

    The model runs on one and on two copies of the image. The dim that doubles holds the images. It
    need not be the first: nn.MultiheadAttention may have (tokens, images, channels).
    """
    one, two = (_calls(model, blocks, image.repeat(n, 1, 1, 1)) for n in (1, 2))
    known: dict[str, BlockLayout] = {}
    missing: dict[str, str] = {}
    before: tuple[Tensor, int] | None = None
    for name, first in one.items():
        second = two.get(name)
        if len(first) != 1 or second is None or len(second) != 1:
            missing[name] = f"runs {len(first)} times in one pass"
            before = None
            continue
        layout = _layout(first[0], second[0], before)
        if isinstance(layout, str):
            missing[name] = layout
            before = None
            continue
        known[name] = layout
        output = first_tensor(first[0].output)
        before = output, output._version
    for block in blocks:
        if block.name not in one:
            missing[block.name] = "does not run as a module"
    return known, missing


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: tuple[int, ...]
    output: Any = None
    changed: bool = False


def _calls(model: nn.Module, blocks: Sequence[Block], images: Tensor) -> dict[str, list[_Call]]:
    """Return the calls of each block in one pass, in the order in which blocks first run."""
    calls: dict[str, list[_Call]] = {}
    hooks = []

    def entered(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _Call(args, kwargs, tuple(t._version for t in _tensors((args, kwargs))))
            calls.setdefault(name, []).append(call)

        return hook

    def left(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = calls[name][-1]
        call.output = output
        call.changed = call.versions != tuple(t._version for t in _tensors((args, kwargs)))

    names = [block.name for block in blocks]
    try:
        for name in names:
            module = model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(entered(name), with_kwargs=True))
        with torch.no_grad(), watching_modules(model, names, left):
            run_model(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in _tree.tree_flatten(nested)[0] if isinstance(leaf, Tensor)]


def _layout(one: _Call, two: _Call, before: tuple[Tensor, int] | None) -> BlockLayout | str:
    if one.changed:
        return "changes its input in place"
    leaves, spec = _tree.tree_flatten((one.args, one.kwargs))
    doubled, _ = _tree.tree_flatten((two.args, two.kwargs))
    if len(leaves) != len(doubled):
        return "gets more tensors for more images"
    x, y = first_tensor((one.args, one.kwargs)), first_tensor(one.output)
    places = []
    for place, (leaf, other) in enumerate(zip(leaves, doubled, strict=True)):
        if not isinstance(leaf, Tensor):
            if isinstance(leaf, int | float | str | bool) and leaf != other:
                return "gets a number that depends on the number of images"
            continue
        grown = _grown(leaf, other)
        if grown is not None:
            places.append((place, *grown))
    output = _grown(y, first_tensor(two.output))
    places.sort(key=lambda place: leaves[place[0]] is not x)
    if output is None or not places or leaves[places[0][0]] is not x:
        return "does not compute each image by itself"
    moving = {place for place, _, _ in places}
    return BlockLayout(
        spec=spec,
        leaves=tuple(None if i in moving else leaf for i, leaf in enumerate(leaves)),
        places=tuple(places),
        output=output,
        chained=len(places) == 1
        and before is not None
        and before[0] is x
        # ``before`` is the last block's output and its version, which in-place changes raise.
        and before[1] == one.versions[0],
        shape=tuple(x.shape),
        output_shape=tuple(y.shape),
    )


def _grown(one: Tensor, two: Tensor) -> tuple[int, int] | None:
    """Return the dim that doubled with the images, and its size for one image."""
    if one.ndim != two.ndim:
        return None
    dims = [d for d, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if len(dims) != 1 or two.shape[dims[0]] != 2 * one.shape[dims[0]]:
        return None
    return dims[0], one.shape[dims[0]]


def channel_dim(block: Block, layout: BlockLayout) -> int:
    """Return the channel dim of a block's first output, as a negative number.

    It is that of the last linear or convolution, unless only another dim has its width.
    """
    last = [s for s in block.sites if s.weight_shape is not None and s.kind in ("linear", "conv")]
    sizes = layout.output_shape
    if not last or last[-1].weight_shape is None:
        return -1
    axis = channel_axis(last[-1])
    width = last[-1].weight_shape[weight_axis(last[-1])]
    if -axis <= len(sizes) and sizes[axis] == width:
        return axis
    others = [d - len(sizes) for d, n in enumerate(sizes) if n == width]
    return others[0] if len(others) == 1 else -1


@dataclass
class BlockData:
    """Runs blocks and models, either quantized with what stands so far or float.

    ``model`` and ``calibrated`` are quantized; ``reference`` is an untouched float copy.
    """

    model: nn.Module
    reference: nn.Module
    trace: Trace
    calibrated: Calibrated
    images: ImageStream

    def __post_init__(self) -> None:
        slots = [slot.site for slot in self.calibrated.quantizers]
        sites = [*slots, *(self.trace[name] for name in self.calibrated.adjustments)]
        self.kinds = frozenset(site.kind for site in sites)
        self.block_kinds = self.kinds - {"add"}

    def reach(self, name: str, layout: BlockLayout, *, quantized: bool) -> Leaves:
        """Return a block's inputs for all images, by running the model up to the block."""
        model = self.model if quantized else self.reference
        parts: list[Leaves] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            parts.append([leaf.clone() for leaf in layout.split(args, kwargs)])
            raise EndOfPass

        hook = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                for batch in self.images:
                    try:
                        self.whole(batch) if quantized else run_model(model, batch)
                    except EndOfPass:
                        continue
                    raise QuietvitError(f"the block {name} did not run; trace the model again.")
        finally:
            hook.remove()
        return [torch.cat(leaf) for leaf in zip(*parts, strict=True)]

    def whole(self, images: Tensor) -> Any:
        """Run the quantized model so far, with compensations."""
        compensations = self.calibrated.compensations
        running = intercept(self.trace, self.calibrated.handle, kinds=self.kinds)

        def compensate(name: str, args: Any, named: Any, output: Any) -> Any:
            with running.paused():
                x, y = first_tensor((args, named)), first_tensor(output)
                return with_first_tensor(output, compensations[name](x, y))

        with watching_modules(self.model, tuple(compensations), compensate), running:
            return run_model(self.model, images)

    def quantized(
        self, block: Block, layout: BlockLayout, leaves: Leaves, handler: Any = None
    ) -> Tensor:
        """Return the quantized block's output (images, rows, ...), without its compensation."""
        args, kwargs = layout.arguments(leaves)
        handler = handler or self.calibrated.handle
        kinds = self.block_kinds
        output = run_block(self.model, block, args, kwargs, handler, kinds=kinds)
        x = first_tensor(output)
        return x.movedim(layout.output[0], 0).unflatten(0, (-1, layout.output[1]))

    def float(self, block: Block, layout: BlockLayout, leaves: Leaves) -> Tensor:
        """Return the float block's output (images, rows, ...)."""
        args, kwargs = layout.arguments(leaves)
        with naming_block(block.name):
            output = self.reference.get_submodule(block.name)(*args, **kwargs)
        return layout.split_output(output)

    def moved(self, block: Block) -> ChannelAffine | None:
        """How a re-parametrized norm before a single layer moved this layer's input, or None."""
        inside = {site.name for site in block.sites}
        for link in self.trace.links if not block.residual else ():
            by = self.calibrated.adjustments.get(link.source)
            if link.consumer in inside and link.source not in inside:
                source = self.trace[link.source]
                if isinstance(by, ChannelAffine) and source.kind == "norm":
                    return by.at(link.channels, channel_axis(self.trace[link.consumer]))
        return None


def chunks(leaves: Leaves) -> Iterable[Leaves]:
    """Yield the leaves, a few images at a time."""
    for start in range(0, leaves[0].shape[0], CHUNK):
        yield [leaf[start : start + CHUNK] for leaf in leaves]


@torch.no_grad()
def in_chunks(leaves: Leaves, run: Callable[[Leaves], Tensor]) -> Tensor:
    """Run on all images, a few at a time, without gradients, and join the results."""
    whole: Tensor | None = None
    for start, chunk in zip(range(0, leaves[0].shape[0], CHUNK), chunks(leaves), strict=True):
        done = run(chunk)
        if whole is None:
            whole = done.new_empty(leaves[0].shape[0], *done.shape[1:])
        whole[start : start + CHUNK] = done
    assert whole is not None
    return whole
