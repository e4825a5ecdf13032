"""What the README says is there."""

import re
from pathlib import Path

import pytest
from places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def places():
    """(name, path) of each name in the table of files; a name without a folder stands beside the one before it."""
    table = README.partition("## Where things are")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (`.*)\|$", table, re.MULTILINE):
        files, what = row.split(" | ", 1)
        folder = Path()
        for name in re.findall(r"`([^`]+)`", files):
            path = ROOT / name if (ROOT / name).exists() else folder / name
            folder = path.parent
            yield name, path
        inside = path if path.is_dir() else folder
        yield from ((name, inside / name) for name in re.findall(r"`([\w/]+(?:\.py|/))`", what))


@pytest.mark.parametrize("path", [pytest.param(path, id=name) for name, path in places()])
def test_files_are_where_it_says(path):
    assert path.exists()
