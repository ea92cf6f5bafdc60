"""Run an .onnx file in onnxruntime. ``session`` makes the session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from quietvit.deployment.facts import KEY, Facts
from quietvit.deployment.for_onnx.kernels import kernels_of
from quietvit.deployment.for_onnx.parts import OnnxParts
from quietvit.deployment.for_onnx.session import exactness, open_session
from quietvit.deployment.runtime import Kernel, Runtime
from quietvit.errors import QuietvitError


class OnnxRuntime(Runtime):
    """A file in a session of onnxruntime. ``exact`` is passed to ``open_session``."""

    opens_float_onnx = True
    uncompared = None

    def __init__(self, path: Path, threads: int = 0, *, exact: bool | None = None) -> None:
        self.session = open_session(path, threads=threads, exact=exact)
        import onnxruntime

        why = exactness() if exact is None else None
        self.notes = () if why is None else (why,)
        self.path, self.threads = path, threads
        self.name = f"onnxruntime {onnxruntime.__version__}"

    def _run(self, images: np.ndarray) -> np.ndarray:
        name = self.session.get_inputs()[0].name
        try:
            output: np.ndarray = self.session.run(None, {name: images})[0]
        except Exception as error:
            raise QuietvitError(
                f"onnxruntime cannot run {self.path} on images of shape {images.shape}: "
                f"{str(error).strip().splitlines()[0]}."
            ) from error
        return output

    @property
    def metadata(self) -> str | None:
        text: str | None = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        return text

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        shape = self.session.get_inputs()[0].shape
        return tuple(n if isinstance(n, int) else None for n in shape)

    def kernels(self, facts: Facts) -> Mapping[str, Kernel]:
        return kernels_of(self.path)

    def parts(self, names: list[str]) -> OnnxParts:
        return OnnxParts.of(self.path, names)
