"""Find and open the files of a detector's heads, which lie beside the detector's own file.

``exporting`` writes all of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from quietvit.deployment.facts import Facts
from quietvit.deployment.paths import head_file
from quietvit.deployment.runtime import Runtime
from quietvit.detection.static_parts import HEADS
from quietvit.errors import QuietvitError


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, which the detector's own file stores."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def heads_of(runtime: Runtime, facts: Facts) -> dict[str, Runtime]:
    """Open the heads of a Faster or Mask R-CNN in the same runtime, by the keys of ``HEADS``.

    ``facts`` are those of the detector's own file, which stores the digest of each head's file.

    Raises QuietvitError if a file is missing, or is that of another export.
    """
    kind: type[Runtime] = type(runtime)
    found = dict[str, Runtime]()
    for head, name in HEADS.items():
        told = (facts.detector or {}).get(name)
        if told is None:
            continue
        path = head_file(runtime.path, head)
        if not path.is_file():
            raise QuietvitError(
                f"{runtime.path} is one file of a detector, and another one, {path}, is missing. "
                "Put all files into one folder with the names they were exported with, or export "
                "again."
            )
        if digest(path) != told:
            raise QuietvitError(
                f"{path} and {runtime.path} come from two different exports. Put the files of one "
                "export together, or export again."
            )
        found[head] = kind(path, runtime.threads)  # type: ignore[call-arg]
    return found
