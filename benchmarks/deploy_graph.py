"""Count the multiply-accumulates that a runtime computed in integers, for any exported model.

``quietvit.check`` finds products by the names that quietvit's export writes. Files of other tools
have no such names. Here, every matrix product counts with the shapes it ran with, per image:

- onnxruntime: the profile of one run lists the operators that ran, with the types and shapes of
  their inputs and outputs. It omits the shape of a packed convolution weight, which comes from the
  optimized graph. An operator is integer if its kernels multiply integers
  (``quietvit.deployment.proof.INTEGER_OPS``) and it reads 8-bit codes.
- openvino: the runtime's own model after compilation. A layer of precision i8 or u8 is integer.
- torch, eager or compiled: the profiler's list of operators with their shapes.

The total is the count of the trace (``quietvit.tracing``). Products that a runtime hides in a fused
operator therefore count as not integer. They are reported as ``unread``.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quietvit.deployment.for_onnx.kernels import FLOAT_OPS, INTEGER_OPS, WEIGHT_ONLY_OPS

Shape = Sequence[int]
Found = tuple[str, bool, int]  # operator, whether it multiplies integers, its MACs
BYTES = frozenset({"int8", "uint8"})


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per image: in integers, in float, and how many products of each kind."""

    integer: int
    floating: int
    operators: dict[str, int]

    @classmethod
    def of(cls, found: Iterator[Found], images: int = 1) -> Macs:
        macs, operators = Counter[bool](), Counter[str]()
        for operator, integer, count in found:
            macs[integer] += count
            operators[operator] += 1
        return cls(macs[True] // images, macs[False] // images, dict(operators.most_common()))


def product(left: Shape, out: Shape) -> int:
    """MACs of a product, from the shapes of its result and its left factor, transposed or not."""
    return math.prod(out) * math.prod(left[-2:]) // out[-2]


def convolution(weight: Shape, out: Shape) -> int:
    """MACs of a convolution; weight (out, in/groups, ...), any order after the first axis."""
    return math.prod(out) * math.prod(weight[1:])


def onnxruntime_macs(path: Path, images: np.ndarray, exact: bool) -> Macs:
    """Read from one run of an ONNX file in a session of its own, with one thread."""
    import onnx
    import onnxruntime

    from quietvit.deployment.for_onnx.session import EXACT

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        if exact:
            options.add_session_config_entry(*EXACT)
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        session.run(None, {session.get_inputs()[0].name: images})
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(Path(folder) / "optimized.onnx").graph
    return Macs.of(_onnxruntime(events, graph), len(images))


def _onnxruntime(events: list[dict[str, Any]], graph: Any) -> Iterator[Found]:
    nodes = {node.name: node for node in graph.node}
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    suffix = "_kernel_time"
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(suffix):
            continue
        op = event["args"]["op_name"]
        if op not in INTEGER_OPS | FLOAT_OPS | WEIGHT_ONLY_OPS:
            continue
        inputs, (output, *_) = event["args"]["input_type_shape"], event["args"]["output_type_shape"]
        (kind, left), (out,) = next(iter(inputs[0].items())), output.values()
        integer = op in INTEGER_OPS and kind in BYTES
        if "Conv" not in op:
            yield op, integer, product(left, out)
            continue
        names = nodes[event["name"].removesuffix(suffix)].input[1:]
        weights = [constants[name] for name in names if len(constants.get(name, ())) > 2]
        yield op, integer, convolution(weights[0], out)


def openvino_macs(compiled: Any, images: np.ndarray) -> Macs:
    """Read from a compiled OpenVINO model, which knows its sizes once it has run."""
    compiled([images])
    return Macs.of(_openvino(compiled.get_runtime_model().get_ordered_ops()), len(images))


def _openvino(nodes: Sequence[Any]) -> Iterator[Found]:
    for node in nodes:
        facts = node.get_rt_info()
        layer = str(facts["layerType"].astype(str)) if "layerType" in facts else ""
        if layer not in ("FullyConnected", "MatMul", "Convolution"):
            continue
        out = node.get_output_partial_shape(0).to_shape()
        first, second = (node.input(n).get_partial_shape().to_shape() for n in (0, 1))
        precision = str(facts["runtimePrecision"].astype(str))
        macs = convolution(second, out) if layer == "Convolution" else product(first, out)
        yield f"{layer} {precision}", precision in ("i8", "u8"), macs


def torch_macs(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> Macs:
    """Read from the profiler's list of one call. Compiled models must have been called before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
        run(images)
    found = [(event.name, event.input_shapes, event.concrete_inputs) for event in watched.events()]
    return Macs.of(_torch(found), len(images))


def _torch(events: Sequence[tuple[str, list[Any], list[Any]]]) -> Iterator[Found]:
    for name, shapes, values in events:
        name = name.rpartition("::")[2]
        if name in ("mm", "bmm", "_int_mm"):
            left, right = shapes[:2]
            yield name, name == "_int_mm", product(left, [*left[:-1], right[-1]])
        elif name in ("addmm", "baddbmm"):
            left, right = shapes[1:3]
            yield name, False, product(left, [*left[:-1], right[-1]])
        elif name == "qlinear_pointwise":
            left, right = shapes[0], shapes[3]
            yield name, True, product(left, [*left[:-1], right[-1]])
        elif name == "qconv_pointwise":
            yield name, True, _torch_convolution(shapes[0], shapes[3], *values[7:10])
        elif name == "convolution":
            yield name, False, _torch_convolution(shapes[0], shapes[1], *values[3:6])
        elif name.startswith("_scaled_dot_product"):
            query, key = shapes[:2]
            macs = product(query, [*query[:-1], key[-2]])
            yield name, False, macs
            yield name, False, macs


def _torch_convolution(x: Shape, weight: Shape, stride: Any, pad: Any, dilation: Any) -> int:
    out = [x[0], weight[0]]
    for axis, size in enumerate(x[2:]):
        reach = dilation[axis] * (weight[2 + axis] - 1) + 1
        out.append((size + 2 * pad[axis] - reach) // stride[axis] + 1)
    return convolution(weight, out)
