"""Which torch functions the trace knows, and how to lay out their operands.

Only classification lives here: what is recorded about a call is ``record``'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MATMUL_KINDS = frozenset({"linear", "conv", "matmul", "einsum"})
SITE_KINDS = MATMUL_KINDS | {"softmax", "norm", "activation", "add"}

# A family is counted with one counter, so that a call is known by its place among its like: the
# n-th matrix multiplication of a forward pass is the same site in every pass.
FAMILIES = {kind: "matmul" if kind in MATMUL_KINDS else kind for kind in SITE_KINDS}


@dataclass(frozen=True)
class Form:
    """How a torch function takes its operands: ``kind``, and the names of its first arguments."""

    kind: str
    names: tuple[str, ...]
    operands: tuple[str, ...]
    gain: str | None = None


_MATMUL = Form("matmul", ("input", "other"), ("input", "other"))
_CONV = Form("conv", ("input", "weight", "bias"), ("input", "weight"))
_UNARY = ("input",)
_ADD = Form("add", ("input", "other"), ("input", "other"))
_RADD = Form("add", ("other", "input"), ("input", "other"))

FORMS: dict[Any, Form] = {
    F.linear: Form("linear", ("input", "weight", "bias"), ("input", "weight")),
    torch.matmul: _MATMUL,
    torch.mm: Form("matmul", ("input", "mat2"), ("input", "mat2")),
    torch.bmm: Form("matmul", ("input", "mat2"), ("input", "mat2")),
    torch.addmm: Form("matmul", ("input", "mat1", "mat2"), ("mat1", "mat2")),
    torch.baddbmm: Form("matmul", ("input", "batch1", "batch2"), ("batch1", "batch2")),
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    Tensor.__rmatmul__: Form("matmul", ("other", "input"), ("input", "other")),
    Tensor.mm: Form("matmul", ("input", "mat2"), ("input", "mat2")),
    Tensor.bmm: Form("matmul", ("input", "mat2"), ("input", "mat2")),
    Tensor.addmm: Form("matmul", ("input", "mat1", "mat2"), ("mat1", "mat2")),
    Tensor.baddbmm: Form("matmul", ("input", "batch1", "batch2"), ("batch1", "batch2")),
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
FORMS |= dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), Form("softmax", _UNARY, _UNARY))
_ACTIVATIONS = (
    *(F.gelu, F.relu, F.relu_, F.relu6, F.silu, F.mish, F.elu, F.celu, F.selu, F.leaky_relu),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.prelu, F.logsigmoid),
    *(torch.relu, torch.relu_, torch.tanh, torch.sigmoid, torch.prelu, torch.selu),
    *(Tensor.relu, Tensor.relu_, Tensor.tanh, Tensor.tanh_, Tensor.sigmoid, Tensor.sigmoid_),
    *(F.sigmoid, F.tanh),
)
FORMS |= dict.fromkeys(_ACTIVATIONS, Form("activation", _UNARY, _UNARY))

# Elementwise functions that carry channels over unchanged, by name, apart from those above.
SCALING = {"mul", "mul_", "div", "div_", "true_divide", "multiply", "divide"} | {
    f"__{i}{name}__" for name in ("mul", "truediv") for i in ("", "r", "i")
}
ADDING = {"add", "add_", "sub", "sub_", "subtract", "__radd__", "__rsub__"} | {
    f"__{i}{name}__" for name in ("add", "sub") for i in ("", "i")
}
ELEMENTWISE = (
    SCALING
    | ADDING
    | {
        *(
            "clamp",
            "clamp_",
            "clip",
            "nan_to_num",
            "neg",
            "__neg__",
            "abs",
            "pow",
            "__pow__",
            "exp",
        ),
        *("sqrt", "rsqrt", "square", "erf", "masked_fill", "masked_fill_", "where", "softplus"),
        *("sin", "cos", "reciprocal", "maximum", "minimum"),
    }
)
# Functions whose output is their first argument, up to precision, place and dropped entries.
CASTING = {
    *("to", "type", "type_as", "float", "half", "double", "bfloat16", "cpu", "cuda", "clone"),
    *("contiguous", "detach", "requires_grad_", "alias", "positive"),
    *("dropout", "dropout_", "alpha_dropout", "feature_dropout"),
}
# Functions that only move entries about: replayed on labels with the very same arguments.
MOVING = {
    *("view", "reshape", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"),
    *("flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "view_as", "t"),
    *("reshape_as", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow"),
    *("select", "__getitem__", "index_select", "gather", "take_along_dim", "roll", "flip"),
    *("repeat", "repeat_interleave", "tile", "broadcast_to", "unfold", "rot90", "hsplit"),
    *("pixel_shuffle", "pixel_unshuffle", "adjoint", "diagonal", "unsafe_chunk", "ravel"),
}
JOINING = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
REDUCING = {"mean", "sum", "amax", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d"}
MOVING_PROPERTIES = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__}  # type: ignore[attr-defined]


@dataclass
class Call:
    """One call of a known function, its operands laid out, ready to run with others in their place.

    ``operands`` of linear and conv are (input, weight), of norm, softmax and activation (input,),
    of matmul, einsum and add both sides.
    """

    kind: str
    operands: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    gain: Tensor | None = None
    equation: str = ""


def classify(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Lay out a call of a known function; None where the function or its operands are not ours."""
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
    return Call("einsum", tensors, lambda a, b: func(equation, a, b), equation=equation)


def weight_first(call: Call) -> Call:
    """Turn ``x @ W`` with W of shape (in, out) into a linear call whose weight is (out, in)."""
    run = call.run
    left, right = call.operands
    return Call("linear", (left, right.mT), lambda x, weight: run(x, weight.mT))


def macs(call: Call, func: Any, output: Tensor) -> int:
    """Multiply-accumulates of a matrix multiplication, biases not counted; 0 for other kinds."""
    if call.kind not in MATMUL_KINDS:
        return 0
    left, right = call.operands
    if call.kind == "conv":
        base = left if "transpose" in func.__name__ else output
        return base.numel() * right[0].numel()
    if call.kind == "einsum":
        return _einsum_macs(call.equation, left, right)
    return output.numel() * left.shape[-1]


def _einsum_macs(equation: str, left: Tensor, right: Tensor) -> int:
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, (left, right), strict=True):
        missing = tensor.ndim - len(term.replace("...", ""))
        wide = term.replace("...", "".join(chr(0x3B1 + i) for i in range(missing))[::-1])
        for label, size in zip(wide, tensor.shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    total = 1
    for size in sizes.values():
        total *= size
    return total
