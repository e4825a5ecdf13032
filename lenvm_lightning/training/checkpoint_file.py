"""A checkpoint in one file: written where it will be, read without running what it holds, looked at for damage."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ..errors import CheckpointError
from ..utils.reading import first_line, in_a_sentence


class OwnFolderIO(TorchCheckpointIO):
    """Writes straight into the folder that a checkpoint is for.

    Lightning's own collects all of it in memory, and writes it to the folder of temporary files first (`$TMPDIR`),
    which may be small, on another disk, or somebody else's. Whoever calls gives the file its name when it is whole, see
    `ResumableCheckpoint`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint. An address is left to Lightning.

        Raises:
            OSError: the disk is full, say; nothing is left then.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("wb") as open_file:
                torch.save(checkpoint, open_file)
        except BaseException as error:
            file.unlink(missing_ok=True)
            if (reason := _error_of_disk(error)) is not None:
                raise OSError(reason.errno, reason.strerror, str(file)) from error
            raise

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: it is damaged.
        """
        with in_a_sentence(f"{path} cannot be read"):
            return super().load_checkpoint(path, *args, **options)


def _error_of_disk(error: BaseException | None) -> OSError | None:
    """What the disk said, where torch's writer only says that it is not where it should be in the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def read_checkpoint_file(path: Path, known: Sequence[Any] = ()) -> dict[str, Any]:
    """Content of a file of a checkpoint; its tensors stay on the disk until they are used.

    Args:
        path: that torch wrote.
        known: classes that may be in it beside tensors and plain values, as `safe_globals` of torch takes them.

    Raises:
        CheckpointError: it is missing, damaged, or holds other objects.
    """
    try:
        with torch.serialization.safe_globals(list(known)):
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise CheckpointError(f"{path} cannot be read safely: {error.strerror}") from error
    except Exception as error:  # a damaged file may end in anything
        unsupported = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {unsupported[1]}, which no checkpoint does" if unsupported else "it is damaged"
        raise CheckpointError(f"{path} cannot be read safely: {reason}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} cannot be read safely: it holds {type(found).__name__}, which is no checkpoint")
    return found


def require_sound(path: Path, every_byte: bool) -> None:
    """Look at a file that torch wrote for damage, without making anything of it.

    Args:
        path: an archive of uncompressed parts, with a checksum for each. torch itself compares none.
        every_byte: compare the checksums, too (about a second for a gigabyte or two); else that all parts are there.

    Raises:
        CheckpointError: it is damaged.
    """
    with in_a_sentence(f"{path} is damaged"):
        try:
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise CheckpointError(f"{path} is damaged: it is no file that torch wrote")
                broken = archive.testzip() if every_byte else None
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{path} is damaged: it is not whole ({first_line(error)})") from error
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {broken} is another one")
