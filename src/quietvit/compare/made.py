"""Where, when and by which command a comparison was made, for its report.

``train.result`` reads the versions and the machine.
"""

from __future__ import annotations

import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quietvit.train.result import provenance


def made(threads: int | None = None) -> dict[str, Any]:
    """Return ``versions``, ``command``, ``machine`` and ``date``. ``threads``: None for torch's."""
    found = provenance()
    machine = found["machine"]
    return {
        "versions": found["versions"],
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": ", ".join(
            [
                machine["platform"],
                machine["processor"],
                f"{os.cpu_count()} processors",
                f"{threads or machine['threads']} threads",
                *machine["accelerators"],
            ]
        ),
        "date": datetime.now(UTC).date().isoformat(),
    }
