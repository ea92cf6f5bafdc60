"""Every form of images and of logits, in front of every consumer of them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quietvit
from quietvit import QuietvitError
from quietvit.data import evaluate
from quietvit.deployment.outputs import output_of
from quietvit.inputs import image_batches
from quietvit.measure import sqnr
from quietvit.outputs import heads, logits_of
from quietvit.quantization import QuantizedModel

X = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % 5
NAMES = list("abcdefg")
LABELLED: dict[str, Callable[[], Any]] = {
    "tuples": lambda: [(X[:3], Y[:3]), (X[3:], Y[3:])],
    "lists": lambda: [[X[:3], Y[:3]], [X[3:], Y[3:]]],
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=3),
    "data set": lambda: TensorDataset(X, Y),
    "singles with labels": lambda: list(zip(X, Y.tolist(), strict=True)),
    "lists of images with labels": lambda: [(list(X[:3]), Y[:3].tolist()), (list(X[3:]), Y[3:])],
    "mappings": lambda: [
        {"pixel_values": X[:3], "labels": Y[:3]},
        {"image": X[3:], "label": Y[3:]},
    ],
    "one mapping": lambda: {"images": X, "label": Y, "names": NAMES},
    "mappings in tuples": lambda: [({"input": X}, Y)],
}
PLAIN: dict[str, Callable[[], Any]] = {
    "tensor": lambda: X,
    "batches": lambda: [X[:3], X[3:3], X[3:]],
    "singles": lambda: list(X),
    "generator": lambda: (image for image in X),
    "lists of images": lambda: [list(X[:3]), list(X[3:])],
    "mixture": lambda: [X[0], X[1], X[2:5], {"x": X[5:6]}, [X[6]]],
}


@pytest.fixture(scope="module")
def own() -> QuantizedModel:
    torch.manual_seed(0)
    return quietvit.quantize(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), quietvit.RTN(), X)


@pytest.fixture(scope="module")
def file(own: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return quietvit.export(own, tmp_path_factory.mktemp("inputs") / "model.onnx").path


@pytest.mark.parametrize("form", [*PLAIN, *LABELLED])
def test_images_in_every_form_for_every_consumer(
    form: str, own: QuantizedModel, file: Path
) -> None:
    def made() -> Any:
        return (PLAIN | LABELLED)[form]()

    read = list(image_batches(made(), 4, labelled=True))
    assert torch.equal(torch.cat([batch.images for batch in read]), X)
    assert max(batch.size for batch in read) <= 4
    labels = [batch.labels for batch in read]
    assert all(y is None for y in labels) if form in PLAIN else torch.equal(torch.cat(labels), Y)
    found = quietvit.diagnose(own.model, made(), pairs=())
    assert found.images == 7
    assert found.sites[0].rms == pytest.approx(float(X.square().mean().sqrt()), rel=1e-4)
    assert sqnr(own.model, own, made()) == pytest.approx(sqnr(own.model, own, X))
    again = quietvit.quantize(own.model, quietvit.RTN(), made(), progress=False)
    assert torch.equal(again.quantizer("1", "input").scale, own.quantizer("1", "input").scale)
    checked = quietvit.check(file, own, made(), seconds=0)
    assert checked.ok, checked.failures
    assert checked.classes.images == 7
    assert (checked.classes.top1 is None) == (form in PLAIN)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        ("folder/", "are a str"),
        (3, "are a int"),
        (X[0], "batch dimension"),
        ([X[0, 0]], r"shape \(8, 8\)"),
        (["a.png"], "an image is a str"),
        ([[X[0], torch.zeros(3, 6, 6)]], r"images of shapes \[\(3, 8, 8\), \(3, 6, 6\)\]"),
        ([{"pixel_values": NAMES}], "batched tensors only"),
        ([(X > 0).int()], "float tensors"),
        ([X[:5], X[5:] / 0], "image 5 holds NaN or inf"),
        ([{"x": X[:2] * torch.nan}], "image 0 holds NaN"),
        ([(X, Y[:3])], r"7 images have labels of shape \(3,\); give one for each"),
        ([(X, NAMES)], "labels are not class numbers"),
    ],
)
def test_what_are_no_images(images: Any, match: str) -> None:
    with pytest.raises(QuietvitError, match=match):
        list(image_batches(images, 4, labelled=True))


def test_a_mapping_without_images_names_its_keys() -> None:
    (batch,) = image_batches({"tokens": torch.zeros(2, 4, 8)}, 4)
    with pytest.raises(QuietvitError, match=r"mapping with tokens \(2, 4, 8\)"):
        _ = batch.images


Named = namedtuple("Named", ["logits", "features"])


@dataclass
class Output:
    logits: Tensor
    loss: None = None


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "list": lambda x: [x],
    "mapping": lambda x: {"logits": x, "features": x[:, :, None]},
    "named tuple": lambda x: Named(x, x[:, :, None]),
    "dataclass": lambda x: Output(x),
    "object": lambda x: SimpleNamespace(logits=x),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_logits_in_every_form_for_every_consumer(form: str) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return OUTPUTS[form](x.flatten(1)[:, :5])

    model, wanted = Wrapped(), X.flatten(1)[:, :5]
    assert torch.equal(logits_of(model(X)), wanted)
    assert [torch.equal(head, wanted) for head in heads(model(X))] == [True]
    assert evaluate(model, [(X, wanted.argmax(1))]) == 100
    for choice in (None, 0, "0"):
        output = output_of(model, (3, 8, 8), choice)
        assert (output.name, output.of_classes) == ("logits", True)
        assert torch.equal(output.of(model(X)), wanted)


def test_what_are_no_logits() -> None:
    two = torch.zeros(2, 5), torch.ones(2, 5)
    assert heads(two) == two
    assert heads({"logits": two}) == two
    for output, match in (
        (two, r"\(2, 5\), \(2, 5\)"),
        (torch.zeros(2, 5, 4, 4), r"\(2, 5, 4, 4\)"),
    ):
        with pytest.raises(QuietvitError, match=rf"{match}, not logits"):
            logits_of(output)
    for nothing in ({"a": two[0], "b": two[1]}, None, (two[0], None), {"scores": two[0]}):
        with pytest.raises(QuietvitError, match="not logits"):
            heads(nothing)
