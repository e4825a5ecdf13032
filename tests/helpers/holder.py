"""Another process that has a folder."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

HOLD = """
import os, sys, time
from pathlib import Path
from lenvm_lightning.utils.locked_folder import FolderLock
with FolderLock(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else 1
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(30)
"""


@contextlib.contextmanager
def holder(folder: Path, how: str = ""):
    command = [sys.executable, "-c", HOLD, str(folder), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        pids = [process.pid]
        try:
            pids = [int(process.stdout.readline()) for _ in range(2 if how == "fork" else 1)]
            yield process, pids
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
