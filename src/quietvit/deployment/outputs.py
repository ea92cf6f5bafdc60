"""Choose the tensor of a model's output to export: logits, an embedding or a feature map.

``exporting``, ``comparing`` and ``predicting`` use the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quietvit.deployment.queries import Choosing
from quietvit.errors import QuietvitError
from quietvit.outputs import LOGITS, tensors_of
from quietvit.quantization import QuantizedModel
from quietvit.tracing import Site, evaluating, intercept

CLASSES, FEATURES, QUERIES = "classes", "features", "queries"
EMBEDDINGS = ("image_embeds", "pooler_output", "embeddings", "embedding")


@dataclass(frozen=True)
class Output:
    """The one tensor that an exported file gives.

    ``name`` is its name in the file. ``path`` locates it in the model's output, such as
    ``pooler_output`` or ``feature_maps.1``. It is empty if the model returns a bare tensor, and
    None (files of version 1) for the default choice. ``kind`` is ``classes`` for class scores
    (batch, classes), ``queries`` for the rows of a detector that chooses its queries by score
    (batch, queries, channels), else ``features``. ``shape`` excludes the batch.
    """

    name: str = LOGITS
    path: str | None = None
    kind: str = CLASSES
    shape: tuple[int, ...] | None = None

    @property
    def of_classes(self) -> bool:
        return self.kind == CLASSES

    @property
    def of_queries(self) -> bool:
        return self.kind == QUERIES

    def __str__(self) -> str:
        shape = "" if self.shape is None else f" {self.shape}"
        return f"{self.name}{shape}, {self.kind}"

    def of(self, output: Any) -> Tensor:
        """Return this tensor from a model's output. Raises QuietvitError if it is missing."""
        tensors = tensors_of(output)
        path = _default(tensors) if self.path is None else self.path
        if path not in tensors:
            raise QuietvitError(
                f"the model gives no tensor {path!r}, but {_listed(tensors)}; give the model that "
                "was exported."
            )
        return tensors[path]


