"""The table of methods that the command line prints and the docs show."""

from __future__ import annotations

from typing import Any

from quietvit.quantization.method import Method, get_method, list_methods
from quietvit.quantization.on_top import OnTop

COLUMNS = ("method", "summary", "needs", "images", "cost", "kernels")


def method_rows(pattern: str = "*") -> list[dict[str, Any]]:
    """Return a row per method; ``kernels`` tells if standard integer kernels compute its codes."""
    rows = []
    for name in list_methods(pattern):
        cls = get_method(name)
        rows.append(
            {
                "method": name,
                "summary": cls.summary,
                "needs": ", ".join(cls.needs),
                "images": cls.images,
                "cost": cls.cost,
                "kernels": _kernels(cls),
                "published": cls.published,
                "source": cls.source,
            }
        )
    return rows


def _kernels(cls: type[Method]) -> str:
    if issubclass(cls, OnTop):
        return "as its base"
    return "deployable" if cls.deployable else "simulated"


def methods_markdown(pattern: str = "*") -> str:
    """Return the rows as a Markdown table, then each method's source and published setting."""
    rows = method_rows(pattern)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(str(row[key]) for key in COLUMNS) + " |" for row in rows]
    lines += [""] + [
        f"- **{row['method']}**: {row['source']}. Published with: {row['published']}."
        for row in rows
    ]
    return "\n".join(lines)
