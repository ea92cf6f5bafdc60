"""TWEO: a penalty on the largest outputs of residual blocks, added to the task loss.

The only regularizer here that acts on activations, and not on weights.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from quietvit.decay.checks import number
from quietvit.decay.config import RegularizerConfig, Strength
from quietvit.decay.following import innermost, is_outermost, is_skipped
from quietvit.decay.regularizer import BaseRegularizer
from quietvit.decay.schedule import Schedule, one_schedule
from quietvit.errors import QuietvitError
from quietvit.tensors import reshard, wide
from quietvit.tracing import trace
from quietvit.tracing.block_modules import first_tensor

logger = logging.getLogger("quietvit")

_EPSILON = 1e-6
_PATIENCE = 3
_MOST_PASSES = 64


class TweoConfig(RegularizerConfig):
    """TWEO, ``quietvit.TWEO``: a penalty on the largest outputs of blocks, added to the loss.

    Source: arXiv 2511.23225, second-hand (docs/method.md).
    """

    strength: Strength = 0.01
    """Factor of the penalty in the loss. 0 is off."""
    threshold: float = Field(default=3.0, gt=0)
    """Magnitude of an output from which on it is expensive."""
    power: float = Field(default=4.0, ge=1)
    """An output costs (magnitude / threshold) to this power."""


class TWEO(BaseRegularizer):
    """Penalize large block outputs: ``strength / L * sum_l mean((|A_l| / (threshold + 1e-6))^p)``.

    A_l is the output of residual block l after its add, p is ``power``; the mean is taken in
    float32 whatever the dtype of A_l. Values below ``threshold`` cost next to nothing, one at ten
    times the threshold as much as 10^p at the threshold. Source: arXiv 2511.23225, second-hand
    (docs/method.md); its epsilon is not public to us.

    Build it before ``torch.compile``, FSDP's ``fully_shard`` and DDP. Then one line is enough::

        criterion = quietvit.TWEO(model, x).attach(optimizer).around(criterion)

    Or add ``loss()`` to the task loss by hand. Forward passes in training mode with gradients
    count; those in eval mode or under ``no_grad`` do not. Checkpointing of blocks works if it is
    not reentrant (``use_reentrant=False``). Under DDP and FSDP each process penalizes its own
    images. If all blocks and everything before them are frozen, there is no gradient, and a warning
    says so once. Copies and pickles of it, or of a model that holds it, are as after ``detach()``.

    Args:
        model: the model that is trained, as itself (not inside DDP).
        example: input for ``quietvit.trace``, by which the blocks are found.
        strength: the factor of the penalty in the loss, at least 0.
        threshold: the magnitude above which outputs are expensive, at least 1e-6.
        power: p, at least 1.
        schedule: function from the optimizer step (0, 1, ...) to a factor of the strength; needs
            ``attach``, which counts the steps.

    Raises:
        QuietvitError: bad values, or a model without residual blocks. While training: ``loss()``
            finds no forward pass, or is not called in three optimizer steps in a row.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        strength: float = 0.01,
        threshold: float = 3.0,
        power: float = 4.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(model, schedule=one_schedule(schedule, "TWEO"))
        self.strength = number(strength, "strength", "TWEO")
        self.threshold = number(threshold, "threshold", "TWEO", least=1e-6)
        self.power = number(power, "power", "TWEO", least=1.0)
        self.blocks: tuple[str, ...] = trace(self.model, example).blocks
        if not self.blocks:
            raise QuietvitError(
                f"TWEO has nothing to penalize: {type(self.model).__name__} has no residual block "
                "(a module whose output is its input plus something). "
                "print(quietvit.trace(model, example)) shows what it has."
            )
        self._seen: list[tuple[str, Tensor]] = []
        self._last: dict[str, Tensor] = {}
        self._used, self._unused = False, 0
        self._warned = False
        self._hooks: list[Any] = []
        self._watch()

    def loss(self) -> Tensor:
        """Return the penalty, strength included, of the forward passes since the last call.

        A float32 scalar with a graph. After several passes (two views of one batch, say) it is
        their mean. Raises QuietvitError if there was none.
        """
        if not self._seen:
            raise QuietvitError(
                "TWEO.loss() found no forward pass in training mode with gradients since the last "
                f"call. Check that this {type(self.model).__name__} is the model that is trained, "
                "in train() mode; that TWEO is not detached and was built before torch.compile; "
                "and that checkpointing of blocks uses use_reentrant=False."
            )
        if self.schedule is not None and not self._handles:
            raise QuietvitError(
                "TWEO has a schedule, but no optimizer counts the steps. Call attach(optimizer)."
            )
        named_terms, self._seen = self._seen, []
        self._last = _by_block([(name, term.detach()) for name, term in named_terms])
        self._used, self._unused = True, 0
        terms = torch.stack([term.to(named_terms[0][1].device) for _, term in named_terms])
        if not self._warned and not any(term.requires_grad for _, term in named_terms):
            self._warned = True
            logger.warning(
                "TWEO changes nothing: no output of its %d blocks depends on a parameter that "
                "trains (requires_grad), so its penalty has no gradient. Unfreeze some, or remove "
                "TWEO.",
                len(self.blocks),
            )
        return terms.mean() * (self.strength * self._factor())

    def around(self, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function that adds ``loss()`` to what ``criterion`` returns.

        With the model in eval mode or under ``no_grad`` it is ``criterion`` alone.

        As ``compute_loss_func`` of the transformers Trainer it is called with
        ``num_items_in_batch``, the number of labels of a whole optimizer step. Such a ``criterion``
        must return a sum divided by that number, because the Trainer adds the results of all
        passes. The penalty is then weighted by this pass's share of the labels, so that its
        strength does not grow with accumulation or processes. Raises QuietvitError if the labels,
        the second argument, are not a tensor.
        """

        def with_penalty(*args: Any, **kwargs: Any) -> Tensor:
            value = criterion(*args, **kwargs)
            if not (torch.is_grad_enabled() and self.model.training):
                return value
            return value + self.loss().to(value.device) * _share_of_step(args, kwargs, value.device)

        return with_penalty

    def attach(self, optimizer: Optimizer) -> Self:
        """Count the steps of ``optimizer``, and raise when three pass without ``loss()``.

        Raises QuietvitError if already attached, if the optimizer cannot be hooked, or if it holds
        none of the model's parameters (copies are none) while some of them train.
        """
        self._refuse_if_attached()
        inner = innermost(optimizer, "attach TWEO to one that trains the model")
        if not self._is_trained_by(inner):
            raise QuietvitError(
                f"none of the {len(list(self.model.parameters()))} parameters of "
                f"{type(self.model).__name__} is in a group of this {type(inner).__name__}, whose "
                "steps TWEO would count; build the optimizer from this model's parameters, after "
                "any load_state_dict(assign=True) or .to()."
            )
        self._handles = [inner.register_step_post_hook(self._after_step)]
        self._watch()
        return self

    def detach(self) -> None:
        """Stop following the optimizer and watching the blocks, until ``attach`` is called."""
        super().detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], []

    def penalty(self) -> float:
        """Return the penalty of the last passes, strength not included. One sync."""
        parts = self.penalties()
        return math.fsum(parts.values()) / len(parts)

    def penalties(self) -> dict[str, float]:
        """Return the mean of (|A| / threshold)^p of each block in the last passes, by its name.

        Raises QuietvitError before the first pass.
        """
        last = _by_block([(n, t.detach()) for n, t in self._seen]) if self._seen else self._last
        if not last:
            raise QuietvitError("TWEO has seen no forward pass in training mode yet.")
        device = next(iter(last.values())).device
        values = torch.stack([value.to(device) for value in last.values()]).tolist()
        return dict(zip(last, values, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_seen": [], "_hooks": []}

    def settings(self) -> dict[str, Any]:
        return {
            "penalty": "tweo",
            "blocks": len(self.blocks),
            "strength": self.strength,
            "threshold": self.threshold,
            "power": self.power,
        }

    def _is_trained_by(self, optimizer: Optimizer) -> bool:
        """Whether it holds a parameter of the model, or the model has none that trains."""
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if trained.isdisjoint(map(id, self.model.parameters())):
            reshard(self.model)  # the parameters may be FSDP2's whole ones of the last pass
        own = list(self.model.parameters())
        return not trained.isdisjoint(map(id, own)) or not any(p.requires_grad for p in own)

    def _watch(self) -> None:
        if self._hooks:
            return
        for name in self.blocks:
            module = self.model.get_submodule(name)
            self._hooks.append(module.register_forward_hook(_Look(self, name)))

    def _look(self, name: str, output: Any) -> None:
        if not (self.model.training and torch.is_grad_enabled()):
            return
        term = _MeanPower.apply(first_tensor(output), self.threshold + _EPSILON, self.power)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # a checkpoint computes the block again during the backward pass
        if len(self._seen) >= _MOST_PASSES * len(self.blocks):
            raise QuietvitError(
                f"{_MOST_PASSES} forward passes in training mode ran without a call of TWEO.loss() "
                "that frees their graphs. Add loss() to the loss, or call detach(), or "
                "run passes that do not train under torch.no_grad()."
            )
        self._seen.append((name, term))

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_outermost(optimizer):
            return
        self._seen = []
        if is_skipped(optimizer):
            return
        self.steps += 1
        self._unused = 0 if self._used else self._unused + 1
        self._used = False
        if self._unused >= _PATIENCE:
            raise QuietvitError(
                f"{self._unused} optimizer steps passed without TWEO.loss(), so it is not part of "
                "the loss. Add it, or use criterion = tweo.around(criterion), or call detach()."
            )


class _MeanPower(torch.autograd.Function):
    """mean((|x| / scale)^power) in float32; keeps x alone for the backward pass, in its dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, power: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale, ctx.power = scale, power
        return _power(wide(x).abs() / scale, power).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        slope = _power(wide(x).abs() / ctx.scale, ctx.power - 1) * wide(x).sign()
        return (slope * (grad * (ctx.power / ctx.scale / x.numel()))).to(x.dtype), None, None


def _power(x: Tensor, power: float) -> Tensor:
    """x^power for x >= 0, by products where there are few: pow costs a logarithm each."""
    if power == 4:
        return x.square().square()
    return x.square() * x if power == 3 else x.pow(power)


class _Look:
    """Forward hook of one block. Copies and pickles of the model carry one that does nothing."""

    def __init__(self, owner: TWEO, name: str) -> None:
        self._owner = weakref.ref(owner)
        self._name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        owner = self._owner()
        if owner is not None:
            owner._look(self._name, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Nothing, ())


class _Nothing:
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        return None


def _share_of_step(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> Tensor | float:
    """This pass's labels over all that its optimizer step counts; 1 where nobody counted them.

    Counted as the transformers Trainer does: labels of -100 are none.
    """
    total = kwargs.get("num_items_in_batch")
    if total is None:
        return 1.0
    labels = kwargs.get("labels", args[1] if len(args) > 1 else None)
    if not isinstance(labels, Tensor):
        raise QuietvitError(
            f"TWEO.around: the criterion is called with num_items_in_batch={total} and with labels "
            f"that are a {type(labels).__name__}, so this pass's share of the step is unknown; "
            "call it as criterion(outputs, labels, num_items_in_batch=...) with a tensor of labels."
        )
    return labels.ne(-100).sum().to(device) / torch.as_tensor(total, device=device)


def _by_block(terms: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    result: dict[str, list[Tensor]] = {}
    for name, term in terms:
        result.setdefault(name, []).append(term)
    return {name: torch.stack(values).mean() for name, values in result.items()}
