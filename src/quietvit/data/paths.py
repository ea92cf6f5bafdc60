"""Files that a data set is spread over: parts for train and test, brace ranges, globs, folders.

And ``Recent``, which keeps a bounded number of them open. What is in the files is not known here.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from quietvit.errors import QuietvitError

V = TypeVar("V")

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def split_parts(text: str) -> list[str]:
    """Split at the commas that stand outside braces; blanks around the parts go."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def part_for(parts: Sequence[str], split: str | None, form: str, example: str) -> str:
    """Return the part of ``split``: the first for train or None, the second for test.

    Raises:
        QuietvitError: no part or more than two, or test is asked for and only one part is named.
    """
    if len(parts) > 2 or not parts:
        raise QuietvitError(
            f"a data set of {form} names one or two files, not {len(parts)} (each may be "
            f"a pattern or a folder): {example}."
        )
    if split == "test" and len(parts) == 1:
        raise QuietvitError(
            f"the data set names no test {form} beside {parts[0]}; write both, as in {example}."
        )
    return parts[1] if split == "test" else parts[0]


def expand(part: str, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """Return the files that ``part`` names: a file, a brace range or list, a glob, a folder.

    Braces give their files in the order written, globs and folders in order of name. Globs and
    folders pass over hidden files, and over names that do not end in ``suffixes``.

    Raises:
        QuietvitError: a file is missing, or a pattern or folder (of files ending in ``suffixes``)
            holds none; the message calls them ``what``. Caused by FileNotFoundError where nothing
            is at a path.
    """
    found: list[Path] = []
    for text in _expand_braces(part):
        path = Path(text).expanduser()
        if path.is_dir():
            held = sorted(entry for entry in path.iterdir() if _is_one(entry, suffixes))
            if not held:
                raise QuietvitError(
                    f"the folder {path} holds no {what} ending in {', '.join(suffixes)}; check "
                    "the path."
                )
            found += held
        elif path.exists():
            found.append(path)
        elif glob.has_magic(text):
            matches = map(Path, glob.glob(str(path)))  # noqa: PTH207
            held = sorted(match for match in matches if _is_one(match, suffixes))
            if not held:
                raise QuietvitError(
                    f"no {what} ending in {', '.join(suffixes)} matches {text}; check the path."
                ) from FileNotFoundError(text)
            found += held
        else:
            raise QuietvitError(
                f"the {what} {path} does not exist; check the path"
                + (f" and the range in {part}." if text != part else ".")
            ) from FileNotFoundError(path)
    twice = [path for path, count in Counter(found).items() if count > 1]
    if twice:
        raise QuietvitError(f"{part} names {twice[0]} more than once; name each {what} once.")
    return found


def _is_one(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.endswith(suffixes) and not path.name.startswith(".")


def _expand_braces(text: str) -> list[str]:
    match = _BRACES.search(text)
    if match is None:
        return [text]
    inside = match[1]
    bounds = _RANGE.fullmatch(inside)
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = inside.split(",") if "," in inside else []
    if not choices:
        raise QuietvitError(
            f"the braces {match[0]} in {text} name nothing; write a range from low to high such as "
            "{0000..1023}, or a list such as {a,b}."
        )
    return [
        whole
        for choice in choices
        for whole in _expand_braces(text[: match.start()] + choice + text[match.end() :])
    ]


class Recent(Generic[V]):
    """The values used last, by number, up to ``limit`` of total ``cost``; at least one is kept.

    Pickling leaves them behind, and so does a forked process: each makes its own when needed.
    """

    def __init__(self, limit: int, cost: Callable[[V], int] | None = None) -> None:
        self.limit, self.cost = limit, cost
        self._kept: OrderedDict[int, tuple[V, int]] = OrderedDict()
        self._process = os.getpid()
        self.made = self.dropped = self.total = 0

    def get(self, key: int, make: Callable[[int], V]) -> V:
        """Return the value of ``key``, made by ``make(key)`` if it is not kept."""
        if self._process != os.getpid():
            self._forget()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        value = make(key)
        cost = 1 if self.cost is None else self.cost(value)
        self._kept[key] = value, cost
        self.made, self.total = self.made + 1, self.total + cost
        while self.total > self.limit and len(self._kept) > 1:
            self.total -= self._kept.popitem(last=False)[1][1]
            self.dropped += 1
        return value

    def _forget(self) -> None:
        self._kept = OrderedDict()
        self._process = os.getpid()
        self.made = self.dropped = self.total = 0

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit, "cost": self.cost}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()
