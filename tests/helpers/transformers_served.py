"""``transformers serve`` on a port of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class Served:
    """``transformers serve`` on a port of its own; it can be killed and started again."""

    def __init__(self, model, folder, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._model, self._options = model, options
        self._log, self._home = folder / "serve.log", folder / "no_hub"
        self.starts = 0
        self._process = None

    def start(self):
        """Return when it answers."""
        command = [str(Path(sys.executable).with_name("transformers")), "serve", self._model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", *self._options]
        environment = {**os.environ, "HF_HOME": str(self._home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.starts += 1
        for _ in range(600):
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"transformers serve did not start:\n{self._log.read_text()[-2000:]}")

    def kill(self):
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
