"""The check: it says ok where all is kept, and finds each way in which a file can lie."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quietvit
from deployment_cases import exported, pictures, quantized
from quietvit import QuietvitError
from quietvit.deployment import comparing, open_runtime, processor
from quietvit.deployment.comparing import Classes, compare_classes
from quietvit.deployment.for_onnx.session import EXACT, open_session
from quietvit.deployment.outputs import Output
from quietvit.deployment.proof import prove

onnx = pytest.importorskip("onnx")


def changed(tmp_path: Path, change: Any, model: str = "vit") -> Path:
    """A copy of an exported file whose graph ``change`` was let loose on."""
    content = onnx.load(exported(model).path)
    change(content)
    path = tmp_path / "changed.onnx"
    onnx.save(content, path)
    return path


def labelled(model: str, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    x = pictures(model, count)
    with torch.no_grad():
        return [(x, quantized(model)(x).argmax(-1))]


def test_a_file_that_keeps_what_it_says(tmp_path: Path) -> None:
    found = exported("vit").check(quantized("vit"), labelled("vit"), seconds=0.1, threads=1)
    assert found.ok, found.failures
    assert found.proof.integer_share == 1
    assert found.classes.images == 8
    assert found.classes.agreement == found.classes.top1 == 100
    assert [speed.batch for speed in found.speeds] == [1, 8]
    assert all(speed.repeats >= 5 and speed.integer_ms > 0 for speed in found.speeds)
    assert all(s.ratio_low <= s.ratio <= s.ratio_high for s in found.speeds)
    text = str(found)
    assert "100.00 % of the multiply-accumulates" in text
    assert "MatMulIntegerToFloat" in text
    written = json.loads(found.to_json(tmp_path / "check.json").read_text())
    assert written["ok"] is True
    assert len(written["products"]) == len(quantized("vit").trace.matmuls)
    assert written["classes"]["top1"] == 100


def test_a_product_that_a_runtime_computes_in_float_is_found(tmp_path: Path) -> None:
    """The file still says that the product is integer, but its weight has become a float one."""
    own = quantized("timm-vit")
    lying = [site.name for site in own.trace.matmuls if site.name.endswith("fc1")]

    def spoil(content: Any) -> None:
        graph = content.graph
        stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
        for node in graph.node:
            site = node.name.removesuffix(":product")
            if site not in lying:
                continue
            values = stored[f"{site}:weight:codes"] * stored[f"{site}:weight:scale"]
            graph.initializer.append(onnx.numpy_helper.from_array(values, f"{site}:float"))
            node.input[1] = f"{site}:float"
        unread = {f"{site}:weight:values" for site in lying}
        for node in [node for node in graph.node if node.name in unread]:
            graph.node.remove(node)

    path = changed(tmp_path, spoil, "timm-vit")
    runtime = open_runtime(path, threads=1)
    proof = prove(runtime, runtime.facts)
    assert sorted(ran.product for ran in proof.broken) == sorted(lying)
    assert all("MatMul" in ran.operator and ran.reason for ran in proof.broken)
    assert proof.integer_share < 1
    found = quietvit.check(path, own, pictures("timm-vit"), seconds=0, threads=1)
    assert not found.ok
    assert sum("ran in float" in line for line in str(found).splitlines()) == len(lying)


def test_the_model_given_stays_as_it_is(tmp_path: Path) -> None:
    own = copy.deepcopy(quantized("vit")).train()
    modes = {name: module.training for name, module in own.named_modules()}
    artifact = quietvit.export(own, tmp_path / "model.onnx")
    found = artifact.check(own, pictures("vit"), seconds=0)
    assert found.ok, found.failures
    assert {name: module.training for name, module in own.named_modules()} == modes


def test_an_artifact_stands_for_its_file() -> None:
    artifact = exported("vit")
    assert quietvit.check(artifact, quantized("vit"), pictures("vit"), seconds=0).ok
    picture = np.zeros((32, 32, 3), np.uint8)
    assert quietvit.predict(artifact, picture) == quietvit.predict(artifact.path, picture)


def test_one_wrong_weight_is_found(tmp_path: Path) -> None:
    def spoil(content: Any) -> None:
        entry = next(i for i in content.graph.initializer if i.name.endswith("weight:codes"))
        array = onnx.numpy_helper.to_array(entry).copy()
        array.flat[0] = array.flat[0] - 1 if array.flat[0] > 0 else array.flat[0] + 1
        entry.CopyFrom(onnx.numpy_helper.from_array(array, entry.name))

    found = quietvit.check(changed(tmp_path, spoil), quantized("vit"), pictures("vit"), seconds=0)
    wrong = [agreement for agreement in found.agreements if not agreement.equal]
    assert len(wrong) == 1
    assert wrong[0].wrong == 0
    assert wrong[0].off > 0
    assert not found.ok


def test_a_wrong_scale_of_activations_is_found(tmp_path: Path) -> None:
    def spoil(content: Any) -> None:
        entry = next(i for i in content.graph.initializer if i.name.endswith("left:scale"))
        array = onnx.numpy_helper.to_array(entry) * np.float32(1.01)
        entry.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), entry.name))

    found = quietvit.check(changed(tmp_path, spoil), quantized("vit"), pictures("vit"), seconds=0)
    assert [a.wrong > 0 for a in found.agreements if not a.equal] == [True]


@pytest.mark.parametrize(
    ("classes", "ok"),
    [
        (Classes(1000, 995, 990), True),
        (Classes(1000, 985, 999), False),  # below 99 %, and the model itself is steady
        (Classes(1000, 945, 950), True),  # its own roundings move it as much
        (Classes(1000, 850, 950), False),
        (Classes(1000, 1000, 1000, 700, 703, 3), True),
        (Classes(1000, 995, 1000, 700, 705, 5), False),
        (Classes(1000, 960, 950, 700, 705, 25), True),  # 15 against 10 is chance
        (Classes(8, 8, 8), True),
        (Classes(8, 2, 8), False),
    ],
)
def test_classes_are_held_to_what_chance_allows(classes: Classes, ok: bool) -> None:
    assert (not classes.failures) is ok


def test_logits_of_two_correct_computations_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why classes are not held to 99 % alone: a disturbance of 1e-6 grows to quantization's size.

    Where it does not, ``steady`` is all images.
    """
    own, x = quantized("vit"), pictures("vit", 16)
    loaded = open_runtime(exported("vit").path)
    found = compare_classes(loaded, own, [(x, None)], Output())
    assert found.images == 16
    assert found.right is None
    monkeypatch.setattr(comparing, "DISTURBANCE", 0.5)
    moved = compare_classes(loaded, own, [(x, None)], Output())
    assert moved.steady < found.steady


