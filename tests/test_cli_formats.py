"""``--format json`` and ``csv``: standard output parses, agrees with the table, keys are stable."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from quietvit import cli
from quietvit.answers import Form, answer, only_results
from quietvit.devices import checked_device
from quietvit.errors import QuietvitError
from test_cli import MODEL, SIZE, png, refused, run

GIVEN = [MODEL, *SIZE, "--classes", 2]
KEYS = {
    "methods": "methods",
    "pairs": "pairs skipped",
    "trace": "model macs sites",
    "diagnose": "sites pairs root_causes skipped images top",
    "sensitivity": "model setting policy images part_images origins macs whole roles sites "
    "estimated complete measure",
    "advise": "model images origins rows target causes steps failed skipped seconds complete",
    "quantize": "path method bits policy deployable calibration_images seconds coverage notes "
    "origin evaluation",
    "evaluate": "model kind scores images data device runtime",
    "export": "path box_head mask_head bytes output replaced notes",
    "check": "path machine runtime ok failures integer_share_of_macs products agreements classes "
    "features box_head mask_head detections speed bytes float_bytes notes",
    "predict": "file images failed",
}
COLUMNS = {
    "methods": "method summary needs images cost kernels published source",
    "pairs": "kind first second head first_view second_view through before between",
    "trace": "site kind role output_shape macs weight",
    "quantize": "path method bits policy deployable calibration_images seconds quantized_macs "
    "total_macs fraction top1",
    "evaluate": "model kind images data device runtime top1",
    "predict": "image rank index label probability",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    rows = [{"image": {"bytes": png(9 * i)}, "label": i % 2} for i in range(16)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    (folder / "photo.png").write_bytes(png(30))
    for command in ("quantize", "export"):  # what the other commands read
        done = run(command, *commands(folder)[command], "--format", "json")
        assert done.exit_code == 0, done.output
        (folder / f"{command}.json").write_text(done.stdout)
    return folder


def commands(folder: Path, made: str = "m.qvit") -> dict[str, list[object]]:
    """The arguments of every command with a result. ``quantize`` writes ``made``."""
    table, qvit, onnx = folder / "t.parquet", folder / "m.qvit", folder / "m.onnx"
    images = ["--images", table]
    return {
        "methods": ["rtn*"],
        "pairs": [MODEL, *SIZE],
        "trace": [MODEL, *SIZE],
        "diagnose": [*GIVEN, *images, "--count", 2],
        "sensitivity": [*GIVEN, *images, "--count", 2, "--estimate"],
        "advise": [*GIVEN, *images, "--count", 16, "--methods", "rtn", "--bits", "W8A8"],
        "quantize": [*GIVEN, "--calibration", table, "--count", 2, *images, "-o", folder / made],
        "evaluate": [qvit, *images],
        "export": [qvit, "--force"],
        "check": [onnx, "--against", qvit, *images, "--count", 2, "--seconds", 0],
        "predict": [onnx, folder / "photo.png", folder / "absent.png", "--top", 2],
    }


@pytest.mark.parametrize("command", KEYS)
def test_json_and_csv_hold_the_result_and_nothing_else(command: str, place: Path) -> None:
    given = commands(place, "again.qvit")[command]
    code = 1 if command == "predict" else 0  # one image is absent
    stored = place / f"{command}.json"
    if stored.is_file():
        found = json.loads(stored.read_text())
    else:
        done = run(command, *given, "--format", "json")
        assert done.exit_code == code, done.output
        found = json.loads(done.stdout)
    assert list(found) == KEYS[command].split()
    if command in ("export", "advise"):  # slow, and their rows are those of JSON
        return
    done = run(command, *given, "--format", "csv")
    assert done.exit_code == code, done.output
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert rows
    assert None not in rows[0]  # no row is longer than the header
    if command in COLUMNS:
        assert list(rows[0]) == COLUMNS[command].split()
    assert all(key.isidentifier() and key == key.lower() for key in rows[0])
    counts = {
        **{"methods": "methods", "pairs": "pairs", "trace": "sites", "diagnose": "sites"},
        "check": "products",
    }
    if command in counts:
        assert len(rows) == len(found[counts[command]])


def test_the_forms_agree_with_the_table_and_are_not_rounded(place: Path) -> None:
    evaluate = ["evaluate", *GIVEN[:1], *SIZE, "--classes", 2, "--images", place / "t.parquet"]
    torch.manual_seed(3)
    shown = run(*evaluate).stdout
    torch.manual_seed(3)
    found = json.loads(run(*evaluate, "--format", "json").stdout)
    assert shown == (
        f"top-1 {found['scores']['top1']:.2f} % on {found['images']} images of {found['data']}\n"
    )
    done = run("quantize", *commands(place, "first.qvit")["quantize"], "--format", "json")
    coverage = json.loads(done.stdout)["coverage"]
    assert coverage["fraction"] == coverage["quantized_macs"] / coverage["total_macs"]
    assert "Written: " in done.stderr  # what people read is in the log
    table = run("quantize", *commands(place, "second.qvit")["quantize"]).stdout
    assert f"coverage {100 * coverage['fraction']:.2f} %" in table


def test_csv_has_a_column_for_each_nested_key(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"name": "a", "effect": None, "list": [1, 2], "path": 'x,"y"'},
        {"name": "b", "effect": {"kl": 0.1 + 0.2, "error": None}, "list": [], "path": None},
    ]
    with only_results(Form.CSV):
        print("a note")
        answer(Form.CSV, data={}, rows=rows)
    out, err = capsys.readouterr()
    assert out == (
        'name,list,path,effect_kl,effect_error\na,"[1, 2]","x,""y""",,\n'
        "b,[],,0.30000000000000004,\n"
    )
    assert err == "a note\n"


def test_an_error_leaves_standard_output_empty(place: Path) -> None:
    result = run("evaluate", *GIVEN, "--images", place / "absent", "--format", "json")
    refused(result)
    assert result.stdout == ""
    assert "exclude each other" in refused(run("methods", "--markdown", "--format", "csv"))


def test_names_are_whole_at_any_width(place: Path) -> None:
    for command, width in (("sensitivity", 60), ("sensitivity", 200), ("advise", 60)):
        given = [str(each) for each in (command, *commands(place)[command])]
        result = CliRunner().invoke(cli.app, given, env={"COLUMNS": str(width)})
        assert result.exit_code == 0, result.output
        assert "…" not in result.stdout
        names = ("attention_value", "post_gelu") if command == "sensitivity" else ("rtn",)
        assert all(name in result.stdout for name in names)


def test_a_device_is_checked_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [checked_device(name) for name in ("auto", "cuda", "cuda:1")] == [
        *("cuda", "cuda", "cuda:1")
    ]
    with pytest.raises(QuietvitError, match=r"'cuda:2': this machine has 2 .*--device cuda:1"):
        checked_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, told in (("cuda", "no device 'cuda'"), ("meta", "'meta'"), ("gpu", "'gpu' is not")):
        with pytest.raises(QuietvitError, match=f"{told}.*--device cpu, --device auto"):
            checked_device(name)
    for command in ("diagnose", "sensitivity", "advise", "evaluate"):
        assert "'gpu'" in refused(run(command, "x", "--images", "y", "--device", "gpu"))
    given = ["x", "--calibration", "y", "-o", "z", "--device", "gpu"]
    assert "'gpu'" in refused(run("quantize", *given))
