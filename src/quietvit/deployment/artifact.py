"""``Artifact``: an exported file, and what it says of itself as text for a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietvit.deployment.checking import check
from quietvit.deployment.facts import Facts
from quietvit.deployment.targets import files_of
from quietvit.deployment.uniform import Replaced

SHOWN = 12


@dataclass(frozen=True, repr=False)
class Artifact:
    """An exported file, its facts as the file has them, and the quantizers that were replaced."""

    path: Path
    facts: Facts
    replaced: tuple[Replaced, ...] = ()

    @property
    def size(self) -> int:
        """Bytes on disk, of all its files."""
        return sum(file.stat().st_size for file in files_of(self.path))

    def check(self, against: Any, images: Any, **options: Any) -> Any:
        """Prove what runs in integers; see ``quietvit.check``."""
        return check(self.path, against, images, **options)

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, {self.size / 1e6:.2f} MB, {self.facts!r})"

    def __str__(self) -> str:
        """What was exported, what it takes and gives, what it claims, and its notes."""
        facts = self.facts
        claimed = [product for product in facts.products if product.why_float is None]
        share = sum(product.macs for product in claimed) / (facts.total_macs or 1)
        shape = " x ".join(map(str, facts.input_shape))
        lines = [
            f"{self.path} ({self.size / 1e6:.2f} MB): {facts.method}",
            f"input      images, batch x {shape}, float32 after the preprocessing",
            f"output     {facts.output}",
            f"claims     {len(claimed)} of {len(facts.products)} products in integers, "
            f"{100 * share:.2f} % of the multiply-accumulates; what a runtime makes of it, check "
            "tells",
            f"carries    {'preprocessing' if facts.preprocessing else 'no preprocessing'}, "
            f"{'names of classes' if facts.labels else 'no names of classes'}",
        ]
        notes = [f"note       {note}" for note in facts.notes]
        shown = notes[:SHOWN]
        if len(notes) > SHOWN:
            shown.append(f"note       ... and {len(notes) - SHOWN} more")
        return "\n".join(lines + shown)
