"""Folders of runs: which one a run gets, who holds it, and what a kill leaves of it."""

import shutil
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lenvm_lightning.errors import StoreError
from lenvm_lightning.pipeline.run_folder import RunFolder, choose_folder, claimed_folder


def test_other_settings_go_to_another_folder(tmp_path):
    one, two = {"fit": {"lr": 1}}, {"fit": {"lr": 2}}
    first = choose_folder(tmp_path, "r", None, one, False)
    first.start(one, "# header\n")
    second = choose_folder(tmp_path, "r", None, two, False)
    second.start(two, "")
    assert (first.path.name, second.path.name) == ("r", "r-2")
    assert choose_folder(tmp_path, "r", None, one, False).path == first.path
    assert choose_folder(tmp_path, "r", None, two, False).path == second.path


def test_a_claimed_folder_is_locked_and_begun(tmp_path):
    one, two = {"fit": {"lr": 1}}, {"fit": {"lr": 2}}
    with claimed_folder(tmp_path, "r", None, one, False, "") as first:
        assert first.settings() == one
        with (
            pytest.raises(StoreError, match=r"r is in use by process \d+ on .* Wait until it ends"),
            claimed_folder(tmp_path, "r", None, one, False, ""),
        ):
            pass
        with (
            pytest.raises(StoreError, match="in use"),  # --fresh does not delete what another process works on
            claimed_folder(tmp_path, "r", "r", two, True, ""),
        ):
            pass
        with claimed_folder(tmp_path, "r", None, two, False, "") as second:
            assert second.path.name == "r-2"
        (first.path / "checkpoints").mkdir()
    with claimed_folder(tmp_path, "r", "r", two, True, "") as fresh:
        assert fresh.settings() == two
        assert not fresh.checkpoints.exists()
    assert not list(tmp_path.glob("*/.lock"))


def test_killed_while_a_run_is_deleted(tmp_path, monkeypatch):
    """At no moment is it taken for complete, nor do its checkpoints belong to nobody."""
    run = RunFolder(tmp_path / "r")
    run.start({"fit": {"lr": 1}}, "")
    run.finish({})
    for folder in (run.checkpoints, run.model):
        folder.mkdir()
        (folder / "file").write_text("")
    seen = []

    def look(call):
        def looked(path, *rest, **options):
            seen.append((run.complete, run.model.exists(), run.settings() is None, run.checkpoints.exists()))
            return call(path, *rest, **options)

        return looked

    monkeypatch.setattr(shutil, "rmtree", look(shutil.rmtree))
    monkeypatch.setattr(Path, "unlink", look(Path.unlink))
    run.clear()
    seen.append((run.complete, run.model.exists(), run.settings() is None, run.checkpoints.exists()))
    assert len(seen) == 5
    assert not any(complete and not model for complete, model, _, _ in seen)
    assert not any(nameless and checkpoints for _, _, nameless, checkpoints in seen)


def test_other_processes_of_a_distributed_run_do_not_lock(tmp_path, monkeypatch):
    settings = {"fit": {"lr": 1}}
    with claimed_folder(tmp_path, "r", None, settings, False, ""):
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with claimed_folder(tmp_path, "r", None, settings, True, "") as same:
            assert same.settings() == settings
        monkeypatch.setattr(rank_zero_only, "rank", 0)
        monkeypatch.setenv("NODE_RANK", "1")
        with claimed_folder(tmp_path, "r", None, settings, False, "") as same:
            assert same.path.name == "r"
