"""The registry of tasks. A new task is one file with a ``Task``, and one row here.

``task`` defines the interface.
"""

from __future__ import annotations

from quietvit.errors import QuietvitError, nearest
from quietvit.plugins import TASKS, load_plugins
from quietvit.tasks.classification import Classification
from quietvit.tasks.detection import Detection
from quietvit.tasks.task import Task

_TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Detection)}


def register_task(task: type[Task]) -> type[Task]:
    """Register a task, so that ``task = "<its name>"`` in a recipe finds it.

    Returns the class, so it also works as a decorator.

    Raises:
        QuietvitError: another task has this name.
    """
    known = _TASKS.setdefault(task.name, task)
    if known is not task:
        raise QuietvitError(
            f"a task named {task.name!r} is registered already ({known.__module__}."
            f"{known.__qualname__}). Give {task.__qualname__} another name."
        )
    return task


def task_named(name: str) -> type[Task]:
    """Return the class of a task. Raises QuietvitError for a name that is not registered."""
    broken = [] if name in _TASKS else load_plugins(TASKS)
    if name not in _TASKS:
        raise QuietvitError(
            " ".join(
                [
                    f"no task is named {name!r}{nearest(name, _TASKS)}. The tasks are "
                    f"{', '.join(_TASKS)}. Register your own with quietvit.register_task.",
                    *broken,
                ]
            )
        )
    return _TASKS[name]


def task_names() -> tuple[str, ...]:
    """Return the names of all registered tasks."""
    load_plugins(TASKS)
    return tuple(_TASKS)
