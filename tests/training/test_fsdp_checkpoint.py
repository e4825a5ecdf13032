"""Folders of shards are read without running anything that they hold."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harm import Harm

from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.training.fsdp import full_weights
from lenvm_lightning.training.fsdp_checkpoint import INDEX, load_shards, read_index


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dcp.save({"state_dict": {"w": torch.arange(6.0)}, "lr": 0.5, "harm": Harm()}, checkpoint_id="f", no_dist=True)
    return tmp_path / "f"


def test_what_is_there_is_read(folder):
    state = {"state_dict": {"w": torch.zeros(6)}, "lr": 0.0}
    load_shards(state, folder, no_dist=True)
    assert state["state_dict"]["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert state["lr"] == 0.5
    assert set(read_index(folder).state_dict_metadata) == {"state_dict.w", "lr", "harm"}
    assert full_weights(folder)["w"].tolist() == [0, 1, 2, 3, 4, 5]


def test_an_object_is_not_made(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"f cannot be read: rank 0: .*posix\.system"):
        load_shards({"harm": None}, folder, no_dist=True)
    assert not (tmp_path / "harmed").exists()


def test_an_index_makes_no_object(folder, tmp_path):
    (folder / INDEX).write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match=r"cannot be read safely: it holds posix\.system"):
        full_weights(folder)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "opcodes", [b"Nr" + (2**31).to_bytes(4, "little"), b"p2147483648\n", b"\x96" + (2**40).to_bytes(8, "little")]
)
def test_an_index_takes_no_more_memory_than_it_has_bytes_for(folder, opcodes):
    # A few bytes that make a table of 32 GiB, or a buffer of a TiB.
    (folder / INDEX).write_bytes(b"\x80\x05N" + opcodes + b".")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        read_index(folder)


def test_an_index_of_one_rank_is_not_read(folder, tmp_path):
    (folder / INDEX).unlink()
    (folder / f"__0{INDEX}").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match=r"f cannot be read: .*No such file"):
        load_shards({"lr": 0.0}, folder, no_dist=True)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(("content", "words"), [(b"abc", "cannot be read safely"), (pickle.dumps("x"), "but str")])
def test_damaged_indices(folder, content, words):
    (folder / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        full_weights(folder)


def test_what_is_not_there(folder):
    with pytest.raises(CheckpointError, match=r"f cannot be read: rank 0: .*more"):
        load_shards({"more": torch.zeros(1)}, folder, no_dist=True)


def changed(folder, change):
    """Write the index anew."""
    index = read_index(folder)
    change(index)
    (folder / INDEX).write_bytes(pickle.dumps(index))


def place(index):
    return next(value for key, value in index.storage_data.items() if key.fqn == "state_dict.w")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: setattr(place(index), "relative_path", "../../x"), "names a place that is none in its folder"),
        (lambda index: setattr(place(index), "relative_path", "/etc/passwd"), "names a place that is none"),
        (lambda index: setattr(place(index), "relative_path", 3), "does not fit the shards beside it"),
        (lambda index: setattr(place(index), "relative_path", "gone"), "gone is damaged: it has 0 bytes of at least"),
        (lambda index: setattr(place(index), "length", 10**15), "is damaged: it has .* bytes of at least"),
        (lambda index: setattr(place(index), "offset", -1), "names a place that is none"),
        (lambda index: setattr(place(index), "offset", "x"), "does not fit the shards beside it"),
        (lambda index: setattr(index, "storage_data", [1]), "does not fit the shards beside it"),
        (lambda index: setattr(index, "state_dict_metadata", 3), "does not fit the shards beside it"),
        (
            lambda index: setattr(index.state_dict_metadata["state_dict.w"], "size", torch.Size([10**15])),
            "and its shards hold fewer",
        ),
        (
            lambda index: setattr(index.state_dict_metadata["state_dict.w"], "properties", None),
            "does not fit the shards beside it",
        ),
    ],
)
def test_an_index_of_other_shards(folder, change, words):
    changed(folder, change)
    with pytest.raises(CheckpointError, match=words) as told:
        full_weights(folder)
    assert str(folder) in str(told.value)


def test_shards_that_are_cut_short(folder):
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is damaged: it has .* bytes of at least"):
        full_weights(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x05.",
        b"\x80\x04K",
        b"(lp0\n" * 50,
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93K\x01R.",  # torch.Size(1)
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"c" + b"\xff" * 20 + b"\nx\n.",
    ],
)
def test_pickles_that_are_damaged(folder, content):
    (folder / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{INDEX} (cannot be read safely|is no index of shards)"):
        full_weights(folder)
