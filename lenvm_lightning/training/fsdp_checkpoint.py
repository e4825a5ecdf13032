"""Reading the shards that FSDP's ranks wrote, with no object in them made but those that are known.

`torch.distributed.checkpoint` unpickles its index, and whatever is no tensor, code included.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from ..errors import CheckpointError
from ..utils.names import is_plain_name
from ..utils.reading import first_line, in_a_sentence

INDEX = ".metadata"
_KNOWN = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "WindowsPath"},
}  # fmt: skip
# Opcodes that place something in the table of what was read, which is as long as the largest place.
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_BUFFERS = ("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"it holds {module}.{name}, which no index of shards does")


class _Reader(dcp.FileSystemReader):
    """Reads the index of all ranks, and never one of a single rank, which torch would fall back to."""

    def read_metadata(self) -> Metadata:
        found = read_index(Path(self.path))
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(dcp.DefaultLoadPlanner):
    """Reads learning rates and the like without running anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def read_index(folder: Path) -> Metadata:
    """What there is in a folder of shards: names, shapes, types.

    Raises:
        CheckpointError: there is no such index, it is damaged, or holds other objects than an index does.
    """
    try:
        content = (folder / INDEX).read_bytes()
        _require_bounded(content)
        found = _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle may end in anything
        said = error if isinstance(error, OSError | CheckpointError) else first_line(error)
        raise CheckpointError(f"{folder / INDEX} cannot be read safely: {said}") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{folder / INDEX} is no index of shards, but {type(found).__name__}")
    with in_a_sentence(f"{folder / INDEX} does not fit the shards beside it"):
        _compare_with_shards(found, folder)
    return found


def _require_bounded(content: bytes) -> None:
    """Refuse a pickle that takes more memory than it has bytes for: one opcode of five bytes can ask for 64 GiB.

    Raises:
        CheckpointError: it does.
        ValueError: it is no pickle.
    """
    for opcode, argument, _ in pickletools.genops(content):
        far = isinstance(argument, int) and argument > len(content)
        if opcode.name in _BUFFERS or (opcode.name in _PUTS and far):
            raise CheckpointError(f"it holds {opcode.name} {argument!r}, as no index of shards does")


def _compare_with_shards(index: Metadata, folder: Path) -> None:
    """Refuse an index of other shards than those that are there, be they damaged or a stranger's.

    Raises:
        CheckpointError: shards are missing or too short, or lie elsewhere; tensors are larger than all of them.
    """
    longest: dict[str, int] = {}  # bytes that a file must have
    for place in (index.storage_data or {}).values():
        if not is_plain_name(place.relative_path) or place.offset < 0 or place.length < 0:
            raise CheckpointError(f"{folder / INDEX} names a place that is none in its folder: {place!r}")
        longest[place.relative_path] = max(longest.get(place.relative_path, 0), place.offset + place.length)
    for name, length in sorted(longest.items()):
        there = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if there < length:
            raise CheckpointError(f"{folder / name} is damaged: it has {there:,} bytes of at least {length:,}")
    sizes = [
        math.prod(one.size) * one.properties.dtype.itemsize
        for one in index.state_dict_metadata.values()
        if isinstance(one, TensorStorageMetadata)
    ]
    if min(sizes, default=0) < 0 or sum(sizes) > sum(longest.values()):
        raise CheckpointError(f"{folder / INDEX} speaks of {sum(sizes):,} bytes, and its shards hold fewer")


def load_shards(state: dict[str, Any], folder: Path, no_dist: bool = False) -> None:
    """Read into the tensors of `state`, sharded or not.

    Args:
        state: what is wanted, by name; nested.
        folder: that the ranks wrote.
        no_dist: this process alone reads, whatever the number of ranks that wrote.

    Raises:
        CheckpointError: see `read_index`; or something wanted is not there, is damaged, or would have to be run.
    """
    try:
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=no_dist)
    except dcp.CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {reason[0]!r}" for rank, reason in error.failures.items())
        raise CheckpointError(f"{folder} cannot be read: {reasons}") from error
