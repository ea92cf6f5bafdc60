"""The Python of the README and of the guide runs as it stands, block after block.

The commands of the README run too, on few images and with small models.
"""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.main import get_command
from typer.testing import CliRunner

import quietvit
from detection_cases import annotated, coco
from huggingface_cases import classifier, saved
from quietvit import cli
from quietvit.data import create_model
from quietvit.decay.registry import _ENTRIES
from quietvit.deployment.targets import _TARGETS
from quietvit.quantization.listing import methods_markdown
from quietvit.quantization.method import _METHODS
from quietvit.tasks import Detection
from quietvit.tasks.registry import _TASKS
from quietvit.train.recipe import known_keys, list_recipes

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted(f"docs/tutorials/{path.name}" for path in ROOT.glob("docs/tutorials/*.md"))
PAGES = ["README.md", "docs/getting-started.md", "docs/methods.md", "docs/deployment.md"]
ALL_PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: str) -> list[tuple[int, str]]:
    """Line number in the page and source of every python block."""
    text = (ROOT / page).read_text("utf-8")
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in BLOCK.finditer(text)]


@pytest.fixture
def kept_registries() -> Iterator[None]:
    """What a page registers is taken back after it."""
    registries: list[dict[str, Any]] = [_METHODS, _ENTRIES, _TARGETS, _TASKS]
    before = [dict(registry) for registry in registries]
    yield
    for registry, held in zip(registries, before, strict=True):
        for name in registry.keys() - held.keys():
            del registry[name]


@pytest.mark.slow
@pytest.mark.usefixtures("kept_registries")
@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        *(
            f"docs/{name}.md"
            for name in ("bits", "detection", "extending", "qat", "serving", "synthesis")
        ),
    ],
)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found, f"{page} shows no Python"
    if any("quietvit.export" in source for _, source in found):
        pytest.importorskip("onnxscript", reason="the page exports to ONNX")
        pytest.importorskip("onnxruntime", reason="the page runs what it exports")
    batch = (torch.rand(2, 3, 224, 224), torch.tensor([0, 1]))
    namespace: dict[str, object] = {"__name__": "docs", "loader": [batch, batch]}
    for line, source in found:
        code = compile("\n" * line + source, str(ROOT / page), "exec")
        exec(code, namespace)


