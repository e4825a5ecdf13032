"""A checkpoint in one file: where it is written, and that damage and strangers' objects are noticed."""

import os
import zipfile

import pytest
import torch
from full_disk import room_for
from harm import Harm

from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.training.checkpoint_file import OwnFolderIO, read_checkpoint_file, require_sound

STATE = {"state_dict": {"w": torch.arange(1000.0)}, "epoch": 3}


@pytest.fixture
def file(tmp_path):
    torch.save(STATE, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def test_nothing_passes_through_the_folder_of_temporary_files(tmp_path, monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    path = tmp_path / "new" / "x.ckpt"
    OwnFolderIO().save_checkpoint(STATE, str(path))
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == ["x.ckpt"]
    assert torch.equal(OwnFolderIO().load_checkpoint(path, weights_only=True)["state_dict"]["w"], torch.arange(1000.0))


@pytest.mark.parametrize("size", [0, 10, 1000, 4000])
def test_a_full_disk_is_what_is_told_of(tmp_path, size):
    """torch's writer says that it is not where it should be in the file."""
    with pytest.raises(OSError, match="File too large") as told, room_for(size):
        OwnFolderIO().save_checkpoint(STATE, tmp_path / "x.ckpt")
    assert told.value.filename == str(tmp_path / "x.ckpt")
    assert not os.listdir(tmp_path)


def damage(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "empty": b"",
        "cut short": content[:-1],
        "half": content[:middle],
        "zeros": bytes(len(content)),
        "zeros at the end": content[:middle] + bytes(len(content) - middle),
        "garbage": b"\xff" * 500,
        "no archive": b"step 3",
    }


@pytest.mark.parametrize("kind", damage(b""))
def test_damaged_files(file, kind):
    file.write_bytes(damage(file.read_bytes())[kind])
    for every_byte in (True, False):
        with pytest.raises(CheckpointError, match=r"x\.ckpt is damaged: it is not whole"):
            require_sound(file, every_byte)
    with pytest.raises(CheckpointError, match=r"x\.ckpt cannot be read safely: it is damaged"):
        read_checkpoint_file(file)
    with pytest.raises(CheckpointError, match=r"x\.ckpt cannot be read: "):
        OwnFolderIO().load_checkpoint(file, weights_only=True)


def test_a_bit_that_changed(file):
    """torch reads it without a word."""
    content = bytearray(file.read_bytes())
    content[content.index(torch.tensor([500.0, 501.0]).numpy().tobytes())] ^= 1
    file.write_bytes(content)
    assert not torch.equal(read_checkpoint_file(file)["state_dict"]["w"], STATE["state_dict"]["w"])
    require_sound(file, every_byte=False)
    with pytest.raises(CheckpointError, match=r"x\.ckpt is damaged: the checksum of x/data/0 is another one"):
        require_sound(file, every_byte=True)


def test_a_whole_file(file):
    require_sound(file, every_byte=True)
    assert read_checkpoint_file(file)["epoch"] == 3


def test_other_archives_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    with pytest.raises(CheckpointError, match="it is no file that torch wrote"):
        require_sound(tmp_path / "x.ckpt", every_byte=True)


@pytest.mark.parametrize(("content", "words"), [(Harm(), r"it holds posix\.system"), ([1], "it holds list")])
def test_what_no_checkpoint_holds(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "x.ckpt")
    with pytest.raises(CheckpointError, match=rf"x\.ckpt cannot be read safely: {words}, which"):
        read_checkpoint_file(tmp_path / "x.ckpt")
    assert not (tmp_path / "harmed").exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read safely: No such file"):
        read_checkpoint_file(tmp_path / "x.ckpt")
