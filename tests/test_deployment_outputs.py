"""Encoders and backbones: which tensor is exported, compared and predicted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import quietvit
from deployment_cases import pictures
from quietvit import QuietvitError
from quietvit.deployment import Embedding, comparing, load_torchao, open_runtime
from quietvit.deployment.comparing import Features
from quietvit.deployment.facts import Facts
from quietvit.deployment.outputs import output_of, unused_products
from quietvit.deployment.queries import Choosing, paired
from quietvit.outputs import tensors_of
from test_cli import refused, run

SHAPE = (3, 32, 32)


class Encoder(nn.Module):
    """Two linears; ``give`` makes the output of their values."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.first = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 16)
        self.norm, self.second = nn.LayerNorm(16), nn.Linear(16, 6)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        tokens = self.norm(self.first(self.patches(x).flatten(2).transpose(1, 2)))
        return self.give(tokens, self.second(tokens.mean(1)))


def quantized(give: Callable[[Tensor, Tensor], Any]) -> quietvit.quantization.QuantizedModel:
    """Weights of 7 bits, which OpenVINO does not saturate on any processor."""
    method = quietvit.RTN(weight_bits=7, patch_embed_bits=7, head_bits=7)
    return quietvit.quantize(Encoder(give).eval(), method, pictures("vit"), progress=False)


def both(tokens: Tensor, pooled: Tensor) -> dict[str, Any]:
    return {"last_hidden_state": tokens, "pooler_output": pooled, "masks": None}


def chosen(tokens: Tensor, pooled: Tensor, spread: float = 1.0) -> Tensor:
    """The 6 tokens of the highest score, as a detector chooses its queries."""
    places = (spread * tokens[..., 0]).topk(6, dim=1).indices
    return tokens.gather(1, places[..., None].expand(len(tokens), 6, tokens.shape[-1]))


@pytest.mark.parametrize(
    ("give", "wanted", "name", "kind", "shape"),
    [
        (lambda t, p: p, None, "logits", "classes", (6,)),
        (lambda t, p: p, "embeddings", "embeddings", "features", (6,)),
        (lambda t, p: t, None, "features", "features", (16, 16)),
        (both, None, "pooler_output", "features", (6,)),
        (both, "last_hidden_state", "last_hidden_state", "features", (16, 16)),
        (both, 0, "last_hidden_state", "features", (16, 16)),
        (both, "1", "pooler_output", "features", (6,)),
        (lambda t, p: {"logits": p, "hidden_states": (t, t)}, None, "logits", "classes", (6,)),
        (lambda t, p: {"maps": [t, t.mT]}, "maps.1", "maps.1", "features", (16, 16)),
        (lambda t, p: (t, p), 1, "1", "features", (6,)),
        (lambda t, p: [t], None, "features", "features", (16, 16)),
        (chosen, None, "features", "queries", (6, 16)),
    ],
)
def test_the_rule_of_choice(
    give: Any, wanted: Any, name: str, kind: str, shape: tuple[int, ...]
) -> None:
    found = output_of(Encoder(give).eval(), SHAPE, wanted)
    assert (found.name, found.kind, found.shape) == (name, kind, shape)


def test_what_cannot_be_chosen_lists_what_there_is() -> None:
    pair = Encoder(lambda t, p: (t, p)).eval()
    for wanted in (None, "nothing", 2, -1, True):
        with pytest.raises(QuietvitError, match=r"0: 0 \(B, 16, 16\); 1: 1 \(B, 6\)"):
            output_of(pair, SHAPE, wanted)
    with pytest.raises(QuietvitError, match="not the batch"):
        output_of(Encoder(lambda t, p: t.flatten(0, 1)).eval(), SHAPE)
    with pytest.raises(QuietvitError, match="returns no tensor"):
        output_of(Encoder(lambda t, p: None).eval(), SHAPE)
    with pytest.raises(QuietvitError, match="leave out labels"):
        quietvit.export(quantized(lambda t, p: t), "never.onnx", labels=["a"])


