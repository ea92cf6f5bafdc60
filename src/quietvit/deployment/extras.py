"""Packages that only some targets need, and the extra to install where one is missing."""

from __future__ import annotations

from quietvit.errors import QuietvitError


def need(*names: str) -> None:
    """Raise QuietvitError naming the extra, unless all these packages can be imported."""
    import importlib

    extras = {"openvino": "openvino", "torchao": "torchao"}
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            extra = extras.get(name, "onnx")
            raise QuietvitError(
                f"{name} cannot be imported ({error}); install it: pip install 'quietvit[{extra}]'."
            ) from error
