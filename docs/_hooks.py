"""Hooks of mkdocs: bring the files that pages link to outside docs/ into the site.

A page links to ``../results/x.csv`` in the repository, and to ``results/x.csv`` on the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()\.\./[\w./-]+")
FOLDER = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:recipes|examples(?:/notebooks)?)/?\)")


def outside(page: str, link: str) -> str | None:
    """Return what the link of a page names, from the root. None: it is in docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_files(files: Any, config: Any) -> Any:
    """Add each file, or the files of each folder, that a page links to outside docs/."""
    from mkdocs.structure.files import File

    linked = {
        outside(file.src_uri, link)
        for file in files.documentation_pages()
        for link in LINK.findall(file.content_string)
    }
    for name in sorted(linked - {None}):
        found = ROOT / name
        for path in sorted(found.iterdir()) if found.is_dir() else [found]:
            if path.is_file():
                target = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links outside docs/ to the copies; a folder becomes its name without a link."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = outside(here, match[0])
        if target is None:
            return match[0]
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(moved, FOLDER.sub(r"\1", markdown))
