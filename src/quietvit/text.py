"""Text for terminals and files of any encoding: what an encoding lacks is written another way.

Which text is printed, and how it is laid out, is decided elsewhere.
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
    """Replace symbols by ASCII ones, and other characters by an escape such as ``\\xe9``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    return "".join(_as_ascii(character) for character in part), error.end


def _as_ascii(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    if "\u2500" <= character <= "\u259f":  # the other box drawings and blocks
        return "+"
    plain = unicodedata.normalize("NFKD", character)
    if plain.isascii():
        return plain
    if "\udc80" <= character <= "\udcff":  # a byte of a path that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode()


def _written(error: UnicodeError) -> tuple[bytes, int]:
    """Replace what UTF-8 cannot hold by U+FFFD, as bytes: Python takes no other text but ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "\ufffd".encode() * (error.end - error.start), error.end


codecs.register_error(PRINTED, _printed)
codecs.register_error(WRITTEN, _written)


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold the text; it cannot where a path has other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str, encoding: str = "utf-8") -> str:
    """Return the text with ASCII in place of what ``encoding`` cannot hold."""
    return text.encode(encoding, PRINTED).decode(encoding)


class Printer:
    """A text stream that takes every text, and that a reader may leave.

    After ``quietvit methods | head`` nobody reads any more: what is printed then is dropped, and
    the command still ends its work with its own exit code. There is no attribute ``buffer``, so
    that click and others write text.
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
        """Drop what comes, also what Python itself writes at the end of the program."""
        self._left = True
        with suppress(OSError, ValueError, AttributeError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self._stream.fileno())
            os.close(sink)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Let every text be printed to standard output and standard error inside."""
    before = sys.stdout, sys.stderr
    # Python has None where a stream was closed before the program began.
    printers: list[Any] = [None if stream is None else Printer(stream) for stream in before]
    sys.stdout, sys.stderr = printers
    try:
        yield
    finally:
        for printer in printers:
            with suppress(OSError, ValueError, AttributeError):
                printer.flush()
        sys.stdout, sys.stderr = before
