"""What is printed in any encoding and width, and what is said of errors that users cause."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from rich.table import Table
from typer.main import get_command
from typer.testing import CliRunner

from quietvit import cli, width
from quietvit.commands import looking, training
from quietvit.complaints import explained
from quietvit.errors import QuietvitError
from quietvit.files import json_text, refuse_unwritable, write_atomic
from quietvit.quantization import list_methods
from quietvit.report.tables import summary_table
from quietvit.text import Printer, in_text, printable, printable_streams
from report_cases import results_of

COMMANDS = get_command(cli.app).commands
OTHER = os.fsdecode(b"caf\xe9")  # a name whose bytes are not UTF-8
MODEL = ["test_vit", "--size", "32"]


def run(*arguments: object, width: int = 40, charset: str = "ascii"):
    runner = CliRunner(charset=charset)
    result = runner.invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": str(width)})
    assert "bug in quietvit" not in result.stderr, result.stderr
    return result


def images(folder):
    """A folder of two classes, with a class and images whose names are not UTF-8."""
    for name in ("cat", OTHER):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            with (folder / name / f"{OTHER}{i}.png").open("wb") as file:
                Image.new("RGB", (32, 32), (90 * i, 9, 200)).save(file, "PNG")
    return folder


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("charset", ["ascii", "cp1252"])
def test_the_help_of_every_command_cuts_no_option(width, charset):
    for name, command in COMMANDS.items():
        result = run(name, "--help", width=width, charset=charset)
        assert result.exit_code == 0, (name, result.exception)
        for option in (option for param in command.params for option in param.opts):
            assert option in result.output or not option.startswith("--"), (name, option)
        assert "[bold]" not in result.output
        assert "<bool>" not in result.output, name  # a flag takes no value
    assert all(name in run("--help", width=width, charset=charset).output for name in COMMANDS)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_name_is_cut_at_any_width_and_no_symbol_stops_the_print(width, tmp_path):
    listed = run("methods", width=width)
    assert listed.exit_code == 0, listed.exception
    for name in list_methods():
        assert name in listed.stdout.partition("Published")[0]
    if width not in (40, 80):
        return
    looked = run(
        "diagnose", *MODEL, "--images", images(tmp_path / "data"), "--count", 2,
        "-o", tmp_path / "out", width=width,
    )  # fmt: skip
    assert looked.exit_code == 0, looked.exception
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text("utf-8"))
    assert any(pair["name"].replace(".weight", "") in looked.stdout for pair in found["pairs"])
    assert sum(f"{site['site']}:{site['operand']}" in looked.stdout for site in found["sites"]) >= 3
    assert "Written: " in looked.stdout
    for command in ("pairs", "trace"):
        assert "blocks.0.attn.qkv" in run(command, *MODEL, width=width).stdout


def test_the_table_of_a_comparison_is_compact_or_a_list_where_it_is_narrow(monkeypatch):
    table = summary_table(results_of([(50.0, 60.0), (51.0, 60.0)]))
    for columns, shown in ((200, "interval"), (80, "outcome"), (40, "  95 % interval: ")):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("COLUMNS", str(columns))
        with printable_streams():
            width.show(width.fitting(table.rich(), table.rich(compact=True)))
        text = out.buffer.getvalue().decode("ascii")
        monkeypatch.undo()
        assert shown in text
        for row in table.rows:
            assert row.setting in text
        assert columns == 40 or max(map(len, text.splitlines()[1:])) <= columns


def test_a_file_gets_every_table_whole(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    table, name = Table("name", "text"), "n" * 300
    table.add_row(name, "t" * 300)
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    width.show(table, "word " * 100)
    lines = out.getvalue().splitlines()
    assert any(name in line and "t" * 300 in line for line in lines)
    assert "word " * 100 in lines


def test_the_text_of_a_result_cuts_no_name():
    table = Table()
    table.add_column("site", overflow="fold")
    table.add_column("value", no_wrap=True)
    table.add_row("blocks." * 30, "9" * 30)
    assert "blocks." * 30 in in_text(table)
    assert "9" * 30 in in_text(table)


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("s₁ ≤ 2×3 … ✗ é", "ascii", "s1 <= 2x3 ... \\u2717 \\xe9"),
        ("2×3 … é → –", "cp1252", "2×3 … é -> –"),
        ("猫 ─", "utf-8", "猫 ─"),
        (OTHER, "utf-8", "caf\\xe9"),
    ],
)
def test_what_an_encoding_lacks_is_written_another_way(text, encoding, expected):
    assert printable(text, encoding) == expected


def test_files_are_utf8_whatever_they_mention(tmp_path):
    text = json_text({"path": OTHER, "猫": [float("nan"), 1.5, (OTHER,)]})
    assert json.loads(text) == {"path": "caf\ufffd", "猫": [None, 1.5, ["caf\ufffd"]]}
    write_atomic(tmp_path / OTHER, f"<p>{OTHER} é</p>")
    assert (tmp_path / OTHER).read_text("utf-8") == "<p>caf\ufffd é</p>"


def test_a_reader_that_left_changes_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        printer = Printer(stream)
        for _ in range(3):
            printer.write("x" * 100_000)
            printer.flush()
        with pytest.raises(TypeError):
            printer.write(b"x")  # type: ignore[arg-type]


def test_a_shell_sees_the_exit_codes_of_a_pipe_and_a_full_disk():
    code = (
        f"set -o pipefail; q='{sys.executable} -m quietvit.cli'; "
        "$q methods | head -1; echo pipe $?; $q methods > /dev/full; echo full $?"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-2:] == ["pipe 0", "full 2"]
    assert done.stderr.startswith("error: ")
    assert "free some space" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "/a: No space .*free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "permissions"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "can be written"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/a"), "shorter"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.EIO, "Input/output error", "/a", None, "/b"), "/a -> /b: .*disk"),
        (UnicodeEncodeError("utf-8", OTHER, 3, 4, "surrogates"), r"caf\\xe9 .*symbolic link"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), "save it as UTF-8"),
        (MemoryError(), "not enough memory.*--batch"),
        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "not enough memory"),
        (RuntimeError("Found no NVIDIA driver on your system."), "--device cpu"),
        (AssertionError("Torch not compiled with CUDA enabled"), "--device cpu"),
        (TypeError("the MPS framework doesn't support float64."), "--device cpu"),
        (ImportError("No module named 'openvino'", name="openvino.x"), r"quietvit\[openvino\]"),
        (ImportError("libGL.so.1: cannot open", name="cv2"), "pip install -U cv2"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_that_users_cause_has_its_remedy(error, remedy, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(looking, "build_bare", fail)
    result = run("trace", "test_vit")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    with pytest.raises(AssertionError, match=remedy):
        raise AssertionError(result.stderr)


@pytest.mark.parametrize(
    "error",
    [
        OSError("could not get source code"),
        ImportError("cannot import name 'x' from 'quietvit.data'", name="quietvit.data"),
        UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_fault_of_ours_is_no_error_of_the_user(error):
    assert explained(error) is None


@pytest.mark.parametrize(
    ("module", "name", "arguments", "said"),
    [
        (looking, "build_bare", ["trace", "test_vit"], "interrupted: stopped before the end."),
        (training, "listed", ["compare", "-r", "digits", "-o", "x"], "interrupted: .*--resume"),
    ],
)
def test_an_interruption_promises_nothing_that_is_not_there(
    module, name, arguments, said, monkeypatch
):
    def stop(*told):
        raise KeyboardInterrupt(*told)

    monkeypatch.setattr(module, name, lambda *_: stop())
    result = run(*arguments)
    assert result.exit_code == 130
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(result.stderr)
    monkeypatch.setattr(module, name, lambda *_: stop("saved already"))
    assert run(*arguments).stderr == ""


def test_paths_of_other_bytes_work_or_are_refused_with_the_remedy(tmp_path):
    other = tmp_path / OTHER
    data = images(other / "data")
    (other / "m.onnx").write_bytes(b"x")
    refused = [
        ("evaluate", *MODEL, "--images", data, "--weights", other / "m.onnx"),
        ("quantize", *MODEL, "--calibration", data, "-o", other / "m.qvit"),
        ("evaluate", other / "m.qvit", "--images", data),
        ("export", other / "m.qvit"),
        ("predict", other / "m.onnx", tmp_path / "x.png"),
        ("train", "-r", "digits", "-o", other / "run"),
        ("train", "-r", "digits", "-o", other / "run", "--resume"),
        ("compare", "-r", "digits", "-o", other / "run"),
    ]
    (other / "m.qvit").mkdir()
    for arguments in refused:
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert "caf\\xe9" in result.stderr
        assert "symbolic link" in result.stderr
    assert sorted(path.name for path in other.iterdir()) == ["data", "m.onnx", "m.qvit"]
    read = run("evaluate", *MODEL, "--classes", 2, "--images", data)
    assert read.exit_code == 0, read.output
    assert "on 4 images" in read.stdout


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the model was built first")

    monkeypatch.setattr(looking, "build_model", never)
    monkeypatch.setattr("quietvit.commands.quantizing.build_model", never)
    monkeypatch.setattr("quietvit.commands.deploying.load_quantized", never)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for place in ("file/x", "n" * 300, "loop/x", "file"):
        out, given = tmp_path / place, ["--images", "embedded:digits"]
        for arguments in (
            ("diagnose", *MODEL, *given, "-o", out),
            ("quantize", *MODEL, "--calibration", "embedded:digits", "-o", out),
            ("check", "m.onnx", "--against", "m.qvit", *given, "--json", out),
        ):
            if place == "file" and arguments[0] == "check":
                continue  # a report may be written again
            assert run(*arguments).exit_code == 2, arguments
    with pytest.raises(QuietvitError, match="is a folder"):
        refuse_unwritable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_home_folder_is_understood_in_every_argument(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images(tmp_path / "data")
    given = ["--images", "~/data", "--count", 2, "--classes", 2, "-o", "~/out"]
    assert run("diagnose", *MODEL, *given).exit_code == 0
    assert (tmp_path / "out" / "diagnosis.json").is_file()
    assert "full path" in run("evaluate", "~nobody-here/x", "--images", "~/data").stderr
