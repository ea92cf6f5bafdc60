"""The public records of a trace: sites, their operands, and how channels flow between sites.

``record`` and ``trace`` create them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quietvit.errors import QuietvitError, nearest
from quietvit.tracing.ops import MATMUL_KINDS
from quietvit.tracing.places import Place
from quietvit.tracing.weights import WeightView


@dataclass(frozen=True)
class Operand:
    """One activation that enters a site: its role, shape at batch 1, and source sites."""

    role: str
    shape: tuple[int, ...]
    fed_by: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """One operation of a forward pass.

    - ``kind``: linear, conv, matmul, einsum, softmax, norm, activation, add, or opaque (a product
      inside a function that the trace cannot open).
    - ``role``, for weights: patch_embed, post_norm, post_gelu, post_activation, post_softmax,
      attention_output, residual, head, constant (does not depend on the input) or other. For
      products of activations: query_key, attention_value, constant or other. Else the kind.
    - ``macs``: multiply-accumulates at batch 1; 0 if the example gives the product no rows.
    - ``place``: identifies the call in every pass.
    - ``has_scale``: a BatchNorm with stored statistics, so a fixed factor for each channel.
    """

    name: str
    kind: str
    role: str
    module: str
    function: str
    place: Place
    operands: tuple[Operand, ...]
    output_shape: tuple[int, ...]
    macs: int
    weight: WeightView | None = None
    weight_shape: tuple[int, ...] | None = None
    feeds: tuple[str, ...] = ()
    has_scale: bool = False


@dataclass(frozen=True)
class Link:
    """Output channels of ``source`` that arrive at the input columns of ``consumer``.

    ``channels[j]``: the channel that column j carries, -1 for none. ``heads[j]``: its attention
    head, -1 without attention between. ``through``: the steps between. ``partial``: some positions
    carry no channel, such as padding or a class token. ``scales``: the BatchNorms and depthwise
    convolutions between, in order.
    """

    source: str
    consumer: str
    channels: tuple[int, ...]
    heads: tuple[int, ...]
    through: tuple[str, ...]
    partial: bool = False
    scales: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Channels of ``query`` and ``key`` that multiply at ``site``: a pair of tuples for each head.

    ``through``: the steps between either source and the scores.
    """

    site: str
    query: str
    key: str
    heads: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """All sites of one forward pass in order, and how channels flow between them.

    ``counts``: the number of products and of norms in every pass. ``outputs``: the last sites
    before the model's output. ``blocks``: the paths of the residual blocks, modules whose output is
    their input plus something, in order of execution.
    """

    model_name: str
    sites: tuple[Site, ...]
    links: tuple[Link, ...]
    scores: tuple[Scores, ...]
    counts: dict[str, int]
    outputs: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    @property
    def matmuls(self) -> tuple[Site, ...]:
        """All sites that multiply matrices, including opaque ones."""
        return tuple(site for site in self.sites if site.kind in MATMUL_KINDS or site.macs > 0)

    @property
    def macs(self) -> int:
        """Half of torch's FlopCounterMode count for one image; matrix-vector products count 0."""
        return sum(site.macs for site in self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        known = [site.name for site in self.sites]
        raise QuietvitError(f"{self.model_name} has no site {name!r}{nearest(name, known)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the sites as plain data, with MACs at batch 1."""
        return {
            "model": self.model_name,
            "macs": self.macs,
            "sites": [
                {
                    "site": site.name,
                    "kind": site.kind,
                    "role": site.role,
                    "output_shape": list(site.output_shape),
                    "macs": site.macs,
                    "weight": None if site.weight is None else str(site.weight),
                }
                for site in self.sites
            ],
        }

    def __repr__(self) -> str:
        sites, macs = len(self.sites), self.macs / 1e6
        return f"Trace({self.model_name}, {sites} sites, {macs:.2f} MMACs an image)"

    def __str__(self) -> str:
        rows = [
            (site.name, site.kind, site.role, "x".join(map(str, site.output_shape)), site.macs)
            for site in self.sites
        ]
        width = max((len(row[0]) for row in rows), default=4)
        lines = [f"{'site':<{width}}  {'kind':<10} {'role':<16} {'output':<16} {'MMACs':>9}"]
        lines += [
            f"{n:<{width}}  {k:<10} {r:<16} {s:<16} {m / 1e6:>9.2f}" for n, k, r, s, m in rows
        ]
        lines.append(f"{len(self.matmuls)} matrix products, {self.macs / 1e6:.1f} MMACs an image")
        return "\n".join(lines)
