"""Hooks of mkdocs: bring the files that pages link to outside docs/ into the site.

A page links to ``../results/x.csv`` in the repository, and to ``results/x.csv`` on the site.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()\.\./([\w./-]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add each file, or the files of each folder, that a page links to outside docs/."""
    from mkdocs.structure.files import File

    linked = {
        name for file in files.documentation_pages() for name in LINK.findall(file.content_string)
    }
    for name in sorted(linked):
        found = ROOT / name
        for path in sorted(found.iterdir()) if found.is_dir() else [found]:
            if path.is_file():
                target = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links outside docs/ to the copies; a folder becomes its name without a link."""
    folders = re.compile(r"\[([^\]]+)\]\(\.\./(?:recipes|examples)/?\)")
    return LINK.sub(r"\1", folders.sub(r"\1", markdown))
