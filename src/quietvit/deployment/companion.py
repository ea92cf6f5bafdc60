"""Find and open the file of a detector's box head, which lies beside the detector's own file.

``exporting`` writes both.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from quietvit.deployment.facts import Facts
from quietvit.deployment.paths import boxes_of
from quietvit.deployment.runtime import Runtime
from quietvit.errors import QuietvitError


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, which the detector's own file stores."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def box_head_of(runtime: Runtime, facts: Facts) -> Runtime | None:
    """Open the box head of a Faster R-CNN in the same runtime. None if the file needs none.

    ``facts`` are those of the detector's own file.

    Raises QuietvitError if its file is missing, or is that of another export.
    """
    told = (facts.detector or {}).get("box_head")
    if told is None:
        return None
    path = boxes_of(runtime.path)
    if not path.is_file():
        raise QuietvitError(
            f"{runtime.path} is one of two files of a detector, and the other, {path}, is missing; "
            "put both into one folder with the names they were exported with, or export again."
        )
    if digest(path) != told:
        raise QuietvitError(
            f"{path} and {runtime.path} come from two different exports; put the files of one "
            "export together, or export again."
        )
    kind: type[Runtime] = type(runtime)
    return kind(path, runtime.threads)  # type: ignore[call-arg]
