"""Classes that a recipe names: from a list of packages, and nothing else is imported without a word."""

import sys

import pytest
import yaml
from jsonargparse import ArgumentParser

from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.pipeline.allowed_imports import PACKAGES, allowed, imports_from, load_class
from lenvm_lightning.pipeline.fit_stage import parse_fit

FIT = {
    "model": {"class_path": "lenvm_lightning.TextLenVM", "init_args": {"backbone": "tiny-text"}},
    "data": {"class_path": "datamodules.TextRollouts"},
}
EVIL = """
from pathlib import Path
Path("ran").touch()
import lightning as L
from lenvm_lightning import TextLenVM
from datamodules import TextRollouts


class Model(TextLenVM):
    pass


class Data(TextRollouts):
    pass


class Callback(L.Callback):
    pass


class Logger(L.pytorch.loggers.CSVLogger):
    pass


class Strategy(L.pytorch.strategies.SingleDeviceStrategy):
    pass
"""


@pytest.fixture
def evil(here, monkeypatch):
    """A module beside the recipe, as Python finds it."""
    (here / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(here)
    yield here / "ran"
    sys.modules.pop("evil", None)


PLACES = {
    "model": ("fit.model.class_path", "evil.Model"),
    "data": ("fit.data.class_path", "evil.Data"),
    "callback": ("fit.trainer.callbacks", "[{class_path: evil.Callback}]"),
    "callback by name": ("fit.trainer.callbacks", "evil.Callback"),
    "callbacks by name": ("fit.trainer.callbacks", "[evil.Callback]"),
    "callback in a text": ("fit.trainer.callbacks", "'[{class_path: evil.Callback}]'"),
    "callback in a file": ("fit.trainer.callbacks", "callbacks.yaml"),
    "strategy": ("fit.trainer.strategy", "{class_path: evil.Strategy}"),
    "profiler": ("fit.trainer.profiler", "{class_path: evil.Logger}"),
    "plugins": ("fit.trainer.plugins", "[{class_path: evil.Strategy}]"),
    "logger": ("fit.trainer.logger", "{class_path: evil.Logger}"),
    "loggers by name": ("fit.trainer.logger", "[evil.Logger]"),
    "re-exported": ("fit.trainer.callbacks", "[{class_path: lightning.pytorch.cli.os.PathLike}]"),
}


@pytest.mark.parametrize("command", [["run", "r.yaml", "--check"], ["plan", "r.yaml"], ["run", "r.yaml", "--fit.help"]])
@pytest.mark.parametrize("place", PLACES)
def test_a_look_imports_nothing_beyond_the_list(here, capsys, evil, place, command):
    (here / "callbacks.yaml").write_text("- class_path: evil.Callback\n")
    key, value = PLACES[place]
    recipe: dict = {"fit": yaml.safe_load(yaml.safe_dump(FIT))}
    section = recipe["fit"].setdefault(key.split(".")[1], {})
    section[key.split(".")[2]] = yaml.safe_load(value)
    (here / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "RecipeError" in err
    if "text" not in place and "file" not in place and place != "strategy by name":
        assert "is none of the packages that a recipe may name classes of" in err
        assert "--allow-import " in err
    assert not evil.exists()
    assert "evil" not in sys.modules


def test_a_package_that_was_named_is_imported(here, capsys, evil):
    words = ["text_lenvm", "--fit.model.class_path", "evil.Model", "--fit.model.gama", "1"]
    for command in ("run", "plan"):
        assert main([command, *words, "--allow-import", "other", "--allow-import", "evil"]) == 2
        assert "'gama' is no setting of evil.Model; did you mean 'gamma'?" in capsys.readouterr().err
        assert evil.exists()
        assert main([command, *words]) == 2  # and not from then on
        assert "say --allow-import evil" in capsys.readouterr().err


def test_everything_that_is_named_can_be_made_where_that_is_allowed(here, evil):
    trainer = {"callbacks": [{"class_path": "evil.Callback"}], "strategy": {"class_path": "evil.Strategy"}}
    fit = {**FIT, "trainer": trainer}
    with pytest.raises(RecipeError, match="evil"):
        parse_fit(fit, "r.yaml")
    with imports_from(["evil"]):
        cli = parse_fit(fit, "r.yaml")
    assert type(cli.config_init["trainer"]["callbacks"][0]).__module__ == "evil"
    assert allowed() == PACKAGES


@pytest.mark.parametrize("path", [".a.B", "a..B", "a.B.", "", ".", "B", "a/b.C", "a.b-c.D", "..", "a b.C"])
def test_what_is_no_path_of_a_class(here, capsys, path):
    with pytest.raises(RecipeError, match=r"names no class: give package\.module\.Class"):
        load_class(path)
    (here / "r.yaml").write_text(yaml.safe_dump({"fit": {**FIT, "model": {"class_path": path or "."}}}))
    assert main(["run", "r.yaml", "--check"]) == 2
    assert "r.yaml:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("torch.float32", "names no class, but dtype"),
        ("torch.nn.functional.relu", "names no class, but function"),
        ("torch.os.PathLike", "cannot be imported"),
        (
            "lightning.pytorch.cli.Namespace",
            r"'jsonargparse.*is none of the packages .*Namespace' is it by another name",
        ),
        ("subprocess.Popen", "is none of the packages"),
        ("lenvm_lightning_evil.X", "is none of the packages"),
        ("lenvm_lightning.TextLenV", "cannot be imported; did you mean 'lenvm_lightning.TextLenVM'"),
        ("lenvm_lightning.nowhere.X", "cannot be imported"),
    ],
)
def test_what_is_no_class_of_the_list(path, words):
    with pytest.raises(RecipeError, match=words):
        load_class(path)


def test_code_that_fails_when_it_is_imported(here, monkeypatch, capsys):
    (here / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(here)
    with imports_from(["broken"]), pytest.raises(RecipeError, match="cannot be imported: ZeroDivisionError: division"):
        load_class("broken.X")


@pytest.mark.parametrize("name", ["", ".", "a/b", "a-b", "*", "jsonargparse", "jsonargparse.x"])
def test_packages_that_cannot_be_allowed(capsys, name):
    assert main(["run", "text_lenvm", "--check", "--allow-import", name]) == 2
    assert f"--allow-import: no package that could be allowed is called {name!r}" in capsys.readouterr().err


def test_jsonargparse_is_held_to_the_same_list(evil):
    with imports_from([]):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--call", type=type)
        with pytest.raises(Exception, match=r"Importing 'evil\.Model' is not allowed"):
            parser.parse_object({"call": "evil.Model"})
    assert not evil.exists()
