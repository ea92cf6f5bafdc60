"""Why an output channel is extreme: which pair of weights, which singular direction, how much.

``diagnose`` runs the model twice. ``PeakTracker`` finds where each pair's output peaks over all
images. ``CauseFinder`` then explains these peaks on the images that hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quietvit.measure.colinearity import read_first
from quietvit.measure.contribution import Contribution, explain
from quietvit.pairs import MatrixPair

if TYPE_CHECKING:
    from quietvit.tracing import Site, Trace, WeightView

TOKENWISE = frozenset({"mlp", "gated_mlp"})
EXPLAINED = TOKENWISE | {"value_output", "norm_linear"}


@dataclass(frozen=True)
class RootCause:
    """Where the output of a pair's second matrix peaks, and which pair and direction make it.

    The peak is the largest ``|value|`` over all images, tokens and channels that the pair writes.
    Several pairs can write the same output (heads; up and gate). Then ``pair`` is the one whose
    strongest direction explains most.

    Attributes:
        pair, kind, head: of the pair.
        site: site whose output holds the value.
        channel: output channel k of that site.
        image: index of the image, counted over all batches.
        index: index of the value in the site's output for that image alone.
        value: the true value y_k, with biases and the contributions of all pairs.
        output_rms: root mean square of the site's output over all images.
        contribution: the direction that explains most.
        share_linear: ``contribution.product / value``.
        share: ``contribution.explained / value``. It exceeds 1 if other directions subtract.
        colinearity: ``|cos(b_k, u_i)|``.
    """

    pair: str
    kind: str
    head: int | None
    site: str
    channel: int
    image: int
    index: tuple[int, ...]
    value: float
    output_rms: float
    contribution: Contribution
    share_linear: float
    share: float
    colinearity: float


@dataclass
class Peak:
    """Pairs that write the same output channels, and the peak of that output so far."""

    site: Site
    channels: tuple[int, ...] | None
    pairs: list[MatrixPair]
    value: float = 0.0
    image: int = -1
    inputs: object = None
    squares: float = 0.0
    count: int = 0

    @property
    def rms(self) -> float:
        return (self.squares / self.count) ** 0.5 if self.count else 0.0

    def read(self, output: Tensor) -> Tensor:
        """Return the channels that these pairs write, with the channel axis last."""
        output = channels_last(self.site, output)
        return output if self.channels is None else output[..., list(self.channels)]


class PeakTracker:
    """Remember the largest value of each output that pairs write, and the image that made it.

    ``skipped`` lists (pair, reason) for the pairs whose output cannot be explained.
    """

    def __init__(self, trace: Trace, pairs: Sequence[MatrixPair]) -> None:
        self.peaks: list[Peak] = []
        self.skipped: list[tuple[str, str]] = []
        self._by_site: dict[str, list[Peak]] = {}
        peaks: dict[tuple[str, tuple[int, ...] | None], Peak] = {}
        for pair in pairs:
            if pair.kind not in EXPLAINED:
                self.skipped.append((pair.name, f"{pair.kind} pairs write no channel of their own"))
                continue
            site = _site_of(trace, pair.second)
            if site is None or _site_of(trace, pair.first) is None:
                self.skipped.append((pair.name, "the trace has no site that reads these weights"))
                continue
            assert site.weight is not None
            channels = _positions(_outputs(pair.second), _outputs(site.weight))
            key = (site.name, channels)
            if key not in peaks:
                peaks[key] = Peak(site, channels, [])
                self.peaks.append(peaks[key])
                self._by_site.setdefault(site.name, []).append(peaks[key])
            peaks[key].pairs.append(pair)

    def update(
        self,
        site: Site,
        output: Tensor,
        first_image: int,
        images: int,
        pick: Callable[[int], object],
    ) -> None:
        """Update with a site's output for ``images`` images; ``pick(i)`` returns one's inputs."""
        for peak in self._by_site.get(site.name, ()):
            written = peak.read(output).detach()
            wide = written.double() if written.device.type != "mps" else written.cpu().double()
            peak.squares += float(wide.square().sum())
            peak.count += wide.numel()
            position = int(wide.abs().argmax())
            value = float(wide.flatten()[position])
            if abs(value) > abs(peak.value):
                axis = _image_axis(site, output, images)
                index = torch.unravel_index(torch.tensor(position), wide.shape)
                place = min(images - 1, int(index[axis]) // max(1, wide.shape[axis] // images))
                peak.value, peak.image, peak.inputs = value, first_image + place, pick(place)


class CauseFinder:
    """Handler for one run on one image: explain the peaks of that image, collect ``causes``."""

    def __init__(
        self, trace: Trace, model: nn.Module, peaks: Sequence[Peak], skipped: list[tuple[str, str]]
    ) -> None:
        self.causes: list[RootCause] = []
        self._trace, self._model, self._peaks, self._skipped = trace, model, peaks, skipped
        self._firsts = {pair.first.parameter_name for peak in peaks for pair in peak.pairs}
        self._seen: dict[str, tuple[Site, Tensor, Tensor]] = {}
        self._activations: dict[str, tuple[str, Callable[..., Tensor]]] = {}

    def __call__(
        self, site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]
    ) -> Tensor:
        output = run(*operands)
        if site.kind == "activation" and len(site.operands[0].fed_by) == 1:
            self._activations[site.operands[0].fed_by[0]] = (site.function.strip("_"), run)
        if site.weight is None or not output.numel():
            return output
        if site.weight.parameter_name in self._firsts:
            offset = run(torch.zeros_like(operands[0]), *operands[1:])
            bias = channels_last(site, offset).flatten(0, -2)[0]
            self._seen[_key(site.weight)] = (site, channels_last(site, operands[0]), bias)
        for peak in self._peaks:
            if peak.site.name == site.name:
                self._explain(peak, channels_last(site, operands[0]), output)
        return output

    def _explain(self, peak: Peak, hidden: Tensor, output: Tensor) -> None:
        written = peak.read(output)
        position = torch.tensor(int(written.abs().argmax()))
        place = tuple(int(i) for i in torch.unravel_index(position, written.shape))
        value = float(written[place])
        best: RootCause | None = None
        for pair in peak.pairs:
            row = pair.second.read(self._model)[place[-1]]
            columns = _inputs(pair.second)
            token = hidden[place[:-1]]
            token = token if columns is None else token[list(columns)]
            contribution = self._contribution(pair, row, token, place[:-1], hidden.shape[:-1])
            if contribution is None:
                continue
            share = contribution.explained / value if value else 0.0
            if best is not None and share <= best.share:
                continue
            norm = float(row.double().norm()) if row.device.type != "mps" else float(row.norm())
            channel = place[-1] if peak.channels is None else peak.channels[place[-1]]
            best = RootCause(
                pair=pair.name,
                kind=pair.kind,
                head=pair.head,
                site=peak.site.name,
                channel=channel,
                image=peak.image,
                index=(*place[:-1], channel),
                value=value,
                output_rms=peak.rms,
                contribution=contribution,
                share_linear=contribution.product / value if value else 0.0,
                share=share,
                colinearity=abs(contribution.second_component) / norm if norm else 0.0,
            )
        if best is not None:
            self.causes.append(best)

    def _contribution(
        self,
        pair: MatrixPair,
        row: Tensor,
        token: Tensor,
        place: tuple[int, ...],
        leading: tuple[int, ...],
    ) -> Contribution | None:
        site = _site_of(self._trace, pair.first)
        reading = None if site is None or site.weight is None else self._seen.get(_key(site.weight))
        if reading is None:
            self._skipped.append((pair.name, "its first matrix did not run before its second"))
            return None
        site, inputs, bias = reading
        assert site.weight is not None
        decomposition = read_first(self._model, pair)
        if pair.kind not in TOKENWISE:
            if pair.between is not None:
                reason = "the offset of the BatchNorm between its matrices cannot be separated"
                self._skipped.append((pair.name, reason))
                return None
            rows = _positions(_outputs(pair.first), _outputs(site.weight))
            bias = bias if rows is None else bias[list(rows)]
            return explain(decomposition, row, token, bias=bias)
        if any(size != 1 for size in (site.weight_shape or ())[2:]):
            reason = "its first matrix is a convolution that reads several positions at once"
            self._skipped.append((pair.name, reason))
            return None
        if inputs.shape[:-1] != leading:
            was = tuple(inputs.shape[:-1])
            reason = f"its tokens {was} become {tuple(leading)} between its matrices"
            self._skipped.append((pair.name, reason))
            return None
        vector, columns = inputs[place], _inputs(pair.first)
        vector = vector if columns is None else vector[list(columns)]
        activation = self._activation(site, pair, vector)
        return explain(decomposition, row, token, inputs=vector, activation=activation)

    def _activation(
        self, site: Site, pair: MatrixPair, like: Tensor
    ) -> Callable[[Tensor], Tensor] | None:
        """The activation function between the matrices; None if it is not one known function."""
        function, run = self._activations.get(site.name, ("", None))
        if run is None or pair.through != (function,):
            return None
        return lambda x: run(x.to(like.device, like.dtype)).to("cpu", torch.float64)


def channels_last(site: Site, x: Tensor) -> Tensor:
    """Move the channel axis to the end: from axis 1 for convolutions, batch and group norms."""
    first = site.kind == "conv" or site.function in ("batch_norm", "group_norm")
    return x.movedim(1, -1) if first and x.ndim > 2 else x


def _image_axis(site: Site, output: Tensor, images: int) -> int:
    """The axis along which a batch of ``images`` differs from the traced output of one image.

    Windowed attention puts windows into axis 0: 64 windows for one image give 64·B for B images.
    """
    for axis, (size, traced) in enumerate(zip(output.shape, site.output_shape, strict=False)):
        if size == traced * images:
            return axis if site.kind != "conv" or axis == 0 else axis - 1
    return 0


def _site_of(trace: Trace, view: WeightView) -> Site | None:
    wanted = _outputs(view)
    for site in reversed(trace.sites):
        if site.weight is None or site.weight.parameter_name != view.parameter_name:
            continue
        rows = _outputs(site.weight)
        if rows is None or (wanted is not None and set(wanted) <= set(rows)):
            return site
    return None


def _key(view: WeightView) -> str:
    return f"{view.parameter_name} {_outputs(view)}"


def _outputs(view: WeightView) -> tuple[int, ...] | None:
    index = view.cols if view.transposed else view.rows
    return None if index is None else tuple(index)


def _inputs(view: WeightView) -> tuple[int, ...] | None:
    index = view.rows if view.transposed else view.cols
    return None if index is None else tuple(index)


def _positions(
    wanted: tuple[int, ...] | None, rows: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    if wanted is None or wanted == rows:
        return None
    if rows is None:
        return wanted
    place = {row: i for i, row in enumerate(rows)}
    return tuple(place[row] for row in wanted)
