"""Check the device of ``--device`` before the work starts, and resolve ``auto``.

Recipes choose their device themselves, in ``train.engine``.
"""

from __future__ import annotations

from quietvit.errors import QuietvitError


def checked_device(text: str) -> str:
    """Return the name of an available device, such as ``cuda:1``, for torch.

    ``auto`` becomes ``cuda``, else ``mps``, else ``cpu``. torch is not imported for ``cpu``.

    Raises:
        QuietvitError: the text names no device, or this machine does not have it.
    """
    if text == "cpu":
        return text
    import torch

    if text == "auto":
        return next((name for name in ("cuda", "mps") if _count(name)), "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise QuietvitError(f"{text!r} is not a device. Choose {_choices()}.") from error
    count = _count(device.type)
    if count == 0:
        raise QuietvitError(
            f"this machine has no device {text!r} that torch {torch.__version__} can use. Choose "
            f"{_choices()}."
        )
    if (device.index or 0) >= count:
        raise QuietvitError(
            f"there is no device {text!r}: this machine has {count} of this kind, counted from 0. "
            f"Choose {_choices()}."
        )
    return str(device)


def _count(kind: str) -> int:
    """Return the number of devices of a kind that torch can use."""
    import torch

    if kind == "cpu":
        return 1
    try:
        return int(torch.get_device_module(kind).device_count())
    except (RuntimeError, AttributeError):  # unknown to this torch, or not for computing (meta)
        return 0


def _choices() -> str:
    """Return the available devices in words, with their options."""
    found = [f"cuda:{index}" for index in range(_count("cuda"))] + ["mps"] * _count("mps")
    return ", ".join(f"--device {name}" for name in ("cpu", *found, "auto"))
