"""What ``overhead.py`` measures with: a model that trains, its variants, clocks and meters.

The list of cases and their table are in ``overhead``.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import quietvit
from quietvit.decay.penalties import Top
from quietvit.tensors import has_fast_bfloat16

RATE = 1e-3
"""That of the ImageNet recipes at its highest: the trust region has most to do there."""
CPU_IMAGES = 32
"""Images in memory at a time on a CPU; a larger batch is accumulated."""
# Name -> class, its settings. Cheap strengths: what they do to the weights does not matter here.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cd": ("ColinearityDecay", {"strength": 1.0}),
    "cd-float32": ("ColinearityDecay", {"strength": 1.0, "products": "float32"}),
    "cd-compiled": ("ColinearityDecay", {"strength": 1.0, "compile": True}),
    "cd-every4": ("ColinearityDecay", {"strength": 1.0, "every": 4}),
    "cd-every10": ("ColinearityDecay", {"strength": 1.0, "every": 10}),
    "cd-top": ("ColinearityDecay", {"strength": 1.0, "top_refresh": 10**9}),
    "cd-top-svd": ("ColinearityDecay", {"strength": 1.0, "top_refresh": 1}),
    # Random weights pass no threshold: without one, every layer that it looks at is decayed.
    "s2d": ("SpectralDecay", {"refresh": 10**9, "threshold": 0.0}),
    "s2d-svd": ("SpectralDecay", {"refresh": 1, "threshold": 0.0}),
    "tweo": ("TWEO", {}),
    "kure": ("KurtosisRegularization", {}),
    "norm-gains": ("NormGainDecay", {"strength": 3.0}),
}


def low(device: torch.device) -> bool:
    """Whether models run in bfloat16 autocast on this device; otherwise float32."""
    return has_fast_bfloat16(device)


def precision(device: torch.device) -> str:
    return "bfloat16 autocast" if low(device) else "float32"


@dataclass
class Bench:
    """A model that trains on one batch of random images, and clocks around its steps.

    It uses bfloat16 autocast if the device multiplies it faster than float32, else float32.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, name: str, batch: int, device: torch.device) -> Bench:
        torch.manual_seed(0)
        model = timm.create_model(name).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        images = torch.randn(batch, 3, 224, 224, device=device)
        return cls(model, optimizer, images, torch.randint(0, 1000, (batch,), device=device))

    @property
    def device(self) -> torch.device:
        return self.images.device

    def backward(self, regularizer: Any = None) -> None:
        self.optimizer.zero_grad()
        at_once = CPU_IMAGES if self.device.type == "cpu" else len(self.images)
        parts = zip(self.images.split(at_once), self.labels.split(at_once), strict=True)
        for images, labels in parts:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=low(self.device)):
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels)
            if isinstance(regularizer, quietvit.TWEO):
                loss = loss + regularizer.loss()
            (loss * (len(images) / len(self.images))).backward()

    def step(self, regularizer: Any = None) -> None:
        self.backward(regularizer)
        self.optimizer.step()

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """Wall seconds of one call, after the device has finished."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - start) / times

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class LivePeak(TorchDispatchMode):
    """Bytes of the tensors that operations inside create: the most alive at once (``most``).

    It does not see what an operation allocates and frees internally.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata in known or storage._cdata in self.seen:
                continue
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def make(variant: str, bench: Bench) -> Any:
    kind, settings = VARIANTS[variant]
    example = torch.zeros(1, 3, 224, 224, device=bench.device)
    given = dict(settings)
    if "top_refresh" in given:
        given["penalty"] = Top(refresh=given.pop("top_refresh"))
    if kind == "SpectralDecay":
        given["images"] = torch.randn(16, 3, 224, 224, device=bench.device)
    made = getattr(quietvit, kind)(bench.model, example, **given)
    if kind == "TWEO":
        made.detach()
    return made


@contextmanager
def attached(regularizer: Any, bench: Bench) -> Iterator[None]:
    if regularizer is None:
        yield
        return
    regularizer.attach(bench.optimizer)
    try:
        yield
    finally:
        regularizer.detach()


def update(regularizer: Any, bench: Bench) -> None:
    """The work of a regularizer in the optimizer's hooks alone, at a step at which it acts."""
    regularizer.steps += (every(regularizer) - 1 - regularizer.steps) % every(regularizer)
    regularizer.step(bench.optimizer)


def every(regularizer: Any) -> int:
    return getattr(regularizer, "every", 1)


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def step_flops(name: str, batch: int) -> float:
    """Matrix FLOPs of a forward and backward pass, counted on two images."""
    small = Bench.of(name, 2, torch.device("cpu"))
    return flops(small.backward) / 2 * batch


def block_mib(model: nn.Module, example: Tensor) -> float:
    """Size of the weights of the largest residual block, MiB."""
    names = quietvit.trace(model, example).blocks
    sizes = [sum(p.nbytes for p in model.get_submodule(n).parameters()) for n in names]
    return max(sizes) / 2**20


def whole_steps(
    bench: Bench, made: dict[str, Any], repeats: int, times: int
) -> dict[str, list[float]]:
    """Seconds of a step with each regularizer and with none, in turn."""
    everyone: dict[str, Any] = {"plain": None} | made
    for regularizer in everyone.values():
        with attached(regularizer, bench):
            bench.step(regularizer)
    found: dict[str, list[float]] = {name: [] for name in everyone}
    order = list(everyone)
    for repeat in range(repeats):
        for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
            with attached(everyone[name], bench):
                one = lambda name=name: bench.step(everyone[name])  # noqa: E731
                found[name].append(bench.seconds(one, times))
    return found


def hooks(bench: Bench, made: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds per step that each regularizer spends in the optimizer's hooks, in turn."""
    found: dict[str, list[float]] = {name: [] for name in made}
    for regularizer in made.values():
        update(regularizer, bench)
    for _ in range(repeats):
        for name, regularizer in made.items():
            taken = bench.seconds(lambda r=regularizer: update(r, bench))
            found[name].append(taken / every(regularizer))
    return found


def extra_memory(bench: Bench, regularizer: Any, in_forward: bool) -> float:
    """Rise of the peak through the regularizer, MiB: during the update, or of a step (TWEO).

    A GPU's allocator reports it, and on a CPU ``LivePeak``. Take one step first, so that gradients
    and states exist.
    """
    if in_forward:
        peaks = []
        for one in (None, regularizer):
            bench.optimizer.zero_grad()
            with attached(one, bench):
                peaks.append(_peak(bench, lambda one=one: bench.step(one)))
        return peaks[1] - peaks[0]
    return _peak(bench, lambda: update(regularizer, bench))


def _peak(bench: Bench, work: Callable[[], object]) -> float:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        bench.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with LivePeak() as peak:
        work()
    return peak.most / 2**20
