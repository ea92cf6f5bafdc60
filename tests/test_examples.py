"""Every example runs as it stands, in seconds and without a download, and does what it says."""

from __future__ import annotations

import re
import runpy
import sys
from inspect import signature
from pathlib import Path

import pytest

from processes import session

EXAMPLES = Path(__file__).parents[1] / "examples"
WITH_AND_WITHOUT = {
    "plain_loop": None,
    "transformers_trainer": "transformers",
    "lightning_module": "lightning",
}
NUMBER = r"([\d.e+-]+)"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What an example prints; it is run elsewhere, so that it finds nothing but what it brings."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elsewhere, log = folder / "elsewhere", folder / "log"
    elsewhere.mkdir()
    path = str(EXAMPLES / f"{name}.py")
    with session(as_a_script, path, folder=elsewhere, log=log) as process:
        process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert not list(elsewhere.iterdir()), "an example leaves nothing behind"
    return log.read_text()


def as_a_script(path: str) -> None:
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_AND_WITHOUT)
def test_the_added_line_lowers_the_penalty_and_the_model_learns(name, tmp_path, monkeypatch):
    package = WITH_AND_WITHOUT[name]
    if package is not None:
        pytest.importorskip(package)
    if package == "transformers":
        from accelerate import Accelerator

        if "keep_torch_compile" not in signature(Accelerator.unwrap_model).parameters:
            pytest.skip("the Trainer does not run with this accelerate")
    text = run(name, tmp_path, monkeypatch)
    rows = re.findall(rf"strength (\d): top-1 {NUMBER} %, penalty {NUMBER}", text)
    assert [row[0] for row in rows] == ["0", "1"], text
    (without, high), (with_decay, low) = [(float(a), float(b)) for _, a, b in rows]
    assert low < 0.8 * high, text
    assert min(without, with_decay) > 40, text


@pytest.mark.slow
def test_fine_tuning_freezes_scales_and_learns(tmp_path, monkeypatch):
    text = run("timm_finetune", tmp_path, monkeypatch)
    frozen, still, moved = re.search(
        r"frozen (\d+), of them moved (\d+), others moved (\d+)", text
    ).groups()
    assert int(frozen) > 12
    assert int(still) == 0
    assert int(moved) > 20
    assert "[0.5625, 0.75, 1.0]" in text
    assert float(re.search(rf"top-1 {NUMBER} %", text)[1]) > 30


def test_every_example_is_run():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*WITH_AND_WITHOUT, "timm_finetune"}
