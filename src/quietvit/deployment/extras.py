"""Import checks for packages that only some targets need, with the command to install them."""

from __future__ import annotations

import importlib

from quietvit.errors import QuietvitError


def need(*packages: str, install: str) -> None:
    """Raise QuietvitError unless all ``packages`` can be imported.

    ``install`` is the pip requirement that provides them, such as ``quietvit[onnx]``.
    """
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise QuietvitError(
                f"{name} cannot be imported ({error}); install it: pip install '{install}'."
            ) from error
