from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quietvit.errors import QuietvitError
from quietvit.files import (
    beside,
    leftovers,
    put_in_place,
    refuse_nonempty,
    save_tensors,
    sweep,
    write_atomic,
)


def held(folder):
    """Every file below a folder, hidden ones too, with its text; empty folders as None."""
    paths = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in paths
    }


def put(content, *paths):
    """Write files of this content, by their names below the folder of ``paths``, in place."""
    with beside(paths[0], RuntimeError) as folder:
        for name, text in content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        put_in_place(folder, *paths)


def failing_rename(monkeypatch, target, error, times=1):
    """Let renames to ``target`` fail, the first ``times`` of them."""
    whole, calls = {name: getattr(Path, name) for name in ("rename", "replace")}, []

    def fail(name):
        def moved(self, to):
            if Path(to) == target and len(calls) < times:
                calls.append(to)
                raise error
            return whole[name](self, to)

        return moved

    for name in whole:
        monkeypatch.setattr(Path, name, fail(name))


def full(_):
    raise OSError(28, "No space left on device")


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
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QuietvitError, match=r"No space left on device.*untouched"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_the_earlier_one_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "earlier"
    put({"earlier/a": "1", "earlier/b": "2", "left over": "3"}, path)
    assert held(tmp_path) == {"new/earlier/a": "1", "new/earlier/b": "2"}
    put({"earlier/a": "4"}, path)
    assert held(tmp_path) == {"new/earlier/a": "4"}
    (tmp_path / "plain").mkdir()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_files_of_one_export_are_put_in_place_together(tmp_path):
    (tmp_path / "other").write_text("mine")
    paths = tmp_path / "a.bin", tmp_path / "a.xml"
    put({"a.bin": "1", "a.xml": "2"}, *paths)
    put({"a.bin": "3", "a.xml": "4"}, *paths)
    assert held(tmp_path) == {"other": "mine", "a.bin": "3", "a.xml": "4"}


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_second_rename_that_fails_brings_back_what_was_there(error, tmp_path, monkeypatch):
    raised = QuietvitError if isinstance(error, OSError) else KeyboardInterrupt
    put({"model/a": "old", "model/b": "old"}, tmp_path / "model")
    failing_rename(monkeypatch, tmp_path / "model", error)
    with pytest.raises(raised):
        put({"model/a": "new"}, tmp_path / "model")
    assert held(tmp_path) == {"model/a": "old", "model/b": "old"}


@pytest.mark.parametrize("before", [{}, {"a.bin": "1"}, {"a.bin": "1", "a.xml": "2"}], ids=len)
def test_one_file_that_fails_takes_back_the_others(before, tmp_path, monkeypatch):
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    failing_rename(monkeypatch, tmp_path / "a.xml", OSError("no"))
    with pytest.raises(QuietvitError, match=r"could not write .*a\.bin: no\."):
        put({"a.bin": "new", "a.xml": "new"}, tmp_path / "a.bin", tmp_path / "a.xml")
    assert held(tmp_path) == before


def test_a_file_that_was_not_written_moves_nothing(tmp_path):
    paths = tmp_path / "a.bin", tmp_path / "a.xml"
    put({"a.bin": "old", "a.xml": "old"}, *paths)
    with pytest.raises(QuietvitError, match="No such file"):
        put({"a.bin": "new"}, *paths)
    assert held(tmp_path) == {"a.bin": "old", "a.xml": "old"}


def test_what_cannot_even_be_brought_back_is_kept(tmp_path, monkeypatch):
    put({"model/a": "old"}, tmp_path / "model")
    failing_rename(monkeypatch, tmp_path / "model", OSError("no"), times=2)
    with pytest.raises(QuietvitError, match=r"could not be restored .*is in .*\.model\."):
        put({"model/a": "new"}, tmp_path / "model")
    assert list(held(tmp_path).values()) == ["old"]


def test_a_link_that_cannot_be_replaced_stays_a_link(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "model").symlink_to("kept")  # relative: it leads nowhere from another folder
    failing_rename(monkeypatch, tmp_path / "model", OSError("no"))
    with pytest.raises(QuietvitError, match="untouched"):
        put({"model/a": "new"}, tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "model").is_dir()


def test_a_full_disk_leaves_the_old_folder_and_says_so(tmp_path, monkeypatch):
    put({"model/a": "old"}, tmp_path / "model")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QuietvitError, match=r"model: No space left on device\. What .*untouched"):
        put({"model/a": "new"}, tmp_path / "model")
    assert held(tmp_path) == {"model/a": "old"}


def test_only_failures_to_write_are_told_as_such(tmp_path):
    def fail(error):
        with beside(tmp_path / "a", RuntimeError) as folder:
            (folder / "half").write_text("x")
            raise error("no")

    with pytest.raises(QuietvitError, match="could not write"):
        fail(RuntimeError)
    with pytest.raises(ValueError, match="no"):
        fail(ValueError)
    assert held(tmp_path) == {}
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuietvitError, match=r"could not write .*file/a"):
        put({}, tmp_path / "file" / "a")


