"""``Runtime``: the interface of a model loaded by a runtime, and of its kernels and products.

Each target's folder (``for_onnx``, ...) has its runtime. ``opening`` chooses one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from quietvit.deployment.facts import Facts
from quietvit.errors import QuietvitError


@dataclass(frozen=True)
class Kernel:
    """How a runtime computes one product: its operator, integer or not, and the reason if not."""

    operator: str
    integer: bool
    reason: str | None = None


class Parts(Protocol):
    """The products of a file, cut out so that each one runs on given operands."""

    @property
    def codes(self) -> Mapping[str, list[str]]:
        """Names of the quantized operands by product name."""

    @property
    def corrected(self) -> bool:
        """Whether the file corrects sums in float for the zero points of weights."""

    def run(
        self, operands: dict[str, list[Tensor]]
    ) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
        """Return codes of the operands, and the output, by product name for given operands."""


class Runtime(ABC):
    """A model loaded by a runtime. ``runtime(images)`` maps numpy images to numpy outputs.

    It takes any number of images. If the file has a fixed batch, the images run in parts.

    A runtime for your own target defines ``_run``, ``metadata`` and ``input_shape``. Only ``check``
    needs ``kernels`` and ``parts``.

    ``path`` is the file, ``name`` the runtime and its version. ``threads`` is the number of CPU
    threads; 0 lets the runtime choose. A check prints ``notes`` about how the file was opened.
    """

    path: Path
    name: str
    threads: int = 0
    notes: tuple[str, ...] = ()
    opens_float_onnx: bool = False
    """Whether ``type(runtime)(path, threads)`` opens a float .onnx, which ``check`` times."""
    uncompared: str | None = "this runtime cannot run single products, so none is compared"
    """Why ``parts`` is missing, or None if it exists."""
    unproven: str = "its runtime does not tell which products it computes in integers"
    """Why ``kernels`` is missing."""
    precautions: frozenset[str] = frozenset()
    """Values of ``Product.why_float`` that are precautions; the kernel seen here is more exact."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        fixed = self.input_shape[0]
        if fixed is None or fixed == len(images):
            return self._run(images)
        # The last part is padded with the first images, and the padding's outputs are cut off.
        # Example: 5 images in a fixed batch of 2 run as (0, 1), (2, 3), (4, 0).
        places = np.arange(-(-len(images) // fixed) * fixed) % len(images)
        parts = [self._run(images[part]) for part in places.reshape(-1, fixed)]
        return np.concatenate(parts)[: len(images)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.name})"

    @abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray:
        """Return the output for one batch (batch, C, H, W), float32, of a size the file takes."""

    @property
    @abstractmethod
    def metadata(self) -> str | None:
        """The text of ``Facts.to_json`` stored in the file, or None."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int | None, ...]:
        """(batch, C, H, W), with None for a free dimension."""

    @property
    def facts(self) -> Facts:
        """The facts in the file. Raises QuietvitError if quietvit did not write it."""
        return Facts.from_json(self.metadata, self.path)

    def claims(self, facts: Facts) -> Facts:
        """Return the facts without claims that this runtime does not keep on every processor."""
        return facts

    def kernels(self, facts: Facts) -> Mapping[str, Kernel]:
        """Return how each product (``name:product``) runs, read from the runtime's own graph.

        Raises QuietvitError if the runtime does not tell.
        """
        raise QuietvitError(
            f"{self.path} cannot be checked: {self.unproven}. 'quietvit evaluate' measures its "
            "top-1."
        )

    def parts(self, names: list[str]) -> Parts:
        """Return the products of these names. Raises QuietvitError if one is not in the file."""
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