@pytest.mark.parametrize("page", [*ALL_PAGES, "CONTRIBUTING.md"])
def test_relative_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text("utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_the_table_of_methods_is_the_one_the_command_prints() -> None:
    assert methods_markdown() in (ROOT / "docs/methods.md").read_text("utf-8")


def test_the_figures_of_choosing_are_those_of_the_results() -> None:
    top1: dict[tuple[str, str], list[float]] = {}
    seconds: dict[str, list[float]] = {}
    with (ROOT / "results/ptq_deit_tiny.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            top1.setdefault((row["setting"], row["bits"]), []).append(float(row["top1"]))
            if row["bits"] == "W4A4":
                took = float(row["calibration_cpu_seconds"])
                seconds.setdefault(row["setting"], []).append(took)
    names = {
        "best RTN": "rtn-omse",
        "RepQ-ViT": "repq-vit",
        "ERQ": "erq",
        "AdaLog": "adalog",
        "QDrop, shortened": "qdrop-240",
    }
    guide = (ROOT / "docs/choosing.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in guide.splitlines()]
    shown = {row[0]: row[1:] for row in rows if row[0] in names}
    assert shown == {
        name: [
            *(f"{median(top1[setting, bits]):.1f}" for bits in ("W6A6", "W4A4")),
            f"{median(seconds[setting]):.0f}",
        ]
        for name, setting in names.items()
    }
    readme = (ROOT / "README.md").read_text("utf-8")
    dear = {"ERQ": "erq", "QDrop, shortened": "qdrop-240", "AdaLog": "adalog"}
    costs = ", ".join(f"{median(seconds[dear[name]]):.0f} s ({name})" for name in dear)
    assert costs in readme
    at_8_bits = [median(values) for (_, bits), values in top1.items() if bits == "W8A8"]
    assert f"{min(at_8_bits):.1f} to {max(at_8_bits):.1f}" in guide


def recipe_tables(guide: str) -> list[list[str]]:
    """The keys in the first column of each table whose first column is keys, a row a list."""
    tables = [part.partition("\n\n")[0] for part in re.split(r"^\| key \|", guide, flags=re.M)[1:]]
    rows = [row for table in tables for row in table.splitlines()[2:]]
    assert len(tables) > 2
    assert len(rows) > 20
    return [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows]


def test_the_recipe_keys_of_the_guide_exist() -> None:
    known = set(known_keys()) | {"model.kwargs.*", "data.augmentation.*"}
    regularizers = [f"decay.{name}" for name in ("cd", "norm_gains", "weight", "s2d", "kure")]
    for first, *others in recipe_tables((ROOT / "docs/getting-started.md").read_text("utf-8")):
        section = first.rpartition(".")[0]
        for key in (first, *(section + key if key[0] == "." else key for key in others)):
            each = [key.replace("decay.<name>", name) for name in regularizers]
            assert set(each) <= known, key


def test_the_recipe_keys_set_on_command_lines_exist() -> None:
    text = "\n".join((ROOT / page).read_text("utf-8") for page in ALL_PAGES).replace("\\\n", " ")
    text = re.sub(r"^quietvit quantize .*$", "", text, flags=re.M)  # fields of a method
    found = set(re.findall(r"(?:(?<!\w)-s|--set)[ =]'?([\w.]+)=", text))
    known = set(known_keys()) | {"key", "field", "conv_output_bits", "exclude"}
    known |= {f"task_settings.{key}" for key in Detection.settings.model_fields}
    kwargs = {key for key in found if key.startswith("model.kwargs.")}
    assert len(found) > 5
    assert found - kwargs <= known, sorted(found - kwargs - known)


def test_the_commands_and_options_named_exist() -> None:
    pages = [page for page in ALL_PAGES if page != "docs/lab-log.md"]
    whole = "\n".join((ROOT / page).read_text("utf-8") for page in pages)
    texts = [block.replace("\\\n", " ") for block in SHELL.findall(whole)]
    texts += [re.sub(r"\\\n#", " ", path.read_text("utf-8")) for path in list_recipes().values()]
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    texts += [f"{command.epilog}" for command in commands.values()]
    calls = re.findall(
        r"^[#$ ]*(?:\.venv/bin/)?quietvit ([a-z][a-z-]*) (.*)$", "\n".join(texts), re.MULTILINE
    )
    assert len(calls) > 60
    for command, rest in calls:
        options = {name for option in commands[command].params for name in option.opts} | {"--help"}
        named = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", f" {rest.partition('#')[0]}"))
        assert named <= options, f"quietvit {command}: {sorted(named - options)}"


SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALL = {"depth": 1, "img_size": 32}
FEW = (
    "-s epochs=1 -s schedule.warmup_epochs=0 -s batch_size=4 -s data.train_images=8 "
    "-s num_workers=0 -s precision=no -s device=cpu -s tensorboard=false"
)
TIMM = f"{FEW} -s model.kwargs.depth=1 -s model.kwargs.img_size=32"
# How a command of the README begins, and what makes it short. They run in this order.
SHORT = {
    "quietvit --help": "",
    "quietvit train --recipe digits": "-s epochs=1 -s schedule.warmup_epochs=0 "
    "-s data.train_images=64 -s data.test_images=20",
    "quietvit quantize runs/digits": "--count 4",
    "quietvit export digits.qvit": "",
    "quietvit check digits.onnx": "--count 4 --seconds 0",
    "quietvit train --recipe imagenet1k_deit_small --dry-run": TIMM
    + " -s data.dataset=imagefolder:/my/images",
    "torchrun --nproc-per-node 8 -m quietvit.cli train": TIMM,  # as one process
    "quietvit train --recipe finetune_hf_folder": FEW + " -s model.freeze_blocks=0 --force",
    "quietvit train --recipe finetune_imagefolder": TIMM + " --force",
    "quietvit quantize runs/mine": "--count 4",
    "quietvit export mine.qvit": "",
}
ELSEWHERE = {
    "quietvit predict": "tests/test_deployment_commands.py",
    "pip install": "changes the environment; make and the CI do it",
    "make demo": "is the comparison of digits at full length",
    "make test": "is what runs this",
}


def readme_commands() -> list[str]:
    """Each command of the README's sh blocks on one line, without its comment."""
    text = (ROOT / "README.md").read_text("utf-8").replace(".venv/bin/", "")
    lines = "\n".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def test_every_command_of_the_readme_is_run_or_it_is_said_why_not() -> None:
    found = readme_commands()
    assert len(found) > 10
    known = {**SHORT, **ELSEWHERE}
    for command in found:
        begins = [start for start in known if command.startswith(start)]
        assert len(begins) == 1, f"give {command!r} an entry in SHORT or ELSEWHERE"
    for start in known:
        assert any(command.startswith(start) for command in found), f"{start!r} is not there"


@pytest.fixture
def my_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of photos; it lies in a folder that becomes the current one."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    names = "n01440764", "n01443537"  # two of ImageNet's
    for part in ("train", "val"):
        for number in range(16):
            path = tmp_path / "images" / part / names[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    Image.open(path).save(tmp_path / "photo.jpg")
    return str(tmp_path / "images")


@pytest.fixture
def my_files(tmp_path: Path, my_photos: str) -> dict[str, str]:
    """What the README calls the user's own, and where it is here."""
    model = create_model("deit_tiny_patch16_224", 10, **SMALL)
    save_file(model.state_dict(), tmp_path / "deit_tiny.safetensors")
    saved(tmp_path / "vit", classifier("ViT", 2))
    return {"/my/images": my_photos, "/data/imagenet": my_photos, "/my/vit": str(tmp_path / "vit")}


@pytest.mark.slow
def test_the_commands_of_the_readme_run(my_files: dict[str, str]) -> None:
    for start, shorter in SHORT.items():
        (command,) = [one for one in readme_commands() if one.startswith(start)]
        text = f"{command} {shorter}"
        for mine, here in my_files.items():
            text = text.replace(mine, here)
        arguments = shlex.split(text.partition("quietvit.cli " if "torchrun" in text else " ")[2])
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, f"{text}\n{done.output}"
    assert {"deit", "mine", "hf", "digits"} <= {path.name for path in Path("runs").iterdir()}
    assert Path("mine.qvit").is_dir()


def test_the_commands_that_choose_bits_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/bits.md").read_text("utf-8")
    commands = [
        line for line in text.splitlines() if line.startswith("quietvit") and " 32 " in line
    ]
    assert len(commands) == 2
    for command in commands:
        done = CliRunner().invoke(cli.app, shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
    held = quietvit.load("mixed.qvit").method.overrides
    assert held == quietvit.RTN(overrides="bits.toml").overrides
    assert held.plain().keys() > {"blocks.0.attn.qkv"}


# The tutorials: what is replaced in each, and what makes its commands short.
SMALL_VIT = {"deit_tiny_patch16_224": "test_vit", "/my/photos": "images", "--count 32": "--count 4"}
SMALL_DETECTOR = (
    "-s model.name=vit_tiny_patch16_224 -s model.weights=none -s model.kwargs.patch_size=8 "
    "-s model.kwargs.embed_dim=32 -s model.kwargs.depth=1 -s model.kwargs.num_heads=2 "
    "-s task_settings.size=[64,64] -s task_settings.channels=16 "
    "-s task_settings.options.box_channels=32 -s checkpoint.every=0 -s epochs=1 "
    "-s schedule.warmup_epochs=0 -s batch_size=2 -s tensorboard=false -s threads=1"
)
SHORTER: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "photos": (
        SMALL_VIT,
        {
            "train": f"{FEW} -s model.name=test_vit",
            "quantize": "--count 4",
            "check": "--count 4 --seconds 0",
        },
    ),
    "given-model": (
        SMALL_VIT | {"--minutes 20": "--minutes 0.05 --methods rtn --bits W8A8"},
        {
            "quantize": "--count 4",
            "compare-methods": "--methods rtn --bits W8A8 --count 4 --calibration-count 4",
        },
    ),
    "diagnosis": (SMALL_VIT, {"sensitivity": ""}),
    "detector": (
        {"/my/boxes": "boxes", "hf:/my/detector": "hf:detector"},
        {"train": SMALL_DETECTOR, "quantize": "--count 2"},
    ),
    "training-loops": ({}, {}),
}
NEEDS = {
    "photos": ["onnxscript", "onnxruntime"],
    "detector": ["faster_coco_eval", "transformers", "onnxscript", "onnxruntime"],
    "training-loops": ["transformers", "lightning"],
}
KINDS = ("sh", "python")
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def my_boxes(tmp_path: Path) -> None:
    """Eight pictures with a box each; they train and test."""
    boxes = [annotated(i, i, [10, 10, 30, 20], 3 + 4 * (i % 2)) for i in range(1, 9)]
    file = coco(tmp_path / "boxes", boxes, pictures=8)
    for name in ("train", "test"):
        shutil.copy(file, file.with_name(f"{name}.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("my_photos", "my_boxes")
@pytest.mark.parametrize("page", [Path(page).stem for page in TUTORIALS])
def test_a_tutorial_runs_from_top_to_bottom(page: str) -> None:
    for package in NEEDS.get(page, []):
        pytest.importorskip(package)
    if page == "detector":
        from detr_cases import write

        write("yolos", Path("detector"))
    else:
        save_file(create_model("test_vit", 1000).state_dict(), "test_vit.safetensors")
    run_page(f"docs/tutorials/{page}.md", *SHORTER[page])


def run_page(
    page: str, replaced: dict[str, str], shorter: dict[str, str], kinds: Sequence[str] = KINDS
) -> None:
    """Run the blocks of a page in order, with other names and what makes a command short."""
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
    for theirs, ours in replaced.items():
        text = text.replace(theirs, ours)
    namespace: dict[str, object] = {"__name__": "docs"}
    for kind, source in FENCE.findall(text):
        if kind not in kinds:
            continue
        if kind == "python":
            exec(compile(source, str(ROOT / page), "exec"), namespace)
            continue
        for line in source.splitlines():
            run_command(line, shorter)


def run_command(line: str, shorter: dict[str, str]) -> None:
    command, *arguments = shlex.split(line, comments=True)
    assert command == "quietvit", line
    more = shlex.split(shorter.get(arguments[0], ""))
    done = CliRunner().invoke(cli.app, [*arguments, *more])
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"


# The guides whose commands need only a small model, a run and photos.
MINE = {
    **{"deit_tiny_patch16_224": "test_vit", "w.safetensors": "test_vit.safetensors"},
    **{"/my/images": "images", "calib.parquet": "images", "val.parquet": "images"},
    **{"hf:/models/dinov2": "hf:encoder", "iterations=600": "iterations=2"},
    **{"synthetic:32:psaq:iterations=120,patches=64": "synthetic:2:psaq:iterations=1,patches=4"},
    **{"synthetic:32 --save": "synthetic:2:pink --save", "synthetic:32": "synthetic:2"},
    "start_epoch=5": "start_epoch=0",
}
DIGITS = "-s epochs=1 -s schedule.warmup_epochs=0 -s data.train_images=64 -s data.test_images=20"
QUICK = {
    "quantize": "--force",
    "export": "--force",
    "check": "--count 4 --seconds 0",
    "compare-methods": "--methods rtn --bits W8A8 --count 4 --calibration-count 4",
    "train": DIGITS + " -s qat.images=4",
    "compare": f"{DIGITS} -s batch_size=16 --seeds 0 --methods rtn --bits W8A8",
    "advise": "--minutes 0.05 --methods rtn --bits W8A8",
}
GUIDES = ("methods", "deployment", "synthesis", "qat", "command-line")


def bare_encoder(folder: str) -> None:
    """Write a tiny DINOv2 without a head, as transformers does."""
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Dinov2Config(image_size=28, patch_size=14, **small)
    saved(Path(folder), transformers.Dinov2Model(config), size={"height": 28, "width": 28})


@pytest.mark.slow
@pytest.mark.usefixtures("my_photos")
@pytest.mark.parametrize("page", GUIDES)
def test_the_commands_of_a_guide_run(page: str) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino", "torchao", "transformers"):
        pytest.importorskip(package)
    save_file(create_model("test_vit", 1000).state_dict(), "test_vit.safetensors")
    mine = f"{FEW} -s model.name=test_vit -s model.weights=none -s data.dataset=imagefolder:images"
    run_command(f"quietvit train --recipe finetune_imagefolder --output runs/mine {mine}", {})
    quantize = "quietvit quantize test_vit --weights test_vit.safetensors --calibration images"
    if page == "deployment":
        bare_encoder("encoder")
        run_command(f"{quantize} --classes 0 --output begun.qvit", QUICK)
        run_command("quietvit export begun.qvit --output encoder.onnx", QUICK)
    run_command(f"{quantize} --output tiny.qvit", QUICK)
    run_page(f"docs/{page}.md", MINE, QUICK, ["sh"])


def test_the_reference_lists_every_public_name() -> None:
    text = (ROOT / "docs/reference.md").read_text("utf-8")
    assert sorted(re.findall(r"^::: quietvit\.(\w+)$", text, re.M)) == sorted(quietvit.__all__)


def sentences(page: str) -> list[tuple[int, str]]:
    """Each sentence outside of tables and code, with its number of words."""
    text = re.sub(
        r"^```.*?^```$|<!--.*?-->", "", (ROOT / page).read_text("utf-8"), flags=re.S | re.M
    )
    text = re.sub(r"^\|.*$|!?\]\([^)]*\)|^!\[.*$", "\n", text, flags=re.M)
    found = re.split(r"(?<=[.:?!])\s|\n\s*\n(?=[^a-z])|\n(?= *- | *\d+\. |#)", text)
    return [(len(re.findall(r"\S*\w\S*", sentence)), sentence) for sentence in found]


# Formulas count as words. Decisions and the lab log are records.
FREE = {"docs/method.md", "docs/decisions.md", "docs/lab-log.md"}


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if page not in FREE])
def test_no_sentence_has_more_than_twenty_words(page: str) -> None:
    counted = sentences(page)
    assert len(counted) > 15
    assert max(counted)[0] <= 20, max(counted)[1]
