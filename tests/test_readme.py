"""What README and docs say is there: files, links, and commands that the parsers take."""

import re
import shlex
from pathlib import Path

import pytest
from places import ROOT

from lenvm_lightning.cli import evaluate
from lenvm_lightning.cli.main import build_parser, split_overrides
from lenvm_lightning.pipeline import recipe

README = ROOT / "README.md"
MOST_WORDS = 1_400  # a page that is read; what is longer belongs to docs/
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "CHANGELOG.md"}
)  # the changelog names what was
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_COMMANDS = ("lightning ", "lenvm ", "lenvm-eval ", "python -m lenvm_lightning ")


def section(title: str) -> str:
    return README.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]


def tree() -> list[str]:
    """Paths of the annotated tree; what is indented lies in the folder above it."""
    places, folder = [], ""
    for line in section("The way through the house").partition("```text\n")[2].partition("\n```")[0].splitlines():
        name = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        places.append(folder + name)
        folder = name if not line.startswith(" ") and name == "lenvm_lightning/" else folder
    return places


def named() -> list[str]:
    """Files and folders that the table of what to change names."""
    return re.findall(r"`(tests/[\w/.]+)`", section("Change the paper"))


@pytest.mark.parametrize("path", [*tree(), *named()])
def test_files_are_where_it_says(path):
    assert (ROOT / path).exists()


def test_tree_leaves_no_folder_out():
    folders = {f"lenvm_lightning/{path.name}/" for path in (ROOT / "lenvm_lightning").iterdir()
               if (path / "__init__.py").exists()}  # fmt: skip
    assert folders <= set(tree())


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_every_recipe_has_its_card_in_the_table():
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "recipes").glob("*.yaml"):
        [row] = [line for line in table.splitlines() if f"[`{path.stem}`]({path.name})" in line]
        card = path.read_text(encoding="utf-8")
        [memory] = re.findall(r"^# Memory: +(?:planned )?([\d.]+ GiB)", card, re.MULTILINE)
        assert f"| {memory} |" in row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


def commands() -> list[tuple[str, list[str]]]:
    """(where, words) of each command of the package in a block of shell."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                command = re.sub(r"^torchrun .*?-m ", "python -m ", part.strip())
                if command.startswith(_COMMANDS):
                    found.append((f"{page.name}: {command.partition('  ')[0]}", shlex.split(command, comments=True)))
    return found


def only_words(words: list[str]) -> list[str]:
    """Arguments of a command, without its program and where its output goes."""
    words = words[: words.index(">")] if ">" in words else words
    return words[3:] if words[0] == "python" else words[1:]


@pytest.mark.parametrize("words", [pytest.param(words, id=where) for where, words in commands()])
def test_commands_are_understood(words):
    if words[0] == "lenvm-eval":
        evaluate.read_settings(vars(evaluate.build_parser().parse_args(words[1:])), "this")
        return
    rest, overrides = split_overrides(only_words(words))
    arguments = build_parser("lenvm").parse_args(rest)
    if arguments.command not in ("run", "plan"):
        assert not overrides
        return
    path = recipe.find_recipe(arguments.recipe)
    asked_for_help = any(key.endswith("help") for key, _ in overrides)
    assert asked_for_help or recipe.read_recipe(path, overrides)


def test_markers_of_commands_are_there():
    """What CI reads."""
    text = README.read_text(encoding="utf-8")
    for marker in ("<!-- first command -->", "<!-- test command -->"):
        assert len(re.findall(rf"{marker}\n```bash\n.+\n```", text)) == 1


def test_pages_of_the_site_are_all_in_its_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation


def test_version_is_the_same_everywhere():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    stated = re.search(r'__version__ = "(.*)"', Path(recipe.__file__).parents[1].joinpath("__init__.py").read_text())
    assert cited
    assert stated
    assert cited[1] == stated[1]
