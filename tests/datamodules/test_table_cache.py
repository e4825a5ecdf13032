"""Tokenised tables on disk: damage is noticed, other folders stay, nothing has a name before it is whole."""

import os

import pytest
from rollout_lines import USER

from datamodules import table as table_module
from datamodules.table_cache import building_folder, default_cache_dir
from lenvm_lightning.errors import DataError
from lenvm_lightning.utils.locked_folder import FolderLock
from lenvm_lightning.utils.own_folder import MARKER, claim

LINES = [{"messages": USER, "completion": f"word {number}"} for number in range(5)]


@pytest.fixture
def tokenised(monkeypatch):
    """Count the rollouts that are tokenised."""
    calls = []
    original = table_module.encode_rollout
    monkeypatch.setattr(table_module, "encode_rollout", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.fixture
def told(monkeypatch):
    notes = []
    monkeypatch.setattr("datamodules.table_cache.rank_zero_info", notes.append)
    return notes


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(start, stop):
    def change(file):
        content = bytearray(file.read_bytes())
        content[start:stop] = bytes(255 - byte for byte in content[start:stop])
        file.write_bytes(bytes(content))

    return change


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("data-00000-of-00001.arrow", cut, "is not as it was written"),
        ("data-00000-of-00001.arrow", lambda file: file.write_bytes(b""), "is not as it was written"),
        ("data-00000-of-00001.arrow", flip(0, 8), "is not as it was written"),
        ("data-00000-of-00001.arrow", flip(20, 200), "is not as it was written"),
        ("data-00000-of-00001.arrow", flip(-2000, -1999), "is not as it was written"),  # in the middle of a row
        ("data-00000-of-00001.arrow", os.unlink, "data-00000-of-00001.arrow is missing"),
        ("state.json", cut, "state.json is not as it was written"),
        ("dataset_info.json", os.unlink, "dataset_info.json is missing"),
        ("checksums.json", os.unlink, "checksums.json is missing"),
        ("checksums.json", cut, "it is not JSON"),
        ("checksums.json", lambda file: file.write_text('{"state.json": 3}'), "cannot unpack"),
    ],
)
def test_a_damaged_table_is_made_anew(build, tiny_text, tmp_path, tokenised, told, name, harm, words):
    whole = build(tiny_text, *LINES).to_dict()
    [folder] = (tmp_path / "cache").glob("rollouts-*")
    harm(folder / name)
    assert build(tiny_text, *LINES).to_dict() == whole
    assert len(tokenised) == 10
    [note] = told
    assert note.startswith(f"note: the tokenised rollouts in {folder} are damaged (")
    assert words in note
    assert build(tiny_text, *LINES).to_dict() == whole
    assert (len(tokenised), len(told)) == (10, 1)
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_folder_of_somebody_else_is_in_the_way_and_stays(build, tiny_text, tmp_path):
    build(tiny_text, *LINES)
    [folder] = (tmp_path / "cache").glob("rollouts-*")
    (folder / MARKER).unlink()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(DataError, match=rf"has no {MARKER}.*left alone.*data\.cache_dir"):
        build(tiny_text, *LINES)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_killed_processes_left_is_swept_away_and_nothing_else(tmp_path):
    ours = [tmp_path / f"building-{name}" for name in ("old", "used", "young")]
    house, empty = tmp_path / "building-a-house", tmp_path / "building-"
    for folder in ours:
        claim(folder, "tokenised rollouts", DataError, "")
        (folder / "rows.arrow").write_text("half")
    for folder in (house, empty):
        folder.mkdir()
    (house / "plan.txt").write_text("three rooms")
    with FolderLock(ours[1]):
        for folder in (*ours[:2], house, empty):
            os.utime(folder, (0, 0))
        with building_folder(tmp_path) as building:
            assert (building / MARKER).exists()
    assert [folder.exists() for folder in ours] == [False, True, True]
    assert (house / "plan.txt").read_text() == "three rooms"
    assert empty.exists()
    assert not building.exists()


def test_a_table_is_on_the_disk_before_it_has_its_name(build, tiny_text, tmp_path, monkeypatch):
    synced, names = [], {}
    fsync, rename = os.fsync, os.rename

    def noted_fsync(file):
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def noted_rename(source, target):
        names[str(target)] = {path for path in synced if path.startswith(str(source))}
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    build(tiny_text, *LINES)
    [folder] = (tmp_path / "cache").glob("rollouts-*")
    [(part, *files)] = [sorted(paths) for target, paths in names.items() if target == str(folder)]
    assert {os.path.relpath(path, part) for path in files} >= {file.name for file in folder.iterdir()}
    assert synced[-1] == str(folder.parent)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LENVM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("LENVM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "lenvm_lightning"
