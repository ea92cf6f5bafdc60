"""Capture what the loss terms need in a pass: attention patches, outputs, BatchNorm inputs.

The trace and the stored statistics locate them; module names play no role.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from quietvit.errors import QuietvitError
from quietvit.synthesis.terms import Moments, image_spread, moments
from quietvit.tensors import precision_on
from quietvit.tracing import SITE_KINDS, Site, Trace, intercept, refusing
from quietvit.tracing.intercept import Handler

Look = Callable[[Site, Tensor], None]
_AUTOCAST = " Or it fails only in bfloat16: then set precision='float32' in the method's settings."


def output_sites(trace: Trace) -> tuple[str, ...]:
    """Return the sites that produce the model's outputs: its heads, or else its last sites.

    Final sums, which shift a detector's boxes, are skipped if there are other last sites.
    """
    heads = tuple(site.name for site in trace.sites if site.role == "head")
    if heads:
        return heads
    direct = tuple(name for name in trace.outputs if trace[name].kind not in ("add", "opaque"))
    return direct or trace.outputs


def watched(
    model: nn.Module, trace: Trace, looks: Mapping[str, Look], images: Tensor, precision: str
) -> Any:
    """Run the model on images (B, C, H, W) and pass each named site's output to its ``Look``.

    Matrix products are in ``precision_on(device, precision)``. Returns the model's output.
    """

    def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        output = run(*operands)
        if site.name in looks:
            looks[site.name](site, output)
        return output

    kinds = {trace[name].kind for name in looks} & SITE_KINDS
    low = precision_on(images.device, precision) == "bfloat16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
        return run_watched(model, trace, handler, kinds, images)


def run_watched(
    model: nn.Module, trace: Trace, handler: Handler, kinds: Collection[str], images: Tensor
) -> Any:
    """Run the model on images (B, C, H, W) with a handler for its sites of these kinds.

    Raises QuietvitError if the model raises an exception.
    """
    with (
        refusing(
            lambda what: (
                f"{type(model).__name__} does not run on a batch of images of shape "
                f"{tuple(images.shape)} ({what.splitlines()[0]}). Give a model that takes one "
                "batch of images of any length."
                + (_AUTOCAST if torch.is_autocast_enabled(images.device.type) else "")
            )
        ),
        intercept(trace, handler, kinds=kinds),
    ):
        return model(images)


class Patches:
    """Read a model's attention outputs as patches (samples, N, D), averaged over heads."""

    def __init__(self, model: nn.Module, trace: Trace, probes: Tensor) -> None:
        """Find the attention sites and their patch tokens.

        ``probes`` are two different images. Tokens that differ between them are patches.
        Raises QuietvitError if the model has no attention over patches.
        """
        self._channelwise = _over_channels(trace)
        self._linear = _linear_attention(trace)
        self._kept: dict[str, Tensor] = {}
        self.windows = False
        """Whether any attention runs in windows of the image."""
        # The query (samples, N, D) has one row per token. In the first attention with N tokens, a
        # row is the same for both probes if it is a class token or a decoder's query. A ViT with
        # 197 tokens keeps rows 1 to 196. Later attentions mix tokens, so ``changing`` collects the
        # rows that differ in every attention with N tokens so far.
        changing: dict[int, Tensor] = {}
        products: list[tuple[Tensor, torch.Size]] = []  # since the last attention

        def handler(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
            output = run(*operands)
            linear = self._linear.get(site.name)
            if linear is None and site.role != "attention_value":
                products.append((operands[0], output.shape))
                return output
            earlier, scores = list(products), operands[site.operands[0].role == "value"].shape
            products.clear()
            if output.ndim < 3 or site.name in self._linear.values():
                return output
            tokens = self._tokens(site, output)
            count = tokens.shape[1]
            matching = [left for left, shape in earlier if shape == scores]
            if linear is not None:
                matching = [operands[site.operands[0].role == "attention_output"]]
            query = _samples(matching[-1]) if matching else tokens
            if query.shape[1] != count or site.name in self._channelwise:
                query = query.mT
            if query.shape[:2] == tokens.shape[:2]:
                first, second = query.chunk(2)
                moved = (first != second).any(-1).any(0)
                changing[count] = moved & changing.get(count, torch.ones_like(moved))
            numbers = changing.get(count, tokens.new_ones(count, dtype=torch.bool)).nonzero()
            if len(numbers) > 1:
                self._kept[site.name] = numbers.flatten()
                self.windows |= output.ndim > 3 and len(tokens) > len(probes)
            return output

        with torch.no_grad():
            run_watched(model, trace, handler, {"matmul"}, probes)
        if not self._kept:
            raise QuietvitError(
                f"the trace of {trace.model_name} has no attention over patches, so method 'psaq' "
                f"cannot measure patch similarity. {_instead_of_patches(model)}"
            )

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self._kept)

    def __call__(self, site: Site, output: Tensor) -> Tensor:
        """Return the patches in the output of a site: (samples, N, D), without other tokens.

        A sample is an image or a window.
        """
        tokens, kept = self._tokens(site, output), self._kept[site.name]
        return tokens if len(kept) == tokens.shape[1] else tokens.index_select(1, kept)

    def _tokens(self, site: Site, x: Tensor) -> Tensor:
        swapped = site.operands[0].role in ("value", "attention_output")
        if swapped != (site.name in self._channelwise):
            x = x.mT
        return _samples(x)


