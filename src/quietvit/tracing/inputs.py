"""Call a model with one tensor, several arguments, keyword arguments, or a list of images.

Callers choose the images and their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from quietvit.errors import QuietvitError


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model on a tensor, a tuple of arguments, or a dict of keyword arguments.

    A list holds arguments too. A list of images (C, H, W), as for detectors, is one argument.
    """
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and not is_image_list(inputs):
        return model(*inputs)
    return model(inputs)


class EndOfPass(BaseException):
    """Raised to end a forward pass from inside; ``except Exception`` does not catch it."""


@contextmanager
def refusing(complaint: Callable[[str], str]) -> Iterator[None]:
    """Turn an exception that a model raises into a QuietvitError.

    ``complaint(what)`` returns the message; ``what`` is the class and text of the exception.
    QuietvitError and out-of-memory errors pass unchanged.
    """
    try:
        yield
    except (QuietvitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise QuietvitError(complaint(f"{type(error).__name__}: {error}")) from error


def one_sample(example: Any) -> Any:
    """Return the first sample of a batch: entry 0 of each tensor whose dim 0 is the batch.

    For a list of images return a list with the first image.
    """
    if is_image_list(example):
        return example[:1]
    if isinstance(example, dict):
        lists = {key: value[:1] for key, value in example.items() if is_image_list(value)}
        if lists:
            return example | lists
    leaves = [leaf for leaf in tree_flatten(example)[0] if isinstance(leaf, Tensor) and leaf.ndim]
    if not leaves:
        return example
    batch = leaves[0].shape[0]
    return tree_map_only(Tensor, lambda x: x[:1] if x.ndim and x.shape[0] == batch else x, example)


def is_image_list(inputs: Any) -> bool:
    """Whether this is a list of images (C, H, W) with at most 4 channels each."""
    return isinstance(inputs, list) and bool(inputs) and all(map(_is_image, inputs))


def _is_image(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.ndim != 3:
        return False
    return x.shape[0] <= 4 < min(x.shape[1:])