def output_of(
    model: nn.Module,
    input_shape: tuple[int, ...],
    wanted: str | int | None = None,
    named_classes: bool = False,
) -> Output:
    """Choose the tensor to export after one pass over two black images (2, C, H, W).

    ``wanted`` is its path or index among the tensors. None takes ``logits``; else ``image_embeds``
    or ``pooler_output``; else the only tensor. An unnamed tensor gets the name ``wanted``.
    A tensor of two dims holds class scores if it is called ``logits`` or if ``named_classes``.
    An unnamed one also does, unless the model has ``num_classes == 0``.

    Raises QuietvitError if the choice is unclear or unknown, if the tensor's first dim is not the
    batch, or if the model needs more than images.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images = torch.zeros(2, *input_shape, device=device)
    try:
        with torch.no_grad(), evaluating(model), Choosing() as choosing:
            tensors = tensors_of(model(images))
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise QuietvitError(
            f"the model could not run on two images {tuple(images.shape)} "
            f"({type(error).__name__}: {reason}); "
            "export needs a model whose only input is images, with any batch size."
        ) from error
    if not tensors:
        raise QuietvitError("the model returns no tensor; wrap it so that it returns one.")
    path = _default(tensors) if wanted is None else _chosen(tensors, wanted)
    shape = tuple(tensors[path].shape)
    if len(shape) < 2 or shape[0] != 2:
        raise QuietvitError(
            f"the output {path or 'of the model'} is {shape} for two images, so its first dim is "
            f"not the batch; choose another tensor (output=..., --output-tensor): "
            f"{_listed(tensors)}."
        )
    unnamed = len(tensors) == 1 and path in ("", "0")  # "0": a tuple or list of one tensor
    output = _described(model, path, unnamed, wanted, shape[1:], named_classes)
    if len(shape) == 3 and shape[1] in choosing.taken:
        return replace(output, kind=QUERIES)
    return output


def _described(
    model: nn.Module,
    path: str,
    unnamed: bool,
    wanted: str | int | None,
    shape: tuple[int, ...],
    named_classes: bool,
) -> Output:
    wanted_name = wanted if isinstance(wanted, str) and not wanted.isdigit() else ""
    own = wanted_name if unnamed else path
    without_classes = getattr(getattr(model, "model", model), "num_classes", None) == 0
    scores = named_classes or own == LOGITS or (not own and not without_classes)
    if len(shape) == 1 and scores:
        return Output(own or LOGITS, path, CLASSES, shape)
    return Output(own or ("embeddings" if len(shape) == 1 else "features"), path, FEATURES, shape)


def unused_products(quantized: QuantizedModel, output: Output) -> tuple[str, ...]:
    """Return the products that do not enter the output, such as those after a feature map.

    A product also enters it through a choice, such as the scores by which a detector takes its
    queries. Empty if the model returns a bare tensor.
    """
    if output.path in ("", None):
        return ()
    names: list[str] = []
    entering = _Entering()

    def keep(site: Site, operands: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        result = run(*operands)
        names.append(site.name)
        entering.add(result, site.name)
        return result

    model = quantized.model
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images = torch.zeros(1, *quantized.input_shape, device=device)
    with torch.no_grad(), evaluating(model), entering, intercept(quantized.trace, keep):
        tensor = output.of(model(images))
    reached = entering.of(tensor)
    return tuple(name for name in names if name not in reached)


class _Entering(TorchDispatchMode):
    """Follow which products each tensor is computed from, also through indices and conditions.

    A gradient would lose them at ``topk``, ``argmax`` and ``detach``. Tensors that share memory
    share their products.
    """

    def __init__(self) -> None:
        super().__init__()
        self._products: dict[int, frozenset[str]] = {}
        self._alive: list[Any] = []  # so that no other tensor gets the same memory

    def of(self, tensor: Tensor) -> frozenset[str]:
        return self._products.get(tensor.untyped_storage()._cdata, frozenset())

    def add(self, tensor: Tensor, *names: str) -> None:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self._products[storage._cdata] = self.of(tensor) | set(names)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("new_") or name.endswith("_like"):  # only the shape of the argument
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        names = frozenset[str]().union(*map(self.of, given))
        for made in tree_leaves(result) if names else ():
            if isinstance(made, Tensor):
                self.add(made, *names)
        return result


def _default(tensors: Mapping[str, Tensor]) -> str:
    for name in (LOGITS, *EMBEDDINGS):
        if name in tensors:
            return name
    if len(tensors) == 1:
        return next(iter(tensors))
    raise QuietvitError(
        f"the model gives {len(tensors)} tensors, and none is called logits or pooler_output: "
        f"{_listed(tensors)}. Choose one by name or index: output=... (--output-tensor)."
    )


def _chosen(tensors: Mapping[str, Tensor], wanted: str | int) -> str:
    paths = list(tensors)
    if isinstance(wanted, str):
        if wanted in tensors:
            return wanted
        if paths == [""] and not wanted.isdigit() and re.fullmatch(r"[A-Za-z][\w.]*", wanted):
            return ""
    place = int(wanted) if isinstance(wanted, str) and wanted.isdigit() else wanted
    if isinstance(place, int) and not isinstance(place, bool) and 0 <= place < len(paths):
        return paths[place]
    raise QuietvitError(
        f"the model has no output {wanted!r}; choose one of its tensors by name or index: "
        f"{_listed(tensors)}."
    )


def _listed(tensors: Mapping[str, Tensor]) -> str:
    """List index, name and shape of each tensor. ``B`` is the batch."""
    shown = [
        f"{place}: {path or 'the only tensor'} ({', '.join(['B', *map(str, x.shape[1:])])})"
        for place, (path, x) in enumerate(tensors.items())
    ]
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return "; ".join(shown[:12]) + more
