"""Pages that lie outside docs/ and belong to the site: the README as its first page, the recipes, the project's files.

They keep their links as a reader of the repository needs them; here they become links of the site, and links to source
files, which are no pages, become plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", **{name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that lie outside docs/."""
    recipes = sorted(path for path in (ROOT / "recipes").iterdir() if path.suffix in (".md", ".yaml"))
    outside = {**PAGES, **{f"recipes/{path.name}": f"recipes/{path.name}" for path in recipes}}
    for source, place in outside.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    place = page.file.src_uri
    source = source_of(place)

    def on_site(match: re.Match[str]) -> str:
        bang, text, link = match.groups()
        if link.startswith(("http:", "https:", "mailto:", "#")):
            return match.group()
        path, hash_, anchor = link.partition("#")
        target = place_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if files.get_file_from_path(target) is None:
            if (ROOT / posixpath.dirname(source) / path).exists():
                return f"`{text}`"
            return match.group()  # the strict build names it
        return f"{bang}[{text}]({posixpath.relpath(target, posixpath.dirname(place) or '.')}{hash_}{anchor})"

    return _LINK.sub(on_site, markdown)


def source_of(place: str) -> str:
    """Where in the repository a page of the site comes from."""
    outside = {site: source for source, site in PAGES.items()}
    if place in outside:
        return outside[place]
    return place if place.startswith("recipes/") else f"docs/{place}"


def place_of(source: str) -> str:
    """Where on the site a file of the repository is."""
    return PAGES.get(source, source.removeprefix("docs/"))
