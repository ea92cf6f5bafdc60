"""Targets: a new one is a row, from export to predict; what each target must keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import quietvit
from quietvit import QuietvitError
from quietvit.deployment import Export, Kernel, Runtime, Target, open_runtime, register_target
from quietvit.deployment.facts import Facts
from quietvit.deployment.targets import _TARGETS, target_of
from test_cli import refused, run, table
from test_deployment_commands import photo, qvit

assert table
assert photo
assert qvit
SAME = {"head_bits": "same", "patch_embed_bits": "same"}
EXACT = quietvit.RTN(weight_bits=16, activation_bits=None, **SAME)


class Linear(Runtime):
    """Pixels times the weight of the last linear, in numpy."""

    opened = 0

    def __init__(self, path: Path, threads: int) -> None:
        with np.load(path, allow_pickle=False) as held:
            self.weight, self.bias, text = held["weight"], held["bias"], str(held["facts"])
        self.text, self.path, self.threads, self.name = text, path, threads, "numpy"
        type(self).opened += 1

    def _run(self, images: np.ndarray) -> np.ndarray:
        pixels = images.reshape(len(images), -1)[:, : self.weight.shape[1]]
        return np.asarray(pixels @ self.weight.T + self.bias)

    @property
    def metadata(self) -> str:
        return self.text

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        return (None, *self.facts.input_shape)


class Proving(Linear):
    """The same, and it tells that its only kernel multiplies floats."""

    opened = 0

    def kernels(self, facts: Facts) -> Mapping[str, Kernel]:
        return {f"{p.name}:product": Kernel("dot", False, "numpy") for p in facts.products}


def write(export: Export) -> Facts:
    last = [m for m in export.quantized.model.modules() if isinstance(m, nn.Linear)][-1]
    products = tuple(replace(p, why_float="numpy") for p in export.facts.products)
    facts = replace(export.facts, products=products)
    held = {"weight": last.weight, "bias": last.bias}
    arrays = {name: value.detach().numpy() for name, value in held.items()}
    np.savez(export.path, facts=np.array(facts.to_json()), **arrays)
    return facts


@pytest.fixture(params=[Linear, Proving])
def kind(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A target that was registered, by the class of its runtime."""
    runtime = request.param
    target = Target(
        "numpy", suffix=".npz", runtime="numpy", write=write, open=runtime, leaves_float=True
    )
    register_target(target)
    runtime.opened = 0
    yield runtime
    del _TARGETS["numpy"]


def test_a_new_target_is_written_opened_and_checked(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).eval()
    x = torch.randn(8, 3, 8, 8)
    own = quietvit.quantize(model, EXACT, x, progress=False)
    config = {"mean": [0.5] * 3, "std": [0.5] * 3}
    artifact = quietvit.export(own, tmp_path / "model.npz", preprocessing=config, labels="abcde")
    assert artifact.size == artifact.path.stat().st_size
    runtime = open_runtime(artifact.path)
    assert isinstance(runtime, kind)
    assert runtime.facts == artifact.facts
    np.testing.assert_allclose(runtime(x.numpy()), own(x).detach().numpy(), atol=1e-4)
    picture = np.zeros((20, 30, 3), np.uint8)
    assert quietvit.predict(artifact.path, picture, top=1)[0].label in set("abcde")
    with pytest.raises(QuietvitError, match=r"model\.npz exists already"):
        quietvit.export(own, artifact.path)
    for setting in ({"signed": True}, {"opset": 20}):
        with pytest.raises(QuietvitError, match="has no meaning for numpy"):
            quietvit.export(own, tmp_path / "other.npz", **setting)
    with pytest.raises(QuietvitError, match="runtime 'openvino' does not run"):
        open_runtime(artifact.path, "openvino")
    if kind is Linear:
        with pytest.raises(QuietvitError, match=r"model\.npz cannot be checked"):
            artifact.check(own, x)
        return
    found = quietvit.check(runtime, own, x)
    assert found.ok
    assert found.classes is not None
    assert found.classes.agreement == 100
    assert (found.proof.integer_share, found.agreements, found.speeds) == (0, (), ())
    assert any("none is compared" in note for note in found.notes)
    with pytest.raises(QuietvitError, match="is already open"):
        quietvit.check(runtime, own, x, threads=1)


def test_the_commands_take_a_new_target(
    kind: Any, qvit: Path, photo: Path, table: Path, tmp_path: Path
) -> None:
    done = run("export", qvit, "--to", "numpy")
    assert done.exit_code == 0, done.output
    path = qvit.with_suffix(".npz")
    assert path.is_file()
    for command in (("predict", path, photo), ("evaluate", path, "--images", table)):
        done = run(*command)
        assert done.exit_code == 0, done.output
    kind.opened = 0
    check = ("check", path, "--against", qvit, "--images", table)
    if kind is Linear:
        assert "cannot be checked" in refused(run(*check))
    else:
        done = run(*check, "--json", tmp_path / "check.json")
        assert "integers   0.00 %" in done.output
    assert kind.opened == 1
    assert "does not end in .npz" in refused(run("export", qvit, "--to", "numpy", "-o", "a.bin"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"suffix": ".onnx"}, "onnx already has the suffix '.onnx'"),
        ({"name": "torchao"}, "torchao already has the name 'torchao'"),
        ({"runtime": "onnxruntime"}, "give numpy another runtime"),
        ({"suffix": "npz"}, "must begin with a dot"),
        ({"settings": frozenset({"batch"})}, "choose among opset, signed"),
    ],
)
def test_a_target_that_cannot_be_registered(changes: dict[str, Any], match: str) -> None:
    fields: dict[str, Any] = {"name": "numpy", "suffix": ".npz", "runtime": "numpy"} | changes
    before = dict(_TARGETS)
    with pytest.raises(QuietvitError, match=match):
        register_target(Target(write=write, open=Linear, **fields))
    assert before == _TARGETS


def test_what_every_target_keeps(tmp_path: Path) -> None:
    """The artifact's facts are those in the file, and the suffix names the target."""
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit", img_size=32).eval(), torch.randn(2, 3, 32, 32)
    own = quietvit.quantize(model, quietvit.RTN(), x, progress=False)
    for target in _TARGETS.values():
        for package in (*target.needs, target.runtime):
            pytest.importorskip(package)
        path = tmp_path / f"model{target.suffix}"
        artifact = quietvit.export(own, path)
        assert artifact.facts == open_runtime(path).facts
        assert target_of(path) is target
        with pytest.raises(QuietvitError, match="exists already"):
            quietvit.export(own, path)
        if not target.settings:
            with pytest.raises(QuietvitError, match=r"leave out opset \(--opset\)"):
                quietvit.export(own, path, opset=20, force=True)
    with pytest.raises(QuietvitError, match="cannot be checked"):
        quietvit.check(tmp_path / "model.torchao", own, x)
