from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from quietvit.compare import CompareConfig, compare
from quietvit.compare import run as room
from quietvit.compare.config import calibration_of
from quietvit.compare.earlier import COMPARISON
from quietvit.errors import QuietvitError
from quietvit.origin import mark
from quietvit.quantization import RTN
from quietvit.quantization.settings import parse_bits, parse_method
from quietvit.report import Results, Run
from quietvit.train import TrainConfig, TrainResult
from quietvit.train.threads import threads

ROOT = Path(__file__).parents[1]
SETTINGS = {"bits": ("W8A8", "W4A4"), "methods": ("rtn-minmax",)}


def recipe(**changes) -> TrainConfig:
    digits = {"dataset": "embedded:digits", "train_images": 128, "test_images": 50}
    return TrainConfig(
        model={"name": "test_vit", "kwargs": {"img_size": 16, "patch_size": 8}},
        data=changes.pop("data", digits),
        decay={"cd": {"strength": 1.0}},
        epochs=1,
        batch_size=32,
        device="cpu",
        tensorboard=False,
        threads=1,
        **changes,
    )


def config(**changes) -> CompareConfig:
    fields = {"recipe": recipe(), "seeds": (0, 1), "calibration_images": 8, **SETTINGS, **changes}
    return CompareConfig(**fields)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One real comparison of a tiny model, and how many runs were finished when it was cut off."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    real, calls = room.train, []

    def cut_off(arm, **given):
        calls.append((arm.seed, arm.decay.cd is not None))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(arm, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "train", cut_off)
        with pytest.raises(KeyboardInterrupt):
            compare(config(), folder, say=lambda _: None)
        partial = (folder / "results.json").read_text()
        finished = sorted(path.parent.name for path in folder.glob("runs/*/run.json"))
        found = compare(config(), folder, resume=True, say=lambda _: None)
    return found, calls, partial, finished


def test_an_interruption_loses_no_finished_run(compared):
    found, calls, partial, finished = compared
    assert finished == ["seed0-with-cd", "seed0-without-cd", "seed1-with-cd"]
    before = Results.model_validate_json(partial)
    assert found.results.runs[:2] == before.runs
    assert before.unfinished == ("seed 1 without CD", "seed 1 with CD")
    assert found.results.unfinished == ()
    assert calls == [(0, False), (0, True), (1, True), (1, False), (1, False)]


def test_the_arm_with_cd_spends_time_on_it(compared):
    found = compared[0]
    for without, with_decay in found.results.pairs():
        assert without.decay_seconds < with_decay.decay_seconds < with_decay.train_seconds
    assert found.overhead is not None
    assert found.overhead.mean > 0


def test_every_product_is_quantized_and_measured_alike_in_both_arms(compared):
    one, other = compared[0].results.pairs()[0]
    assert one.coverage == other.coverage == 1.0
    assert [(s.site, s.role) for s in one.outliers] == [(s.site, s.role) for s in other.outliers]
    assert {"post_norm", "post_gelu", "query", "post_softmax"} <= {s.role for s in one.outliers}
    assert one.noise
    assert all(math.isfinite(site.db) for site in (*one.noise, *other.noise))


