"""How much memory a process may still take, and whether that was the trouble."""

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def is_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes: what the machine has free, or what the container leaves of its limit, whichever is less.

    Args:
        cgroup: folder that tells the limit of a container, as version 2 of Linux's control groups lays it out.
    """
    free = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        # Files that were read count as used until somebody needs their memory.
        read = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or no Linux
        return free
    if limit == "max":
        return free
    return max(0, min(free, int(limit) - used + int(read.get("inactive_file", 0))))
