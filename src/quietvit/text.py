"""Text for any terminal or file: encode it, and turn a rich renderable into it.

The callers choose the text and its layout.
"""

from __future__ import annotations

import codecs
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Names of the two error handlers, for ``str.encode``.
PRINTED = "quietvit.printed"
WRITTEN = "quietvit.written"

_SYMBOLS = {
    "×": "x", "→": "->", "–": "-", "—": "-", "−": "-", "±": "+-", "‖": "|", "·": ".", "•": "*",
    "≤": "<=", "≥": ">=", "Δ": "d", "Σ": "sum ", "σ": "s", "‘": "'", "’": "'", "“": '"', "”": '"',
    "─": "-", "━": "-", "│": "|", "┃": "|",
}  # fmt: skip


def _printed(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that the encoding lacks by ASCII, or by an escape such as ``\\xe9``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    return "".join(_as_ascii(character) for character in part), error.end


def _as_ascii(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    if "\u2500" <= character <= "\u259f":  # the other box-drawing and block characters
        return "+"
    plain = unicodedata.normalize("NFKD", character)
    if plain.isascii():
        return plain
    if "\udc80" <= character <= "\udcff":  # a byte of a path that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode()


def _written(error: UnicodeError) -> tuple[bytes, int]:
    """Replace what UTF-8 cannot encode by U+FFFD, as bytes: Python accepts only ASCII as text."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "\ufffd".encode() * (error.end - error.start), error.end


codecs.register_error(PRINTED, _printed)
codecs.register_error(WRITTEN, _written)


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode the text. It cannot encode the other bytes in a path."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str, encoding: str = "utf-8") -> str:
    """Return the text with ASCII for every character that ``encoding`` lacks."""
    return text.encode(encoding, PRINTED).decode(encoding)


class Printer:
    """A text stream that accepts any text and survives a closed pipe.

    In ``quietvit methods | head`` the reader leaves early. Later text is then dropped, and the
    command finishes with its own exit code. ``buffer`` is hidden, so that click writes text.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"only text can be printed, not {type(text).__name__}")
        if not self._left:
            try:
                self._stream.write(printable(text, self.encoding))
            except BrokenPipeError:
                self._leave()
        return len(text)

    def flush(self) -> None:
        if not self._left:
            try:
                self._stream.flush()
            except BrokenPipeError:
                self._leave()

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    def _leave(self) -> None:
        """Drop all later text, including what Python writes when it exits."""
        self._left = True
        with suppress(OSError, ValueError, AttributeError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self._stream.fileno())
            os.close(sink)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Make standard output and standard error accept any text inside."""
    before = sys.stdout, sys.stderr
    # A stream is None if it was closed before the program started.
    printers: list[Any] = [None if stream is None else Printer(stream) for stream in before]
    sys.stdout, sys.stderr = printers
    try:
        yield
    finally:
        for printer in printers:
            with suppress(OSError, ValueError, AttributeError):
                printer.flush()
        sys.stdout, sys.stderr = before


def in_text(part: Any) -> str:
    """Return a rich renderable as plain text for ``str`` of a result.

    It is 120 columns wide, or as wide as its longest names need: a name is never cut.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=120, color_system=None, force_terminal=False)
    endless = console.options.update(width=100_000, max_width=100_000)
    console.width = max(120, Measurement.get(console, endless, part).minimum)
    with console.capture() as capture:
        console.print(part)
    return capture.get()
