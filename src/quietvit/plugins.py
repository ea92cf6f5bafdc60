"""Import methods, regularizers, targets and tasks of other packages (entry points, ``--plugin``).

Importing a plugin registers what it holds. The registries call ``load_plugins`` when they need it.
"""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from quietvit.errors import QuietvitError

logger = logging.getLogger(__name__)

METHODS, REGULARIZERS = "quietvit.methods", "quietvit.regularizers"
TARGETS, TASKS = "quietvit.targets", "quietvit.tasks"

_found: dict[str, list[str]] = {}


def load_plugins(group: str) -> list[str]:
    """Import the entry points of a group, once. Return one sentence for each that is broken.

    Each of them is also logged as a warning. What works without the broken one goes on working.
    """
    if group not in _found:
        _found[group] = broken = []  # before the imports, because they use the registries
        for point in metadata.entry_points(group=group):
            package = "" if point.dist is None else f" of the package {point.dist.name}"
            what = f"the plugin {point.name!r}{package} ({group}: {point.value})"
            why = _failure(point.load)
            if why is not None:
                broken.append(f"{what} is broken: {why}. Update or uninstall its package.")
                logger.warning(broken[-1])
    return _found[group]


def import_plugin(module: str) -> None:
    """Import the module of ``--plugin``, also from the current folder.

    Raises QuietvitError if the module does not exist, raises an exception, or registers a name that
    is taken.
    """
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        why = _failure(lambda: importlib.import_module(module))
    finally:
        if added:
            sys.path.remove(folder)
    if why is not None:
        raise QuietvitError(
            f"the plugin {module!r} cannot be imported: {why}. Give --plugin the name of a module, "
            "such as my_package.methods, that is installed or in the current folder."
        )


def origin_of(cls: type) -> dict[str, str] | None:
    """Return the module and package of a class for a file; None for a class of quietvit itself.

    The package is empty if the module is not installed, as in a script or notebook.
    """
    module = cls.__module__
    top = module.partition(".")[0]
    if top == "quietvit":
        return None
    packages = _packages().get(top, [])
    return {"module": module, "package": packages[0] if packages else ""}


def how_to_get(origin: dict[str, Any]) -> str:
    """Return the remedy if what ``origin_of`` describes is not registered."""
    module, package = origin.get("module"), origin.get("package")
    if module == "__main__":
        return "It was defined in a script or notebook; run that definition first"
    install = f"Install the package {package}, then i" if package else "I"
    return f"{install}mport {module} first (on the command line: --plugin {module})"


@cache
def _packages() -> Any:
    return metadata.packages_distributions()


def _failure(load: Callable[[], Any]) -> str | None:
    """Return why ``load`` fails, in one clause with the place; None if it works."""
    try:
        load()
    except QuietvitError as error:
        return str(error).rstrip(".")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        shown = f" at {place.filename}, line {place.lineno}"
        inside = "importlib" in place.filename
        return f"{type(error).__name__}: {error}{'' if inside else shown}"
    return None