def test_a_timm_model_without_classes_gives_an_embedding() -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=0).eval()
    found = output_of(model, SHAPE)
    assert (found.name, found.kind) == ("embeddings", "features")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    own = quantized(both)
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    quietvit.export(own, path, preprocessing=preprocessing)
    quietvit.export(own, path.with_suffix(".xml"), preprocessing=preprocessing)
    return own, path


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_an_encoder_is_proven_and_compared_by_its_values(
    suffix: str, encoder: tuple[Any, Path]
) -> None:
    own, path = encoder[0], encoder[1].with_suffix(suffix)
    if suffix == ".xml":
        pytest.importorskip("openvino")
    found = quietvit.check(path, own, pictures("vit"), seconds=0.01, batches=(1,))
    assert found.ok, found.failures
    assert found.classes is None
    assert found.features is not None
    assert found.features.images == 8
    assert found.features.cosine > 0.99
    assert all(agreement.equal for agreement in found.agreements)
    assert len(found.agreements) == 3
    assert "cosine" in str(found)
    content = json.loads(found.to_json(path.with_suffix(".json")).read_text())
    assert content["classes"] is None
    assert content["features"]["images"] == 8


def test_queries_chosen_by_score_are_compared_in_pairs(tmp_path: Path) -> None:
    own, path = quantized(chosen), tmp_path / "queries.onnx"
    quietvit.export(own, path)
    assert open_runtime(path).input_shape[0] is None  # len(tokens) did not fix the batch
    found = quietvit.check(path, own, pictures("vit"), seconds=0)
    assert found.ok, found.failures
    assert found.features is not None
    assert found.features.queries is not None
    assert found.features.queries.comparable
    assert "they are paired" in str(found)
    with torch.no_grad():
        own.model.norm.bias.add_(1.0)
    assert quietvit.check(path, own, pictures("vit"), seconds=0).features.failures  # type: ignore[union-attr]


def test_queries_whose_scores_tie_are_not_compared(tmp_path: Path) -> None:
    own, path = quantized(lambda t, p: chosen(t, p, 0.0)), tmp_path / "tied.onnx"
    quietvit.export(own, path)
    found = quietvit.check(path, own, pictures("vit"), seconds=0)
    assert found.ok, found.failures
    assert found.features is not None
    assert found.features.queries is not None
    assert found.features.queries.tied == 1
    assert "outputs are not compared: 100 % of the queries" in str(found)


def test_pairing_finds_the_order_and_ties_are_counted_to_the_next_score() -> None:
    rows = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 1, 0, 4, 2])
    found, moved = paired(rows[:, order], rows)
    assert torch.equal(found, rows)
    assert moved == 0.8
    scores = torch.tensor([[4.0, 3.0, 2.0, 2.0]])
    for count, tied in ((1, 0), (2, 0), (3, 1), (4, 1)):
        with Choosing() as choosing:
            scores.mT.topk(count, dim=0)
            torch.topk(torch.arange(9), 4)  # places, not scores
        assert (choosing.taken, choosing.chosen) == ({count}, min(count, 3))
        assert choosing.tied == tied


