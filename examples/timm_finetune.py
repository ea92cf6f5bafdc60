"""Fine-tuning a timm model with the pieces that ``quietvit train`` is made of.

A small ViT learns the digits 0 to 4; its weights then start one for all ten, with a new head, the
first block frozen, smaller learning rates for earlier blocks, Colinearity Decay on the weights and
TWEO on the activations.
"""

import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F

import quietvit
from quietvit.data import create_model
from quietvit.train.config import OptimizerConfig
from quietvit.train.finetune import freeze, parameter_groups

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 2}

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
images = F.interpolate(images, 16, mode="nearest").expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)
few = torch.arange(1200)[labels[:1200] < 5]

torch.manual_seed(0)
model = timm.create_model(NAME, num_classes=5, **SMALL)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(3):
    for batch in few[torch.randperm(len(few))].split(64):
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()

with tempfile.TemporaryDirectory() as folder:
    weights = Path(folder) / "five.safetensors"
    save_file(model.state_dict(), weights)
    model = create_model(NAME, 10, weights, **SMALL)

frozen = freeze(model, blocks=1)
before = {name: p.clone() for name, p in model.named_parameters()}
groups = parameter_groups(model, OptimizerConfig(weight_decay=0.05, layer_decay=0.75))
optimizer = torch.optim.AdamW(groups, lr=2e-3)
scheduler = CosineLRScheduler(optimizer, t_initial=304, t_in_epochs=False)  # applies lr_scale

# The regularizers: one line each.
decay = quietvit.ColinearityDecay(model, images[:1], strength=1.0).attach(optimizer)
tweo = quietvit.TWEO(model, images[:1], strength=0.01).attach(optimizer)
criterion = tweo.around(F.cross_entropy)

for _ in range(8):
    for batch in torch.randperm(1200).split(32):
        criterion(model(images[batch]), labels[batch]).backward()
        scheduler.step_update(decay.steps)
        optimizer.step()
        optimizer.zero_grad()

with torch.no_grad():
    top1 = 100 * (model.eval()(images[1200:]).argmax(1) == labels[1200:]).float().mean()
moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
rates = sorted({round(group["lr_scale"], 4) for group in groups})
print(f"frozen {len(frozen)}, of them moved {len(moved & set(frozen))}, others moved {len(moved)}")
print(f"scales of the learning rate {rates}")
print(f"top-1 {top1:.1f} %")
