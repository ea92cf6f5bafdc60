"""Shared fixtures. Real weights and images: QUIETVIT_TEST_DATA; tests skip without them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with the real weights and images (see docs/development.md)."""
    folder = os.environ.get("QUIETVIT_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("QUIETVIT_TEST_DATA does not name a folder with the real weights and images")
    return Path(folder)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    from decay_cases import process_group

    with process_group(tmp_path):
        yield


@pytest.fixture(params=["exact", "default"])
def sessions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's sessions as on a processor without 8-bit products, and with them."""
    from quietvit.deployment import processor

    if request.param == "default" and processor.vnni() is not True:
        pytest.skip("products of default sessions saturate here")
    monkeypatch.setattr(processor, "vnni", lambda: request.param == "default")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of tiny detectors of transformers by kind, see ``detr_cases.KINDS``."""
    pytest.importorskip("transformers")
    from detr_cases import Folders

    return Folders(tmp_path_factory.mktemp)
