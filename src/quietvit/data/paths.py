"""The files of a data set: parts for train and test, brace ranges, globs, folders.

``Recent`` keeps a bounded number of them open. Other modules read their contents.
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
    """Split at the commas outside braces, and strip the parts."""
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
        QuietvitError: there are no parts or more than two, or there is no second part for test.
    """
    if len(parts) > 2 or not parts:
        raise QuietvitError(
            f"a data set of {form} needs one or two names, not {len(parts)}. Each may be a file, a "
            f"pattern or a folder: {example}."
        )
    if split == "test" and len(parts) == 1:
        raise QuietvitError(
            f"the data set names no test {form}, only {parts[0]}; write both, as in {example}."
        )
    return parts[1] if split == "test" else parts[0]


def expand(part: str, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """Return the files that ``part`` names: a file, a brace range or list, a glob, a folder.

    Braces keep the written order; globs and folders are sorted by name. Globs and folders skip
    hidden files, and names that do not end in ``suffixes``.

    Raises:
        QuietvitError: a file is missing, or a pattern or folder gives no file; the message calls
            files ``what``. Caused by FileNotFoundError if a path does not exist.
    """
    paths: list[Path] = []
    for text in _expand_braces(part):
        path = Path(text).expanduser()
        if path.is_dir():
            matching = sorted(entry for entry in path.iterdir() if _is_one(entry, suffixes))
            if not matching:
                raise QuietvitError(
                    f"the folder {path} holds no {what} ending in {', '.join(suffixes)}; check "
                    "the path."
                )
            paths += matching
        elif path.exists():
            paths.append(path)
        elif glob.has_magic(text):
            matches = map(Path, glob.glob(str(path)))  # noqa: PTH207
            matching = sorted(match for match in matches if _is_one(match, suffixes))
            if not matching:
                raise QuietvitError(
                    f"no {what} ending in {', '.join(suffixes)} matches {text}; check the path."
                ) from FileNotFoundError(text)
            paths += matching
        else:
            raise QuietvitError(
                f"the {what} {path} does not exist; check the path"
                + (f" and the range in {part}." if text != part else ".")
            ) from FileNotFoundError(path)
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise QuietvitError(f"{part} names {twice[0]} more than once; name each {what} once.")
    return paths


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
            f"the braces {match[0]} in {text} name nothing. Write a range from low to high such "
            "as {0000..1023}, or a list such as {a,b}."
        )
    return [
        whole
        for choice in choices
        for whole in _expand_braces(text[: match.start()] + choice + text[match.end() :])
    ]


class Recent(Generic[V]):
    """A cache of the most recently used values, up to a total ``cost`` of ``limit``, at least one.

    It is empty after pickling and in a forked process, which makes its own values.
    """

    def __init__(self, limit: int, cost: Callable[[V], int] | None = None) -> None:
        self.limit, self.cost = limit, cost
        self._kept: OrderedDict[int, tuple[V, int]] = OrderedDict()
        self._process = os.getpid()
        self.made = self.dropped = self.total = 0

    def get(self, key: int, make: Callable[[int], V]) -> V:
        """Return the value of ``key``; call ``make(key)`` if it is not cached."""
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
