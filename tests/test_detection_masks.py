"""Laws: masks lie on what they mark, wherever the image goes; mask AP is pycocotools'."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import quietvit
from detection_cases import BACKBONE, annotated, coco, outlined, picture
from quietvit.compare import CompareConfig, compare
from quietvit.data import create_model
from quietvit.detection import (
    BoxAugmentation,
    Canvas,
    TrainingTransform,
    box_ap,
    detection_loader,
    evaluate_detector,
    load_detection_dataset,
    mask_rcnn,
    open_coco,
    predictors,
    predicts_masks,
)
from quietvit.detection.average_precision import coco_files
from quietvit.errors import QuietvitError
from quietvit.quantization.settings import parse_method
from quietvit.tasks import Detection
from quietvit.train import TrainResult, load_recipe, parse_config
from quietvit.train.estimate import estimate
from test_cli import run as run_cli
from test_detection_models import judged, small, vit

pytest.importorskip("faster_coco_eval")

BOX = (10, 20, 30, 15)
SIZE = (60, 80)  # height and width
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2)}  # fmt: skip


def run_lengths(box, compressed=False):
    """Return COCO's RLE of a box in a picture of ``SIZE``."""
    from faster_coco_eval.core import mask

    x, y, width, height = box
    pixels = np.zeros(SIZE, np.uint8, order="F")
    pixels[y : y + height, x : x + width] = 1
    if compressed:
        code = mask.encode(pixels)
        return {"size": list(SIZE), "counts": code["counts"].decode()}
    flat = np.flatnonzero(np.diff(pixels.flatten(order="F"), prepend=0, append=0))
    counts = np.diff([0, *flat, pixels.size]).tolist()
    return {"size": list(SIZE), "counts": counts}


