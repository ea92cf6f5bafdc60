"""The Python of the README and of the guide runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/getting-started.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: str) -> list[tuple[int, str]]:
    """Line number in the page and source of every python block."""
    text = (ROOT / page).read_text("utf-8")
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in BLOCK.finditer(text)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found, f"{page} shows no Python"
    batch = (torch.rand(2, 3, 224, 224), torch.tensor([0, 1]))
    namespace: dict[str, object] = {"__name__": "docs", "loader": [batch, batch]}
    for line, source in found:
        code = compile("\n" * line + source, str(ROOT / page), "exec")
        exec(code, namespace)


@pytest.mark.parametrize(
    "page", [*PAGES, "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
)
def test_relative_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text("utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
