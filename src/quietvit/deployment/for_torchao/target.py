"""The target ``torchao``: a folder with a torch model whose linears multiply int8."""

from __future__ import annotations

from dataclasses import replace

from quietvit.deployment.facts import Facts
from quietvit.deployment.for_torchao.file import FORMAT, write_folder
from quietvit.deployment.for_torchao.linear import INSTALL
from quietvit.deployment.for_torchao.model import to_torchao
from quietvit.deployment.for_torchao.runtime import TorchRuntime
from quietvit.deployment.target import Export, Target


def _write(export: Export) -> Facts:
    converted = to_torchao(export.quantized)
    why = dict(converted.left_float)
    products = tuple(
        replace(product, why_float=why.get(product.name, product.why_float))
        for product in export.facts.products
    )
    facts = replace(export.facts, products=products)
    write_folder(converted, export.path, facts)
    return facts


TORCHAO = Target(
    "torchao",
    suffix=FORMAT.suffix,
    runtime="torchao",
    needs=("torchao",),
    install=INSTALL,
    write=_write,
    open=TorchRuntime,
    folder=FORMAT,
    leaves_float=True,
)