def _instead_of_patches(model: nn.Module) -> str:
    if any(map(has_statistics, model.modules())):
        return "Use method 'dgh', because the model has BatchNorm."
    return (
        "The model has no BatchNorm with stored statistics either, so use method 'pink', which "
        "needs neither. Or set entropy=0 to keep only the other terms."
    )


def has_attention(trace: Trace) -> bool:
    """Whether a trace has attention, which ``psaq`` needs."""
    return any(site.role == "attention_value" for site in trace.sites)


def _samples(x: Tensor) -> Tensor:
    """Average (B, heads, ..., N, D) over heads and flatten to (samples, N, D).

    A tensor (B * heads, N, D) has no dim for heads, so each head counts as a sample.
    """
    return (x.mean(1) if x.ndim > 3 else x).flatten(0, -3)


def _linear_attention(trace: Trace) -> dict[str, str]:
    """Return the products of the query with softmax(key)^T value, each with the latter's site.

    The former have a row for each token. The latter have a row for each channel (CoaT).
    """
    values = {site.name for site in trace.sites if site.role == "attention_value"}
    return {
        site.name: source
        for site in trace.sites
        if len(site.operands) == 2
        for operand in site.operands
        if operand.role == "attention_output"
        for source in values.intersection(operand.fed_by)
    }


def _over_channels(trace: Trace) -> set[str]:
    """Return the attentions that mix channels. Their tokens are in the last dim."""
    values = {link.source for link in trace.links if "channel_attention" in link.through}
    return {
        site.name
        for site in trace.sites
        if any(values.intersection(operand.fed_by) for operand in site.operands)
    }


class Norms:
    """Record the inputs of all BatchNorms with stored statistics, with hooks on a private copy.

    After a pass, ``moments`` holds the moments of each call's input in order. ``spread`` is the
    ``image_spread`` at the last BatchNorm whose input has several positions per image.
    """

    def __init__(self, model: nn.Module, run: Callable[[Tensor], Any], probe: Tensor) -> None:
        """Add the hooks, then call ``run(probe)``: one pass over images (B, C, H, W).

        Raises QuietvitError if no BatchNorm with stored statistics takes part in the pass.
        """
        self.moments: list[Moments] = []
        self.spread: Tensor | None = None
        self._batch = 1
        self._last = -1
        self._modules: list[Any] = []
        for module in model.modules():
            if has_statistics(module):
                module.register_forward_pre_hook(self._note)
        shapes: list[tuple[int, ...]] = []
        self._shapes: list[tuple[int, ...]] | None = shapes
        with torch.no_grad():
            run(probe)
        self._shapes = None
        if not self.moments:
            raise QuietvitError(
                f"no BatchNorm of {type(model).__name__} with stored statistics takes part in a "
                "pass in eval mode, so method 'dgh' cannot match them. Use another method."
            )
        wide = [i for i, shape in enumerate(shapes) if math.prod(shape) > len(probe) * shape[1]]
        self._last = wide[-1] if wide else -1
        self.stored = [
            (module.running_mean.float(), module.running_var.float()) for module in self._modules
        ]

    def start(self, batch: int) -> None:
        """Forget the last pass. The next one has ``batch`` images."""
        self.moments, self.spread, self._batch = [], None, batch

    def _note(self, module: Any, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if self._shapes is not None:
            self._shapes.append(tuple(x.shape))
            self._modules.append(module)
        elif len(self.moments) == self._last:
            self.spread = image_spread(x, self._batch, *self.stored[self._last])
        self.moments.append(moments(x))


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with running statistics, frozen or not."""
    if isinstance(module, _InstanceNorm):
        return False
    mean, variance = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return False
    return mean.ndim == 1 and mean.shape == variance.shape
