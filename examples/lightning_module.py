"""Lightning, with one callback.

Trains a small ViT on scikit-learn's digits in a LightningModule. The callback attaches Colinearity
Decay to the module's optimizer when the fit starts, and its state goes into every checkpoint.
"""

import lightning
import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import quietvit
from quietvit.callbacks import lightning_callback

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
images = F.interpolate(images, 16, mode="nearest").expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)


class Classifier(lightning.LightningModule):
    """A module like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=16,
            patch_size=4,
            embed_dim=64,
            depth=2,
            num_heads=2,
            num_classes=10,
        )

    def training_step(self, batch, index):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)


def train(strength: float) -> tuple[float, float]:
    torch.manual_seed(0)
    module = Classifier()
    decay = quietvit.ColinearityDecay(module.model, images[:1], strength=strength)
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lightning_callback(decay)],  # the one line
    )
    data = TensorDataset(images[:1200], labels[:1200])
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))
    with torch.no_grad():
        right = module.model.eval()(images[1200:]).argmax(1) == labels[1200:]
    return 100 * float(right.float().mean()), decay.penalty()


for strength in (0.0, 1.0):
    top1, penalty = train(strength)
    print(f"strength {strength:g}: top-1 {top1:.1f} %, penalty {penalty:.4g}")
