from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.main import get_command
from typer.testing import CliRunner

from quietvit import __version__, cli, console
from quietvit.commands import looking

MODEL = "test_vit"
SIZE = ["--size", "32"]
COMMANDS = sorted(get_command(cli.app).commands)


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(result) -> str:
    """The one paragraph of an error the user can mend."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (value, 2 * value, 255 - value)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def table(tmp_path):
    rows = [{"image": {"bytes": png(10 * i)}, "label": i % 2} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


def test_help_names_every_command_and_loads_no_torch():
    code = (
        "import sys, quietvit.cli as c\n"
        "try: c.main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    for command in COMMANDS:
        assert command in done.stdout
    assert done.stderr.strip().endswith("False")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"quietvit {command}" in result.output.partition("Examples")[2]


def test_version():
    assert run("--version").output == f"quietvit {__version__}\n"


def test_an_unknown_command_is_answered_with_the_nearest():
    result = run("quantise")
    assert result.exit_code == 2
    assert "quantize" in result.stderr


def test_the_traceback_is_shown_on_request():
    result = run("--traceback", "trace", "vit_tinny_patch16_224")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "did you mean" in result.stderr


def test_an_interruption_is_one_line_and_130(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(looking, "build_bare", interrupted)
    result = run("trace", MODEL)
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted: ")
    assert result.stderr.count("\n") == 1


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(looking, "build_bare", broken)
    result = run("trace", MODEL)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "unexpected error: ZeroDivisionError: oops" in result.stderr


def test_trace_and_pairs_print_their_tables():
    every, products = run("trace", MODEL, *SIZE), run("trace", MODEL, *SIZE, "--matmuls")
    assert every.exit_code == products.exit_code == 0
    assert "blocks.0.attn.qkv" in products.output
    assert "softmax" in every.output
    assert len(products.output.splitlines()) < len(every.output.splitlines())
    assert "mlp" in run("pairs", MODEL, *SIZE).output
    assert "there is no folder nothing, and timm has no model" in refused(run("trace", "nothing"))


def test_methods_are_listed():
    assert "rtn" in run("methods").output
    assert "'quietvit methods'" in refused(run("methods", "nothing*"))


def test_quantize_then_evaluate_gives_the_same_top1(table, tmp_path):
    torch.manual_seed(0)
    import timm

    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model(MODEL, num_classes=2, img_size=32).state_dict(), weights)
    given = [MODEL, "--weights", weights, "--calibration", table, "--count", 4, *SIZE]
    file = tmp_path / "m.qvit"
    made = run("quantize", *given, "--bits", "W4A8", "-o", file, "--images", table)
    assert made.exit_code == 0, made.output
    assert "coverage" in made.output
    read = run("evaluate", file, "--images", table)
    assert read.exit_code == 0, read.output
    top1 = [line for line in made.output.splitlines() if line.startswith("top-1")]
    assert read.output.splitlines()[-1] == top1[-1]
    assert "force" in refused(run("quantize", *given, "-o", file))
    assert run("evaluate", file, "--images", table).output == read.output


def test_quantize_generates_its_images_where_there_are_none(table, tmp_path):
    file, seen = tmp_path / "m.qvit", tmp_path / "seen"
    given = ["quantize", MODEL, "--classes", 2, *SIZE, "-o", file, "--calibration"]
    asked = "synthetic:3:psaq:iterations=1"
    made = run(*given, asked, "--seed", 5, "--save-images", seen)
    assert made.exit_code == 0, made.output
    assert len(list((seen / "images").iterdir())) == 3
    assert f"Images: {seen / 'contact-sheet.png'}" in made.output
    facts = json.loads((file / "quantization.json").read_text())["calibration"]
    assert (facts["method"], facts["seed"], facts["count"]) == ("psaq", 5, 3)
    for wrong, told in (
        ((asked, "--save-images", seen, "--force"), ""),
        ((asked, "--save-images", seen), "not empty"),
        ((asked, "--count", 4, "--force"), "leave one of them out"),
        ((table, "--minutes", 1, "--force"), "--minutes and --save-images"),
        (("synthetic:3:dgh", "--force"), "'psaq'"),
    ):
        again = run(*given, *wrong)
        assert told in refused(again) if told else again.exit_code == 0, again.output


RECIPE = """
recipe = 1
epochs = 1
batch_size = 32
device = "cpu"
threads = 1
tensorboard = false
model = { name = "test_vit", kwargs = { img_size = 16, patch_size = 8 } }
data = { dataset = "embedded:digits", train_images = 64, test_images = 599 }
decay = { cd = { strength = 1.0 } }
"""


def test_a_trained_model_is_evaluated_and_quantized_by_its_folder(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE)
    out = tmp_path / "out"
    trained = run("train", "-r", tmp_path / "r.toml", "-o", out, "-s", "optimizer.lr=2e-3")
    assert trained.exit_code == 0, trained.output
    assert '"lr": 0.002' in (out / "config.json").read_text()
    top1 = re.search(r"top-1 [\d.]+ %", trained.output)
    evaluated = run("evaluate", out, "--images", "embedded:digits")
    assert top1
    assert evaluated.output.startswith(f"{top1[0]} on 599 images")
    assert "leave" in refused(run("evaluate", out, "--images", "embedded:digits", *SIZE))
    file = tmp_path / "m.qvit"
    made = run("quantize", out, "--calibration", "embedded:digits", "--count", 2, "-o", file)
    assert made.exit_code == 0, made.output
    assert "a finished run" in refused(run("train", "-r", tmp_path / "r.toml", "-o", out))
    assert "blocks.0.mlp.fc2.weight" in run("pairs", out).output
    assert "blocks.0.mlp.fc2" in run("trace", out).output
    assert "random" not in evaluated.stderr
    found = run("trace", out, "--classes", 0)
    assert "head" not in found.output
    assert "norm  " in found.output


def test_diagnose_writes_what_it_prints(table, tmp_path):
    out = tmp_path / "out"
    given = ["diagnose", MODEL, "--classes", 2, *SIZE, "--images", table, "-o", out]
    done = run(*given)  # 32 images are the default, and the table has fewer
    assert done.exit_code == 0, done.output
    assert (out / "diagnosis.json").is_file()
    assert list(out.glob("*.png"))
    before = sorted(path.stat().st_mtime_ns for path in out.iterdir())
    assert "not empty" in refused(run(*given))
    assert sorted(path.stat().st_mtime_ns for path in out.iterdir()) == before


def test_a_model_that_is_neither_a_folder_nor_a_name_says_both():
    result = run("evaluate", "run2", "--images", "embedded:digits")
    assert "there is no folder run2, and timm has no model named 'run2'" in refused(result)
    assert "random" not in result.output


@pytest.mark.parametrize("bits", ["W1A8", "W8A17", "8", "W4"])
def test_bits_out_of_range_are_refused_before_anything_is_loaded(bits, tmp_path):
    out = tmp_path / "m.qvit"
    text = refused(run("quantize", MODEL, "--calibration", "nowhere/", "--bits", bits, "-o", out))
    assert "bits" in text
    assert not out.exists()


def test_bad_data_is_refused_with_the_remedy(table, tmp_path):
    head = [MODEL, "--classes", 2, *SIZE]
    assert "does not exist" in refused(
        run("evaluate", *head, "--images", tmp_path / "missing_folder")
    )
    wrong = tmp_path / "wrong.parquet"
    pq.write_table(pa.table({"picture": [png(1)], "label": [0]}), wrong)
    assert "image" in refused(run("evaluate", *head, "--images", wrong))
    out = tmp_path / "m.qvit"
    none = run("quantize", *head, "--calibration", table, "--count", 0, "-o", out)
    assert "calibration images" in refused(none)
    broken = tmp_path / "broken.parquet"
    cut = [{"image": png(3)[:60], "label": 0}]
    pq.write_table(pa.Table.from_pylist(cut), broken)
    refused(run("diagnose", *head, "--images", broken, "--count", 1))


def test_a_split_is_chosen_where_there_is_one(tmp_path):
    for split, count in (("train", 5), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(png(i))
    head = ["evaluate", MODEL, "--classes", 2, *SIZE, "--images"]
    assert "on 6 images" in run(*head, tmp_path).output
    assert "on 6 images" in run(*head, tmp_path / "val").output
    head[3] = 10
    assert "on 599 images" in run(*head, "embedded:digits").output


def test_a_device_that_is_not_there_is_refused(table):
    result = run("evaluate", MODEL, "--classes", 2, "--images", table, "--device", "cda")
    assert result.exit_code == 2
    assert "--device cpu" in result.stderr


def test_random_weights_are_said_to_be_random(table):
    head = ["evaluate", MODEL, "--classes", 2, *SIZE, "--images", table]
    assert "random" in run(*head).stderr


def test_weights_of_another_architecture_are_refused(table, tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file({"stem.weight": torch.zeros(2, 3), "head.weight": torch.zeros(2, 3)}, weights)
    text = refused(run("evaluate", MODEL, "--weights", weights, "--images", table))
    assert "another architecture" in text


def test_a_model_without_blocks_is_refused():
    refused(run("pairs", "resnet18", "--kinds", "value_output"))


def test_a_full_output_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    text = refused(run("compare", "--recipe", "digits", "--output", tmp_path))
    assert "not empty" in text
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unknown_key_of_a_recipe_is_answered_with_the_nearest(tmp_path):
    out = tmp_path / "out"
    text = refused(run("train", "-r", "digits", "-s", "optimizer.lrr=1", "-o", out))
    assert "optimizer.lr" in text
    assert not out.exists()


def test_a_home_folder_and_a_class_called_train_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("split/train/cat", "split/val/cat", "classes/train", "classes/car"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.png").write_bytes(png(1))
    assert len(console.open_data("~/split", "test")) == 1
    assert len(console.open_data("imagefolder:~/split", "test")) == 1
    assert console.open_data("~/classes", "test").class_names == ("car", "train")


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_only_the_first_process_of_torchrun_prints(tmp_path, monkeypatch, rank):
    """``torchrun -m quietvit.cli compare`` starts several processes. The table comes once."""
    table = SimpleNamespace(rich=lambda compact=False: "the table")
    given = {"table": table, "verdict": "v", "overhead": "o", "page": "p"}

    def compare(config, output, *, say=lambda text: print(text, file=sys.stderr), **more):
        say("a run begins")
        return SimpleNamespace(**given)

    monkeypatch.setattr("quietvit.compare.compare", compare)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    done = run("compare", "--recipe", "digits", "--output", tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert ("the table" in done.stdout) is (rank != "1")
    assert ("a run begins" in done.stderr) is (rank != "1")
