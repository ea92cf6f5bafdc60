"""Copies of a weight that some optimizers keep and pull it back to: moved with the weight.

The rate of a step is in ``rates``. ``attach`` says when a regularizer acts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Schedule-free optimizers: z, and in the reference versions x and y; dual averaging (MADGRAD,
# D-Adaptation's SGD and Adagrad): x0, and a copy z; Lookahead of timm: the slow weights.
_KEPT = ("x", "y", "z", "x0", "lookahead_slow_buff")


@contextmanager
def carried(optimizer: Any, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Move the optimizer's copies of ``parameters`` by the changes made inside.

    A schedule-free weight is y = (1 - b) z + b x, where x averages all z so far. If only y decayed,
    the next steps would pull it back to z and x. So all three move by the change of y, and each
    decays as documented (derived here). The same holds for a weight that follows x0 minus a sum of
    gradients, and for the slow weights of Lookahead.

    For other optimizers nothing is copied.
    """
    state = getattr(optimizer, "state", {})
    result = []
    for parameter in {id(parameter): parameter for parameter in parameters}.values():
        kept = [
            value
            for key, value in state.get(parameter, {}).items()
            if key in _KEPT and isinstance(value, Tensor) and value.shape == parameter.shape
        ]
        if kept:
            result.append((parameter, parameter.detach().clone(), kept))
    yield
    with torch.no_grad():
        for parameter, before, kept in result:
            change = parameter.detach() - before
            for value in kept:
                value.add_(change.to(value))
