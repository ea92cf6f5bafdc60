"""The list of targets that ``export`` can write. ``target`` defines what a target is."""

from __future__ import annotations

from pathlib import Path

from quietvit.deployment.for_onnx.target import ONNX
from quietvit.deployment.for_openvino.target import OPENVINO
from quietvit.deployment.for_torchao.target import TORCHAO
from quietvit.deployment.target import SETTINGS, Target
from quietvit.errors import QuietvitError, nearest
from quietvit.plugins import TARGETS as PLUGINS
from quietvit.plugins import load_plugins

_TARGETS = {target.name: target for target in (ONNX, OPENVINO, TORCHAO)}


def registered_targets() -> dict[str, Target]:
    """Return all targets by name. The first is the default."""
    load_plugins(PLUGINS)
    return dict(_TARGETS)


def register_target(target: Target) -> None:
    """Add your own target to ``export``, ``open_runtime`` and the commands.

    Raises QuietvitError if its name, suffix or runtime is taken, its suffix has no dot, or its
    settings are unknown.
    """
    for other in _TARGETS.values():
        if other is target:
            return
        for field in ("name", "suffix", "runtime"):
            if getattr(other, field) == getattr(target, field):
                raise QuietvitError(
                    f"the target {other.name} already has the {field} {getattr(target, field)!r}; "
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
    _TARGETS[target.name] = target


def target_named(name: str) -> Target:
    """Return the target of this name. Raises QuietvitError for an unknown name."""
    if name in _TARGETS:
        return _TARGETS[name]
    targets = registered_targets()
    if name not in targets:
        told = f"there is no target {name!r}{nearest(name, targets)}; choose {listed([*targets])}."
        raise QuietvitError(" ".join([told, *load_plugins(PLUGINS)]))
    return targets[name]


def target_to_write(path: Path, to: str | None) -> Target:
    """Return the target named by ``to``, or else by the suffix of ``path``.

    Raises QuietvitError if there is none, or if the suffix belongs to another target. A file must
    have its target's suffix, a folder need not.
    """
    by_suffix = _by_suffix(path)
    target = by_suffix if to is None else registered_targets().get(to)
    if target is None or by_suffix not in (None, target):
        targets = registered_targets().values()
        choices = listed([f"model{each.suffix} (to={each.name!r})" for each in targets])
        raise QuietvitError(f"{path} with to={to!r} fits no target; choose {choices}.")
    if by_suffix is None and target.folder is None:
        raise QuietvitError(
            f"{path} does not end in {target.suffix}, which {target.name} needs; rename it."
        )
    return target


def target_of(path: Path) -> Target | None:
    """Return the target of ``path``, from the content of a folder or else from the suffix.

    ``path`` need not exist. Returns None if no target fits.
    """
    targets = registered_targets().values() if path.suffix or path.exists() else ()
    return next((target for target in targets if target.holds(path)), None) or _by_suffix(path)


def files_of(path: Path) -> list[Path]:
    """Return the files that an export wrote at ``path``."""
    if path.is_dir():
        return sorted(path.iterdir())
    target = target_of(path)
    return [file for file in (target.files_of(path) if target else [path]) if file.is_file()]


def listed(names: list[str]) -> str:
    """Join names like ``a, b or c``."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _by_suffix(path: Path) -> Target | None:
    for targets in (_TARGETS, registered_targets()):
        for target in targets.values():
            if target.suffix == path.suffix:
                return target
    return None
