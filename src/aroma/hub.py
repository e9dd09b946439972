"""A saved adapter as a repository of the Hugging Face hub: what would be uploaded, and the upload as one commit.

Only files that belong to the adapter are taken: never optimizer states, pickles, or whatever else lies in its folder.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME

from .card import CARD_FILE, PICTURE_FILE, is_by_hand, make_card, shown_base
from .checkpoint import verify_adapter
from .errors import AromaError, ConfigError, bad_value
from .export import rank_rows, subject_of
from .files import own_file
from .outputs import TOKENIZER_FILES
from .pictures import rank_picture
from .saved import read_adapter
from .tasks import is_task
from .tuner.state import STATE_FILE

_OTHERS = (CONFIG_NAME, STATE_FILE, "aroma_task.json", *TOKENIZER_FILES)
"""Names and patterns of files that belong to an adapter, beside those that its state vouches for."""


@dataclass(frozen=True)
class Upload:
    """What would be uploaded.

    Args:
        repo: The repository, OWNER/NAME.
        files: Content of every file by its name there: bytes, or a path.
        left_out: Names in the folder that are not uploaded.
        base_path: Path by which the adapter names its base model, if that is a folder of this machine.
        is_own_card: Whether the card is one that a person wrote.
    """

    repo: str
    files: Mapping[str, bytes | Path]
    left_out: tuple[str, ...]
    base_path: str | None
    is_own_card: bool

    def size_of(self, name: str) -> int:
        """Return the bytes of a file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def plan_upload(folder: str | os.PathLike[str], repo: str, licence: str | None = None) -> Upload:
    """Verify an adapter, and return what would be uploaded to `repo`; nothing is sent.

    Its card is written anew for the repository, with a picture of ranks where matplotlib is installed, unless a person
    wrote the one in the folder.

    Args:
        folder: An adapter that AROMA saved or exported with `--uniform`.
        repo: OWNER/NAME; a NAME alone is one of the account that the token belongs to.
        licence: Licence of the adapter, as the hub names licences; None: the card says that none was given.

    Raises:
        CheckpointError: A file is missing, damaged or edited.
        ConfigError: `repo` is no name of a repository, or `licence` none of a licence; a person wrote the card, and
            says there what the licence is; the hub is offline, out of reach, or does not know the token.
    """
    home = Path(folder)
    by_hand = is_by_hand(home / CARD_FILE)
    if licence is not None:
        _check_licence(licence, by_hand)
    if is_task(home):
        remedy = f"it answers together with others; write them as one first: aroma export {home} OUT --plain"
        raise bad_value("ADAPTER", str(folder), remedy)
    state = verify_adapter(home)
    adapter = read_adapter(home)
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise bad_value("REPO", repo, f"no name of a repository ({error}); give OWNER/NAME") from error
    owned = repo if "/" in repo else f"{account()}/{repo}"
    names = [*state["files"], *(name for name in os.listdir(home) if _belongs(name))]
    files: dict[str, bytes | Path] = {name: own_file(home, name) for name in sorted({*names})}
    if by_hand:
        files |= {name: own_file(home, name) for name in (CARD_FILE, PICTURE_FILE) if os.path.lexists(home / name)}
    else:
        subject = replace(subject_of(adapter), licence=licence)
        if find_spec("matplotlib") is not None:
            with TemporaryDirectory() as scratch:
                rank_picture(rank_rows(adapter), Path(scratch) / PICTURE_FILE)
                files[PICTURE_FILE] = (Path(scratch) / PICTURE_FILE).read_bytes()
            subject = replace(subject, files=subject.files | {PICTURE_FILE})
        files[CARD_FILE] = make_card(subject, owned).encode("utf-8")
    base = adapter.config.get("base_model_name_or_path")
    return Upload(
        owned,
        files,
        tuple(sorted({*os.listdir(home)} - {*files, CARD_FILE, PICTURE_FILE})),
        base if base and not shown_base(base)[1] else None,
        by_hand,
    )


def _check_licence(licence: str, by_hand: bool) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        remedy = "the hub names licences like apache-2.0, mit, llama3.1 or other: https://hf.co/docs/hub/repositories-licenses"
        raise bad_value("--license", licence, remedy)
    if by_hand:
        raise bad_value(
            "--license", licence, f"{CARD_FILE} is yours and goes as it is; write `license: {licence}` there"
        )


def account() -> str:
    """Return the name of the account that the token belongs to.

    Raises:
        ConfigError: There is no token, the hub does not know it, is out of reach, or is offline.
    """
    if constants.HF_HUB_OFFLINE:
        raise bad_value("HF_HUB_OFFLINE", 1, "nothing can be uploaded; unset it, or set it to 0")
    if get_token() is None:
        raise ConfigError("token: there is none for the hub; run `hf auth login`, or set HF_TOKEN")
    with _told("token"):
        return str(HfApi().whoami()["name"])


def push(upload: Upload, *, private: bool = False, update: bool = False) -> str:
    """Make the repository, upload everything in one commit, and return where it is.

    Args:
        upload: What `plan_upload` returned.
        private: Whether only the owner sees it.
        update: Whether the repository may exist; then the commit is added to it.

    Raises:
        ConfigError: The name is taken, the token may not write there, or the hub is out of reach.
    """
    api = HfApi()
    with _told(upload.repo):
        url = api.create_repo(upload.repo, private=private or None, exist_ok=update)
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in upload.files.items()
    ]
    try:
        with _told(upload.repo):
            api.create_commit(upload.repo, operations, commit_message="Adapter trained with AROMA")
    except AromaError as error:
        remedy = "the repository is there, without these files; run the command again with --update"
        raise ConfigError(f"{error}; {remedy}") from error
    return str(url)


def _belongs(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _OTHERS)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one line each."""
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise ConfigError(f"{what}: {_REMEDIES.get(status, _unknown(error, status))}") from error
    except (errors.HTTPError, ConnectionError) as error:  # type: ignore[attr-defined]
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{what}: the hub at {constants.ENDPOINT} cannot be reached ({reason}); check the network, and HF_ENDPOINT"
        ) from error


_REMEDIES = {
    401: "the hub does not accept the token; run `hf auth login` again, or set another HF_TOKEN",
    403: "the token may not write there; make one with the role `write`, or give a repository of your own",
    409: "the name is taken; give another one, or --update to add a commit to that repository",
}


def _unknown(error: Any, status: int) -> str:
    reason = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
    return f"the hub refused, with status {status} ({reason})"
