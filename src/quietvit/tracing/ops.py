"""Which torch functions the trace knows, and how to lay out their operands.

This module only classifies calls. ``record`` decides what is stored about them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MATMUL_KINDS = frozenset({"linear", "conv", "matmul", "einsum"})
SITE_KINDS = MATMUL_KINDS | {"softmax", "norm", "activation", "add"}

COMPOSED = "composed_rms_norm"
"""The function of a norm that ``composed`` found in single steps."""

# Each family has one counter. The n-th matrix multiplication of a forward pass is the same site in
# every pass.
FAMILIES = {kind: "matmul" if kind in MATMUL_KINDS else kind for kind in SITE_KINDS}


@dataclass(frozen=True)
class Form:
    """How a torch function takes its operands.

    ``names``: its positional arguments in order. ``operands``: those that the trace records.
    """

    kind: str
    names: tuple[str, ...]
    operands: tuple[str, ...]
    gain: str | None = None


_MATMUL = Form("matmul", ("input", "other"), ("input", "other"))
_MM = Form("matmul", ("input", "mat2"), ("input", "mat2"))
_ADDMM = Form("matmul", ("input", "mat1", "mat2"), ("mat1", "mat2"))
_BADDBMM = Form("matmul", ("input", "batch1", "batch2"), ("batch1", "batch2"))
_CONV = Form("conv", ("input", "weight", "bias"), ("input", "weight"))
_UNARY = ("input",)
_ADD = Form("add", ("input", "other"), ("input", "other"))
_RADD = Form("add", ("other", "input"), ("input", "other"))

FORMS: dict[Any, Form] = {
    F.linear: Form("linear", ("input", "weight", "bias"), ("input", "weight")),
    torch.matmul: _MATMUL,
    torch.linalg.matmul: _MATMUL,
    torch.mm: _MM,
    torch.bmm: _MM,
    torch.addmm: _ADDMM,
    torch.baddbmm: _BADDBMM,
    torch.addbmm: _BADDBMM,
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    Tensor.__rmatmul__: Form("matmul", ("other", "input"), ("input", "other")),
    Tensor.mm: _MM,
    Tensor.bmm: _MM,
    Tensor.addmm: _ADDMM,
    Tensor.addmm_: _ADDMM,
    Tensor.baddbmm: _BADDBMM,
    Tensor.baddbmm_: _BADDBMM,
    Tensor.addbmm: _BADDBMM,
    Tensor.addbmm_: _BADDBMM,
    torch.einsum: Form("einsum", ("equation",), ()),
    F.layer_norm: Form("norm", ("input", "normalized_shape", "weight"), _UNARY, "weight"),
    torch.layer_norm: Form("norm", ("input", "normalized_shape", "weight"), _UNARY, "weight"),
    F.rms_norm: Form("norm", ("input", "normalized_shape", "weight"), _UNARY, "weight"),
    torch.rms_norm: Form("norm", ("input", "normalized_shape", "weight"), _UNARY, "weight"),
    F.group_norm: Form("norm", ("input", "num_groups", "weight"), _UNARY, "weight"),
    torch.group_norm: Form("norm", ("input", "num_groups", "weight"), _UNARY, "weight"),
    F.batch_norm: Form(
        "norm", ("input", "running_mean", "running_var", "weight"), _UNARY, "weight"
    ),
    torch.batch_norm: Form(
        "norm", ("input", "weight", "bias", "running_mean", "running_var"), _UNARY, "weight"
    ),
    torch.add: _ADD,
    Tensor.add: _ADD,
    Tensor.add_: _ADD,
    Tensor.__add__: _ADD,
    Tensor.__radd__: _RADD,
    Tensor.__iadd__: _ADD,
}
_CONVOLUTIONS = (
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)
FORMS |= dict.fromkeys(_CONVOLUTIONS, _CONV)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
FORMS |= dict.fromkeys(_SOFTMAX, Form("softmax", _UNARY, _UNARY))
_ACTIVATIONS = (
    *(F.gelu, F.relu, F.relu_, F.relu6, F.silu, F.mish, F.elu, F.celu, F.selu, F.leaky_relu),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.prelu, F.logsigmoid),
    *(torch.relu, torch.relu_, torch.tanh, torch.sigmoid, torch.prelu, torch.selu),
    *(Tensor.relu, Tensor.relu_, Tensor.tanh, Tensor.tanh_, Tensor.sigmoid, Tensor.sigmoid_),
    *(F.sigmoid, F.tanh, torch.sigmoid_, torch.tanh_, torch.special.expit),
    *(F.threshold, F.softsign, F.tanhshrink, F.hardshrink, F.softshrink, F.rrelu),
)
FORMS |= dict.fromkeys(_ACTIVATIONS, Form("activation", _UNARY, _UNARY))

TOKEN_NORMS = ("layer_norm", "rms_norm", COMPOSED)
"""Functions of norms over the last dim."""

# Names of more elementwise functions, which keep channels apart. BENDING ones are nonlinear: like
# an activation, they separate two matrices.
SCALING = {"mul", "mul_", "div", "div_", "true_divide", "multiply", "divide"} | {
    f"__{i}{name}__" for name in ("mul", "truediv") for i in ("", "r", "i")
}
ADDING = {"add", "add_", "sub", "sub_", "subtract", "__radd__", "__rsub__"} | {
    f"__{i}{name}__" for name in ("add", "sub") for i in ("", "i")
}
BENDING = {
    *("clamp", "clamp_", "clip", "clamp_min", "clamp_max", "abs", "pow", "__pow__", "square"),
    *("exp", "exp_", "log", "sqrt", "rsqrt", "erf", "softplus", "sin", "cos", "reciprocal"),
    *("maximum", "minimum"),
}
ELEMENTWISE = (
    SCALING
    | ADDING
    | BENDING
    | {"nan_to_num", "neg", "__neg__", "masked_fill", "masked_fill_", "where"}
)
# Functions that return their first argument, apart from dtype, device and dropped entries.
CASTING = {
    *("to", "type", "type_as", "float", "half", "double", "bfloat16", "cpu", "cuda", "clone"),
    *("contiguous", "detach", "requires_grad_", "alias", "positive"),
    *("dropout", "dropout_", "alpha_dropout", "feature_dropout"),
}
# Functions that use only the shape, dtype and device of their argument, not its values.
FRESH = {f"new_{what}" for what in ("zeros", "ones", "full", "empty", "tensor")} | {
    f"{what}_like" for what in ("zeros", "ones", "full", "empty", "rand", "randn")
}
# Functions that only move entries. They are replayed on the labels with the same arguments.
MOVING = {
    *("view", "reshape", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"),
    *("flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "view_as", "t"),
    *("reshape_as", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow"),
    *("select", "__getitem__", "index_select", "gather", "take_along_dim", "roll", "flip"),
    *("repeat", "repeat_interleave", "tile", "broadcast_to", "unfold", "fold", "rot90", "hsplit"),
    *("pixel_shuffle", "pixel_unshuffle", "adjoint", "diagonal", "unsafe_chunk", "ravel"),
}
JOINING = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
# Functions that pool each channel by itself -> the number of last dims that they pool over.
POOLING = {
    **dict.fromkeys(("avg_pool1d", "adaptive_avg_pool1d", "max_pool1d"), 1),
    **dict.fromkeys(("avg_pool2d", "adaptive_avg_pool2d", "max_pool2d"), 2),
    "adaptive_max_pool2d": 2,
}
REDUCING = {"mean", "sum", "amax", *POOLING}
# Functions in which another tensor can select the entries to move.
CHOOSING = {"__getitem__", "index_select", "gather", "take_along_dim"}
# Functions that read a map at boxes.
AT_BOXES = {"roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"}
CASTING_PROPERTIES = {Tensor.data.__get__}  # type: ignore[attr-defined]
MOVING_PROPERTIES = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__}  # type: ignore[attr-defined]


@dataclass
class Call:
    """One call of a known function; ``run`` repeats it with other operands.

    ``operands``: (input, weight) of linear and conv; (input,) of norm, softmax and activation; both
    sides of matmul, einsum and add. ``letters``: one letter for each dim of the left side, right
    side and output of an einsum. ``function``: a name for the site, instead of the function's own.
    """

    kind: str
    operands: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    gain: Tensor | None = None
    letters: tuple[str, str, str] = ("", "", "")
    function: str | None = None


def name_of(func: Any) -> str:
    """Return the name of a torch function, as sites show it."""
    return str(getattr(func, "__name__", func))


def classify(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Lay out a call of a known function; None for others and for matrix-vector products."""
    form = FORMS.get(func)
    if form is None:
        return None
    if form.kind == "einsum":
        return _einsum(func, args, kwargs)
    places: dict[str, int | str] = dict(zip(form.names, range(len(args)), strict=False))
    places |= {name: name for name in kwargs}
    if "self" in places:
        places[form.names[0]] = "self"

    def value(name: str) -> Any:
        place = places.get(name)
        if place is None:
            return None
        return args[place] if isinstance(place, int) else kwargs[place]

    operands = tuple(value(name) for name in form.operands)
    if not all(isinstance(operand, Tensor) for operand in operands):
        return None
    if form.kind in ("linear", "matmul") and operands[1].ndim == 1:
        return None  # a weighted sum over the last dim, for which torch counts no flops

    def run(*replaced: Tensor) -> Tensor:
        new_args, new_kwargs = list(args), dict(kwargs)
        for name, tensor in zip(form.operands, replaced, strict=True):
            place = places[name]
            if isinstance(place, int):
                new_args[place] = tensor
            else:
                new_kwargs[place] = tensor
        result: Tensor = func(*new_args, **new_kwargs)
        return result

    return Call(form.kind, operands, run, gain=value(form.gain) if form.gain else None)


