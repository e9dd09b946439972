"""The database of a study: opened with clear errors, and safe for several processes at once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError

from aroma.errors import bad_value

MOST_RETRIES = 2
"""So often is a trial tried again whose worker died. One that kills its worker each time must end some day."""
MISSED_BEATS = 3
"""After so many missed signs of life a worker counts as dead."""

STORAGE_ERRORS = (SQLAlchemyError, StorageInternalError)
"""What a database that fails or cannot be reached raises, through Optuna or directly."""

_CONNECT_SECONDS = 10
_LOCK_SECONDS = 60
_TABLE_TRIES = 5


def open_storage(url: str, heartbeat: int) -> RDBStorage:
    """Return the storage at a database URL, its tables made if they are missing.

    Args:
        url: As `sqlite:///search.db` or `postgresql://user:password@host/database`.
        heartbeat: Seconds between a worker's signs of life.

    Raises:
        ConfigError: No such kind of database, its driver is missing, it cannot be reached, or its tables are of
            another version of Optuna. No password is shown.
    """
    parsed = _parse(url)
    options = _engine_options(parsed)
    _require_reachable(parsed, options)
    return _make_tables(parsed, options, heartbeat)


def shown(url: str) -> str:
    """Return a database URL as it may be printed and written: without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


@contextmanager
def no_experimental_warnings() -> Iterator[None]:
    """Keep Optuna from warning that heartbeats, constant liar and partly fixed samplers may change some day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError) as error:
        remedy = "no database URL; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
        raise bad_value("storage", shown(url), remedy) from error
    except ImportError as error:
        raise _missing_driver(url, error) from error
    return parsed


def _engine_options(url: URL) -> dict[str, Any]:
    backend = url.get_backend_name()
    if backend == "sqlite":
        return {"connect_args": {"timeout": _LOCK_SECONDS}}
    waits = {"connect_timeout": _CONNECT_SECONDS} if backend in ("postgresql", "mysql", "mariadb") else {}
    # A connection may have been closed in the hours between two uses.
    return {"connect_args": waits, "pool_pre_ping": True}


def _require_reachable(url: URL, options: dict[str, Any]) -> None:
    if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:"):
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    try:
        engine = sqlalchemy.create_engine(url, **options)
        with engine.connect():
            pass
        engine.dispose()
    except ImportError as error:
        raise _missing_driver(str(url), error) from error
    except SQLAlchemyError as error:
        raise bad_value(
            "storage", str(url), f"cannot be reached ({_reason(error)}); start it, or correct it"
        ) from error


def _make_tables(url: URL, options: dict[str, Any], heartbeat: int) -> RDBStorage:
    """Return the storage; workers that make the tables at the same moment wait for each other's."""
    for attempt in range(_TABLE_TRIES):
        try:
            with no_experimental_warnings():
                storage = RDBStorage(
                    url.render_as_string(hide_password=False),
                    engine_kwargs=options,
                    heartbeat_interval=heartbeat,
                    grace_period=MISSED_BEATS * heartbeat,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MOST_RETRIES),
                )
            if url.get_backend_name() == "sqlite":
                _serialise(storage.engine)
            return storage
        except RuntimeError as error:  # tables of another version; Optuna says which, and what to do
            raise bad_value("storage", str(url), str(error)) from error
        except STORAGE_ERRORS as error:
            if attempt == _TABLE_TRIES - 1:
                raise bad_value("storage", str(url), f"no tables can be made there ({_reason(error)})") from error
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("the last attempt returns or raises")


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

    engine.dispose()  # connections made before would not know


def _missing_driver(url: str, error: ImportError) -> Exception:
    remedy = f"its driver is missing ({error.name or error}); for PostgreSQL run: pip install 'aroma-peft[postgresql]'"
    return bad_value("storage", shown(url), remedy)


def _reason(error: Exception) -> str:
    """Return the database's own words, in one line."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    if isinstance(cause, OperationalError):
        cause = cause.orig or cause
    return " ".join(str(cause).split()).rstrip(".")


def lost(url: str, error: Exception) -> Exception:
    """Return (not raise) the error for a database that went away while trials ran."""
    return bad_value(
        "storage", shown(url), f"lost ({_reason(error)}); start it and run the command again, nothing finished is lost"
    )


optuna.logging.set_verbosity(optuna.logging.ERROR)  # what it would say of trials is shown by the progress
