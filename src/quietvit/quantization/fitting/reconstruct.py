"""Block reconstruction: the config and the loop that BRECQ and QDrop share.

``block_fit`` fits one block; ``block_data`` feeds the blocks.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from quietvit.errors import QuietvitError
from quietvit.quantization.blocks import Block, find_blocks
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration, ImageStream
from quietvit.quantization.fitting.block_data import (
    BlockData,
    BlockLayout,
    Leaves,
    channel_dim,
    in_chunks,
    layouts,
)
from quietvit.quantization.fitting.block_fit import FitSettings, Learned, Samples, fit
from quietvit.quantization.method import between, get_method
from quietvit.quantization.on_top import SHARED, OnTop
from quietvit.quantization.weights import (
    frozen,
    read_weight,
    refuse_inference_mode,
    why_fixed,
    write_weight,
)
from quietvit.tensors import has_fast_bfloat16, precision_on

logger = logging.getLogger("quietvit")

CHECKED = 64
"""Images on which a block's error is measured before and after the fit."""


class Reconstruction(OnTop):
    """Base of BRECQ and QDrop: fit blocks in order, rounding and scales together.

    Blocks are the residual blocks of the trace, and each linear and convolution outside of them
    (``blocks.find_blocks``). For each one, Adam minimizes the squared error between the outputs of
    the quantized and the float block: Σ over channels, mean over the rest. The quantized block gets
    its input from the quantized model, the float block from the float model.
    Added is ``regularizer``·Σ(1 - |2h - 1|^β), with β from 20 to 2 after the ``warm_up``.

    Learned are AdaRound's V of each weight and the scale of each activation with a uniform
    quantizer from ``base``. Zero points, other quantizers and adjustments stay. Afterwards weights
    lie on their grid. A block whose error on the first 64 images did not fall stays as the base
    left it, and the notes say so.

    The default ``base`` is RTN with OMSE ranges. The larger learning rates for fewer iterations
    are a choice made here. The progress bar shows the expected time, measured beforehand on one
    iteration of each block.

    Memory holds for all images: a block's input in the quantized model (for QDrop also in the float
    model), its float output, and its next quantized output. BRECQ's ``fisher`` adds weights of that
    shape. Images from a generator or a loader, and a float copy of the model, are held too.

    Differs from the authors' code, on purpose: (1) rounding and activation scales are learned
    together, as QDrop does; BRECQ learns scales after all rounding. (2) The logarithm of a scale is
    learned, so 4e-4 is relative; without LSQ's gradient scale, which Adam cancels. (3) Both
    learning rates fall along a half cosine. (4) The guard on the first 64 images. (5) Blocks come
    from the trace, not by name.
    """

    needs: ClassVar[tuple[str, ...]] = ("images", "gradients")
    cost: ClassVar[str] = "hours"
    images: ClassVar[int] = 1024

    iterations: Annotated[int, Field(ge=1)] = 20000
    """Steps of Adam for each block."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images per step."""
    rounding_lr: Annotated[float, between(0, 1)] | None = None
    """Learning rate of V; None: 1e-3 at 20000 iterations, larger for fewer, up to 0.02."""
    scale_lr: Annotated[float, between(0, 1)] | None = None
    """Learning rate of the scales; None: 4e-4 at 20000 iterations, larger for fewer, up to 0.01."""
    regularizer: Annotated[float, Field(ge=0)] = 0.01
    """Factor of AdaRound's term, which pulls each rounding up or down."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the iterations before that term acts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """``bfloat16``: matrix products of the fit run under autocast. ``auto``: where that is faster.

    Quantizers, the loss and everything outside the fit stay float32. So do layers outside of
    blocks, because their 8 bits are finer than bfloat16's rounding.
    """
    base_images: Annotated[int, Field(ge=1)] | None = None
    """Calibration images of ``base``, the first ones; None: the number of its published setting."""
    seed: int = 0
    """Seed of the order of images and of QDrop's random choice."""

    @model_validator(mode="before")
    @classmethod
    def _default_base(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("base") is not None:
            return fields
        shared = {name: fields[name] for name in SHARED if name in fields}
        ranges = {"weight_range": "omse", "activation_range": "omse"}
        return fields | {"base": get_method("rtn")(**ranges, **shared)}

    @property
    def rounding_rate(self) -> float:
        """Learning rate of V: given, or such that V can move equally far for any ``iterations``."""
        return self.rounding_lr or min(0.02, 1e-3 * 20000 / self.iterations)

    @property
    def scale_rate(self) -> float:
        """Learning rate of the scales' logarithms, chosen in the same way."""
        return self.scale_lr or min(0.01, 4e-4 * 20000 / self.iterations)

    @property
    def keep(self) -> float:
        """Probability that an activation stays float while a block is fitted."""
        return 0.0

    def settings(self) -> FitSettings:
        return FitSettings(
            rounding_rate=self.rounding_rate,
            scale_rate=self.scale_rate,
            batch_size=self.batch_size,
            regularizer=self.regularizer,
            warm_up=self.warm_up,
            keep=self.keep,
        )

    def output_weights(self, data: BlockData, block: Block, layout: BlockLayout) -> Tensor | None:
        """Weights of the squared output errors (images, rows, ...); None weighs all alike."""
        return None

    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Calibrate the base, then fit one block after the other; see the class."""
        refuse_inference_mode()
        calibration = replayable(calibration)
        if self.dtype == "bfloat16" and not has_fast_bfloat16(calibration.images.peek().device):
            logger.warning(
                "%s: dtype 'bfloat16' is slower than float32 on this processor, often many times; "
                "set dtype to 'auto'.",
                self.name,
            )
        reference = copy.deepcopy(calibration.model).requires_grad_(False)
        calibrated = self.base.calibrate(few(calibration, self.base_images or self.base.images))
        check_base(self, calibrated)
        data = BlockData(
            calibration.model,
            reference,
            calibration.trace,
            calibrated,
            calibration.images,
        )
        with frozen(calibration.model):
            _BlockLoop(self, calibration, data).run()
        return calibrated


def check_base(method: OnTop, calibrated: Calibrated) -> None:
    """Raise QuietvitError for a base that compensates blocks, because blocks change afterwards."""
    if calibrated.compensations:
        base = method.base.name
        raise QuietvitError(
            f"{method.name} on top of {base}: what {base} adds to the blocks fits its own rounding "
            f"only; put {base} on top of {method.name}, not the other way round."
        )


def replayable(calibration: Calibration) -> Calibration:
    """Return the calibration over images that are the same in every pass.

    A tensor or a list is. Images of a generator, or of a DataLoader that may shuffle, are stored.
    """
    if isinstance(calibration.images.source, Tensor | list | tuple):
        return calibration
    images = ImageStream(calibration.everything(), calibration.model)
    return replace(calibration, images=images)


def few(calibration: Calibration, count: int) -> Calibration:
    """Return the calibration on the first ``count`` images."""
    kept: list[Tensor] = []
    for batch in calibration.images:
        kept.append(batch)
        if sum(images.shape[0] for images in kept) >= count:
            break
    first = ImageStream(torch.cat(kept)[:count], calibration.model)
    return replace(calibration, images=first)


@dataclass
class _BlockLoop:
    """One calibration: fit the blocks in order, each on the outputs of the blocks before it."""

    method: Reconstruction
    calibration: Calibration
    data: BlockData

    def run(self) -> None:
        blocks = find_blocks(self.data.trace)
        first = self.calibration.images.peek()
        self.layouts, missing = layouts(self.data.reference, blocks, first[:1])
        self.generator = torch.Generator().manual_seed(self.method.seed)
        self.ratios: dict[str, float] = {}
        todo = [b for b in blocks if b.name in self.layouts]
        learning = [b for b in todo if Learned.of(self.data, b, self.method.keep)]
        total = len(learning) * self.method.iterations
        label = f"{self.method.name} {self.method.label}{self._estimate(learning, first)}"
        bar = self.calibration.track(range(total), total, label)
        with closing(bar):
            self._blocks(todo, lambda: next(bar, None))
        self._notes(blocks, missing)

    def _estimate(self, blocks: list[Block], images: Tensor) -> str:
        """Estimate the total time from one iteration of each block on the first batch."""
        if not self.calibration.progress:
            return ""
        images = images[: self.method.batch_size]
        first = replace(self.data, images=ImageStream(images, self.data.reference))
        seconds = spent = 0.0
        for block in blocks:
            layout = self.layouts[block.name]
            leaves = first.reach(block.name, layout, quantized=False)
            with torch.no_grad():
                target = self.data.float(block, layout, leaves)
            samples = Samples(leaves, target, leaves[0] if self.method.keep else None)
            for _ in range(2):  # the first iteration also allocates memory
                start = time.monotonic()
                learned = Learned.of(self.data, block, self.method.keep)
                generator = torch.Generator().manual_seed(0)
                self._fit(block, learned, samples, generator, lambda: None, 1)
                spent = time.monotonic() - start
            seconds += spent * self.method.batch_size / images.shape[0]
        minutes = seconds * self.method.iterations / 60
        return f", about {minutes:.0f} min" if minutes >= 1 else ""

    def _blocks(self, blocks: list[Block], tick: Callable[[], Any]) -> None:
        way: tuple[Leaves, Leaves] | None = None
        for place, block in enumerate(blocks):
            layout = self.layouts[block.name]
            if way is None or not layout.chained:
                way = None  # free the memory before the next inputs are collected
                leaves = self.data.reach(block.name, layout, quantized=True)
                floats = self.data.reach(block.name, layout, quantized=False)
            else:
                leaves, floats = way
            targets = in_chunks(floats, lambda chunk: self.data.float(block, layout, chunk))  # noqa: B023
            samples = Samples(leaves, targets, floats[0] if self.method.keep else None)
            way, floats = None, []
            self._block(block, samples, tick)
            after = blocks[place + 1] if place + 1 < len(blocks) else None
            if after is not None and self.layouts[after.name].chained:
                samples.mixed = samples.importance = None
                quantized = in_chunks(
                    leaves,
                    lambda chunk: self.data.quantized(block, layout, chunk),  # noqa: B023
                )
                way = [quantized], [targets]

    def _block(self, block: Block, samples: Samples, tick: Callable[[], Any]) -> None:
        """Fit a block. Undo it unless its output came nearer to the float output."""
        learned = Learned.of(self.data, block, self.method.keep)
        if not learned:
            return
        before = self._error(block, samples)
        moved = self.data.moved(block)
        if samples.mixed is not None and moved is not None:
            samples.mixed = moved.apply_to(samples.mixed)
        samples.importance = self.method.output_weights(self.data, block, self.layouts[block.name])
        self._fit(block, learned, samples, self.generator, tick, self.method.iterations)
        model = self.data.model
        earlier = {slot: read_weight(model, slot.site) for slot in learned.rounding}
        for slot, rounding in learned.rounding.items():
            write_weight(model, slot.site, rounding.hard())
        for scale in learned.scales.values():
            scale.write()
        after = self._error(block, samples)
        self.ratios[block.name] = after / before if before else math.inf
        if not after < before:
            for slot, weight in earlier.items():
                write_weight(model, slot.site, weight)
            for scale in learned.scales.values():
                scale.undo()

    def _fit(
        self,
        block: Block,
        learned: Learned,
        samples: Samples,
        generator: torch.Generator,
        tick: Callable[[], Any],
        iterations: int,
    ) -> None:
        layout = self.layouts[block.name]
        channels = layout.output_shape[channel_dim(block, layout)]

        device = samples.targets.device
        half = precision_on(device, self.method.dtype) == "bfloat16" and block.residual

        def run(leaves: Leaves, handler: Callable[..., Tensor]) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                return self.data.quantized(block, layout, leaves, handler)

        with torch.enable_grad():
            settings = self.method.settings()
            fit(settings, learned, run, samples, channels, generator, tick, iterations)

    def _error(self, block: Block, samples: Samples) -> float:
        """Mean squared error of the quantized block's output on the first images."""
        layout = self.layouts[block.name]
        leaves = [leaf[:CHECKED] for leaf in samples.arguments]
        output = in_chunks(leaves, lambda chunk: self.data.quantized(block, layout, chunk))
        return float((output - samples.targets[:CHECKED]).double().square().mean())

    def _notes(self, blocks: tuple[Block, ...], missing: dict[str, str]) -> None:
        notes, name = self.data.calibrated.notes, self.method.base.name
        precision = precision_on(self.calibration.images.peek().device, self.method.dtype)
        better = sorted(ratio for ratio in self.ratios.values() if ratio < 1)
        if better:
            notes.append(
                f"{self.method.name}: {len(better)} blocks and layers reconstructed in "
                f"{self.method.iterations} iterations each, in {precision}; their squared output "
                f"error is {100 * better[len(better) // 2]:.0f} % (median) of what {name} left"
            )
        kept = [block for block, ratio in self.ratios.items() if not ratio < 1]
        if kept:
            notes.append(
                f"not better after reconstruction, kept as {name} left it: {', '.join(kept)}"
            )
        for block, why in missing.items():
            notes.append(f"{block} stays as {name} left it: it {why}")
        inside = {site.name for block in blocks for site in block.sites}
        outside = [site.name for site in self.data.trace.matmuls if site.name not in inside]
        if outside:
            notes.append(f"in no block, kept as {name} left it: {', '.join(outside)}")
        weights = [slot.site for slot in self.data.calibrated.quantizers if slot.is_weight]
        reasons = [why_fixed(self.data.model, self.data.trace, site) for site in weights]
        fixed = [why for why in reasons if why is not None]
        if fixed:
            more = f" ({len(fixed)} such weights)" if len(fixed) > 1 else ""
            notes.append(f"rounding not learned: {fixed[0]}{more}")
        if "add" in self.data.kinds:
            notes.append("residual adds inside a block are float while it is reconstructed")
