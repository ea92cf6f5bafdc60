"""Training tasks. The training loop works through ``Task``, and each task is one file.

``quietvit.train`` holds the loop, checkpoints and result files. It never names a task.
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
