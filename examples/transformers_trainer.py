"""The transformers Trainer, with one callback.

Trains a small ViT of transformers on scikit-learn's digits. The callback attaches Colinearity Decay
to the optimizer that the Trainer makes, and its state goes into the Trainer's checkpoints.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import quietvit
from quietvit.callbacks import transformers_callback

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
images = F.interpolate(images, 16, mode="nearest").expand(-1, 3, -1, -1)
samples = [
    {"pixel_values": image, "labels": int(label)}
    for image, label in zip(images, digits.target, strict=True)
]


def train(strength: float, folder: str) -> tuple[float, float]:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    decay = quietvit.ColinearityDecay(model, images[:1], strength=strength)
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            num_train_epochs=8,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            weight_decay=0.05,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=samples[:1200],
        callbacks=[transformers_callback(decay)],  # the one line
    )
    trainer.train()
    found = trainer.predict(samples[1200:])
    top1 = 100 * (found.predictions.argmax(1) == found.label_ids).mean()
    return float(top1), decay.penalty()


with tempfile.TemporaryDirectory() as folder:
    for strength in (0.0, 1.0):
        top1, penalty = train(strength, folder)
        print(f"strength {strength:g}: top-1 {top1:.1f} %, penalty {penalty:.4g}")