def test_the_files_tell_the_same_numbers(compared):
    found = compared[0]
    results = Results.model_validate_json((found.folder / "results.json").read_text())
    assert results == found.results
    with (found.folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        run = next(
            run for run in results.runs if (str(run.seed), run.arm) == (line["seed"], line["arm"])
        )
        assert float(line["top1"]) == run.score(line["setting"])
    assert len(lines) == 4 * 3
    page = found.page.read_text()
    assert all(cell in page for row in found.table.cells() for cell in row)
    assert "W4A4: MACs: " in page


def test_the_float_accuracy_is_that_of_the_training(compared):
    for path in compared[0].folder.glob("runs/*/train/result.json"):
        run = Run.model_validate_json((path.parents[1] / "run.json").read_text())
        assert run.float_score == pytest.approx(json.loads(path.read_text())["top1"])


def test_going_on_with_a_finished_comparison_trains_nothing(compared, monkeypatch):
    found = compared[0]
    monkeypatch.setattr(room, "train", None)
    again = compare(config(), found.folder, resume=True, say=lambda _: None)
    assert again.results.runs == found.results.runs


def test_calibration_images_can_be_generated(compared, monkeypatch):
    asked = config(bits=("W4A4",), **calibration_of("synthetic:8:pink"))
    made, real = [], room.quantize
    monkeypatch.setattr(
        room, "quantize", lambda *args, **given: made.append(real(*args, **given)) or made[-1]
    )
    trained = TrainResult.read(compared[0].folder / "runs" / "seed0-without-cd" / "train")
    room._quantized(asked, trained, 0, False)
    assert made[0].origin["method"] == "pink"
    assert made[0].origin["count"] == asked.calibration_images == 8
    assert "generated from each run's own model" in room._calibrated_on(asked)
    assert asked.flat()["synthesis"] == "synthetic:8:pink"
    assert "synthesis" not in config().flat()
    assert calibration_of("12") == {"calibration_images": 12}
    with pytest.raises(QuietvitError, match="synthetic:32"):
        calibration_of("many")
    ended = mark(torch.zeros(8, 3, 16, 16), {"method": "psaq", "seed": 0, "stopped": "by Ctrl-C"})
    monkeypatch.setattr(room, "synthesize", lambda *args, **given: ended)
    with pytest.raises(KeyboardInterrupt):
        room._quantized(asked, trained, 0, False)


def test_a_model_is_quantized_with_the_threads_of_its_recipe(compared, tmp_path, monkeypatch):
    """Two threads made it fifty times slower for a tiny model where another process was busy."""
    folder = tmp_path / "out"
    shutil.copytree(compared[0].folder, folder)
    (folder / "runs" / "seed1-with-cd" / "run.json").unlink()

    def counted(*_):
        raise KeyboardInterrupt(torch.get_num_threads())

    monkeypatch.setattr(room, "_quantized", counted)
    with threads(3), pytest.raises(KeyboardInterrupt, match="1"):
        compare(config(), folder, resume=True, say=lambda _: None)


def test_other_settings_or_a_used_folder_are_refused_and_nothing_is_lost(compared, tmp_path):
    folder = compared[0].folder
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(QuietvitError, match=r"calibration_images was 8 and is 9"):
        compare(config(calibration_images=9), folder, resume=True)
    with pytest.raises(QuietvitError, match=r"a finished comparison\. To add seeds .*\(--resume\)"):
        compare(config(), folder)
    with pytest.raises(QuietvitError, match="no comparison to continue"):
        compare(config(), folder / "runs", resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == held


def test_an_arm_that_went_on_otherwise_is_refused(compared, tmp_path):
    """As by ``train --resume`` at a lower rate, in one arm alone."""
    folder = tmp_path / "out"
    shutil.copytree(compared[0].folder, folder)
    arm = folder / "runs" / "seed1-with-cd"
    (arm / "run.json").unlink()
    content = json.loads((arm / "train" / "config.json").read_text())
    content["optimizer"]["lr"] /= 10
    (arm / "train" / "config.json").write_text(json.dumps(content))
    with pytest.raises(QuietvitError, match=r"seed1-with-cd.* optimizer\.lr was 0\.0001 and is"):
        compare(config(), folder, resume=True, say=lambda _: None)


def test_a_comparison_killed_while_its_settings_were_written_goes_on(tmp_path):
    left = Path(tempfile.mkdtemp(prefix=".compare.json.", dir=tmp_path))
    (left / "compare.json").write_text('{"se')
    room._prepare(config(), tmp_path, resume=True, say=print)
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]
    room._prepare(config(), tmp_path, resume=True, say=print)


def test_a_damaged_run_is_named(compared, tmp_path):
    kept = tmp_path / "run.json"
    kept.write_text("{")
    with pytest.raises(QuietvitError, match=r"run\.json.*delete"):
        room._read_run(kept)


def test_the_arms_differ_in_the_decay_alone():
    both = config(recipe=recipe(label_smoothing=0.1))
    without, with_decay = both.arm(5, False), both.arm(5, True)
    assert without.seed == with_decay.seed == 5
    assert without.decay.cd is None
    assert without.model_copy(update={"decay": with_decay.decay}) == with_decay


def test_which_arm_goes_first_alternates():
    order = config(seeds=(3, 1, 2)).order()
    assert order == ((3, False), (3, True), (1, True), (1, False), (2, False), (2, True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "seeds are empty"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": ("a",)}, "seeds"),
        ({"seeds": (-1,)}, "0 or more"),
        ({"bits": ("W1A4",)}, r"outside 2\.\.16"),
        ({"bits": ("W4A17",)}, r"outside 2\.\.16"),
        ({"bits": ("w4a4", "W4A4")}, "each once"),
        ({"methods": ("rtn-minmx",)}, "did you mean 'rtn-minmax'"),
        ({"calibration_images": 0}, "calibration_images=0"),
        ({"synthesis": "generated"}, "write synthetic:32"),
        ({"synthesis": "synthetic:9"}, "calibration_images is 8"),
        ({"noise_setting": "W3A3 rtn-minmax"}, "choose one of"),
        ({"calibration_image": 3}, "did you mean 'calibration_images'"),
    ],
)
def test_settings_are_checked_when_they_are_given(changes, message):
    with pytest.raises(QuietvitError, match=message):
        config(**changes)


def test_a_recipe_without_cd_has_nothing_to_compare():
    plain = recipe().model_copy(update={"decay": recipe().decay.model_copy(update={"cd": None})})
    with pytest.raises(QuietvitError, match=r"--set decay\.cd\.strength"):
        config(recipe=plain)


@pytest.mark.parametrize(
    ("text", "bits"), [("W4A8", (4, 8)), ("w16a2", (16, 2)), (" W8A8 ", (8, 8))]
)
def test_bits_by_name(text, bits):
    assert parse_bits(text) == bits


def test_methods_by_name():
    assert parse_method("RTN-omse", "W4A8") == RTN(
        weight_bits=4, activation_bits=8, activation_range="omse"
    )
    assert parse_method("rtn", "W4A4") == RTN(weight_bits=4, activation_bits=4)
    with pytest.raises(QuietvitError, match="quietvit methods"):
        parse_method("nonsense", "W4A4")


def earlier(folder):
    """What an earlier comparison and its user left behind."""
    names = (
        "seed0-with-cd/run.json",
        "seed7-without-cd/run.json",
        "seed0-with-cd/train/result.json",
    )
    for path in (folder / "compare.json", *(folder / "runs" / name for name in names)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (folder / "runs" / "mine.txt").write_text("mine")
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_force_leaves_no_run_that_a_later_resume_would_take_for_its_own(tmp_path, monkeypatch):
    held, told = earlier(tmp_path), []
    for force, way in ((False, "pass resume"), (True, "instead of force")):
        with pytest.raises(QuietvitError, match=f"unfinished comparison.*{way}.*--discard.*seed7"):
            compare(config(), tmp_path, force=force)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == held

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config(), tmp_path, force=True, discard=True, say=told.append)
    assert "seed7-without-cd (a finished run)" in told[0]
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["compare.json", "mine.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration_images": 5000}, "has only 1198 images for training"),
        ({"recipe": recipe(data={"dataset": "table:no.parquet,no.parquet"})}, "does not exist"),
    ],
)
def test_bad_data_is_refused_before_anything_is_trained_or_removed(tmp_path, changes, message):
    held = earlier(tmp_path)
    with pytest.raises(QuietvitError, match=message):
        compare(config(**changes), tmp_path, force=True, discard=True, say=lambda _: None)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == held


def test_the_demo_goes_on_where_it_stopped(tmp_path):
    """``make demo`` looks for the file that marks a begun comparison."""
    make = ["make", "--dry-run", "--no-print-directory", "-f", str(ROOT / "Makefile"), "demo"]

    def shown() -> str:
        return subprocess.run(make, capture_output=True, text=True, cwd=tmp_path, check=True).stdout

    (tmp_path / "pyproject.toml").touch()
    assert "--resume" not in shown()
    begun = tmp_path / "demo-output" / COMPARISON
    begun.parent.mkdir()
    begun.touch()
    assert "--output demo-output --resume" in " ".join(shown().split())
