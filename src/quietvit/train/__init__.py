"""Train and fine-tune a model from a recipe, with decoupled decay and exact resume.

Data is in ``quietvit.data``, tasks are in ``quietvit.tasks``, the decay is in ``quietvit.decay``.
"""

from quietvit.train.config import TrainConfig
from quietvit.train.estimate import Estimate, estimate
from quietvit.train.loop import train
from quietvit.train.recipe import list_recipes, load_recipe, parse_config
from quietvit.train.result import TrainResult

__all__ = [
    "Estimate",
    "TrainConfig",
    "TrainResult",
    "estimate",
    "list_recipes",
    "load_recipe",
    "parse_config",
    "train",
]
