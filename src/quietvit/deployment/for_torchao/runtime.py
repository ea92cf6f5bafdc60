"""Wrap a torchao folder as a ``Runtime`` for ``predict`` and ``evaluate``."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from quietvit.deployment.for_torchao.file import FORMAT, load_torchao
from quietvit.deployment.runtime import Runtime
from quietvit.errors import QuietvitError


class TorchRuntime(Runtime):
    """A model read by ``load_torchao``. ``threads`` applies to the whole process."""

    unproven = (
        "torch does not report which products it computed in integers; integer_share and "
        "left_float of load_torchao(path) tell what the folder claims. Check the .onnx or .xml of "
        "the same model"
    )

    def __init__(self, path: Path, threads: int = 0) -> None:
        self.path, self.threads = path, threads
        self._facts = FORMAT.read(path)[0].get("facts")
        self.converted = load_torchao(path)
        self.name = f"torchao {version('torchao')}"
        self._output = self.facts.output
        self._shape = self.facts.input_shape
        if threads:
            torch.set_num_threads(threads)

    def _run(self, images: np.ndarray) -> np.ndarray:
        try:
            with torch.no_grad():
                output = self._output.of(self.converted(torch.from_numpy(images)))
        except RuntimeError as error:
            raise QuietvitError(
                f"torch cannot run {self.path} on images of shape {images.shape}: "
                f"{str(error).splitlines()[0]}."
            ) from error
        return output.numpy()

    @property
    def metadata(self) -> str | None:
        return None if self._facts is None else json.dumps(self._facts)

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        return (None, *self._shape)
