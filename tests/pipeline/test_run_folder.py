"""Folders of runs: which one a run gets, who holds it, and what a kill leaves of it."""

import shutil
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError, StoreError
from lenvm_lightning.pipeline.run_folder import RunFolder, choose_folder, claimed_folder
from lenvm_lightning.utils.own_folder import MARKER


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


# -- folders that are no runs -----------------------------------------------------------------------------------------

SETTINGS = {"fit": {"lr": 1}}


@pytest.fixture
def precious(tmp_path):
    """A folder that is no run, with names in it that a run has, too."""
    folder = tmp_path / "precious"
    for name in ("thesis.txt", "model/weights", "checkpoints/step-000000001.ckpt", "results.json", "recipe.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    yield folder
    found = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert len(found) == 5
    assert all(name == content for name, content in found.items())


@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_that_was_never_a_run_is_refused(tmp_path, precious, fresh):
    with (
        pytest.raises(RecipeError, match=rf"precious is not empty, and it has no {MARKER}.*Nothing in it is touched"),
        claimed_folder(tmp_path, "r", "precious", SETTINGS, fresh, ""),
    ):
        pass
    with pytest.raises(RecipeError, match="Nothing in it is touched"):
        RunFolder(precious).clear()
    with pytest.raises(RecipeError, match="Nothing in it is touched"):
        RunFolder(precious).claim()


def test_without_a_name_another_folder_is_taken(tmp_path, precious, capsys):
    with claimed_folder(tmp_path, "precious", None, SETTINGS, True, "") as folder:
        assert folder.path.name == "precious-2"
    assert "precious is not empty and holds no run: left alone" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\\b", "../precious", "rollouts", "a\0"])
def test_names_that_are_no_folder_among_the_runs(tmp_path, name):
    (tmp_path / "runs" / "other").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"--name .*the name of a run is that of one folder among the runs"):
        choose_folder(tmp_path / "runs", "r", name, SETTINGS, True)
    with pytest.raises(RecipeError, match="the recipe's file, which gives the run its name"):
        choose_folder(tmp_path / "runs", name, None, SETTINGS, True)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


@pytest.mark.parametrize(
    "text", ["evaluate: [{task: lifebench}]", "sample: {generator: tiny-text, prompts: tiny-math}"]
)
def test_names_are_looked_at_before_anything_is_done(here, capsys, text):
    (here / "r.yaml").write_text(text)
    for words in (["--name", ".."], ["--name", ""], ["--check", "--name", "a/b"]):
        assert main(["run", "r.yaml", *words]) == 2
        assert "the name of a run is that of one folder among the runs" in capsys.readouterr().err
    (here / "..yaml").write_text(text)  # whose stem is a dot
    assert main(["run", "..yaml", "--fresh"]) == 2
    assert "'.': the name of a run" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_measuring_leaves_other_folders_alone(here, precious, capsys):
    (here / "r.yaml").write_text("evaluate: [{task: lifebench, lengths: [16], limit: 1, n: 1}]")
    assert main(["run", "r.yaml", "--runs", str(precious.parent), "--name", "precious"]) == 2
    assert "precious is not empty, and it has no" in capsys.readouterr().err


# -- runs that are damaged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"fit: [", b"\xff", b"- 1", b"a: &a [*a]", b"x: !!python/name:os.system"])
def test_settings_of_a_run_that_cannot_be_read(tmp_path, content):
    run = RunFolder(tmp_path / "r")
    run.start(SETTINGS, "")
    (run.path / "recipe.yaml").write_bytes(content)
    for name in ("r", None):
        with pytest.raises(RecipeError, match=r"(?s)r/recipe\.yaml .*delete the run with --name r --fresh") as told:
            choose_folder(tmp_path, "r", name, SETTINGS, False)
        assert "nobody knows which settings that run has" in str(told.value)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        run.settings()
    with claimed_folder(tmp_path, "r", "r", SETTINGS, True, "") as fresh:
        assert fresh.settings() == SETTINGS


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"metrics": 3, "tiny_world": true}', '{"gamma": "x"}'])
def test_results_of_a_run_that_cannot_be_read(trains, here, capsys, content):
    run = RunFolder(trains)
    words = ["run", "r.yaml"]
    (here / "r.yaml").write_text((here / "r.yaml").read_text().partition("variants:")[0])
    with pytest.MonkeyPatch.context() as patch:  # the settings as the command resolves them, without a training
        patch.setattr("lenvm_lightning.pipeline.run_recipe.run_fit", lambda *_: 1)
        assert main(words) == 1
    run.results.write_text(content)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "runs/r/results.json " in err
    assert "Delete that file: the same command writes it again, from the last checkpoint." in err
