"""The targets that ``export`` can write: one row each. What a target is says ``target``."""

from __future__ import annotations

from pathlib import Path

from quietvit.deployment.for_onnx.target import ONNX
from quietvit.deployment.for_openvino.target import OPENVINO
from quietvit.deployment.for_torchao.target import TORCHAO
from quietvit.deployment.target import SETTINGS, Target
from quietvit.errors import QuietvitError, nearest

TARGETS = {target.name: target for target in (ONNX, OPENVINO, TORCHAO)}
"""By name; the first is the default."""


def register_target(target: Target) -> None:
    """Make a target of your own known to ``export``, ``open_runtime`` and the commands.

    Raises QuietvitError where another target has its name, suffix or runtime, or where the suffix
    does not begin with a dot.
    """
    for other in TARGETS.values():
        if other is target:
            return
        for field in ("name", "suffix", "runtime"):
            if getattr(other, field) == getattr(target, field):
                raise QuietvitError(
                    f"the target {other.name} has the {field} {getattr(target, field)!r} already; "
                    f"give {target.name} another {field}."
                )
    if not target.suffix.startswith(".") or len(target.suffix) < 2:
        raise QuietvitError(
            f"the suffix {target.suffix!r} of the target {target.name} must begin with a dot, "
            "such as '.onnx'."
        )
    unknown = sorted(target.settings - set(SETTINGS))
    if unknown:
        raise QuietvitError(
            f"the target {target.name} takes the settings {', '.join(unknown)}, which export does "
            f"not have; choose among {', '.join(SETTINGS)}."
        )
    TARGETS[target.name] = target


def target_named(name: str) -> Target:
    """The target of this name. Raises QuietvitError where there is none."""
    if name not in TARGETS:
        known = listed(list(TARGETS))
        raise QuietvitError(f"there is no target {name!r}{nearest(name, TARGETS)}; choose {known}.")
    return TARGETS[name]


def target_to_write(path: Path, to: str | None) -> Target:
    """The target that ``to`` names, else the suffix of ``path``.

    Raises QuietvitError where there is none, and where the suffix is not the target's. A folder may
    have any name but one with another target's suffix.
    """
    by_suffix = _by_suffix(path)
    target = by_suffix if to is None else TARGETS.get(to)
    if target is None or by_suffix not in (None, target):
        choices = listed([f"model{each.suffix} (to={each.name!r})" for each in TARGETS.values()])
        raise QuietvitError(f"{path} with to={to!r} fits no target; choose {choices}.")
    if by_suffix is None and target.folder is None:
        raise QuietvitError(
            f"{path} does not end in {target.suffix}, as files for {target.name} do; name it so."
        )
    return target


def target_of(path: Path) -> Target | None:
    """The target that wrote ``path``, judged by its content if a folder, else by its suffix.

    ``path`` need not be there. None where it fits no target.
    """
    found = next((target for target in TARGETS.values() if target.holds(path)), None)
    return found or _by_suffix(path)


def files_of(path: Path) -> list[Path]:
    """The files that an export wrote at ``path``."""
    if path.is_dir():
        return sorted(path.iterdir())
    target = target_of(path)
    return [file for file in (target.files(path) if target else [path]) if file.is_file()]


def listed(names: list[str]) -> str:
    """``a, b or c``."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _by_suffix(path: Path) -> Target | None:
    return next((target for target in TARGETS.values() if target.suffix == path.suffix), None)
