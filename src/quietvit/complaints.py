"""How a command ends early: one paragraph with the remedy on standard error, and an exit code.

Errors of Python and torch get their text here. A ``QuietvitError`` has its own.
"""

from __future__ import annotations

import errno
import sys
import traceback as tracebacks
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from quietvit.answers import only_results
from quietvit.errors import QuietvitError
from quietvit.files import not_utf8
from quietvit.text import printable_streams
from quietvit.width import columns

# On narrower terminals rich truncates option names. The plain help never does.
RICH_HELP = 80

_MEMORY = (
    "there is not enough memory; use fewer images at a time (--batch, --count, or batch_size in "
    "the recipe), a smaller model, or a machine with more memory"
)
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: it goes through a file where a folder is expected",
    errno.EISDIR: "name a file instead of a folder",
    errno.EEXIST: "choose another name",
    errno.ELOOP: "fix the symbolic link, which points back to itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer workers",
    errno.ENFILE: "close other programs: the system has too many open files",
    errno.ENOMEM: _MEMORY,
}
_EXTRAS = {
    "transformers": "transformers", "datasets": "datasets", "lightning": "lightning",
    "onnx": "onnx", "onnxruntime": "onnx", "onnxscript": "onnx", "onnx_ir": "onnx",
    "ml_dtypes": "onnx", "openvino": "openvino", "torchao": "torchao", "pycocotools": "detection",
}  # fmt: skip
_STOPPED = "stopped before the end"
_GO_ON = {
    "train": "; --resume continues from the last checkpoint, if one was written.",
    "compare-methods": "; the same command again continues and keeps the measured settings.",
    "compare": "; --resume continues and keeps the finished runs.",
}
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate")
_NO_DEVICE = (
    "no nvidia driver", "not compiled with cuda", "no cuda gpus", "invalid device ordinal",
    "cuda error", "cuda driver", "hip error", "mps framework doesn't support float64",
)  # fmt: skip


class _Help:
    """Print flags without a type, and the epilog of a plain help text without rich's bold marks."""

    epilog: str | None

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for option in found:
            if getattr(option, "is_flag", False):
                option.metavar = ""  # recent typer shows <bool>, as if a flag took a value
        return found

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write_paragraph()
        for line in (self.epilog or "").split("\n\n"):
            formatter.write_text(line.replace("[bold]", "").replace("[/bold]", ""))


class Commands(_Help, TyperGroup):
    """The group of all commands. It prints any character and handles errors by ``telling``."""

    def main(self, *args: Any, **extra: Any) -> Any:
        with printable_streams():
            try:
                width = columns(sys.stdout)
                mode: Any = "rich" if width is None or width >= RICH_HELP else None
                for command in (self, *self.commands.values()):
                    command.rich_markup_mode = mode  # type: ignore[attr-defined]
                if mode is None:
                    extra.setdefault("terminal_width", width)
                return super().main(*args, **extra)
            except OSError as error:  # standard output is not writable
                complain("error", f"could not print: {explained(error)}")
                sys.exit(2)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _plugins_first(args))

    def invoke(self, ctx: Any) -> Any:
        with telling(ctx):
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result


class Command(_Help, TyperCommand):
    """A command that expands ``~`` in its arguments, because a shell expands only some.

    With ``--format json`` or ``csv``, only ``answers.answer`` prints to standard output.
    """

    def invoke(self, ctx: Any) -> Any:
        ctx.params = {name: _expanded(value) for name, value in ctx.params.items()}
        with only_results(ctx.params.get("form")):
            return super().invoke(ctx)


def _plugins_first(args: list[str]) -> list[str]:
    """Move ``--plugin MODULE`` to the front, so that it may also follow the name of a command."""
    first, rest, place = list[str](), list[str](), 0
    while place < len(args):
        if args[place] == "--":
            break
        taken = 2 if args[place] == "--plugin" else 1
        (first if args[place].split("=")[0] == "--plugin" else rest).extend(
            args[place : place + taken]
        )
        place += taken
    return [*first, *rest, *args[place:]]


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(entry) for entry in value]
    if isinstance(value, Path | str) and str(value).startswith("~"):
        try:
            expanded = Path(value).expanduser()
        except RuntimeError as error:
            raise QuietvitError(f"{value}: {error}; write the full path.") from error
        return expanded if isinstance(value, Path) else str(expanded)
    return value


@contextmanager
def telling(ctx: Any) -> Iterator[None]:
    """Turn exceptions into exit codes: 2 if the user can fix it, 1 for a bug in quietvit.

    Ctrl-C is 130. A KeyboardInterrupt with a message prints nothing, because training already did.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if not error.args:
            complain("interrupted", _STOPPED + _GO_ON.get(ctx.invoked_subcommand, "."))
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("click", "typer"):
            raise
        told = explained(error)
        if told is None or ctx.params.get("traceback"):
            tracebacks.print_exc()
        if told is not None:
            complain("error", told)
            raise typer.Exit(2) from None
        complain(
            "unexpected error",
            f"{type(error).__name__}: {error}. This is a bug in quietvit; please report it "
            "with the traceback above.",
        )
        raise typer.Exit(1) from None


def explained(error: BaseException) -> str | None:
    """Return what happened and what the user can do, or None for a bug in quietvit."""
    if isinstance(error, QuietvitError):
        return str(error)
    text = " ".join(str(error).split())
    lowered = text.lower()
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(part in lowered for part in _NO_MEMORY)
    ):
        return f"{_MEMORY} ({text or 'MemoryError'})."
    of_device = any(part in lowered for part in _NO_DEVICE)
    if of_device and isinstance(error, RuntimeError | AssertionError | TypeError):
        return (
            f"the device cannot be used: {text}. Choose another device, such as --device cpu, or "
            'device = "cpu" in the recipe.'
        )
    if isinstance(error, ImportError):
        return _of_import(error)
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, UnicodeEncodeError):
        of_path = "\udc80" <= error.object[error.start] <= "\udcff" and len(error.object) < 1000
        return not_utf8(error.object) if of_path else None
    if isinstance(error, UnicodeDecodeError):
        return f"a file that should be UTF-8 text is not ({text}); save it as UTF-8."
    return None


def _of_system(error: OSError) -> str | None:
    if error.errno is None or error.strerror is None:
        return None
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f"{' -> '.join(names)}: " if names else ""
    remedy = _REMEDIES.get(error.errno, "check the disk and the path")
    return f"{where}{error.strerror}; {remedy}."


def _of_import(error: ImportError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if package == "quietvit" or not package:
        return None
    extra = _EXTRAS.get(package)
    remedy = f"pip install -U 'quietvit[{extra}]'" if extra else f"pip install -U {package}"
    return f"the package {package} cannot be imported ({error}); install it: {remedy}."


def complain(kind: str, text: str) -> None:
    """Print ``kind`` in red and ``text`` as one paragraph to standard error."""
    typer.secho(f"{kind}: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(" ".join(text.split()), err=True)
