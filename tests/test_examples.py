"""Every example runs as it stands, in seconds and without a download, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
WITH_AND_WITHOUT = {
    "plain_loop": None,
    "transformers_trainer": "transformers",
    "lightning_module": "lightning",
}
NUMBER = r"([\d.e+-]+)"


def run(name: str, folder: Path) -> str:
    """What an example prints; it is run elsewhere, so that it finds nothing but what it brings."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(folder.iterdir()), "an example leaves nothing behind"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_AND_WITHOUT)
def test_the_added_line_lowers_the_penalty_and_the_model_learns(name, tmp_path):
    package = WITH_AND_WITHOUT[name]
    if package is not None:
        pytest.importorskip(package)
    if package == "transformers":
        from accelerate import Accelerator

        if "keep_torch_compile" not in signature(Accelerator.unwrap_model).parameters:
            pytest.skip("the Trainer does not run with this accelerate")
    text = run(name, tmp_path)
    rows = re.findall(rf"strength (\d): top-1 {NUMBER} %, penalty {NUMBER}", text)
    assert [row[0] for row in rows] == ["0", "1"], text
    (without, high), (with_decay, low) = [(float(a), float(b)) for _, a, b in rows]
    assert low < 0.8 * high, text
    assert min(without, with_decay) > 40, text


@pytest.mark.slow
def test_fine_tuning_freezes_scales_and_learns(tmp_path):
    text = run("timm_finetune", tmp_path)
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
