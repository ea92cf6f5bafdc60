"""Describe how the weights of a file and of a model differ.

``weights`` and ``huggingface`` load weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_FILE_LACKS, _MODEL_LACKS = "the file lacks", "the model lacks"


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return a text for each key or shape that differs between ``state`` (file) and ``own``."""
    lines = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    lines += [f"{_FILE_LACKS} {key} {tuple(own[key].shape)}" for key in own if key not in state]
    lines += [
        f"{_MODEL_LACKS} {key} {tuple(state[key].shape)}" for key in sorted(state) if key not in own
    ]
    return lines


def shown(problems: list[str], count: int = 4) -> str:
    """Return the first ``count`` of ``differences``, taking turns between their kinds."""
    kinds: list[list[str]] = [[], [], []]
    for problem in problems:
        lacks = [problem.startswith(begin) for begin in (_FILE_LACKS, _MODEL_LACKS)]
        kinds[lacks.index(True) if any(lacks) else 2].append(problem)
    turns = [kind[turn] for turn in range(count) for kind in kinds[::-1] if turn < len(kind)]
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(turns[:count]) + more