def test_another_embedding_is_found(
    encoder: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy.deepcopy(encoder[0])
    with torch.no_grad():
        own.model.second.bias.add_(1.0)
    found = quietvit.check(encoder[1], own, pictures("vit"), seconds=0)
    assert any("relative L2" in failure for failure in found.failures)
    assert Features(8, 0.2, 0.3, 0.15, 0.98, 0.97).failures == ()
    assert Features(8, 0.2, 0.3, 0.01, 0.98, 0.97).failures
    assert comparing.TIMES_OWN >= 1


def test_predict_and_the_command_give_the_embedding(
    encoder: tuple[Any, Path], tmp_path: Path
) -> None:
    photo, path = tmp_path / "photo.png", encoder[1]
    Image.new("RGB", (40, 50), (200, 30, 90)).save(photo)
    found = quietvit.predict(path, photo)
    assert isinstance(found, Embedding)
    assert found.values.shape == (6,)
    done = run("predict", path, photo, photo, "--npy", tmp_path / "e.npy", "--json", tmp_path / "e")
    assert done.exit_code == 0, done.output
    assert "pooler_output, 6 values" in done.output
    assert np.array_equal(np.load(tmp_path / "e.npy"), np.stack([found.values] * 2))
    written = json.loads((tmp_path / "e").read_text())
    assert written[1]["values"] == pytest.approx(found.values.tolist())
    assert "has no top-1" in refused(run("evaluate", path, "--images", "embedded:digits"))


def test_products_behind_a_feature_map_are_not_claimed(tmp_path: Path) -> None:
    own = quantized(both)
    artifact = quietvit.export(own, tmp_path / "map.onnx", output="last_hidden_state")
    assert artifact.facts.unused == ("second",)
    assert [product.name for product in artifact.facts.products] == ["patches", "first"]
    found = artifact.check(own, pictures("vit"), seconds=0)
    assert found.ok, found.failures
    assert found.proof.integer_share == 1
    assert "do not enter the output last_hidden_state" in str(artifact)


@pytest.mark.parametrize(
    "give",
    [
        lambda t, p: {"logits": chosen(t, p), "x": p.argmax(1)},
        lambda t, p: {"logits": t.detach().mean(1), "x": p},
        lambda t, p: {"logits": torch.where(t > 0, 1.0, -1.0).mean(1), "x": p},
        lambda t, p: {"logits": t.mean(1).index_add(0, (p[:1, 0] > 9).long(), t[:1, 0]), "x": p},
        lambda t, p: {"logits": torch.zeros_like(p).copy_(t[:, 0, :6]), "x": p},
    ],
    ids=["topk", "detach", "where", "index", "in-place"],
)
def test_products_enter_an_output_through_choices_without_a_gradient(
    give: Callable[[Tensor, Tensor], Any], request: pytest.FixtureRequest
) -> None:
    own = quantized(give)
    expected = () if "index" in request.node.name else ("second",)
    assert unused_products(own, output_of(own, own.input_shape)) == expected


def test_torchao_gives_the_same_tensor(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    own, x = quantized(both), pictures("vit", 2)
    quietvit.export(own, tmp_path / "folder", to="torchao", output="last_hidden_state")
    made = load_torchao(tmp_path / "folder", Encoder(both))
    assert torch.equal(made(x)["last_hidden_state"], made.model(x)["last_hidden_state"])
    content = json.loads((tmp_path / "folder" / "torchao.json").read_text())
    assert content["facts"]["output"]["name"] == "last_hidden_state"


@pytest.mark.parametrize(
    ("config", "model", "name"),
    [
        ("SiglipVisionConfig", "SiglipVisionModel", "pooler_output"),
        ("CLIPVisionConfig", "CLIPVisionModelWithProjection", "image_embeds"),
    ],
)
def test_towers_of_transformers_are_saved_and_exported(
    config: str, model: str, name: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    settings = getattr(transformers, config)(
        **sizes, image_size=32, patch_size=8, num_hidden_layers=1
    )
    tower = getattr(transformers, model)(settings).eval()
    x = pictures("vit")
    own = quietvit.quantize(tower, quietvit.RTN(), x, progress=False)
    again = quietvit.load(own.save(tmp_path / "tower.qvit"))  # without model=
    with torch.no_grad():
        assert torch.equal(tensors_of(again(x))[name], tensors_of(own(x))[name])
    artifact = quietvit.export(again, tmp_path / "tower.onnx")
    assert artifact.facts.output.name == name
    assert artifact.facts.labels is None
    session = open_runtime(artifact.path).session  # type: ignore[attr-defined]
    assert [output.name for output in session.get_outputs()] == [name]
    found = artifact.check(own, x, seconds=0)
    assert found.ok, found.failures


def test_files_of_version_1_are_read() -> None:
    text = (
        '{"format": "quietvit exported model", "version": 1, "method": "rtn W8A8", "input_shape": '
        '[3, 8, 8], "products": [], "total_macs": 0, "preprocessing": null, "labels": null, '
        '"notes": [], "uniform": true, "versions": {}}'
    )
    facts = Facts.from_json(text, Path("old.onnx"))
    assert facts.replaced == "uniform"
    assert facts.output.of({"logits": torch.ones(1)}).item() == 1
    assert Facts.from_json(facts.to_json(), Path("new.onnx")) == facts
