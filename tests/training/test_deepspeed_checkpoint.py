"""Folders that DeepSpeed's ranks wrote, read without it; those that are damaged are named."""

import pytest
import torch

from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.training.deepspeed_checkpoint import TAG, read_weights, require_whole

WEIGHTS = {"w": torch.arange(6.0).view(2, 3), "b": torch.arange(3.0)}


def optim(rank):
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def write(folder, stage):
    """What two ranks write, as far as it is read."""
    (folder / TAG).mkdir()
    for rank in range(2):
        # Of stage 3 each rank holds half of every weight, filled up: 3 of 6, and 2 of 3.
        shard = torch.cat(
            [WEIGHTS["w"].flatten()[3 * rank :][:3], torch.cat([WEIGHTS["b"], torch.zeros(1)])[2 * rank :][:2]]
        )
        state = {"zero_stage": stage, "partition_count": 2 if stage == 3 else [2, 2], "fp32_flat_groups": [shard]}
        torch.save({"optimizer_state_dict": state}, folder / TAG / optim(rank))
    if stage == 3:
        shapes = [{name: weight.shape for name, weight in WEIGHTS.items()}]
        torch.save({"param_shapes": shapes}, folder / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    else:
        torch.save({"module": WEIGHTS}, folder / TAG / "mp_rank_00_model_states.pt")
    return folder / TAG


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_of_ranks_are_joined(tmp_path, stage):
    write(tmp_path, stage)
    require_whole(tmp_path)
    assert all(torch.equal(weight, WEIGHTS[name]) for name, weight in read_weights(tmp_path).items())


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("harm", ["cut", "empty", "gone", "list", "no key", "wrong count", "wrong stage"])
@pytest.mark.parametrize("which", [0, 1])
def test_files_of_ranks_that_are_damaged(tmp_path, stage, harm, which):
    file = write(tmp_path, stage) / optim(which)
    state = torch.load(file)["optimizer_state_dict"]
    if harm == "gone":
        file.unlink()
    elif harm in ("cut", "empty"):
        file.write_bytes(file.read_bytes()[:-1] if harm == "cut" else b"")
    else:
        wrong = {
            "list": [1],
            "no key": {},
            "wrong count": {"partition_count": "x"},
            "wrong stage": {"zero_stage": None},
        }
        content = {"optimizer_state_dict": {**state, **wrong[harm]}} if "wrong" in harm else wrong[harm]
        torch.save(content, file)
    if which == 1 and "wrong" in harm:
        return  # only the first rank's are looked at
    for read in (require_whole, read_weights):
        if harm == "wrong stage" and (read is require_whole or stage == 2):
            continue
        with pytest.raises(CheckpointError) as told:
            read(tmp_path)
        assert str(tmp_path) in str(told.value)


@pytest.mark.parametrize(
    ("stage", "content"),
    [(2, {}), (2, {"module": 3}), (3, {}), (3, {"param_shapes": 3}), (3, {"param_shapes": [{"w": "x"}]}),
     (3, {"param_shapes": [{"w": torch.Size([10**9])}]}), (2, [1])],
)  # fmt: skip
def test_files_of_weights_that_are_damaged(tmp_path, stage, content):
    folder = write(tmp_path, stage)
    [file] = folder.glob("*model_states.pt")
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=str(folder)):
        read_weights(tmp_path)
    file.unlink()
    for read in (require_whole, read_weights):
        with pytest.raises(CheckpointError, match=r"is not whole: .*model_states\.pt is missing"):
            read(tmp_path)
