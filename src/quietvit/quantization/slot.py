"""``Slot``: one operand of one site, which may have a quantizer, and its key in a saved model.

``method`` decides the bits of an operand; each method chooses the quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from quietvit.tracing import Site

OPERANDS = {
    "linear": ("input", "weight"),
    "conv": ("input", "weight"),
    "matmul": ("left", "right"),
    "add": ("left", "right"),
    **dict.fromkeys(("norm", "softmax", "activation"), ("input",)),
}
OUTPUT = -1


@dataclass(frozen=True, eq=False)
class Slot:
    """One operand of a site, or its output (``OUTPUT``). Equal by site name and index."""

    site: Site
    index: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slot) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, int]:
        return self.site.name, self.index

    @property
    def operand(self) -> str:
        """``input`` or ``weight`` of linear and conv, ``left`` or ``right`` of matmul and add,
        ``input`` of norm, softmax and activation; ``output`` of any.
        """
        if self.is_output:
            return "output"
        names = OPERANDS.get(self.site.kind, ())
        return names[self.index] if self.index < len(names) else f"operand{self.index}"

    @property
    def is_output(self) -> bool:
        return self.index == OUTPUT

    @property
    def is_weight(self) -> bool:
        return self.site.kind in ("linear", "conv") and self.index == 1

    @property
    def role(self) -> str:
        """Role of the activation, such as ``post_softmax``; "weight" or "output" otherwise."""
        if self.is_output:
            return "output"
        if self.is_weight or self.index >= len(self.site.operands):
            return "weight"
        return self.site.operands[self.index].role

    @property
    def key(self) -> str:
        """Key in ``QuantizedModel.quantizers``, whose ModuleDict allows no dots."""
        return f"{self.site.name.replace('.', '/')}:{self.operand}"