@pytest.mark.parametrize(
    ("vnni", "told"), [(False, "has no VNNI"), (None, "is unknown whether"), (True, None)]
)
def test_sessions_that_are_kept_exact_are_told(
    vnni: bool | None, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "vnni", lambda: vnni)
    found = quietvit.check(exported("vit").path, quantized("vit"), pictures("vit"), seconds=0)
    assert found.ok or vnni, found.failures
    notes = [note for note in found.notes if "x64quantprecision" in note]
    assert [told in note for note in notes] == [True] * (told is not None)  # type: ignore[operator]


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, x = quantized("vit"), pictures("vit")
    whole = exported("vit").path
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(QuietvitError, match=r"cut\.onnx.*truncated"):
        quietvit.check(cut, own, x)
    foreign = changed(tmp_path, lambda content: content.ClearField("metadata_props"))
    with pytest.raises(QuietvitError, match="was not exported by quietvit"):
        quietvit.check(foreign, own, x)

    def newer(content: Any) -> None:
        content.metadata_props[0].value = content.metadata_props[0].value.replace(
            '"version": 2', '"version": 9', 1
        )

    with pytest.raises(QuietvitError, match="version 9"):
        quietvit.check(changed(tmp_path, newer), own, x)

    def opset(content: Any) -> None:
        content.opset_import[0].version = 99

    with pytest.raises(QuietvitError, match="opset"):
        quietvit.check(changed(tmp_path, opset), own, x)
    with pytest.raises(QuietvitError, match="does not exist"):
        quietvit.check(tmp_path / "absent.onnx", own, x)
    with pytest.raises(QuietvitError, match="does not end in"):
        quietvit.check(Path(__file__), own, x)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(QuietvitError, match=r"onnxruntime cannot be imported.*quietvit\[onnx\]"):
        quietvit.check(whole, own, x)


