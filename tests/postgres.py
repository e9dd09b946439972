"""A PostgreSQL server of the tests' own: in a temporary folder, on a free port of the loopback, gone at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USER, PASSWORD = "aroma", "s3cret"


@dataclass
class Server:
    """A running server.

    Args:
        programs: Folder of `initdb` and `pg_ctl`.
        home: Its folder, which holds `data`, `log` and nothing else.
        port: Where it listens, on 127.0.0.1.
    """

    programs: Path
    home: Path
    port: int

    def url(self, database: str, driver: str = "postgresql") -> str:
        """Return the URL of a database."""
        return f"{driver}://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def new_database(self, name: str) -> str:
        """Make an empty database and return its URL."""
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        # No socket file, no fsync: nothing of it outlives the tests.
        options = f"-h 127.0.0.1 -p {self.port} -c unix_socket_directories='' -c fsync=off -c max_connections=40"
        self._control("start", "-w", "-t", "60", "-l", str(self.home / "log"), "-o", options)

    def stop(self) -> None:
        """Stop it, cutting connections."""
        self._control("stop", "-w", "-m", "fast")

    def _control(self, *arguments: str) -> None:
        _run(self.home, str(self.programs / "pg_ctl"), "-D", str(self.home / "data"), *arguments)


@contextmanager
def private_server() -> Iterator[Server]:
    """Start a server with the user `aroma`, who needs a password, and stop it at the end."""
    programs = _programs()
    home = Path(tempfile.mkdtemp(prefix="aroma-postgres-"))
    try:
        (home / "password").write_text(PASSWORD)
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            for path in (home, home / "password"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        initdb = [str(programs / "initdb"), "-D", str(home / "data"), "-U", USER, "--encoding=UTF8", "--no-sync"]
        _run(home, *initdb, "--auth=scram-sha-256", f"--pwfile={home / 'password'}")
        server = Server(programs, home, _free_port())
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home)


def _programs() -> Path:
    """Return the folder of the server's programs, the newest where there are several."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        raise RuntimeError("PostgreSQL's server is not installed: apt-get install postgresql")
    return found[-1].parent if found else Path(str(on_path)).resolve().parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(home: Path, *command: str) -> None:
    """Run a program of the server as the user who may: PostgreSQL refuses to run as root."""
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*as_user, *command],
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        log = home / "log"
        raise RuntimeError(f"{command[0]}: {done.stdout}{done.stderr}{log.read_text() if log.exists() else ''}")
