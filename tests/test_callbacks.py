"""Regularizers inside the transformers Trainer and inside Lightning: as by hand, and resumed."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quietvit
from quietvit.callbacks import lightning_callback, transformers_callback
from quietvit.errors import QuietvitError

EXAMPLE = torch.zeros(1, 3, 16, 16)
STEPS, SAVED = 6, 3


def data(count: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return [
        {"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images)
    ]


def one_image() -> list[dict[str, Tensor]]:
    """The same image always: a resumed run of either package may go on with other batches."""
    return data(1) * 8 * SAVED


def cd(model: nn.Module) -> Any:
    return quietvit.ColinearityDecay(model, EXAMPLE, strength=20.0, penalty="top")


def s2d(model: nn.Module) -> Any:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return quietvit.SpectralDecay(model, EXAMPLE, images=images, threshold=0.0, refresh=4)


REGULARIZERS: dict[str, Callable[[nn.Module], Any]] = {"cd": cd, "s2d": s2d}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# transformers


def hf_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


class Plain(nn.Module):
    """A model whose keys the Trainer saves as they are.

    ViT of transformers 5.23 cannot be resumed exactly with or without a callback: the keys in a
    checkpoint are renamed, and resuming does not rename them back.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=16,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=3,
        )

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.vit(pixel_values)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def hf_trainer(folder: Path, model: nn.Module, callbacks: list[Any], **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    if "keep_torch_compile" not in signature(accelerate.Accelerator.unwrap_model).parameters:
        pytest.skip(f"the Trainer does not run with accelerate {accelerate.__version__}")
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    for name in ("save_strategy", *arguments, "max_grad_norm"):
        if name in more:
            arguments[name] = more.pop(name)
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments),
        callbacks=callbacks,
        **{"train_dataset": data(), **more},
    )


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_trainer_regularizes_as_one_attached_by_hand(tmp_path, name):
    found = {}
    for how in ("callback", "by hand", "without"):
        model = hf_model()
        regularizer = REGULARIZERS[name](model)
        callbacks = [transformers_callback(regularizer)] if how == "callback" else []
        trainer = hf_trainer(tmp_path, model, callbacks, save_strategy="no")
        if how == "by hand":
            regularizer.attach(trainer.create_optimizer())
        trainer.train()
        found[how] = weights(model)
        assert regularizer.steps == (0 if how == "without" else STEPS)
    assert equal(found["callback"], found["by hand"])
    assert not equal(found["callback"], found["without"])


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_trainer_ends_with_the_same_weights(tmp_path, name, restore):
    first = Plain()
    callback = transformers_callback(REGULARIZERS[name](first))
    hf_trainer(tmp_path, first, [callback], train_dataset=one_image()).train()
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    json.loads((checkpoint / "trainer_state.json").read_text())
    second = Plain()
    regularizer = REGULARIZERS[name](second)
    callback = transformers_callback(regularizer)
    trainer = hf_trainer(tmp_path / "b", second, [callback], train_dataset=one_image())
    trainer.args.restore_callback_states_from_checkpoint = restore
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert regularizer.steps == STEPS
    assert equal(weights(second), weights(first))


