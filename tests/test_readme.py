"""What README and docs say is there: files, links, commands, the Python of the README."""

import re
import shlex
from pathlib import Path

import pytest
from places import ROOT

from lenvm_lightning.cli import evaluate
from lenvm_lightning.cli.main import build_parser, split_overrides
from lenvm_lightning.cli.recipe import find_recipe, read_recipe
from lenvm_lightning.evaluation.settings import read_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip
MOST_WORDS = 1400  # read in one sitting
ENDS_A_COMMAND = ("&&", "|", ">")


# -- files ------------------------------------------------------------------------------------------------------------


def section(title):
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def places_of_tree():
    """(name, path) of each line of the annotated tree; indentation says in which folder it lies."""
    folders = []
    for line in section("The way through the house").partition("```\n")[2].partition("```")[0].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        yield "/".join(part.rstrip("/") for part in folders), ROOT.joinpath(*folders)


def places_of_table():
    """(name, path) of each file that the table of changes names."""
    for name in re.findall(r"`([\w/.]+)`", section("Change the paper").partition("\n\n`pytest")[0]):
        yield name, ROOT / name


PLACES = [*places_of_tree(), *places_of_table()]


def test_places_are_found():
    assert len(PLACES) > 30


@pytest.mark.parametrize("path", [pytest.param(path, id=name) for name, path in PLACES])
def test_files_are_where_it_says(path):
    assert path.exists()


def test_every_folder_of_the_package_is_in_the_tree():
    said = {path for _, path in places_of_tree()}
    package = ROOT / "lenvm_lightning"
    for folder in package.iterdir():
        if (folder / "__init__.py").exists():
            assert folder in said


def test_readme_is_read_in_one_sitting():
    assert len(README.split()) <= MOST_WORDS


def test_figure_is_small():
    assert (ROOT / "docs" / "img" / "remaining.png").stat().st_size < 60_000


def test_every_recipe_is_in_the_overview():
    overview = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in ROOT.glob("recipes/*.yaml") if f"({path.name})" not in overview] == []


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []


# -- commands ---------------------------------------------------------------------------------------------------------


def commands_of(page):
    """Commands of this package in the shell blocks of a page, as words."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = min((words.index(mark) for mark in ENDS_A_COMMAND if mark in words), default=len(words))
                command, words = words[:end], words[end + 1 :]
                if "lenvm_lightning" in command:  # torchrun … -m lenvm_lightning run …
                    command = ["lenvm", *command[command.index("lenvm_lightning") + 1 :]]
                if command and command[0] in ("lenvm", "lightning", "lenvm-eval"):
                    yield tuple(command)


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})


def test_commands_are_found():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_means_something(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = command
    if program == "lenvm-eval":
        read_settings(vars(evaluate.build_parser().parse_args(words)), "this")
        return
    rest, overrides = split_overrides(words)
    arguments = build_parser(program).parse_args(rest)
    if arguments.command in ("run", "plan"):
        path = find_recipe(arguments.recipe)
        assert path.resolve().parent == ROOT / "recipes"
        read_recipe(path, [(key, value) for key, value in overrides if not key.endswith(".help")])
    else:
        assert overrides == []


def test_commands_that_others_read_are_marked():
    for mark in ("first command", "test command"):
        assert re.search(rf"<!-- {mark} -->\n```bash\n[^\n]+\n```", README)


# -- Python -----------------------------------------------------------------------------------------------------------


def test_python_of_the_readme_runs(capsys):
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, str(Path("README.md")), "exec"), {})
    lengths = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines() if re.match(r"\d+ \w", line)]
    assert len(lengths) == 6
