"""Where a study is kept: a journal file on one machine, a database for several; opened with clear errors."""

from __future__ import annotations

import fcntl
import os
import time
import warnings
from pathlib import Path
from typing import Any, cast

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from aroma.errors import AromaError, bad_value

JOURNAL_FILE = "study.journal"
"""Name, in the output folder, of the journal of a study that has no database."""
MAX_RETRIES = 2
"""How often a trial is retried whose process or machine died. A trial that kills its process each time must end."""
MISSED_BEATS = 3
"""Number of missed signs of life after which a machine counts as dead."""
STORAGE_ERRORS = (SQLAlchemyError, StorageInternalError)
"""What a database that fails or cannot be reached raises, through Optuna or directly."""

_CONNECT_SECONDS, _LOCK_SECONDS = 10, 60
_TRIES = 5

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the progress display shows trials
warnings.filterwarnings("ignore", category=ExperimentalWarning, module=r"(optuna|aroma_lab)\.")


def open_storage(url: str | None, output: Path, heartbeat: int) -> BaseStorage:
    """Return the storage at a database URL, with its tables, or the journal in the output folder.

    Args:
        url: Such as `sqlite:///study.db` or `postgresql://user:password@host/database`; None for the journal.
        output: The output folder; made for a journal if missing.
        heartbeat: Seconds between a machine's signs of life in a database. A journal has none.

    Raises:
        ConfigError: No such kind of database, its driver is missing, it cannot be reached, or its tables are of
            another version of Optuna; or the journal is damaged. No password is shown.
    """
    if url is None:
        return _open_journal(output)
    try:
        return _open_database(make_url(url), heartbeat)
    except (ImportError, RuntimeError, *STORAGE_ERRORS) as error:
        raise storage_error(url, error) from error


def has_file(url: str | None, output: Path) -> bool:
    """Whether a storage that is a file exists; True for a server, and for what is no URL."""
    if url is None:
        return (output / JOURNAL_FILE).exists()
    return not url.startswith("sqlite") or Path(str(make_url(url).database)).exists()


def without_password(url: str) -> str:
    """Return a database URL as it may be printed and written."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def storage_error(url: str | None, error: Exception) -> AromaError:
    """Return (not raise) what is wrong with a storage, in the database's own words, without its password."""
    if isinstance(error, ArgumentError):
        remedy = "not a database URL; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
    elif isinstance(error, ImportError):
        missing = error.name or error
        remedy = f"its driver is missing ({missing}); for PostgreSQL run: pip install 'aroma-peft[postgresql]'"
    elif isinstance(error, RuntimeError):  # tables of another version; Optuna says which, and what to do
        remedy = str(error)
    else:
        cause = getattr(error, "orig", None) or error.__cause__ or error
        reason = " ".join(str(getattr(cause, "orig", None) or cause).split()).rstrip(".")
        remedy = f"cannot be reached ({reason}); start or correct it and run again, nothing finished is lost"
    return bad_value("storage", without_password(url or JOURNAL_FILE), remedy)


class _FileLock:
    """The lock of a journal's writers. The kernel releases it with the process, however that ends.

    Optuna's own locks are files that a killed process leaves behind; others then wait 30 seconds for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        self._descriptor = os.open(self._path, os.O_RDWR)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self._descriptor)


def _open_journal(output: Path) -> JournalStorage:
    path = (output / JOURNAL_FILE).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=cast(Any, _FileLock(path))))
    except (ValueError, KeyError, TypeError) as error:
        raise bad_value("output", str(output), f"{path.name} there is not a study's journal; move it away") from error


def _open_database(url: URL, heartbeat: int) -> RDBStorage:
    """Return the storage. Machines that make the tables at the same moment wait for each other."""
    is_sqlite = url.get_backend_name() == "sqlite"
    if is_sqlite:
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    timeout = {"timeout": _LOCK_SECONDS} if is_sqlite else {"connect_timeout": _CONNECT_SECONDS}
    # A connection may have been closed in the hours between two uses.
    options = {"connect_args": timeout, "pool_pre_ping": not is_sqlite}
    sqlalchemy.create_engine(url, **options).connect().close()
    for attempt in range(1, _TRIES + 1):
        try:
            storage = RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs=options,
                heartbeat_interval=heartbeat,
                grace_period=MISSED_BEATS * heartbeat,
            )
            break
        except STORAGE_ERRORS:
            if attempt == _TRIES:
                raise
            time.sleep(0.2 * attempt)
    if is_sqlite:
        _serialise(storage.engine)
    return storage


def _serialise(engine: Engine) -> None:
    """Make every SQLite transaction take the write lock when it begins.

    SQLite has no SELECT … FOR UPDATE, on which Optuna relies: two processes would both read that a trial is waiting,
    and both run it. The recipe is SQLAlchemy's.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def _begin_ourselves(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def _begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before do not have the listeners