def test_a_checkpoint_of_other_settings_or_without_a_state_is_told(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    model = Plain()
    hf_trainer(tmp_path, model, [transformers_callback(cd(model))]).train()
    checkpoint = str(tmp_path / f"checkpoint-{SAVED}")
    model = Plain()
    other = quietvit.ColinearityDecay(model, EXAMPLE, strength=1.0, penalty="top")
    with pytest.raises(QuietvitError, match=r"strength=20\.0.*strength=1\.0"):
        hf_trainer(tmp_path / "b", model, [transformers_callback(other)]).train(
            resume_from_checkpoint=checkpoint
        )
    assert "holds no state" not in caplog.text
    model = Plain()
    new = s2d(model)
    hf_trainer(tmp_path / "c", model, [transformers_callback(new)]).train(
        resume_from_checkpoint=checkpoint
    )
    assert "holds no state of these regularizers" in caplog.text
    assert new.steps == STEPS - SAVED
    assert (tmp_path / "c" / f"checkpoint-{STEPS}").is_dir()


def of_the_step(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """The criterion that the Trainer asks for: a sum over this pass, divided for the whole step."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def test_a_penalty_on_activations_goes_into_the_loss_of_the_trainer(tmp_path):
    found = []
    for strength in (0.0, 5.0):
        model = hf_model()
        tweo = quietvit.TWEO(model, EXAMPLE, strength=strength, threshold=0.5)
        trainer = hf_trainer(
            tmp_path,
            model,
            [transformers_callback(tweo, cd(model))],
            compute_loss_func=tweo.around(of_the_step),
            save_strategy="no",
        )
        trainer.train()
        assert tweo.steps == STEPS
        found.append(weights(model))
    assert not equal(*found)


@pytest.mark.parametrize("count", [24, 22], ids=["even", "a smaller last pass"])
def test_accumulation_in_the_trainer_leaves_the_penalty_as_strong(tmp_path, count):
    """Two passes of n images to a step train the weights of one pass of 2 n images."""
    found = {}
    for passes, strength in ((1, 5.0), (2, 5.0), (1, 0.0)):
        model = hf_model().double()
        tweo = quietvit.TWEO(model, EXAMPLE.double(), strength=strength, threshold=0.5)
        trainer = hf_trainer(
            tmp_path,
            model,
            [transformers_callback(tweo)],
            compute_loss_func=tweo.around(of_the_step),
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.01), None),
            train_dataset=[{**s, "pixel_values": s["pixel_values"].double()} for s in data(count)],
            save_strategy="no",
            gradient_accumulation_steps=passes,
            per_device_train_batch_size=8 // passes,
            max_steps=3,
            max_grad_norm=0.0,  # clipping would hide a wrong factor
        )
        trainer.train()
        assert tweo.steps == 3
        found[passes, strength] = weights(model)
    for name, value in found[1, 5.0].items():
        torch.testing.assert_close(found[2, 5.0][name], value, rtol=1e-5, atol=1e-8)
    assert not equal(found[1, 5.0], found[1, 0.0])


def failing(at: int) -> Any:
    """A callback that ends the first training after so many steps."""
    transformers = pytest.importorskip("transformers")
    left = [at]

    class Callback(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if left and state.global_step == left[0]:
                left.clear()
                raise FailedError

    return Callback()


class FailedError(Exception):
    pass


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("same", [True, False], ids=["same trainer", "another trainer"])
def test_after_a_training_that_failed_the_next_attaches_once(tmp_path, name, same):
    """As where it is detached and attached by hand in between."""
    found = {}
    for how in ("callback", "by hand"):
        model = hf_model()
        regularizer = REGULARIZERS[name](model)
        own = [transformers_callback(regularizer)] if how == "callback" else []

        def trainer(callbacks: list[Any], model: nn.Module = model) -> Any:
            return hf_trainer(tmp_path, model, callbacks, save_strategy="no")

        first = trainer([*own, failing(at=2)])
        if how == "by hand":
            regularizer.attach(first.create_optimizer())
        with pytest.raises(FailedError):
            first.train()
        second = first if same else trainer(own)
        if how == "by hand":
            regularizer.detach()
            regularizer.attach(second.optimizer or second.create_optimizer())
        second.train()
        assert regularizer.steps == 2 + STEPS
        found[how] = weights(model)
        if how == "callback":
            regularizer.attach(torch.optim.SGD(model.parameters(), lr=0.1))  # is detached
    assert equal(found["callback"], found["by hand"])


def test_a_failed_training_goes_on_from_its_checkpoint_exactly(tmp_path):
    whole = Plain()
    callback = transformers_callback(cd(whole))
    hf_trainer(tmp_path / "a", whole, [callback], train_dataset=one_image()).train()
    model = Plain()
    regularizer = cd(model)
    callbacks = [transformers_callback(regularizer), failing(at=SAVED + 1)]
    trainer = hf_trainer(tmp_path / "b", model, callbacks, train_dataset=one_image())
    with pytest.raises(FailedError):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{SAVED}"))
    assert regularizer.steps == STEPS
    assert equal(weights(model), weights(whole))


def test_where_one_regularizer_cannot_be_attached_none_is(tmp_path):
    model = hf_model()
    regularizer = cd(model)
    callback = transformers_callback(regularizer, s2d(hf_model()))
    with pytest.raises(QuietvitError, match="none of the"):
        hf_trainer(tmp_path, model, [callback]).train()
    regularizer.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_two_callbacks_of_one_kind_are_refused(tmp_path):
    model = hf_model()
    callbacks = [transformers_callback(cd(model)), transformers_callback(cd(model))]
    with pytest.raises(QuietvitError, match="give all regularizers to one"):
        hf_trainer(tmp_path, model, callbacks).train()


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(QuietvitError, match="none of the"):
        hf_trainer(tmp_path, hf_model(), [transformers_callback(cd(hf_model()))]).train()


# Lightning


def lightning_module(
    model: nn.Module, criterion: Any = F.cross_entropy, optimizers: int = 1
) -> Any:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.automatic_optimization = optimizers == 1

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss: Tensor = criterion(model(batch["pixel_values"]).logits, batch["labels"])
            return loss

        def configure_optimizers(self) -> Any:
            made = [torch.optim.AdamW(model.parameters(), lr=1e-3) for _ in range(optimizers)]
            return made if optimizers > 1 else made[0]

    return Module()


def fit(folder: Path, module: Any, callbacks: list[Any], resume: Any = None) -> None:
    """Train on varied batches, two to a step; runs to be resumed on one image again and again."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)
    resumed = "resume" in folder.name
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=1 if resumed else 2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[*callbacks, keep],
    )
    images = one_image() if resumed else data()
    loader = torch.utils.data.DataLoader(images, batch_size=4)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=resume)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_lightning_regularizes_as_one_attached_by_hand(tmp_path, name):
    found = {}
    for how in ("callback", "by hand", "without"):
        model = hf_model()
        module = lightning_module(model)
        regularizer = REGULARIZERS[name](model)
        if how == "by hand":
            module.on_train_start = lambda m=module, r=regularizer: r.attach(
                m.optimizers().optimizer
            )
        fit(tmp_path / how, module, [lightning_callback(regularizer)] if how == "callback" else [])
        found[how] = weights(model)
        assert regularizer.steps == (0 if how == "without" else STEPS)
    assert equal(found["callback"], found["by hand"])
    assert not equal(found["callback"], found["without"])


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_resumed_fit_ends_with_the_same_weights(tmp_path, name, caplog):
    caplog.set_level(logging.WARNING, "quietvit")
    first = hf_model()
    fit(
        tmp_path / "resume-a",
        lightning_module(first),
        [lightning_callback(REGULARIZERS[name](first))],
    )
    checkpoint = tmp_path / "resume-a" / f"step={SAVED}.ckpt"
    second = hf_model()
    regularizer = REGULARIZERS[name](second)
    module = lightning_module(second)
    fit(tmp_path / "resume-b", module, [lightning_callback(regularizer)], checkpoint)
    assert regularizer.steps == STEPS
    assert equal(weights(second), weights(first))
    assert "holds no state" not in caplog.text
    third = hf_model()
    other = quietvit.NormGainDecay(third, EXAMPLE, strength=1.0)
    fit(tmp_path / "resume-c", lightning_module(third), [lightning_callback(other)], checkpoint)
    assert "holds no state of these regularizers" in caplog.text


