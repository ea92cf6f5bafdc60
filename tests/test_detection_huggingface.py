"""Laws of transformers' detectors: what they take and give, losses, trace, runs, commands."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import quietvit
from detection_cases import annotated, coco
from detr_cases import KINDS
from method_cases import METHODS, configured
from quietvit import QuietvitError
from quietvit.data import load_weights
from quietvit.deployment import open_runtime
from quietvit.deployment.evaluation import FileDetector
from quietvit.detection import hf_detector, is_detector, predictors
from quietvit.detection.canvas import is_padding
from quietvit.tasks import Detection
from quietvit.train import TrainResult
from quietvit.train.qat import QATConfig, refuse_unfit_sites
from test_cli import refused, run
from test_detection_training import config

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def traced_detr(folders: dict[str, Path]) -> tuple[Any, Tensor, Any]:
    """A DETR, two images with padding on its canvas, and its trace."""
    model = hf_detector(str(folders["detr"])).eval()
    batch = torch.stack([model.transform.fit(image) for image in images()])
    return model, batch, quietvit.trace(model, batch[:1])


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in ((60, 80), (100, 50))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_takes_and_gives_what_torchvisions_do(
    kind: str, folders: dict[str, Path]
) -> None:
    _, _, _, size, stretched = KINDS[kind]
    model = hf_detector(str(folders[kind])).eval()
    assert is_detector(model)
    assert model.transform.size == size
    assert model.transform.stretch is stretched
    with torch.no_grad():
        both = model(images())
        each = [model([image])[0] for image in images()]
    for (height, width), together, alone in zip(((60, 80), (100, 50)), both, each, strict=True):
        assert set(together) == {"boxes", "labels", "scores"}
        assert torch.equal(together["scores"], together["scores"].sort(descending=True).values)
        assert set(together["labels"].tolist()) <= {1, 2}
        assert (together["boxes"][:, 2:] <= torch.tensor([width, height])).all()
        # A batch with padding gives what each image gives alone: the mask works.
        torch.testing.assert_close(together["boxes"], alone["boxes"], atol=2e-3, rtol=1e-3)
    if kind == "detr":
        assert model.class_names == ("disc", "square")
    targets: list[dict[str, Tensor]] = [
        {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    loss = model.train()(images(), targets)["loss"]
    loss.backward()
    assert loss.isfinite()
    with pytest.raises(QuietvitError, match="training needs targets"):
        model(images())


@pytest.mark.parametrize("kind", ["rt_detr", "rf_detr"])
def test_boxes_are_those_of_the_models_own_processor(kind: str, folders: dict[str, Path]) -> None:
    model = hf_detector(str(folders[kind])).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folders[kind])
    image = images()[0]
    with torch.no_grad():
        own = model([image])[0]
        fitted = model.transform([image])[0].tensors
        output = model.model(fitted)
    (theirs,) = processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[(60, 80)]
    )
    assert torch.equal(theirs["scores"], own["scores"])
    assert torch.equal(theirs["labels"] + 1, own["labels"])
    torch.testing.assert_close(
        theirs["boxes"].clamp(min=0), own["boxes"].clamp(min=0), atol=1, rtol=0
    )


@pytest.mark.parametrize("kind", ["detr", "yolos"])
def test_all_products_are_quantized_and_predictors_can_be_kept(
    kind: str, folders: dict[str, Path]
) -> None:
    model = hf_detector(str(folders[kind])).eval()
    kept = dict.fromkeys(predictors(model), 8)
    batch = torch.rand(2, 3, *model.transform.size, generator=torch.Generator().manual_seed(0))
    method = quietvit.RTN(weight_bits=4, activation_bits=4, overrides=kept)
    own = quietvit.quantize(model, method, batch, progress=False)
    assert own.coverage.fraction == 1
    with torch.no_grad():
        assert len(own(images())) == 2
    last = "model.class_labels_classifier" + (".layers.2" if kind == "yolos" else "")
    found: Any = own.quantizer(last, "input")
    assert found.bits == 8
    pairs = {pair.kind for pair in quietvit.find_pairs(model, batch[:1])}
    assert {"mlp", "value_output"} <= pairs


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("detr", ["class_labels_classifier"]),
        ("rf_detr", [*(f"model.enc_out_class_embed.{i}" for i in (0, 1)), "class_embed"]),
    ],
)
def test_another_number_of_classes_starts_the_class_heads_anew(
    kind: str, heads: list[str], folders: dict[str, Path]
) -> None:
    own = hf_detector(str(folders[kind]))
    model = hf_detector(str(folders[kind]), 5, class_names=list("abcde"))
    assert (model.num_classes, model.class_names) == (5, tuple("abcde"))
    before, after = own.model.state_dict(), model.model.state_dict()
    differing = [key for key in before if before[key].shape != after[key].shape]
    assert differing == [f"{head}.{which}" for head in heads for which in ("weight", "bias")]
    same = [key for key in before if key not in differing]
    assert all(torch.equal(before[key], after[key]) for key in same)


def test_a_folder_is_fine_tuned_loaded_and_evaluated(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faster_coco_eval")
    monkeypatch.setenv("COLUMNS", "200")
    boxes = [annotated(i, i, [10, 10, 30, 20], 3 + 4 * (i % 2)) for i in range(1, 5)]
    spec = f"coco:{coco(tmp_path, boxes, pictures=4)},{tmp_path / 'boxes.json'}"
    short = (
        "epochs=2",
        "batch_size=2",
        "num_workers=0",
        "device=cpu",
        "task_settings.size=[64,64]",
    )
    given = [part for setting in short for part in ("-s", setting)]
    call = ["train", "--recipe", "detect_hf_folder", "--model", f"hf:{folders['detr']}"]
    call += ["-s", f"data.dataset={spec}", *given, "--output", str(tmp_path / "run")]
    result = run(*call)
    assert result.exit_code == 0, result.output
    done = TrainResult.read(tmp_path / "run")
    model = done.load_model()
    assert model.class_names == ("disc", "square")
    load_weights(model, done.weights)
    result = run("evaluate", done.output, "--images", f"coco:{tmp_path / 'boxes.json'}")
    assert "AP" in result.output
    again = run("evaluate", f"hf:{folders['detr']}", "--images", f"coco:{tmp_path / 'boxes.json'}")
    assert "AP" in again.output
    assert "decoder.layers.0" in run("pairs", f"hf:{folders['detr']}").output


def test_a_file_finds_the_boxes_of_the_simulated_detector(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = hf_detector(str(folders["yolos"]), class_names=["disc", "square"]).eval()
    batch = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    own = quietvit.quantize(model, "rtn", batch, bits="W8A8", progress=False)
    path = tmp_path / "yolos.onnx"
    artifact = quietvit.export(own, path)
    checked = artifact.check(own, batch, seconds=0)
    assert checked.ok, checked.failures
    assert checked.proof.integer_share == 1
    runtime = open_runtime(path)
    assert (runtime.input_shape[0], runtime.facts.labels) == (None, ("disc", "square"))
    with torch.no_grad():
        simulated = own(images())
    for theirs, ours in zip(FileDetector(runtime)(images()), simulated, strict=True):
        torch.testing.assert_close(theirs["scores"], ours["scores"], atol=1e-3, rtol=0)
        torch.testing.assert_close(theirs["boxes"][0], ours["boxes"][0], atol=0.5, rtol=0)
    boxes = [annotated(i, i, [10, 10, 30, 20], 3 + 4 * (i % 2)) for i in range(1, 3)]
    spec, photo = f"coco:{coco(tmp_path, boxes)}", tmp_path / "images" / "1.png"
    seen = run("predict", path, photo, "--top", "2", "--pictures", tmp_path / "seen")
    assert seen.exit_code == 0, seen.output
    assert seen.output.count(" %  ") == 2
    assert Image.open(tmp_path / "seen" / "1.png").size == Image.open(photo).size
    measured = run("evaluate", path, "--images", spec)
    assert (measured.exit_code, measured.output.startswith("box AP")) == (0, True)
    assert "has nothing to write" in refused(run("predict", path, photo, "--npy", "x.npy"))


def test_a_file_masks_the_padding_of_images_of_other_aspect_ratios(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = hf_detector(str(folders["detr"])).eval()
    fit = model.transform.fit
    fitted = torch.stack([fit(image) for image in images()])
    own = quietvit.quantize(model, "rtn", fitted, bits="W8A8", progress=False)
    checked = quietvit.export(own, tmp_path / "detr.onnx").check(own, fitted, seconds=0)
    assert checked.ok, checked.failures
    runtime = open_runtime(tmp_path / "detr.onnx")
    assert runtime.input_shape[0] is None
    told = {key: value for key, value in runtime.facts.detector.items() if key != "marked"}
    with pytest.raises(QuietvitError, match=r"misplaced\. Export it again"):
        FileDetector(runtime, replace(runtime.facts, detector=told))
    with torch.no_grad():
        simulated, at_once = own(images()), own(fitted)
    for theirs, ours in zip(FileDetector(runtime)(images()), simulated, strict=True):
        torch.testing.assert_close(theirs["scores"], ours["scores"], atol=1e-3, rtol=0)
        torch.testing.assert_close(theirs["boxes"], ours["boxes"], atol=0.5, rtol=0)
    for image, whole, listed in zip(images(), at_once, simulated, strict=True):
        factor = model.transform.factor(*image.shape[-2:])
        torch.testing.assert_close(whole["boxes"] / factor, listed["boxes"], atol=0.5, rtol=0)
    masks: list[Tensor] = []  # an untrained DETR hardly sees its images, so look at its input
    model.model.register_forward_pre_hook(
        lambda _, args, given: masks.append(given["pixel_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(images()), model(fitted)
    assert torch.equal(*masks)
    assert torch.equal(masks[0] == 0, is_padding(fitted))
    assert all(0 < float(mask.double().mean()) < 1 for mask in masks[0])


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("rt_detr", (64, 80), r"64 x 80 .* the strides of the model\. Give multiples of 32"),
        ("deimv2", (72, 72), "multiples of 32, such as 64 x 64"),
        ("lw_detr", (72, 64), r"windows of the backbone \(2 x 2\)\. Give multiples of 16"),
        ("rf_detr", (72, 72), "multiples of 16, such as 64 x 64"),
        ("rf_detr", (64, 96), "not square, such as 64 x 96"),
    ],
)
def test_a_canvas_that_the_model_cannot_take_is_refused(
    kind: str, size: tuple[int, int], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(QuietvitError, match=message):
        hf_detector(str(folders[kind]), size=size, untrained=True)


@pytest.mark.parametrize(
    ("kind", "fits"),
    [("rt_detr", True), ("yolos", True), ("d_fine", False), ("lw_detr", False)],
)
def test_only_detectors_with_the_same_products_in_training_take_qat(
    kind: str, fits: bool, folders: dict[str, Path]
) -> None:
    model, images = hf_detector(str(folders[kind])).eval(), torch.rand(2, 3, 64, 64)
    target = {"boxes": torch.tensor([[12.0, 8.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    refuses = nullcontext() if fits else pytest.raises(QuietvitError, match="other products")
    with refuses:
        refuse_unfit_sites(
            QATConfig(bits="W8A8"), model, images[:1], lambda model: model(images, [target] * 2)
        )
    if fits:
        quantized = quietvit.quantize(model, "rtn", images, bits="W8A8", progress=False).train()
        quantized(images, [target] * 2)["loss"].backward()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_a_detr(name: str, traced_detr: tuple[Any, Tensor, Any]) -> None:
    model, batch, trace = traced_detr
    method = configured(name, **({"iterations": 1} if name in ("brecq", "qdrop") else {}))
    own = quietvit.quantize(model, method, batch, trace=trace, progress=False)
    assert own.coverage.fraction > 0.8  # QwT adds products in float
    with torch.no_grad():
        found, expected = own(images()), model(images())
    assert found.logits.isfinite().all()
    error = (found.logits - expected.logits).norm() / expected.logits.norm()
    assert 0 < error < 0.5


def test_settings_of_another_kind_of_detector_are_refused(folders: dict[str, Path]) -> None:
    name = {"name": f"hf:{folders['yolos']}"}
    with pytest.raises(QuietvitError, match=r"leave task_settings\.channels out"):
        Detection(config("x", model=name, task_settings={"channels": 16})).create_model(
            None, untrained=True
        )
    with pytest.raises(QuietvitError, match="is not an object detector"):
        hf_detector(str(_classifier(folders)))
    result = run("evaluate", name["name"], "--weights", "w.safetensors", "--images", "coco:/x.json")
    assert "leave --weights out" in refused(result)


def _classifier(folders: dict[str, Path]) -> Path:
    from huggingface_cases import classifier

    folder = folders["yolos"].parent / "classifier"
    classifier("Swin", 2).save_pretrained(folder)
    return folder
