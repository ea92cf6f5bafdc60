"""The table of methods, as the command line prints it and the docs show it."""

from __future__ import annotations

from quietvit.quantization.method import Method, get_method, list_methods
from quietvit.quantization.on_top import OnTop

COLUMNS = ("method", "summary", "needs", "images", "cost", "kernels")


def method_rows(pattern: str = "*") -> list[dict[str, str]]:
    """One row a method for the tables of command line and docs: what it needs, costs and claims.

    ``kernels``: deployable where standard integer kernels compute with the codes, else simulated.
    """
    rows = []
    for name in list_methods(pattern):
        cls = get_method(name)
        rows.append(
            {
                "method": name,
                "summary": cls.summary,
                "needs": ", ".join(cls.needs),
                "images": str(cls.images),
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
    """The same as a Markdown table, and below it the source and published setting of each."""
    rows = method_rows(pattern)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row[key] for key in COLUMNS) + " |" for row in rows]
    lines += [""] + [
        f"- **{row['method']}**: {row['source']}. Published with: {row['published']}."
        for row in rows
    ]
    return "\n".join(lines)
