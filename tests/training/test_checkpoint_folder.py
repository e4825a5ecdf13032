"""The newest checkpoint that is whole, whatever lies beside it."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.training.checkpoint_folder import (
    METADATA_FILE,
    latest_checkpoint,
    leftovers_of,
    name_of_step,
    step_of,
    steps_of,
    writing_name,
)

STATE = {"epoch": 0, "global_step": 1, "loops": {}, "callbacks": {}, "lr_schedulers": [], "state_dict": {},
         "optimizer_states": []}  # fmt: skip


def save(folder, *steps, **changed):
    for step in steps:
        torch.save({**STATE, "state_dict": {"w": torch.arange(1000.0)}, **changed}, folder / name_of_step(step))


def save_shards(folder, step):
    path = folder / name_of_step(step)
    dcp.save({"state_dict": {"w": torch.arange(1000.0)}}, checkpoint_id=path, no_dist=True)
    rest = {name: value for name, value in STATE.items() if name not in ("state_dict", "optimizer_states")}
    torch.save(rest, path / METADATA_FILE)
    return path


def test_the_newest_by_its_step(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    save(tmp_path, 100, 999_999_999, 1_000_000_000)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000000.ckpt"
    assert step_of(latest_checkpoint(tmp_path)) == 10**9
    assert [step for step, _ in steps_of(tmp_path)] == [100, 999_999_999, 10**9]


@pytest.mark.parametrize(
    "name", ["step-final.ckpt", "step-9.ckpt", "step-000000009.ckpt.bak", "best.ckpt", "step-.ckpt"]
)
def test_other_files_are_none(tmp_path, name):
    save(tmp_path, 1)
    (tmp_path / name).write_bytes(b"somebody's")
    assert latest_checkpoint(tmp_path) == tmp_path / name_of_step(1)


@pytest.mark.parametrize("harm", ["empty", "half", "a bit", "another file", "a key"])
def test_a_damaged_one_is_named_and_the_next_older_is_taken(tmp_path, capsys, harm):
    save(tmp_path, 1, 2, 3)
    newest = tmp_path / name_of_step(3)
    content = bytearray(newest.read_bytes())
    content[content.index(torch.tensor([500.0]).numpy().tobytes())] ^= 1
    if harm == "another file":
        torch.save({"a": 1}, newest)
    elif harm == "a key":
        torch.save({name: value for name, value in STATE.items() if name != "loops"}, newest)
    else:
        newest.write_bytes({"empty": b"", "half": newest.read_bytes()[:2000], "a bit": bytes(content)}[harm])
    before = newest.read_bytes()
    assert latest_checkpoint(tmp_path) == tmp_path / name_of_step(2)
    err = capsys.readouterr().err
    assert str(newest) in err
    assert "left alone, step-000000002.ckpt is used instead" in err
    assert newest.read_bytes() == before
    (tmp_path / name_of_step(2)).write_bytes(b"")
    assert latest_checkpoint(tmp_path) == tmp_path / name_of_step(1)
    assert capsys.readouterr().err.count("step-000000001.ckpt is used instead") == 2


def test_all_are_damaged(tmp_path):
    for step in (1, 2):
        (tmp_path / name_of_step(step)).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)holds no checkpoint that is whole:.*000002.*000001.*--fresh"):
        latest_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("harm", ["a shard is cut", "a shard is missing", "no index", "no metadata", "metadata is cut"])
def test_damaged_shards(tmp_path, capsys, harm):
    save_shards(tmp_path, 1)
    path = save_shards(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == path
    shard, index, rest = next(path.glob("*.distcp")), path / ".metadata", path / METADATA_FILE
    if harm == "a shard is cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "metadata is cut":
        rest.write_bytes(rest.read_bytes()[:-1])
    else:
        {"a shard is missing": shard, "no index": index, "no metadata": rest}[harm].unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / name_of_step(1)
    assert "step-000000002.ckpt" in capsys.readouterr().err


def test_one_that_goes_while_we_look(tmp_path, monkeypatch):
    """Its owner has a newer one."""
    save(tmp_path, 1, 2)

    def look(path):
        path.unlink()
        raise CheckpointError("it is gone")

    monkeypatch.setattr("lenvm_lightning.training.checkpoint_folder.require_whole_checkpoint", look)
    assert latest_checkpoint(tmp_path) is None


def test_leftovers_are_what_our_writers_call_so(tmp_path):
    ours = writing_name(name_of_step(3))
    for name in (ours, ".writing-thesis.txt", ".writing-step-3.ckpt", "writing-step-000000003.ckpt", f"{ours}.bak"):
        (tmp_path / name).touch()
    assert [path.name for path in leftovers_of(tmp_path)] == [ours]
