"""Tasks: what a run trains for. ``Task`` is what the training loop asks; one file is one task.

The loop, checkpoints and result files are in ``quietvit.train`` and know no task by name.
"""

from quietvit.tasks.classification import Classification
from quietvit.tasks.detection import Detection
from quietvit.tasks.registry import register_task, task_named, task_names
from quietvit.tasks.task import Batch, Metric, Task

__all__ = [
    "Batch",
    "Classification",
    "Detection",
    "Metric",
    "Task",
    "register_task",
    "task_named",
    "task_names",
]
