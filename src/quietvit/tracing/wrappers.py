"""Unwrap models: ``torch.compile``, DistributedDataParallel, FSDP and the like.

These wrap a model or its blocks and do not change its result. Their names never appear in ours.
"""

from __future__ import annotations

import copy
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quietvit.errors import QuietvitError

# Wrappers that forward unknown attributes keep the inner model under one of these names.
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# (Python module, class) of wrappers that do not; all of them keep the inner model as ``module``.
_PARALLEL = (
    ("torch.nn.parallel", "DataParallel"),
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch.optim.swa_utils", "AveragedModel"),
    ("timm.utils", "ModelEma"),
    ("timm.utils", "ModelEmaV2"),
    ("timm.utils", "ModelEmaV3"),
)


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model inside all its wrappers.

    Removes ``torch.compile``, DataParallel, DistributedDataParallel, FSDP, the activation
    checkpoint wrapper, and torch's and timm's averaged models. Other objects pass unchanged.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def plain_name(name: str) -> str:
    """Return a name without the parts that wrapped blocks add; ``get_submodule`` accepts it."""
    return ".".join(part for part in name.split(".") if part not in _INNER)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of the model without wrappers, compiled blocks and compiled methods.

    A plain deep copy is wrong: its compiled methods still run the original model. Functions that
    the class itself compiles stay; ``eagerly`` runs them uncompiled.

    Raises QuietvitError if old torch functions keep a computed weight in the model.
    """
    memo: dict[int, Any] = {}
    try:
        copied = plain_model(copy.deepcopy(plain_model(model), memo))
    except RuntimeError as error:
        _refuse_computed(model, error)
        raise
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if child is not None and _passes_on(child) is not None:
                module._modules[name] = plain_model(child)
    for module in copied.modules():
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None
        for name, value in list(vars(module).items()):
            inner = getattr(value, "_torchdynamo_orig_callable", None)
            if isinstance(inner, types.MethodType):
                owner = memo.get(id(inner.__self__), inner.__self__)
                inner = types.MethodType(inner.__func__, owner)
            if inner is not None:
                vars(module)[name] = inner
    return copied


def _refuse_computed(model: nn.Module, error: RuntimeError) -> None:
    kept = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    if kept:
        raise QuietvitError(
            f"{type(model).__name__} cannot be copied: {kept[0]} is a tensor with a gradient from "
            "an earlier pass. torch.nn.utils.weight_norm and spectral_norm leave such tensors. "
            "Use torch.nn.utils.parametrizations.weight_norm or spectral_norm instead. Or call "
            "remove_weight_norm or remove_spectral_norm first, or run one forward pass under "
            "torch.no_grad()."
        ) from error


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled code eagerly inside ``with``; afterwards it runs compiled again.

    Does nothing while torch itself compiles, because inner compiled code then joins the outer.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are")
        yield


def _inside(model: nn.Module) -> nn.Module | None:
    """Return the module inside the outermost wrapper; None without a wrapper."""
    inner = _passes_on(model)
    if inner is not None:
        return inner
    for where, kind in _PARALLEL:
        wrapper = getattr(sys.modules.get(where), kind, None)
        if wrapper is not None and isinstance(model, wrapper):
            return _module(getattr(model, "module", None))
    return None


def _passes_on(model: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper that forwards attributes; None for other modules."""
    children = getattr(model, "_modules", {})
    return next((_module(children[name]) for name in _INNER if name in children), None)


def _module(value: Any) -> nn.Module | None:
    return value if isinstance(value, nn.Module) else None
