"""Parameters without a part in the forward pass are found, whatever the model, and frozen."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import timm
import torch
from torch import nn

from huggingface_cases import FAMILIES, classifier
from quietvit.errors import QuietvitError
from quietvit.train.setup import build
from quietvit.train.unused import freeze_unused
from test_train_finetune import TINY
from test_train_loop import MODEL, config

EXAMPLE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
TWO = torch.cat([EXAMPLE, EXAMPLE])


def logits(output):
    output = getattr(output, "logits", output)
    return output if isinstance(output, tuple) else (output,)


def frozen_in(model):
    return freeze_unused(model, (EXAMPLE, TWO), lambda forward, batch: logits(forward(batch)))


class Odd(nn.Module):
    """One parameter is never used, one in training mode only; everything draws and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.still, self.drop = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.head = nn.Linear(3, 4)
        self.idle, self.late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4))

    def forward(self, images):
        random.random(), np.random.rand()
        x = self.drop(self.still(self.norm(images)).mean((2, 3)))
        return self.head(x) + self.late if self.training else self.head(x)


def odd() -> Odd:
    model = Odd()
    model.still.eval()
    return model


def drawn() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_only_what_no_mode_uses_is_frozen():
    model = odd()
    assert frozen_in(model) == ["idle"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["idle"]
    assert frozen_in(model) == []


def test_the_search_leaves_no_trace():
    model = odd()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    frozen_in(model)
    assert drawn() == expected
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_where_nothing_that_trains_is_used_that_is_an_error():
    model = odd()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "idle")
    with pytest.raises(QuietvitError, match=r"of Odd uses none of its 1 .*first: idle"):
        frozen_in(model)


MODELS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=2, **TINY),
    "levit": lambda: timm.create_model(
        "levit_128s",
        img_size=32,
        embed_dim=(16, 24, 32),
        key_dim=4,
        num_heads=(2, 2, 2),
        depth=(1, 1, 1),
        num_classes=5,
    ),
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=2, **TINY),
    **{family: lambda family=family: classifier(family, 4) for family in FAMILIES},
}


@pytest.mark.parametrize("name", MODELS)
def test_afterwards_every_parameter_that_trains_gets_a_gradient(name):
    model = MODELS[name]().train()
    frozen = frozen_in(model)
    assert frozen == (["dinov2.embeddings.mask_token"] if name == "Dinov2" else [])
    copy.deepcopy(model)  # refused where tables of the search with their history are left
    sum(head.sum() for head in logits(model(TWO))).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key


def test_a_run_names_what_it_freezes(tmp_path, monkeypatch, caplog):
    from quietvit.tasks import classification

    create = classification.create_model

    def with_idle(*args, **kwargs):
        model = create(*args, **kwargs)
        model.idle = nn.Parameter(torch.ones(3))
        return model

    monkeypatch.setattr(classification, "create_model", with_idle)
    parts = build(config(tmp_path, model=MODEL)).training
    assert "1 parameters take no part in the forward pass and are frozen: idle." in caplog.text
    held = {id(p) for group in parts.optim.inner.param_groups for p in group["params"]}
    assert id(parts.models.plain.idle) not in held
