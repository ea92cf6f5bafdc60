"""``quietvit export``, ``check`` and ``predict`` as a user types them; preprocessing travels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import quietvit
from deployment_cases import exported, quantized
from huggingface_cases import HIDDEN, saved
from quietvit import QuietvitError
from quietvit.data import create_model, evaluation_transform
from quietvit.deployment import open_runtime
from test_cli import MODEL, SIZE, refused, run, table

assert table  # the fixture of test_cli


@pytest.fixture
def qvit(tmp_path: Path, table: Path) -> Path:
    path = tmp_path / "tiny.qvit"
    done = run(
        "quantize", MODEL, *SIZE, "--classes", 2, "--calibration", table, "--count", 6, "-o", path
    )
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_from_a_qvit_to_a_proven_file_and_a_prediction(
    qvit: Path, table: Path, photo: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("left\nright\n")
    done = run("export", qvit, "--labels", labels)
    assert done.exit_code == 0, done.output
    written = qvit.with_suffix(".onnx")
    assert str(written) in done.output
    assert "exists already" in refused(run("export", qvit))
    assert run("export", qvit, "--labels", labels, "--force").exit_code == 0

    out = tmp_path / "check.json"
    arguments = ("--against", qvit, "--images", table, "--seconds", 0.05, "--json", out)
    done = run("check", written, *arguments)
    assert done.exit_code == 0, done.output
    assert "100.00 % of the multiply-accumulates" in done.output
    assert json.loads(out.read_text())["ok"] is True

    done = run("predict", written, photo, "--top", 2)
    assert done.exit_code == 0, done.output
    assert {line.split()[-1] for line in done.output.splitlines()[1:]} == {"left", "right"}

    flat = tmp_path / "flat"
    flat.mkdir()
    photo.rename(flat / photo.name)
    done = run("check", written, "--against", qvit, "--images", flat, "--seconds", 0)
    assert done.exit_code == 0, done.output
    assert "no labels, so top-1 is not compared" in done.stderr
    for command in (
        ("quantize", MODEL, *SIZE, "--count", 1, "--calibration", flat, "-o", tmp_path / "b.qvit"),
        ("diagnose", MODEL, *SIZE, "--count", 1, "--images", flat / photo.name),
    ):
        done = run(*command)
        assert done.exit_code == 0, done.output
    assert "labels" in refused(run("evaluate", qvit, "--images", flat))


def test_predict_goes_on_after_a_bad_image_and_takes_folders_and_patterns(
    tmp_path: Path, photo: Path
) -> None:
    path = exported("vit").path
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "more").mkdir()
    photo.with_name("z.gif").write_bytes(photo.read_bytes())
    for given in (tmp_path, f"{tmp_path}/*.*"):
        done = run("predict", path, given, tmp_path / "absent.jpg", photo, "--top", 1)
        assert done.exit_code == 1, done.output
        shown = [line for line in done.stdout.splitlines() if line.startswith("/")]
        assert shown == [str(photo), str(tmp_path / "z.gif"), str(photo)]
        complaints = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(complaints) == 2
        assert f"{tmp_path}/a.png could not be decoded: it is empty" in complaints[0]
        assert "absent.jpg does not exist" in complaints[1]
    assert run("predict", path, photo).exit_code == 0
    done = run("predict", path, tmp_path / "more")
    assert done.exit_code == 1
    assert "holds no images" in done.stderr


def test_predict_takes_files_images_arrays_and_lists_of_them(photo: Path) -> None:
    runtime = open_runtime(exported("vit").path)
    image = Image.open(photo)
    wanted = quietvit.predict(runtime, photo, top=2)
    for given in (str(photo), image, np.asarray(image), np.asarray(image) / 255):
        assert quietvit.predict(runtime, given, top=2) == wanted
    assert quietvit.predict(runtime, [photo, image], top=2) == [wanted, wanted]
    for given, told in (
        (torch.zeros(3, 8, 8), r"is a Tensor; .*open_runtime"),
        (np.zeros((3, 8, 8), np.uint8), r"argument 'image' is an array of shape \(3, 8, 8\)"),
        (None, "is a NoneType"),
        (photo.parent, "is a folder; give its images"),
        ([photo, photo.with_name("b.png")], r"b\.png does not exist"),
    ):
        with pytest.raises(QuietvitError, match=told):
            quietvit.predict(runtime, given)  # type: ignore[call-overload]


def test_a_broken_claim_ends_with_exit_code_1(qvit: Path, table: Path) -> None:
    import onnx

    assert run("export", qvit).exit_code == 0
    path = qvit.with_suffix(".onnx")
    content = onnx.load(path)
    entry = next(i for i in content.graph.initializer if i.name.endswith("weight:codes"))
    array = onnx.numpy_helper.to_array(entry).copy()
    array.flat[0] = -array.flat[0] or 1
    entry.CopyFrom(onnx.numpy_helper.from_array(array, entry.name))
    onnx.save(content, path)
    done = run("check", path, "--against", qvit, "--images", table, "--seconds", 0)
    assert done.exit_code == 1, done.output
    assert "FAILED" in done.output


def test_a_simulated_method_needs_as_uniform(tmp_path: Path, table: Path) -> None:
    path = tmp_path / "log.qvit"
    quantize = ("quantize", MODEL, *SIZE, "--calibration", table, "--count", 6)
    assert run(*quantize, "--method", "repq-vit", "-o", path).exit_code == 0
    assert "--as uniform" in refused(run("export", path))
    done = run("export", path, "--as", "uniform")
    assert done.exit_code == 0, done.output
    assert "levels fall together" in done.output


def test_wrong_words(qvit: Path, tmp_path: Path) -> None:
    assert "choose onnx" in refused(run("export", qvit, "--to", "tensorrt"))
    assert "opset 17" in refused(run("export", qvit, "--opset", 17))
    labels = refused(run("export", qvit, "--labels", tmp_path / "absent.txt"))
    assert "absent.txt" in labels


def test_preprocessing_arguments_and_labels_travel(tmp_path: Path, photo: Path) -> None:
    """What a recipe says of its model is in the .qvit and in the exported file."""
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224",
        4,
        preprocessing={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.7},
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=1,
        num_heads=2,
    ).eval()
    transform = evaluation_transform(model)
    x = transform(Image.open(photo).convert("RGB")).unsqueeze(0)
    own = quietvit.quantize(model, quietvit.RTN(), torch.cat([x, torch.randn(3, 3, 32, 32)]))
    loaded = quietvit.load(own.save(tmp_path / "tiny.qvit"))
    with torch.no_grad():
        assert torch.equal(loaded(x), own(x))
    again = evaluation_transform(loaded.model)(Image.open(photo).convert("RGB")).unsqueeze(0)
    assert torch.equal(again, x)
    artifact = quietvit.export(loaded, tmp_path / "tiny.onnx", labels=["a", "b", "c", "d"])
    found = quietvit.predict(artifact.path, photo, top=4)
    logits = torch.from_numpy(open_runtime(artifact.path)(x.numpy()))[0]
    wanted = logits.softmax(-1)
    assert [p.index for p in found] == wanted.argsort(descending=True).tolist()
    assert [p.label for p in found] == ["abcd"[p.index] for p in found]
    for p in found:
        assert p.probability == pytest.approx(float(wanted[p.index]), rel=1e-5)


def test_a_file_without_preprocessing_says_so(photo: Path) -> None:
    with pytest.raises(QuietvitError, match="carries no preprocessing"):
        quietvit.predict(exported("tv-vit").path, photo)
    assert len(quietvit.predict(exported("vit").path, photo, top=3)) == 3  # of its own size


def test_exported_files_are_evaluated_in_their_runtime(qvit: Path, table: Path) -> None:
    """Top-1 of the .qvit, of its ONNX file, and of its torchao folder, on the same six images."""
    own = run("evaluate", qvit, "--images", table)
    assert own.exit_code == 0, own.output
    for to in ("onnx", "torchao"):
        if to == "torchao":
            pytest.importorskip("torchao")
        assert run("export", qvit, "--to", to).exit_code == 0
        done = run("evaluate", qvit.with_suffix(f".{to}"), "--images", table, "--threads", 1)
        assert done.exit_code == 0, done.output
        assert "on 6 images" in done.output
        assert f"in {'onnxruntime' if to == 'onnx' else to} " in done.output
    file = qvit.with_suffix(".onnx")
    for arguments, match in (
        ((file, "--classes", 2), "leave out --weights, --classes and --size"),
        ((file, "--model", MODEL), "--model is only for a quantized model"),
        ((qvit, "--threads", 2), "only for exported files"),
        ((file, "--device", "cuda"), "on the CPU"),
        ((file, "--runtime", "tensorrt"), "choose onnxruntime or openvino"),
        ((qvit.with_suffix(".xml"),), "does not exist"),
    ):
        assert match in refused(run("evaluate", *arguments, "--images", table))


def test_a_transformers_model_needs_its_folder_no_more(tmp_path: Path, table: Path) -> None:
    from huggingface_cases import classifier, saved

    torch.manual_seed(0)
    name, path = saved(tmp_path / "folder", classifier("ViT", 2)), tmp_path / "x.qvit"
    done = run("quantize", name, "--calibration", table, "--count", 6, "-o", path)
    assert done.exit_code == 0, done.output
    (tmp_path / "folder").rename(tmp_path / "elsewhere")
    done = run("evaluate", path, "--images", table)
    assert done.exit_code == 0, done.output
    loaded = quietvit.load(path)
    assert evaluation_transform(loaded.model).transforms[-1].mean.tolist() == pytest.approx(
        [0.1, 0.2, 0.3]
    )
    again = run("evaluate", path, "--images", table, "--model", f"hf:{tmp_path / 'elsewhere'}")
    assert done.output.strip() in again.output  # beside the progress of loading weights


def test_a_model_that_no_library_builds_asks_for_it(tmp_path: Path, table: Path) -> None:
    path = quantized("tv-vit").save(tmp_path / "tv.qvit")
    message = refused(run("evaluate", path, "--images", table))
    assert "neither timm nor transformers" in message
    assert "--model" in message


def test_names_and_paths_of_other_kinds(qvit: Path, table: Path, photo: Path) -> None:
    folder = qvit.parent
    quantize = ("quantize", MODEL, *SIZE, "--calibration", table, "--count", 6)
    for name in ("x.onnx", "x.pt"):
        message = refused(run(*quantize, "-o", folder / name))
        assert "x.qvit" in message
        assert ("quietvit export" in message) == (name == "x.onnx")
        assert not (folder / name).exists()
    assert "does not exist" in refused(run("export", folder / "nope.qvit"))
    assert "is a file" in refused(run("export", photo))
    for command in (
        ("predict", qvit, photo),
        ("check", qvit, "--against", qvit, "--images", table),
    ):
        assert "was not exported yet" in refused(run(*command))
    assert "does not exist" in refused(run("predict", folder / "nope.onnx", photo))
    assert "does not end in" in refused(run("predict", photo, photo))
    assert "not an exported file" in refused(run("predict", folder, photo))
    assert "no embedding" in refused(run("predict", exported("vit").path, photo, "--npy", "x.npy"))
    wrong = ("check", exported("vit").path, "--against", qvit, "--images", table, "--json", folder)
    assert "is a folder" in refused(run(*wrong))


def test_an_encoder_goes_from_its_folder_to_an_embedding(
    tmp_path: Path, table: Path, photo: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**HIDDEN, image_size=32, patch_size=16)
    model = saved(tmp_path / "encoder", transformers.Dinov2Model(config))
    made, file = tmp_path / "encoder.qvit", tmp_path / "encoder.onnx"
    for arguments in (
        ("quantize", model, "--calibration", table, "--count", 4, "-o", made),
        ("diagnose", model, "--images", table, "--count", 2),
        ("sensitivity", model, "--images", table, "--count", 2, "--estimate"),
        ("pairs", model),
        ("trace", model),
        ("export", made),
        ("check", file, "--against", made, "--images", table, "--count", 2, "--seconds", 0),
        ("predict", file, photo),
    ):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        assert "classifier" not in done.output
    assert "pooler_output, 32 values" in done.output
    refused(run("evaluate", model, "--images", table))


def test_a_classifier_loses_its_head_and_a_detector_keeps_it(tmp_path: Path, table: Path) -> None:
    head = ("--classes", 0, "--calibration", table, "--count", 4, "-o", tmp_path / "x.qvit")
    assert run("quantize", MODEL, *SIZE, *head).exit_code == 0
    answered = run("evaluate", tmp_path / "x.qvit", "--images", table)
    assert "an encoder without a head" in refused(answered)
    assert "embeddings (64,), features" in run("export", tmp_path / "x.qvit").output
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"architectures": ["YolosForObjectDetection"]}')
    assert "is a detector" in refused(run("quantize", f"hf:{tmp_path}", *head, "--force"))
