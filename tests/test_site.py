"""The site: MkDocs builds it without a warning, and nothing on it leads nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import aroma

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def build(project: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


class Links(HTMLParser):
    """What a page leads to and shows, the anchors it has, and pictures without a description."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.silent: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {name for name in (values.get("id"), values.get("name")) if name}
        self.targets |= {name for name in (values.get("href"), values.get("src")) if name}
        if tag == "img" and not values.get("alt"):
            self.silent.append(values.get("src") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_link_and_picture_is_there(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) >= 16
    wrong = []
    for page, links in pages.items():
        assert not links.silent, page.name
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            if not path.exists() or (parts.fragment and path in pages and parts.fragment not in pages[path].anchors):
                wrong.append(f"{page.name}: {target}")
    assert not wrong


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "fonts.googleapis" not in text
        assert '<script src="http' not in text
        assert '<link rel="stylesheet" href="http' not in text


def test_the_reference_has_every_public_name(site: Path) -> None:
    anchors = {anchor.rpartition(".")[2] for anchor in Links(site / "api.html").anchors}
    assert set(aroma.__all__) <= anchors
