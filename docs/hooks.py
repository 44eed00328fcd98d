"""What the site's build does beside mkdocs: links into the repository, and nothing from elsewhere.

Pages link to files of the repository (`../benchmarks/results/scale.json`), so that the links work
where the pages are read as files. On the site these files stand under `repository/`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")
# What a browser would fetch while it shows a page; links to follow are not among it.
LOADED = re.compile(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*\brel=\"?"
                    r"(?:stylesheet|preconnect|preload)[^>]*\bhref=\"(?:https?:)?//")  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's files that pages link to."""
    found = set()
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            found.add(_inside(page.src_uri, link))
    for name in sorted(filter(None, found)):
        if (ROOT / name).is_file():
            target = f"repository/{name}"
            files.append(File.generated(config, target, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links into the repository point to its files on the site."""
    del config, files

    def moved(match: re.Match[str]) -> str:
        name = _inside(page.file.src_uri, match[1])
        if name is None or not (ROOT / name).is_file():
            return match[0]  # mkdocs says what is broken
        start = posixpath.dirname(page.file.src_uri) or "."
        return "](" + posixpath.relpath(f"repository/{name}", start)

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that would load something from the network."""
    del config
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri}: loads from the network: {found[0]}")
    return output


def _inside(page: str, link: str) -> str | None:
    """Return the repository's path of a link that leaves docs/, or None for one that stays."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith(("docs/", "..")) else path
