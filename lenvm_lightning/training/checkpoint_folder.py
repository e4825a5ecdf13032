"""The checkpoints of a run: which there are, and which is the newest that is whole."""

import re
import sys
from pathlib import Path

from lightning.fabric.utilities.load import _METADATA_FILENAME as METADATA_FILE
from lightning.pytorch.utilities import rank_zero_only

from ..errors import CheckpointError
from .checkpoint_file import read_checkpoint_file, require_sound
from .deepspeed_checkpoint import is_zero_checkpoint, require_whole
from .fsdp_checkpoint import read_index

_NAME = re.compile(r"step-(\d{9,})\.ckpt")
_WRITING = re.compile(r"\.writing-step-\d{9,}\.ckpt")
_OF_EVERY_ONE = {"epoch", "global_step", "loops", "callbacks", "lr_schedulers"}  # that Lightning reads
_OF_A_FILE = {"state_dict", "optimizer_states"}  # which ranks write into shards


def name_of_step(step: int) -> str:
    """Name of the checkpoint of an optimizer step."""
    return f"step-{step:09d}.ckpt"


def writing_name(name: str) -> str:
    """What a checkpoint is called while it is written: beside its place, and hidden."""
    return f".writing-{name}"


def steps_of(folder: Path) -> list[tuple[int, Path]]:
    """All checkpoints in a folder with their optimizer steps, the oldest first."""
    found = [(match, path) for path in folder.glob("step-*.ckpt") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def leftovers_of(folder: Path) -> list[Path]:
    """What writers that were killed have left; nothing but what they call so."""
    return [path for path in folder.glob(".writing-*") if _WRITING.fullmatch(path.name)]


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, by its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most optimizer steps in a folder that is whole; None where there is none at all.

    One that is damaged is named on stderr, and the next older one is taken.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    damaged: list[str] = []
    for _, path in reversed(steps_of(folder)):
        try:
            require_whole_checkpoint(path)
        except CheckpointError as error:
            if not path.exists():  # its owner has a newer one, and took it away while we looked
                continue
            damaged.append(str(error))
            continue
        for text in damaged:
            rank_zero_only(print)(f"{text}: left alone, {path.name} is used instead", file=sys.stderr)
        return path
    if damaged:
        raise CheckpointError(
            f"{folder} holds no checkpoint that is whole:\n  " + "\n  ".join(damaged) + "\n"
            "Put one back from a copy; or train again with --fresh, which deletes them."
        )
    return None


def require_whole_checkpoint(path: Path) -> None:
    """Look at a checkpoint for damage. Every rank of a run comes to the same answer.

    Args:
        path: a file, of which every byte is looked at, or a folder of shards of ranks: that all are there, and as long
            as they must be.

    Raises:
        CheckpointError: it is damaged, or lacks what a run goes on from.
    """
    if path.is_dir():
        saved = read_checkpoint_file(path / METADATA_FILE)
        if is_zero_checkpoint(path):
            require_whole(path)
        else:
            read_index(path)
    else:
        require_sound(path, every_byte=True)
        saved = read_checkpoint_file(path)
    needed = _OF_EVERY_ONE | (set() if path.is_dir() else _OF_A_FILE)
    if missing := sorted(needed - saved.keys()):
        raise CheckpointError(f"{path} is no checkpoint of a run: {', '.join(missing)} are not in it")
