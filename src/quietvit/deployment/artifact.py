"""``Artifact``: an exported file with its facts, printed for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quietvit.deployment.checking import check
from quietvit.deployment.facts import Facts
from quietvit.deployment.paths import head_file
from quietvit.deployment.targets import files_of
from quietvit.deployment.uniform import Replaced

SHOWN = 12


@dataclass(frozen=True, repr=False)
class Artifact:
    """An exported file, the facts stored in it, and the quantizers that export replaced.

    ``heads`` holds the facts of the files of a detector's heads: ``boxes`` of a Faster or Mask
    R-CNN, ``masks`` of a Mask R-CNN. ``paths.head_file`` names these files.
    """

    path: Path
    facts: Facts
    replaced: tuple[Replaced, ...] = ()
    heads: Mapping[str, Facts] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file, and those of its heads."""
        return (self.path, *(head_file(self.path, head) for head in self.heads))

    @property
    def size(self) -> int:
        """Bytes on disk of all its files."""
        return sum(file.stat().st_size for file in files_of(self.path))

    def __fspath__(self) -> str:
        """The path of the file, so that an artifact can stand for it in every call."""
        return str(self.path)

    def check(self, against: Any, images: Any, **options: Any) -> Any:
        """Prove what runs in integers, as ``quietvit.check`` does."""
        return check(self.path, against, images, **options)

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, {self.size / 1e6:.2f} MB, {self.facts!r})"

    def __str__(self) -> str:
        """List the method, input, output, claims and notes of the file."""
        facts = self.facts
        every = [facts, *self.heads.values()]
        products = [product for each in every for product in each.products]
        claimed = [product for product in products if product.why_float is None]
        macs = sum(each.total_macs for each in every)
        share = sum(product.macs for product in claimed) / (macs or 1)
        shape = " x ".join(map(str, facts.input_shape))
        name = ", ".join(map(str, self.paths))
        lines = [
            f"{name} ({self.size / 1e6:.2f} MB): {facts.method}",
            f"input      images, batch x {shape}, float32 after the preprocessing",
            f"output     {facts.output}",
            f"claims     {len(claimed)} of {len(products)} products in integers, "
            f"{100 * share:.2f} % of the multiply-accumulates; 'quietvit check' proves it in a "
            "runtime",
            f"carries    {'preprocessing' if facts.preprocessing else 'no preprocessing'}, "
            f"{'class names' if facts.labels else 'no class names'}",
        ]
        notes = [f"note       {note}" for note in facts.notes]
        shown = notes[:SHOWN]
        if len(notes) > SHOWN:
            shown.append(f"note       ... and {len(notes) - SHOWN} more")
        return "\n".join(lines + shown)