def test_bad_companions() -> None:
    path = exported("vit").path
    with pytest.raises(QuietvitError, match=r"3 x 32 x 32"):
        quietvit.check(path, quantized("vit"), torch.randn(2, 3, 48, 48), seconds=0)
    with pytest.raises(QuietvitError, match="another model"):
        quietvit.check(path, quantized("timm-vit"), pictures("vit"), seconds=0)
    other = quantized("vit", head_bits=None, exclude="*fc1")
    with pytest.raises(QuietvitError, match="does not have two quantizers"):
        quietvit.check(path, other, pictures("vit"), seconds=0)
    with pytest.raises(QuietvitError, match="no images"):
        quietvit.check(path, quantized("vit"), [], seconds=0)
    with pytest.raises(QuietvitError, match="float tensors"):
        quietvit.check(path, quantized("vit"), torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(QuietvitError, match="does not run"):
        quietvit.check(path, quantized("vit"), pictures("vit"), runtime="tensorrt")
    with pytest.raises(QuietvitError, match="one for each"):
        quietvit.check(path, quantized("vit"), [(pictures("vit"), torch.zeros(3))], seconds=0)
    with pytest.raises(QuietvitError, match="VisionTransformer is not quantized"):
        quietvit.check(path, quantized("vit").model, pictures("vit"))  # type: ignore[arg-type]


class Bare(nn.Module):
    """Products without biases, one feeding the next, a convolution that overlaps, an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.a, self.b = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5, bias=False)
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        scores = torch.einsum("bqd,bkd->bqk", self.q(x), self.k(x))
        x = x + scores.softmax(-1) @ self.v(x)
        x = x + self.b(self.a(x))
        x = x + (x.mean(-1, keepdim=True) * self.gain).sum(-1, keepdim=True)
        return self.head(self.norm(x).mean(1))


@pytest.mark.usefixtures("sessions")
def test_what_is_written_otherwise_is_exact_and_not_claimed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    own = quietvit.quantize(Bare().eval(), quietvit.RTN(), x)
    artifact = quietvit.export(own, tmp_path / "bare.onnx")
    runtime = open_runtime(artifact.path)
    assert [output.name for output in runtime.session.get_outputs()] == ["logits"]  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted = own(x).numpy()
    assert np.linalg.norm(runtime(x.numpy()) - wanted) < 0.05 * np.linalg.norm(wanted)
    found = artifact.check(own, x, seconds=0)
    assert found.ok, found.failures
    unclaimed = {p.name: p.why_float or "" for p in artifact.facts.products if p.why_float}
    assert set(unclaimed) == {"stem", "query_key"}
    assert "convolution" in unclaimed["stem"]
    assert len(found.agreements) == len(artifact.facts.products) - 2
    assert any("2 products" in note for note in found.notes)


@pytest.mark.parametrize(
    ("vnni", "exact", "asked"),
    [
        *((False, None, True), (None, None, True), (True, None, False)),
        *((True, True, True), (False, False, False)),
    ],
)
def test_sessions_are_exact_where_the_processor_would_saturate(
    vnni: bool | None, exact: bool | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the others it costs speed: the products would no longer be of the instruction's kind."""
    monkeypatch.setattr(processor, "vnni", lambda: vnni)
    options = open_session(exported("vit").path, exact=exact).get_session_options()
    key, value = EXACT
    if asked:
        assert options.get_session_config_entry(key) == value
    else:
        with pytest.raises(RuntimeError, match=key):
            options.get_session_config_entry(key)


def test_what_the_processor_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processor.vnni() in (True, False, None)
    for flags, known in (("fpu avx2", False), ("fpu avx_vnni", True), ("fpu amx_int8", True)):
        info = tmp_path / "cpuinfo"
        info.write_text(f"processor : 0\nflags\t\t: {flags}\n")
        monkeypatch.setattr(processor, "Path", lambda _name, info=info: info)
        assert processor.vnni() is known