def test_a_penalty_on_activations_in_lightning(tmp_path):
    model = hf_model()
    tweo = quietvit.TWEO(model, EXAMPLE, strength=5.0, threshold=0.5)
    module = lightning_module(model, tweo.around(F.cross_entropy))
    fit(tmp_path, module, [lightning_callback(tweo)])
    assert tweo.steps == STEPS


def test_several_optimizers_are_refused_with_the_way_out(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    model = hf_model()
    callback = lightning_callback(cd(model))
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data(8), batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(QuietvitError, match=r"2 optimizers.*regularizer\.attach\(optimizer\)"):
        trainer.fit(lightning_module(model, optimizers=2), loader)


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_a_callback_fits_the_lightning_that_is_in_use(monkeypatch, package):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    fake = types.ModuleType(package)
    fake.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, fake)
    assert isinstance(lightning_callback(cd(hf_model())), fake.Callback)


# both


def test_what_is_no_regularizer_is_refused():
    for make in (transformers_callback, lightning_callback):
        pytest.importorskip("transformers" if make is transformers_callback else "lightning")
        with pytest.raises(QuietvitError, match="at least one"):
            make()
        with pytest.raises(QuietvitError, match="not Linear"):
            make(nn.Linear(1, 1))


def test_without_the_package_the_extra_is_named(monkeypatch):
    for package in ("transformers", "lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(QuietvitError, match=r"quietvit\[transformers\]"):
        transformers_callback()
    with pytest.raises(QuietvitError, match=r"quietvit\[lightning\]"):
        lightning_callback()
