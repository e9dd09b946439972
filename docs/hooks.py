"""What MkDocs does for this site: pages and files from outside of docs/, under links that work in both places.

A page may link to `../results/lab/x/tables/main.md` or show `../results/y.png`, as a reader of the repository needs.
Those files are copied into the site below `repository/`, and the link is bent to there. A link to a folder becomes its
name: a site has no listing to show. CHANGELOG.md, SECURITY.md and CONTRIBUTING.md are pages of the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository's root, and the pages that they are."""

_LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_COPIES = "repository/"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and whatever files of the repository the pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    linked = set()
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in PAGES)]:
        for target, _ in _LINK.findall(path.read_text(encoding="utf-8")):
            outside = _outside(path, target)
            if outside is not None and outside.is_file():
                linked.add(outside)
    for path in sorted(linked):
        name = path.relative_to(ROOT).as_posix()
        # A table in Markdown is shown as it is: as a page it would have to be in the navigation.
        copy = _COPIES + (f"{name}.txt" if path.suffix == ".md" else name)
        files.append(File.generated(config, copy, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Bend links that lead out of docs/ to the copies."""
    source = Path(page.file.abs_src_path)

    def bend(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = (source.parent / target).resolve()
        if path.parent == ROOT and path.name in PAGES:
            return f"]({PAGES[path.name]}{anchor})"
        if path.parent == ROOT / "docs":
            return f"]({path.name}{anchor})"
        outside = _outside(source, target)
        if outside is None:
            return match[0]
        if outside.is_file():
            name = outside.relative_to(ROOT).as_posix()
            return f"]({_COPIES}{name}{'.txt' if outside.suffix == '.md' else ''}{anchor})"
        return "](!folder)"

    return re.sub(r"\[([^\]]*)\]\(!folder\)", r"\1", _LINK.sub(bend, markdown))


def _outside(page: Path, target: str) -> Path | None:
    """Return the file or folder of the repository that a link leads to, if it is no page of the site."""
    path = (page.parent / target).resolve()
    of_site = path.is_relative_to(ROOT / "docs") or (path.parent == ROOT and path.name in PAGES)
    return path if path.is_relative_to(ROOT) and path.exists() and not of_site else None