FORMS = {
    "polygon": outlined(1, 1, BOX)["segmentation"],
    "two polygons": [[10, 20, 25, 20, 25, 35, 10, 35], [25, 20, 40, 20, 40, 35, 25, 35]],
    "counts": run_lengths(BOX),
    "compressed": run_lengths(BOX, compressed=True),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_turned_with_a_stored_image(tmp_path, orientation):
    form = [*FORMS.values()][(orientation // 2) % 4]
    given = annotated(1, 1, BOX, segmentation=form)
    path = coco(tmp_path, [given, outlined(2, 1, (1, 1, 4, 9), iscrowd=1)], pictures=1)
    picture(tmp_path / "images" / "1.png", box=BOX, orientation=orientation)
    image, target = open_coco(path, masks=True)[0]
    white = torch.from_numpy(np.asarray(image.convert("L")) > 0)
    assert target["masks"].shape == (2, *target["size"])
    assert torch.equal(target["masks"][0].bool(), white)
    assert torch.equal(corners_of(target["masks"]), target["boxes"].as_subclass(torch.Tensor))
    assert "masks" not in open_coco(path)[0][1]


def corners_of(masks):
    """Return the boxes (N, 4) around masks (N, h, w)."""
    found = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        found.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return torch.tensor(found, dtype=torch.float32).reshape(-1, 4)


def test_masks_of_an_upright_image_are_known_by_its_stated_size(tmp_path):
    path = coco(tmp_path, [outlined(1, 1, (25, 10, 15, 30))], pictures=1, size=(60, 80))
    picture(tmp_path / "images" / "1.png", (80, 60), BOX, orientation=6)
    image, target = open_coco(path, masks=True)[0]
    white = torch.from_numpy(np.asarray(image.convert("L")) > 0)
    assert torch.equal(target["masks"][0].bool(), white)


def test_drawn_polygons_are_those_of_pycocotools(tmp_path):
    theirs = pytest.importorskip("pycocotools.mask")
    draw = np.random.default_rng(0)
    polygons = [(draw.uniform(-3, 65, 2 * count)).tolist() for count in (3, 5, 9)]
    path = coco(tmp_path, [annotated(1, 1, BOX, segmentation=polygons)], pictures=1)
    expected = theirs.decode(theirs.merge(theirs.frPyObjects(polygons, *SIZE)))
    assert torch.equal(open_coco(path, masks=True)[0][1]["masks"][0], torch.from_numpy(expected))


@pytest.mark.parametrize("absent", [{}, {"segmentation": []}, {"segmentation": None}])
def test_an_annotation_without_a_mask_is_refused_by_its_id(tmp_path, absent):
    path = coco(tmp_path, [outlined(1, 1, BOX), annotated(8, 2, BOX, **absent)])
    with pytest.raises(QuietvitError, match=r"annotation 8 of 2\.png in .*boxes\.json has no segm"):
        open_coco(path, masks=True)


@pytest.mark.parametrize(
    ("segmentation", "told"),
    [
        ([[1, 2, 3, 4]], "needs at least 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "needs at least 3 points"),
        ([[1, 2, 3, 4, 5, float("nan")]], "lies outside the image of 80 x 60"),
        ([[1, 2, 3, 4, 1e9, 6]], "lies outside the image of 80 x 60"),
        ([["a"] * 6], "could not convert"),
        (3, "not iterable"),
        ({"counts": [4800]}, "it has no 'size'"),
        ({"size": [80, 60], "counts": [4800]}, r"is \[80, 60\], and the image has 60 x 80"),
        ({"size": [60, 80], "counts": [4801]}, "add up to 4801"),
    ],
)
def test_wrong_masks_are_counted_then_refused(tmp_path, segmentation, told):
    path = coco(tmp_path, [annotated(4, 1, BOX, segmentation=segmentation), outlined(5, 1, BOX)])
    with pytest.raises(QuietvitError, match=f"segmentation of annotation 4 of 1.png .*{told}"):
        open_coco(path, masks=True, max_bad_boxes=0)
    target = open_coco(path, masks=True)[0][1]
    assert len(target["boxes"]) == len(target["masks"]) == 1


def test_damaged_run_lengths_are_told_with_their_annotation(tmp_path):
    damaged = {"size": [60, 80], "counts": run_lengths(BOX, compressed=True)["counts"][:4]}
    data = open_coco(coco(tmp_path, [annotated(4, 1, BOX, segmentation=damaged)]), masks=True)
    with pytest.raises(QuietvitError, match=r"annotation 4 of 1\.png could not be decoded"):
        data[0]


@pytest.mark.parametrize("spec", ["voc:/cells", "objects:/cells"])
def test_data_without_masks_is_refused_for_masks(spec):
    with pytest.raises(QuietvitError, match=f"{spec} holds boxes and no masks"):
        load_detection_dataset(spec, masks=True)


def test_another_mask_is_another_data_set(tmp_path):
    one, other = (
        open_coco(coco(tmp_path / name, [outlined(1, 1, BOX, segmentation=form)]), masks=True)
        for name, form in (("a", FORMS["polygon"]), ("b", FORMS["counts"]))
    )
    assert one.checksum() != other.checksum()
    assert one.chosen([1, 0]).has_masks


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.4, 2.0)])
def test_masks_move_with_the_image_and_its_boxes(tmp_path, scale):
    """The object is an L, so a crop may leave a part that does not fill its box."""
    ell = [[10, 10, 60, 10, 60, 20, 20, 20, 20, 50, 10, 50]]
    given = [annotated(1, 1, (10, 10, 50, 40), segmentation=ell)]
    path = coco(tmp_path, [*given, outlined(2, 1, (0, 0, 80, 60), iscrowd=1)])
    data = open_coco(path, masks=True)
    image, target = data[0]
    white = target["masks"][0].bool().numpy()
    pixels = np.asarray(image).copy()
    pixels[white] = 255
    image = Image.fromarray(pixels)
    change = TrainingTransform((64, 64), (0.0, 0.0, 0.0), BoxAugmentation(flip=0.5, scale=scale))
    counts = set()
    for seed in range(16):
        torch.manual_seed(seed)
        seen, changed = change(image, dict(target))
        assert type(changed["masks"]) is torch.Tensor
        assert changed["masks"].shape == (len(changed["boxes"]), *changed["size"])
        counts.add(len(changed["boxes"]))
        for mask, box in zip(changed["masks"].bool(), changed["boxes"], strict=True):
            assert float(seen.mean(0)[mask].mean()) > 0.7
            assert float(seen.mean(0)[~mask].mean()) < 0.05
            assert (corners_of(mask[None])[0] - box).abs().max() < 1
    assert counts <= {0, 1}
    background = change(*data[1])[1]
    assert background["masks"].shape == (0, *background["size"])


def test_the_canvas_scales_masks():
    canvas = Canvas((64, 96), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).train()
    image, masks = torch.zeros(3, 120, 60), torch.zeros(2, 120, 60, dtype=torch.uint8)
    masks[0, 30:60, 15:30] = 1
    targets = [{"boxes": corners_of(masks[:1]), "masks": masks}]
    _, (fitted,) = canvas([image], targets)
    assert fitted["masks"].shape == (2, 64, 32)
    assert fitted["masks"].dtype == torch.uint8
    assert torch.equal(corners_of(fitted["masks"][:1]), fitted["boxes"])


def masked(kind="plain", **options):
    torch.manual_seed(0)
    body = vit() if kind == "plain" else create_model("swin_tiny_patch4_window7_224", 0, **SWIN)
    own = {"scales": (2, 1, 0.5)} if kind == "plain" else {}
    widths = {"channels": 16, "box_channels": 16, "mask_channels": 16}
    return mask_rcnn(body, 3, **own | widths | options)


@pytest.mark.parametrize("kind", ["plain", "hierarchical"])
def test_a_mask_detector_takes_images_of_any_size_with_and_without_objects(kind):
    model = masked(kind, box_score_thresh=0.0, box_detections_per_img=5)
    images = [torch.rand(3, 48, 64), torch.rand(3, 100, 30)]
    masks = torch.zeros(1, 48, 64, dtype=torch.uint8)
    masks[:, 5:40, 5:40] = 1
    targets = [
        {"boxes": corners_of(masks), "labels": torch.tensor([1]), "masks": masks},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
         "masks": torch.zeros(0, 100, 30, dtype=torch.uint8)},
    ]  # fmt: skip
    losses = model.train()(images, targets)
    assert losses["loss_mask"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert predicts_masks(model)
    assert not predicts_masks(small())
    assert "roi_heads.mask_predictor.mask_fcn_logits*" in predictors(model)
    assert model.roi_heads.mask_roi_pool.scales == model.roi_heads.box_roi_pool.scales
    with torch.no_grad():
        found = model.eval()(images)
    for image, one in zip(images, found, strict=True):
        assert one["masks"].shape == (len(one["boxes"]), 1, *image.shape[1:])
        assert 0 <= float(one["masks"].min()) <= float(one["masks"].max()) <= 1


@pytest.mark.parametrize("name", ["rtn", "smoothquant", "repq-vit", "gptq"])
def test_a_mask_detector_is_quantized_whatever_it_finds(name):
    """The first image gives no boxes, so the mask head has no rows there."""
    model = masked(box_score_thresh=0.0, box_detections_per_img=3).eval()
    noise = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    keep = model.roi_heads.postprocess_detections
    seen = []

    def none_at_first(*given):
        boxes, scores, labels = keep(*given)
        each = [slice(0 if not seen and not place else None) for place in range(len(boxes))]
        seen.append(1)
        return tuple([x[cut] for x, cut in zip(of, each, strict=True)]
                     for of in (boxes, scores, labels))  # fmt: skip

    model.roi_heads.postprocess_detections = none_at_first
    method = parse_method(name, "W6A6").model_copy(update={"head_bits": 8})
    own = quietvit.quantize(model, method, noise, progress=False)
    bits = {slot.site.name: own.quantizers[slot.key].bits for slot in own.slots()}
    mask_head = {site: b for site, b in bits.items() if site.startswith("roi_heads.mask")}
    assert len(mask_head) == 6
    assert mask_head.pop("roi_heads.mask_predictor.mask_fcn_logits") == 8
    assert set(mask_head.values()) == {6}
    assert len(own([noise[0]])[0]["masks"]) == 3


@pytest.mark.parametrize("name", ["rtn", "repq-vit"])
def test_a_mask_head_without_boxes_cannot_be_calibrated(name):
    model = masked(box_score_thresh=0.99).eval()
    with pytest.raises(QuietvitError, match=r"found nothing.* exclude=\['roi_heads.mask_head.0.0'"):
        quietvit.quantize(model, parse_method(name, "W6A6"), torch.rand(1, 3, 64, 96))


def with_masks(found):
    """Give each object of ``judged`` a disc inside its box."""
    from faster_coco_eval.core import mask

    y, x = np.mgrid[:300, :300]

    def disc(box):
        across, down = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        reach = ((x - across) / (box[2] - box[0])) ** 2 + ((y - down) / (box[3] - box[1])) ** 2
        return mask.encode(np.asfortranarray((reach <= 0.2).astype(np.uint8)))

    return [tuple(one | {"masks": [*map(disc, one["boxes"])]} for one in pair) for pair in found]


def test_mask_ap_is_that_of_pycocotools():
    pycocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    found = with_masks(judged(images=8))
    own = box_ap(found)
    truth, results = coco_files(found, by="segm")
    with contextlib.redirect_stdout(io.StringIO()):
        reference = pycocotools.COCO()
        reference.dataset = truth
        reference.createIndex()
        counted = COCOeval(reference, reference.loadRes(results), "segm")
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    expected = [100 * value if value >= 0 else -1 for value in counted.stats[:6]]
    keys = [key for key in own.figures() if key.startswith("mask_")]
    assert [own.figures()[key] for key in keys] == pytest.approx(expected, abs=1e-4)
    assert 0 < own.mask.ap < own.mask.ap50 < 100
    assert own.mask != box_ap(judged(images=8))
    assert "; mask AP " in str(own)
    perfect = [(there, there | {"scores": [1.0] * len(there["boxes"])}) for there, _ in found]
    assert box_ap(perfect).mask.ap == pytest.approx(100)


def test_a_mask_detector_is_evaluated_on_data_with_masks(tmp_path):
    path = coco(tmp_path, [outlined(1, 1, BOX), outlined(2, 2, (5, 5, 50, 40), 3)])
    model = masked(box_score_thresh=0.0, box_detections_per_img=3).eval()
    names = ("disc", "square", "star")
    data = load_detection_dataset(f"coco:{path}", class_names=names, masks=True)
    found = evaluate_detector(model, detection_loader(data, 2))
    assert 0 <= found.mask.ap <= 100
    with pytest.raises(QuietvitError, match=r"the data set has none.*masks=True"):
        evaluate_detector(model, detection_loader(open_coco(path, class_names=names), 2))


def discs(folder, images=4):
    """Write pictures with a bright disc each. coco256 of the test data has no segmentations."""
    draw = np.random.default_rng(0)
    given = []
    for index in range(1, images + 1):
        x, y = draw.integers(4, 24, 2)
        side = draw.integers(16, 36)
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        ring = np.stack([np.cos(angles), np.sin(angles)], 1) * side / 2 + (x, y) + side / 2
        box = [int(x), int(y), int(side), int(side)]
        polygon = [ring.flatten().tolist()]
        given.append(annotated(index, index, box, 3, segmentation=polygon))
    path = coco(folder, given, images)
    for index, each in enumerate(given, start=1):
        bright = np.zeros((60, 80, 3), np.uint8)
        y, x = np.mgrid[:60, :80] + 0.5
        left, top, side, _ = each["bbox"]
        bright[(x - left - side / 2) ** 2 + (y - top - side / 2) ** 2 <= side**2 / 4] = 255
        Image.fromarray(bright).save(folder / "images" / f"{index}.png")
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of a mask detector, with a tiny model and tiny pictures."""
    folder = tmp_path_factory.mktemp("discs")
    path = discs(folder)
    found = load_recipe("detect_coco_mask_deit").model_dump()
    options = {"box_channels": 32, "mask_channels": 16, "rpn_post_nms_top_n_test": 20}
    small = {"size": (64, 64), "channels": 16, "options": options | {"box_score_thresh": 0.0}}
    return parse_config(
        found
        | {
            "task_settings": found["task_settings"] | small,
            "model": BACKBONE,
            "data": {"dataset": f"coco:{path},{path}"},
            "epochs": 2,
            "evaluate_every": 1,
            "batch_size": 2,
            "log_every": 1,
            "tensorboard": False,
            "device": "cpu",
            "threads": 1,
            "checkpoint": {},
            "output": str(folder / "run"),
        }
    )


def test_the_recipe_trains_a_mask_detector_which_is_compared_in_both_aps(recipe, tmp_path):
    settings = {"bits": ("W8A8",), "methods": ("rtn",), "seeds": (0,)}
    images = {"calibration_images": 2, "diagnosed_images": 1}
    wanted = CompareConfig(recipe=recipe, **settings, **images)
    found = compare(wanted, tmp_path / "out", say=lambda _: None)
    run = found.results.runs[0]
    assert run.figure("float", "ap") == run.float_score
    assert 0 <= run.figure("W8A8 rtn", "mask_ap") <= run.figure("W8A8 rtn", "mask_ap50")
    head = (tmp_path / "out" / "results.csv").read_text().splitlines()[0]
    assert head.startswith("seed,arm,setting,ap,ap50,ap75,small,medium,large,mask_ap,mask_ap50,")
    assert "mask AP50" in found.page.read_text()
    trained = TrainResult.read(next((tmp_path / "out").glob("runs/*/train")))
    logged = [json.loads(line) for line in (trained.output / "metrics.jsonl").open()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert [line["epoch"] for line in logged if "mask_ap" in line] == [1, 2]
    assert trained.figures["ap"] == trained.score
    model = trained.load_model()
    kinds = {pair.kind for pair in quietvit.find_pairs(model, torch.rand(1, 3, 64, 64))}
    assert "mlp" in kinds
    path = recipe.data.dataset.split(",")[1]
    told = run_cli("evaluate", trained.output, "--images", f"coco:{path}", "--format", "json")
    assert told.exit_code == 0, told.output
    scores = json.loads(told.output)["scores"]
    assert scores == pytest.approx(dict(trained.figures))
    refused = run_cli("evaluate", trained.output, "--images", "voc:/cells")
    assert "holds boxes and no masks" in refused.stderr


def test_training_a_mask_detector_needs_masks_and_a_dry_run_no_data(recipe, tmp_path):
    path = coco(tmp_path, [annotated(1, 1, BOX)])
    data = recipe.data.model_copy(update={"dataset": f"coco:{path},{path}"})
    with pytest.raises(QuietvitError, match=r"annotation 1 of 1\.png .* has no segmentation"):
        Detection(recipe.model_copy(update={"data": data})).open_data()
    absent = recipe.data.model_copy(update={"dataset": f"coco:{tmp_path}/none.json,b.json"})
    found = estimate(recipe.model_copy(update={"data": absent}))
    assert found.trainable == found.parameters
