"""Run an .xml or .onnx file in OpenVINO. ``parts`` compiles it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from quietvit.deployment.extras import need
from quietvit.deployment.facts import KEY, Facts
from quietvit.deployment.for_openvino.kernels import (
    ATTENTION,
    ZERO_POINTS,
    kept_by_openvino,
    kernels_of,
)
from quietvit.deployment.for_openvino.parts import INSTALL, IRParts, compiled, read
from quietvit.deployment.runtime import Kernel, Runtime
from quietvit.errors import QuietvitError


class OpenVINO(Runtime):
    """A file compiled by OpenVINO for low latency on the CPU."""

    opens_float_onnx = True
    precautions = frozenset({ATTENTION, ZERO_POINTS})

    def __init__(self, path: Path, threads: int = 0) -> None:
        need("openvino", install=INSTALL)
        import openvino

        self.path, self.threads = path, threads
        self.name = f"openvino {openvino.__version__.partition('-')[0]}"
        self._is_ir = path.suffix == ".xml"
        if self._is_ir:
            self.uncompared = None
            _refuse_foreign(path)
        else:
            self.uncompared = (
                "products of an .onnx are not compared in openvino; export to openvino to compare"
            )
        try:
            self.model = read(path)
            self.compiled = compiled(self.model, threads)
        except Exception as error:
            binary = path.with_suffix(".bin").name
            beside = f"; an IR needs its own {binary} next to it" if self._is_ir else ""
            reason = str(error).strip().splitlines()[-1].rstrip(".!")
            raise QuietvitError(
                f"openvino cannot load {path}: {reason}. The file is truncated or "
                f"foreign{beside}. Export it again."
            ) from error

    def _run(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.compiled([images])[0])

    @property
    def metadata(self) -> str | None:
        if self.model.has_rt_info([KEY]):
            return str(self.model.get_rt_info([KEY]).astype(str))
        return None if self._is_ir else _onnx_metadata(self.path)

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        shape = self.model.input(0).get_partial_shape()
        return tuple(None if n.is_dynamic else n.get_length() for n in shape)

    def claims(self, facts: Facts) -> Facts:
        return kept_by_openvino(facts)

    def kernels(self, facts: Facts) -> Mapping[str, Kernel]:
        self(np.zeros([n or 1 for n in self.input_shape], dtype=np.float32))
        return kernels_of(self.compiled, facts)

    def parts(self, names: list[str]) -> IRParts:
        return IRParts.of(self.path, names)


def _refuse_foreign(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(1000)
    if b"<net" not in start:  # openvino would try all its other readers, such as TensorFlow's
        raise QuietvitError(
            f"{path} is not an OpenVINO IR: it does not begin with <net>. Give the .xml that "
            "'quietvit export --to openvino' wrote."
        )


def _onnx_metadata(path: Path) -> str | None:
    """Return our entry in an ONNX file's metadata, which OpenVINO does not read."""
    need("onnx", install=INSTALL)
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise QuietvitError(f"{path} is not a whole ONNX file ({error}); export it.") from error
    return next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
