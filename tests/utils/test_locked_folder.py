"""One process at a time in a folder."""

import os

import pytest
from holder import holder
from sampled import sample

from lenvm_lightning.errors import StoreError
from lenvm_lightning.utils.locked_folder import FolderLock


def test_two_processes_never_share_a_folder(tmp_path, capsys):
    with holder(tmp_path) as (process, _):
        with pytest.raises(StoreError, match=f"{tmp_path} is in use by process {process.pid} on "):
            sample(tmp_path)
        process.kill()
        process.wait()
        assert sample(tmp_path).status == 0  # the lock of a killed process is nobody's
    assert not (tmp_path / ".lock").exists()


def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path):
    with holder(tmp_path, "fork") as (process, pids):
        process.kill()
        process.wait()
        (child,) = set(pids) - {process.pid}
        os.kill(child, 0)  # alive
        with FolderLock(tmp_path):
            pass
