"""Folders of this package, by the marker in them; nothing happens to others."""

import os
from pathlib import Path

import pytest

from lenvm_lightning.errors import StoreError
from lenvm_lightning.utils.names import is_plain_name
from lenvm_lightning.utils.own_folder import MARKER, claim, is_free, kind_of, put_in_place, refuse_others


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_free_folder_becomes_ours(tmp_path):
    for folder in (tmp_path / "a" / "new", tmp_path / "empty"):
        claim(folder, "run", StoreError, "")
        assert kind_of(folder) == "run"
        assert not is_free(folder)
        (folder / "more").touch()
        claim(folder, "run", StoreError, "")  # once ours, always ours
        (tmp_path / "empty").mkdir(exist_ok=True)


def test_what_a_killed_process_left_before_the_marker_is_nothing(tmp_path):
    (tmp_path / ".lock").write_text("process 1")
    (tmp_path / f".{MARKER}").write_text('{"made')
    assert is_free(tmp_path)
    claim(tmp_path, "run", StoreError, "")
    assert sorted(everything(tmp_path)) == [".lock", MARKER]


@pytest.mark.parametrize(
    "marker",
    [None, "", "[]", "3", '{"holds": "run"}', '{"made_by": "lenvm-lightning", "holds": ["run"]}', "\xff",
     '{"made_by": "somebody", "holds": "run"}'],
)  # fmt: skip
def test_other_folders_are_refused_untouched(tmp_path, marker):
    (tmp_path / "thesis.txt").write_text("years")
    if marker is not None:
        (tmp_path / MARKER).write_text(marker)
    before = everything(tmp_path)
    for look in (refuse_others, claim):
        with pytest.raises(StoreError, match=rf"is not empty, and it has no {MARKER}, .*is touched\. Go elsewhere\."):
            look(tmp_path, "run", StoreError, "Go elsewhere.")
    assert everything(tmp_path) == before


def test_folders_of_ours_are_of_one_kind(tmp_path):
    claim(tmp_path, "comparison", StoreError, "")
    with pytest.raises(StoreError, match="is not empty, and it holds: comparison"):
        claim(tmp_path, "run", StoreError, "")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(StoreError, match="Nothing in it is touched"):
        claim(tmp_path / "x", "run", StoreError, "")
    assert is_free(tmp_path / "x" / "y")  # which nobody can make, and whoever tries says so


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\\b", "a\0b", "a\nb"])
def test_names_that_lead_elsewhere(name):
    assert not is_plain_name(name)


def test_plain_names():
    assert all(map(is_plain_name, ["a", "a b", ".hidden", "é.yaml", "-x", "...", "a..b"]))


def test_a_finished_folder_or_file_takes_the_place_of_another(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "keep").touch()
    for old in ("nothing", "folder", "file", "link"):
        part, target = tmp_path / f".{old}", tmp_path / old
        (part / "sub").mkdir(parents=True)
        (part / "sub" / "new").write_text("new")
        if old == "folder":
            target.mkdir()
            (target / "old").touch()
        if old == "file":
            target.touch()
        if old == "link":
            target.symlink_to(tmp_path / "elsewhere")
        synced.clear()
        put_in_place(part, target)
        assert everything(target) == {"sub/new": b"new"}
        assert set(synced[:-1]) == {str(part), str(part / "sub"), str(part / "sub" / "new")}  # before it has its name
        assert synced[-1] == str(tmp_path)
    assert (tmp_path / "elsewhere" / "keep").exists()
    (tmp_path / ".x").write_text("whole")
    put_in_place(tmp_path / ".x", tmp_path / "nothing")  # a checkpoint that was a folder, and is a file now
    assert (tmp_path / "nothing").read_text() == "whole"