def _einsum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    equation, *rest = args
    tensors = tuple(rest[0]) if len(rest) == 1 and not isinstance(rest[0], Tensor) else tuple(rest)
    if len(tensors) != 2 or not isinstance(equation, str):
        return None
    left, right, output = _letters(equation, tensors[0].ndim, tensors[1].ndim)
    if not set(left) & set(right) - set(output):
        return None  # no dim is contracted: an elementwise product
    return Call(
        "einsum",
        tensors,
        lambda a, b: func(equation, a, b),
        letters=(left, right, output),
    )


def _letters(equation: str, left: int, right: int) -> tuple[str, str, str]:
    """Return an einsum's terms with each ellipsis replaced by right-aligned Greek letters.

    Example: "...ij,...jk" of two 3-d tensors gives ("αij", "αjk", "αik").
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    first, second = inputs.split(",")
    wide = []
    for term, ndim in ((first, left), (second, right)):
        missing = ndim - len(term.replace("...", ""))
        wide.append("".join(chr(0x3B1 + i) for i in reversed(range(missing))))
    longest = max(wide, key=len)
    terms = [t.replace("...", w) for t, w in zip((first, second), wide, strict=True)]
    if not arrow:
        named = (first + second).replace("...", "")
        output = "..." + "".join(sorted(c for c in named if named.count(c) == 1))
    return terms[0], terms[1], output.replace("...", longest)


def norm_channel_dim(function: str) -> int:
    """Return the dim of a norm's output that its gain scales, given the function's name."""
    return -1 if function in TOKEN_NORMS else 1


def weight_first(call: Call) -> Call:
    """Turn ``x @ W`` with W of shape (in, out) into a linear call whose weight is (out, in)."""
    run = call.run
    left, right = call.operands
    return Call("linear", (left, right.mT), lambda x, weight: run(x, weight.mT))


def macs(call: Call, func: Any, output: Tensor) -> int:
    """Return the multiply-accumulates of a product without its bias; 0 for other kinds."""
    if call.kind not in MATMUL_KINDS:
        return 0
    left, right = call.operands
    if call.kind == "conv":
        base = left if "transpose" in func.__name__ else output
        return base.numel() * right[0].numel()
    if call.kind == "einsum":
        return _einsum_macs(call.letters, left, right)
    summed = output.numel() * left.shape[-1]
    return summed * left.shape[0] if "addbmm" in func.__name__ else summed


def _einsum_macs(letters: tuple[str, str, str], left: Tensor, right: Tensor) -> int:
    """Count without letters of one side that the output lacks: they are summed beforehand."""
    first, second, output = letters
    sizes: dict[str, int] = {}
    for own, other, tensor in ((first, second, left), (second, first, right)):
        for letter, size in zip(own, tensor.shape, strict=True):
            if letter in other or letter in output:
                sizes[letter] = max(sizes.get(letter, 1), size)
    return math.prod(sizes.values())