def test_an_empty_or_missing_folder_is_accepted_and_a_full_one_refused(tmp_path):
    assert refuse_nonempty(tmp_path / "x" / "y").is_dir()
    assert refuse_nonempty(tmp_path / "x" / "y").is_dir()
    with pytest.raises(QuietvitError, match=r"not empty \(it holds y\).*force"):
        refuse_nonempty(tmp_path / "x")
    assert refuse_nonempty(tmp_path / "x", force=True).is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuietvitError, match="is a file"):
        refuse_nonempty(tmp_path / "file", force=True)


def test_a_folder_that_another_process_probes_is_empty(tmp_path, monkeypatch):
    probed = []
    remove = Path.rmdir

    def remove_later(folder):
        probed.append(folder)

    monkeypatch.setattr(Path, "rmdir", remove_later)
    assert refuse_nonempty(tmp_path) == tmp_path
    assert refuse_nonempty(tmp_path) == tmp_path
    assert sorted(tmp_path.iterdir()) == sorted(probed) != []
    (tmp_path / ".probe.mine").mkdir()
    with pytest.raises(QuietvitError, match=r"holds \.probe\.mine\)"):
        refuse_nonempty(tmp_path)
    for folder in probed:
        remove(folder)


def test_tensors_may_be_read_by_whom_the_umask_lets(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    path = tmp_path / "a.safetensors"
    save_tensors({"x": torch.arange(3.0)}, path)
    assert torch.equal(load_file(path)["x"], torch.arange(3.0))
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    save_tensors({"x": torch.zeros(1)}, path)
    assert path.stat().st_mode & 0o777 == 0o640


def killed(path, monkeypatch):
    """What a process killed between writing ``path`` and renaming it leaves."""

    class KilledError(BaseException):
        pass

    def kill(_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", kill)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KilledError):
            write_atomic(path, "half")


def test_what_a_killed_process_leaves_is_known_and_swept(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    for _ in range(20):
        killed(path, monkeypatch)
    left = leftovers(path)
    assert len(left) == 20
    assert {folder.parent for folder in left} == {tmp_path}
    assert held(tmp_path) == {f"{folder.name}/a.json": "half" for folder in left}
    assert refuse_nonempty(tmp_path, ignored=left) == tmp_path
    with pytest.raises(QuietvitError, match=r"holds \.a\.json"):
        refuse_nonempty(tmp_path, ignored=left[1:])
    sweep(path, tmp_path / "b.json")
    assert list(tmp_path.iterdir()) == []
    assert leftovers(tmp_path / "none" / "a.json") == []


def test_what_only_looks_like_a_leftover_is_never_swept(tmp_path):
    outside = tmp_path / "outside"
    (outside / "a.json").parent.mkdir()
    (outside / "a.json").write_text("mine")
    folder = tmp_path / "used"
    for name in (
        ".a.json.abcd1234/notes.txt",  # holds something else
        ".a.json.abcd1235/a.json/x",  # a folder where the file should be
        ".a.json.backup/a.json",  # not as long as a random name
        ".a.json.Abcd1234/a.json",  # no letters of a random name
        ".a.json.abcd1236",  # a file
        ".a.json.swp",
        ".a-json.abcd1234/a.json",  # of another file
        "a.json.abcd1234/a.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / ".a.json.abcd1237").symlink_to(outside)
    before = held(tmp_path)
    assert leftovers(folder / "a.json") == []
    sweep(folder / "a.json")
    assert held(tmp_path) == before
    assert (folder / ".a.json.abcd1237").is_symlink()


@pytest.mark.parametrize("before", [False, True])
def test_the_next_save_of_a_folder_sweeps_what_killed_ones_left(tmp_path, monkeypatch, before):
    path = tmp_path / "model"
    if before:
        put({"model/a": "old"}, path)
    for rename in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            if rename:  # killed when the earlier folder is moved away already
                failing_rename(patch, path, SystemExit(), times=9)
            else:
                patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(SystemExit()))
            with pytest.raises(SystemExit):
                put({"model/a": "half"}, path)
    assert len(leftovers(path, parts=["a"])) == 2 + before
    put({"model/a": "new"}, path)
    assert held(tmp_path) == {"model/a": "new"}


def test_a_write_that_goes_on_is_not_swept_by_another(tmp_path):
    path = tmp_path / "model"
    with beside(path) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "a").write_text("late")
        put({"model/a": "early"}, path)
        sweep(path, parts=["a"])
        assert (path / "a").read_text() == "early"
        put_in_place(folder, path)
    assert held(tmp_path) == {"model/a": "late"}
    killed_bin = tmp_path / ".m.xml.abcd1234" / "m.bin"
    killed_bin.parent.mkdir()
    killed_bin.touch()
    put({"m.bin": "1", "m.xml": "2"}, tmp_path / "m.bin", tmp_path / "m.xml")
    assert not killed_bin.parent.exists()
