"""Why an output channel is extreme: which pair of weights, which singular direction, how much.

The values come from two looks at the model, both inside ``diagnose``: ``PeakTracker`` remembers
where each pair's output peaks, ``CauseFinder`` takes the peaks apart on those images alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quietvit.measure.colinearity import Decomposition, read_first
from quietvit.pairs import MatrixPair

if TYPE_CHECKING:
    from quietvit.tracing import Site, Trace, WeightView

TOKENWISE = frozenset({"mlp", "gated_mlp"})
EXPLAINED = TOKENWISE | {"value_output", "norm_linear"}


@dataclass(frozen=True)
class Contribution:
    """The direction i that explains most of one output value. Derived here.

    With y_k = b_kᵀ h + bias, h the true hidden activation, f what stands between the two matrices
    and A = Σ s_i u_i v_iᵀ. The three accounts agree where f is the identity and nothing is biased:

    Attributes:
        direction: i, counted from 0 in descending order of s_i.
        singular_value: s_i.
        second_component: b_kᵀ u_i.
        input_component: v_iᵀ x.
        product: ``s_i (b_kᵀ u_i)(v_iᵀ x)``: what the pair would give without the non-linearity.
        alone: ``b_kᵀ f(s_i u_i v_iᵀ x)``: what this direction by itself gives through f. None where
            f is not one activation function; the product where nothing but an average stands
            between. It need not add up over directions.
        through: ``(b_kᵀ u_i)(u_iᵀ h)``: the exact part of the true value that comes through u_i,
            everything between the two matrices included.
        linear: b_kᵀ A x, the sum of the products over all directions.
        hidden: b_kᵀ h, the true value without the second bias.
    """

    direction: int
    singular_value: float
    second_component: float
    input_component: float
    product: float
    alone: float | None
    through: float
    linear: float
    hidden: float

    @property
    def explained(self) -> float:
        """``alone``, or where there is none ``through``."""
        return self.through if self.alone is None else self.alone


@dataclass(frozen=True)
class RootCause:
    """Where the output of a pair's second linear peaks, and the pair and direction that make it.

    The peak is the largest ``|value|`` over all images, tokens and channels that the pair writes.
    Where several pairs end in the same output (heads; up and gate), the pair named is the one whose
    strongest direction explains most.

    Attributes:
        pair, kind, head: of the pair.
        site: site whose output holds the value.
        channel: output channel k of that site.
        image: which image, counted over all batches.
        index: index of the value in the site's output for that image alone.
        value: the true value y_k, biases and all pairs included.
        output_rms: root mean square of the site's output over all images.
        contribution: the direction that explains most.
        share_linear: ``contribution.product / value``.
        share: ``contribution.explained / value``; may exceed 1, where other directions take away.
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


