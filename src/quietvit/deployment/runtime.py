"""``Runtime``: a model loaded by a runtime, what it computes, and what it tells about its kernels.

The runtimes themselves lie with their targets (``for_onnx``, ...); ``opening`` chooses one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from quietvit.deployment.facts import Facts
from quietvit.errors import QuietvitError


class Kernel(NamedTuple):
    """How a runtime computes one product: its operator, whether in integers, and why not."""

    operator: str
    integer: bool
    reason: str | None = None


class Parts(Protocol):
    """The products of a file, cut out of it, so that each one runs on given operands."""

    @property
    def codes(self) -> Mapping[str, list[str]]:
        """Names of the quantized operands of each product, by the name of the product."""

    @property
    def corrected(self) -> bool:
        """Whether the file corrects sums in float for the zero points of weights."""

    def run(
        self, given: dict[str, list[Tensor]]
    ) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
        """(codes of the operands, output) of each product, for these values of its operands."""


class Runtime(ABC):
    """A model loaded by a runtime. ``runtime(images)`` is its output; both are numpy arrays.

    It takes any number of images. Where the file takes a fixed number at once, the images are run
    in parts.

    A runtime of an own target defines ``_run``, ``metadata`` and ``input_shape``. ``kernels`` and
    ``parts`` are needed for ``check`` alone.

    ``path``: the file. ``name``: the runtime and its version. ``threads``: 0 is its own choice.
    ``notes``: what a check should say about how the file was opened.
    """

    path: Path
    name: str
    threads: int = 0
    notes: tuple[str, ...] = ()
    opens_float_onnx: bool = False
    """Whether ``type(runtime)(path, threads)`` opens a float .onnx, which ``check`` times."""
    uncompared: str | None = "this runtime does not run products one by one: none is compared"
    """Why ``parts`` is not there; None where it is."""
    unproven: str = "its runtime does not tell which products it computes in integers"
    """Why ``kernels`` is not there."""
    precautions: frozenset[str] = frozenset()
    """Reasons in a file for not claiming a product that the kernel seen here may correct."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        fixed = self.input_shape[0]
        if fixed is None or fixed == len(images):
            return self._run(images)
        # The last part is filled up with the first images; what they give is cut off again.
        places = np.arange(-(-len(images) // fixed) * fixed) % len(images)
        parts = [self._run(images[part]) for part in places.reshape(-1, fixed)]
        return np.concatenate(parts)[: len(images)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.name})"

    @abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray:
        """The output for as many images (batch, C, H, W), float32, as the file takes at once."""

    @property
    @abstractmethod
    def metadata(self) -> str | None:
        """The text that ``Facts.to_json`` made when the file was written; None without."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int | None, ...]:
        """(batch, C, H, W), None where any number fits."""

    @property
    def facts(self) -> Facts:
        """What travels in the file. Raises QuietvitError where quietvit did not write it."""
        return Facts.from_json(self.metadata, self.path)

    def claims(self, facts: Facts) -> Facts:
        """The facts, without claims that this runtime does not keep on every processor."""
        return facts

    def kernels(self, facts: Facts) -> Mapping[str, Kernel]:
        """How each product runs, by ``name:product``, read off the runtime's own graph.

        Raises QuietvitError where the runtime does not tell.
        """
        raise QuietvitError(
            f"{self.path} cannot be checked: {self.unproven}. 'quietvit evaluate' measures its "
            "top-1."
        )

    def parts(self, names: list[str]) -> Parts:
        """The products of these names. Raises QuietvitError where one is not in the file."""
        raise QuietvitError(f"{self.path}: {self.uncompared}.")

    def check_images(self, shape: tuple[int, ...]) -> None:
        """Raise QuietvitError unless images of this shape (N, C, H, W) fit."""
        wanted = self.input_shape
        same = len(shape) == len(wanted) and all(
            there is None or n == there for n, there in zip(shape[1:], wanted[1:], strict=False)
        )
        if not same:
            shown = " x ".join("any" if n is None else str(n) for n in wanted[1:])
            raise QuietvitError(
                f"images of shape {tuple(shape)} do not fit {self.path}, which takes (N, C, H, W) "
                f"with {shown}. Use the preprocessing in the file, or export the model at this "
                "size."
            )
