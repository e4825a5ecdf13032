"""Hooks of mkdocs: pages that lie elsewhere in the repository, and links that hold on both sides.

Files link to one another as they lie in the repository, so that they can be read there. The site has README and the
like as pages of its own, and no code: their links are turned to the page, or to nothing where there is none.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {  # in the repository -> on the site
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of `docs/`."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page from places in the repository to places on the site."""
    on_site = page.file.src_uri
    in_repository = {site: source for source, site in PAGES.items()}.get(on_site, f"docs/{on_site}")
    return _LINK.sub(_turner(in_repository, on_site), markdown)


def _turner(in_repository: str, on_site: str) -> Callable[[re.Match[str]], str]:
    here = posixpath.dirname(in_repository)

    def turn(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        path, hash_sign, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(here, path))
        if target in PAGES:
            target = PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return text  # code, which the site does not have
        return f"{image}[{text}]({posixpath.relpath(target, posixpath.dirname(on_site) or '.')}{hash_sign}{anchor})"

    return turn
