"""README and links of a release, made from the address of the public repository.

The address is in the environment variable QUIETVIT_URL (``make dist URL=...``). Package indexes
show the README without the repository, so its links must be absolute there. Without an address the
README stays as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?://|#)([^)\s]+)(?=\))")


def with_absolute_links(text: str, url: str, version: str) -> str:
    """Return Markdown whose relative links lead to the tag ``v<version>`` of the repository."""

    def absolute(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        return f"{picture}{label}{url}/{'raw' if picture else 'blob'}/v{version}/{target}"

    return _LINK.sub(absolute, text)


class CustomMetadataHook(MetadataHookInterface):  # type: ignore[misc]
    """Sets ``readme`` and ``urls``, which are dynamic in pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add both to the metadata.

        Raises:
            ValueError: the address is not an https URL.
        """
        text = (Path(self.root) / "README.md").read_text("utf-8")
        url, version = os.environ.get("QUIETVIT_URL", "").rstrip("/"), metadata["version"]
        metadata["urls"] = {}
        if url:
            if not url.startswith("https://"):
                raise ValueError(f"QUIETVIT_URL is {url!r}; give an address with https://.")
            text = with_absolute_links(text, url, version)
            metadata["urls"] = {
                "Homepage": url,
                "Documentation": f"{url}/tree/v{version}/docs",
                "Issues": f"{url}/issues",
                "Changelog": f"{url}/blob/v{version}/CHANGELOG.md",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