def explain(
    decomposition: Decomposition,
    row: Tensor,
    hidden: Tensor,
    *,
    inputs: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Contribution:
    """Take b_kᵀ h apart into the singular directions of A and return the one that explains most.

    Args:
        decomposition: of A, shape (h, d).
        row: b_k, shape (h,).
        hidden: the true activation h that meets b_k, shape (h,).
        inputs: x, shape (d,), where an activation function stands between.
        bias: c, shape (h,), the first bias, where the hidden activation is A x̄ + c with x̄ an
            average of inputs: attention (rows of probabilities sum to 1, so x̄ is the
            attention-weighted mean) or nothing at all. Then v_iᵀ x̄ = u_iᵀ(h − c) / s_i exactly.
        activation: f, elementwise, where it is known; goes with ``inputs``.

    The direction is the one of largest ``product`` in the direction of b_kᵀ h, or, where ``alone``
    is not known, of largest ``through``. Derived here.
    """
    wide = [t.detach().to("cpu", torch.float64) for t in (row, hidden)]
    row, hidden = wide
    values = decomposition.values
    onto_row, onto_hidden = decomposition.onto_left(row), decomposition.onto_left(hidden)
    if inputs is not None:
        onto_input = decomposition.onto_right(inputs.detach().to("cpu", torch.float64))
    else:
        offset = torch.zeros_like(hidden)
        if bias is not None:
            offset = bias.detach().to("cpu", torch.float64)
        linear_part = decomposition.onto_left(hidden - offset)
        onto_input = torch.where(values > 0, linear_part / values.clamp_min(1e-300), 0.0)
    products, through = values * onto_row * onto_input, onto_row * onto_hidden
    alone: Tensor | None = products if inputs is None else None
    if activation is not None and decomposition.left is not None:
        alone = activation(decomposition.left.mT * (values * onto_input)[:, None]) @ row
    total = float(row @ hidden)
    ranked = through if alone is None else products
    i = int((ranked * (1.0 if total >= 0 else -1.0)).argmax())
    return Contribution(
        direction=i,
        singular_value=float(values[i]),
        second_component=float(onto_row[i]),
        input_component=float(onto_input[i]),
        product=float(products[i]),
        alone=None if alone is None else float(alone[i]),
        through=float(through[i]),
        linear=float(products.sum()),
        hidden=total,
    )


@dataclass
class Peak:
    """Pairs that write the same output channels, and where that output peaked so far."""

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
        """The channels these pairs write, channel axis last."""
        output = channels_last(self.site, output)
        return output if self.channels is None else output[..., list(self.channels)]


class PeakTracker:
    """Remembers, for each output that pairs write, the largest value and the image that made it.

    ``skipped`` lists (pair, reason) for the pairs whose output cannot be taken apart.
    """

    def __init__(self, trace: Trace, pairs: Sequence[MatrixPair]) -> None:
        self.peaks: list[Peak] = []
        self.skipped: list[tuple[str, str]] = []
        self._by_site: dict[str, list[Peak]] = {}
        found: dict[tuple[str, tuple[int, ...] | None], Peak] = {}
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
            if key not in found:
                found[key] = Peak(site, channels, [])
                self.peaks.append(found[key])
                self._by_site.setdefault(site.name, []).append(found[key])
            found[key].pairs.append(pair)

    def update(
        self,
        site: Site,
        output: Tensor,
        first_image: int,
        images: int,
        pick: Callable[[int], object],
    ) -> None:
        """Look at one site's output for ``images`` images; ``pick(i)`` gives the inputs of one."""
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
    """Handler for one run on one image: takes apart the peaks of that image, into ``causes``."""

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
        if site.weight is None:
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
        seen = None if site is None or site.weight is None else self._seen.get(_key(site.weight))
        if seen is None:
            self._skipped.append((pair.name, "its first matrix did not run before its second"))
            return None
        site, inputs, bias = seen
        assert site.weight is not None
        decomposition = read_first(self._model, pair)
        if pair.kind not in TOKENWISE:
            rows = _positions(_outputs(pair.first), _outputs(site.weight))
            bias = bias if rows is None else bias[list(rows)]
            return explain(decomposition, row, token, bias=bias)
        if inputs.shape[:-1] != leading:
            was = tuple(inputs.shape[:-1])
            reason = f"tokens {was} are rearranged to {tuple(leading)} on the way"
            self._skipped.append((pair.name, reason))
            return None
        vector, columns = inputs[place], _inputs(pair.first)
        vector = vector if columns is None else vector[list(columns)]
        activation = self._activation(site, pair, vector)
        return explain(decomposition, row, token, inputs=vector, activation=activation)

    def _activation(
        self, site: Site, pair: MatrixPair, like: Tensor
    ) -> Callable[[Tensor], Tensor] | None:
        """The one activation function between the matrices; None where there is more to it."""
        function, run = self._activations.get(site.name, ("", None))
        if run is None or pair.through != (function,):
            return None
        return lambda x: run(x.to(like.device, like.dtype)).to("cpu", torch.float64)


def channels_last(site: Site, x: Tensor) -> Tensor:
    """Move the channel axis to the end: from axis 1 for convolutions, batch and group norms."""
    first = site.kind == "conv" or site.function in ("batch_norm", "group_norm")
    return x.movedim(1, -1) if first and x.ndim > 2 else x


def _image_axis(site: Site, output: Tensor, images: int) -> int:
    """The axis along which a batch of ``images`` differs from the traced output of one image."""
    for axis, (size, traced) in enumerate(zip(output.shape, site.output_shape, strict=False)):
        if size == traced * images:
            return axis if site.kind != "conv" or axis == 0 else axis - 1
    return 0


def _site_of(trace: Trace, view: WeightView) -> Site | None:
    wanted = _outputs(view)
    for site in reversed(trace.sites):
        if site.weight is None or site.weight.parameter_name != view.parameter_name:
            continue
        held = _outputs(site.weight)
        if held is None or (wanted is not None and set(wanted) <= set(held)):
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
    wanted: tuple[int, ...] | None, held: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    if wanted is None or wanted == held:
        return None
    if held is None:
        return wanted
    place = {row: i for i, row in enumerate(held)}
    return tuple(place[row] for row in wanted)
