from __future__ import annotations

import os

import pytest

from quietvit.errors import QuietvitError
from quietvit.files import refuse_nonempty, write_atomic


def test_content_comes_back_and_nothing_else_is_left(tmp_path):
    path = write_atomic(tmp_path / "new" / "a.txt", "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert write_atomic(tmp_path / "b", "x").stat().st_mode == plain.stat().st_mode


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "a.txt", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QuietvitError, match=r"No space left on device.*untouched"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_an_empty_or_missing_folder_is_accepted_and_a_full_one_refused(tmp_path):
    assert refuse_nonempty(tmp_path / "x" / "y").is_dir()
    assert refuse_nonempty(tmp_path / "x" / "y").is_dir()
    with pytest.raises(QuietvitError, match=r"not empty \(it holds y\).*force"):
        refuse_nonempty(tmp_path / "x")
    assert refuse_nonempty(tmp_path / "x", force=True).is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuietvitError, match="is a file"):
        refuse_nonempty(tmp_path / "file", force=True)
