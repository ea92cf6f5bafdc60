"""Callbacks that use regularizers in the transformers ``Trainer`` and in Lightning.

The packages are imported on use. A plain loop needs only ``regularizer.attach(optimizer)``.
"""

from __future__ import annotations

import base64
import importlib
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quietvit.decay import Regularizer
from quietvit.errors import QuietvitError

logger = logging.getLogger("quietvit")


def transformers_callback(*regularizers: Regularizer) -> Any:
    """Return a ``TrainerCallback``: ``Trainer(..., callbacks=[transformers_callback(decay)])``.

    Build the regularizers on the model that the Trainer gets, and give all of them to one callback.
    They are attached to the Trainer's optimizer when training begins (also under accelerate) and
    detached when it ends. Each checkpoint keeps their state for an exact resume in
    ``trainer_state.json``.

    TWEO also needs ``compute_loss_func=tweo.around(criterion)``. The Trainer calls the criterion
    with outputs, labels and ``num_items_in_batch``. It must return the sum of its losses divided by
    that number.

    If ``train()`` raises, the Trainer calls no callback and the regularizers stay attached. The
    next ``train()``, of any Trainer, detaches them first. It continues from their current state or
    from its checkpoint. To continue without a Trainer, call ``detach()`` on each.

    Raises:
        QuietvitError: transformers is missing, or no regularizer is given. When training begins:
            the optimizer has no parameter of a regularizer, or the checkpoint is from other
            regularizers.
    """
    try:
        from transformers import TrainerCallback
        from transformers.trainer_callback import ExportableState
    except ImportError as error:
        raise QuietvitError(
            "transformers_callback needs transformers, which is not installed; pip install "
            "'quietvit[transformers]'."
        ) from error
    key = _key(regularizers)

    class Callback(TrainerCallback, ExportableState):
        # To restore callbacks, the Trainer may create another instance without arguments.

        def on_train_begin(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            saved = state.stateful_callbacks.get(key)
            if isinstance(saved, list):
                raise QuietvitError(
                    f"this Trainer has {len(saved)} callbacks named {key}; give all regularizers "
                    "to one: transformers_callback(first, second)."
                )
            if saved is None:
                _say_unsaved(state.global_step)
                state.stateful_callbacks[key] = self.state()
            elif state.global_step:
                _load(regularizers, _unpacked(saved["attributes"]["packed"]))
            _attach(regularizers, optimizer)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _detach(regularizers)

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"packed": _packed(_states(regularizers))}}

    Callback.__name__ = Callback.__qualname__ = key
    return Callback()


def lightning_callback(*regularizers: Regularizer) -> Any:
    """Return a Lightning ``Callback``: ``Trainer(callbacks=[lightning_callback(decay)])``.

    Works with ``lightning`` and ``pytorch_lightning``. Build the regularizers on the module, or on
    the model inside it, before the fit. They are attached to the module's only optimizer when
    training starts and detached when it ends. Every checkpoint keeps their state. TWEO also needs
    its loss: use ``tweo.around(criterion)`` in the module.

    Raises:
        QuietvitError: Lightning is missing, or no regularizer is given. When training starts: the
            module has several optimizers, its optimizer has no parameter of a regularizer, or the
            checkpoint is from other regularizers.
    """
    base: Any = _lightning().Callback
    key = _key(regularizers)

    class Callback(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._pending: Mapping[str, Any] | None = None

        @property
        def state_key(self) -> str:
            return key

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            optimizers = trainer.optimizers
            if len(optimizers) != 1:
                raise QuietvitError(
                    f"{type(pl_module).__name__} has {len(optimizers)} optimizers, and "
                    "lightning_callback supports only one; remove the callback and call "
                    "regularizer.attach(optimizer) in the module's on_train_start."
                )
            if self._pending is not None:
                _load(regularizers, self._pending)
                self._pending = None
            elif trainer.ckpt_path:
                _say_unsaved(trainer.global_step)
            _attach(regularizers, optimizers[0])

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            _detach(regularizers)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            _detach(regularizers)

        def state_dict(self) -> dict[str, Any]:
            return _states(regularizers)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            # Load it in on_train_start: here the model is not on its device yet.
            self._pending = state_dict

    return Callback()


def _lightning() -> Any:
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise QuietvitError(
        "lightning_callback needs lightning, which is not installed; pip install "
        "'quietvit[lightning]'."
    )


def _key(regularizers: Sequence[Regularizer]) -> str:
    for regularizer in regularizers:
        if not isinstance(regularizer, Regularizer):
            raise QuietvitError(
                f"a callback takes regularizers such as quietvit.ColinearityDecay(model, example), "
                f"not {type(regularizer).__name__}."
            )
    if not regularizers:
        raise QuietvitError(
            "give the callback at least one regularizer, such as "
            "quietvit.ColinearityDecay(model, example)."
        )
    return "Quietvit" + "".join(type(regularizer).__name__ for regularizer in regularizers)


def _attach(regularizers: Sequence[Regularizer], optimizer: Any) -> None:
    """Attach all regularizers, or none if one raises."""
    _detach(regularizers)
    try:
        for regularizer in regularizers:
            regularizer.attach(optimizer)
    except QuietvitError:
        _detach(regularizers)
        raise


def _detach(regularizers: Sequence[Regularizer]) -> None:
    for regularizer in regularizers:
        regularizer.detach()


def _states(regularizers: Sequence[Regularizer]) -> dict[str, Any]:
    return {"states": [regularizer.state_dict() for regularizer in regularizers]}


def _load(regularizers: Sequence[Regularizer], state: Mapping[str, Any]) -> None:
    for regularizer, saved in zip(regularizers, state["states"], strict=True):
        regularizer.load_state_dict(saved)


def _say_unsaved(step: int) -> None:
    logger.warning(
        "the checkpoint of step %d holds no state of these regularizers; they continue from their "
        "current state.",
        step,
    )


def _packed(state: dict[str, Any]) -> str:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _unpacked(text: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(
        io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True
    )
    return state
