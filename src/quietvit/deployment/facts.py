"""The facts stored in an exported file: products, grids, preprocessing, labels and origin.

They are JSON in the file's own metadata, under the key ``quietvit``. They contain no code.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import quietvit
from quietvit.deployment.grids import Grid
from quietvit.deployment.outputs import Output
from quietvit.errors import QuietvitError
from quietvit.files import json_text
from quietvit.quantization import QuantizedModel
from quietvit.tracing import MATMUL_KINDS

UNCLAIMED = "torch wrote it in a form that quietvit does not recognize, so the file claims nothing"
KEY, FORMAT, VERSION = "quietvit", "quietvit exported model", 2
READ = (1, VERSION)
COARSEST = 1 / 4
"""The largest rounding (steps) in ``Product.rounded``. A coarser convolution stays in float."""


@dataclass(frozen=True)
class Product:
    """One matrix product of the model, with its multiply-accumulates and its operands' grids.

    ``operands`` maps names to ``Grid.facts``. ``why_float`` is the reason if the file does not
    claim integers. ``rounded`` is set for a convolution that outputs codes: ``slot``
    (``site:operand``) names whose codes they are, and ``rounding`` bounds their error in steps.
    """

    name: str
    kind: str
    macs: int
    operands: dict[str, dict[str, Any]]
    why_float: str | None = None
    rounded: dict[str, Any] | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that ``quietvit check`` and ``quietvit predict`` need besides the graph.

    ``replaced`` is the replacement that export applied to quantizers, ``uniform`` or ``symmetric``.
    ``output`` is the file's output. ``unused`` lists products that do not enter the output.
    ``detector`` says how boxes are decoded from queries: ``classes``, ``stretch`` (else images are
    padded with ``mean``), ``marked`` (padding is ``quietvit.detection.canvas.PADDING`` instead).
    """

    method: str
    input_shape: tuple[int, ...]
    products: tuple[Product, ...]
    total_macs: int
    preprocessing: dict[str, Any] | None
    labels: tuple[str, ...] | None
    notes: tuple[str, ...]
    replaced: str | None
    versions: dict[str, str]
    output: Output = field(default_factory=Output)
    unused: tuple[str, ...] = ()
    detector: dict[str, Any] | None = None

    def __repr__(self) -> str:
        claimed = sum(product.why_float is None for product in self.products)
        return (
            f"Facts({self.method}, images {self.input_shape}, output {self.output}, {claimed} of "
            f"{len(self.products)} products in integers)"
        )

    def to_json(self) -> str:
        return json_text({"format": FORMAT, "version": VERSION} | asdict(self))

    @classmethod
    def from_json(cls, text: str | None, path: Path) -> Facts:
        """Read what ``to_json`` wrote. Raises QuietvitError for any other text."""
        try:
            content = json.loads(text or "")
            known = content.pop("format"), content.pop("version")
        except (ValueError, KeyError, AttributeError) as error:
            raise QuietvitError(
                f"{path} was not exported by quietvit: its metadata has no entry {KEY!r} "
                f"({type(error).__name__}). Export it from its .qvit with 'quietvit export'."
            ) from error
        if known[0] != FORMAT or known[1] not in READ:
            raise QuietvitError(
                f"{path} is {known[0]!r} of version {known[1]!r}, but this quietvit reads "
                f"{FORMAT!r} of versions {READ[0]} to {VERSION}; export it again from its .qvit."
            )
        if known[1] == 1:
            content["replaced"] = "uniform" if content.pop("uniform") else None
        products = tuple(Product(**product) for product in content.pop("products"))
        for name in ("input_shape", "labels", "notes", "unused"):
            content[name] = None if content.get(name) is None else tuple(content[name])
        content["unused"] = content["unused"] or ()
        output = content.pop("output", None) or {}
        if output.get("shape") is not None:
            output["shape"] = tuple(output["shape"])
        return cls(products=products, output=Output(**output), **content)

    def claiming(
        self,
        names: Collection[str],
        reasons: Mapping[str, str],
        rounded: Mapping[str, dict[str, Any]],
    ) -> Facts:
        """Return the facts with integers claimed only for the products in ``names``.

        ``reasons`` tells by name why others are float. ``rounded`` is ``Product.rounded`` by name.
        """

        def held_to(product: Product) -> Product:
            if product.why_float is not None:
                return product
            if product.name in names:
                return replace(product, rounded=rounded.get(product.name))
            return replace(product, why_float=reasons.get(product.name, UNCLAIMED))

        return replace(self, products=tuple(map(held_to, self.products)))

    def product(self, name: str) -> Product:
        return next(product for product in self.products if product.name == name)


def facts_of(
    quantized: QuantizedModel,
    grids: Mapping[str, Grid],
    *,
    preprocessing: Mapping[str, Any] | None,
    labels: Sequence[str] | None,
    notes: Sequence[str] = (),
    replaced: str | None = None,
    output: Output | None = None,
    unused: Collection[str] = (),
    detector: Mapping[str, Any] | None = None,
) -> Facts:
    """Collect the facts of a quantized model. ``grids`` holds the existing grids by slot key.

    Sites in ``unused`` do not enter the output and do not count.
    """
    keys: dict[str, dict[str, str]] = {}
    for slot in quantized.slots():
        if slot.site.kind in MATMUL_KINDS and not slot.is_output:
            keys.setdefault(slot.site.name, {})[slot.operand] = slot.key
    coverage = quantized.coverage
    reasons = dict(coverage.untouched)
    products = []
    for site in quantized.trace.matmuls:
        if site.name in unused:
            continue
        own = keys.get(site.name, {}).items()
        operands = {name: grids[key].facts for name, key in own if key in grids}
        for operand in operands.values():
            if isinstance(operand["scale"], list):
                operand["scale"] = operand["zero_point"] = None  # one per channel: see the graph
        why = reasons.get(site.name)
        products.append(Product(site.name, site.kind, site.macs, operands, why))
    known = {p.name for p in products} | set(unused)
    extra = [name for name, _ in coverage.untouched if name not in known]
    for name in extra:
        macs = coverage.untouched_macs[[n for n, _ in coverage.untouched].index(name)]
        products.append(Product(name, "compensation", macs, {}, reasons[name]))
    return Facts(
        method=f"{quantized.method.name} {quantized.method.label}",
        input_shape=quantized.input_shape,
        products=tuple(products),
        total_macs=sum(product.macs for product in products),
        preprocessing=None if preprocessing is None else dict(preprocessing),
        labels=None if labels is None else tuple(labels),
        notes=(*quantized.notes, *notes),
        replaced=replaced,
        versions={"quietvit": quietvit.__version__, "torch": torch.__version__},
        output=output or Output(),
        unused=tuple(unused),
        detector=None if detector is None else dict(detector),
    )
