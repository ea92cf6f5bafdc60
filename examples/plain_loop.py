"""Any PyTorch loop, with one line added.

Trains a small ViT on scikit-learn's digits, once without and once with Colinearity Decay, and
prints the accuracy and the penalty (how well the matrices of each pair are aligned) of both.
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import quietvit

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
images = F.interpolate(images, 16, mode="nearest").expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)


def train(strength: float) -> tuple[float, float]:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=64,
        depth=2,
        num_heads=2,
        num_classes=10,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

    # The one line. Everything else here is a loop like any other.
    decay = quietvit.ColinearityDecay(model, images[:1], strength=strength).attach(optimizer)

    for _ in range(8):
        for batch in torch.randperm(1200).split(32):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with torch.no_grad():
        right = model.eval()(images[1200:]).argmax(1) == labels[1200:]
    return 100 * float(right.float().mean()), decay.penalty()


for strength in (0.0, 1.0):
    top1, penalty = train(strength)
    print(f"strength {strength:g}: top-1 {top1:.1f} %, penalty {penalty:.4g}")
