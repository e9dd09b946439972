"""A PostgreSQL server of the tests' own: in a temporary folder, on a free port of the loopback, gone at the end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER, PASSWORD = "aroma", "s3cret"


class Server:
    """A server in the folder `home`; `programs` is the folder of `initdb` and `pg_ctl`."""

    def __init__(self, programs: Path, home: Path) -> None:
        self.programs, self.home = programs, home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

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
        self.run("pg_ctl", "start", "-w", "-t", "60", "-l", str(self.home / "log"), "-o", options)

    def stop(self) -> None:
        """Stop it, cutting connections."""
        self.run("pg_ctl", "stop", "-w", "-m", "fast")

    def run(self, program: str, *arguments: str) -> None:
        """Run a program on the server's data, as the user who may: PostgreSQL refuses to run as root."""
        as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*as_user, str(self.programs / program), "-D", str(self.home / "data"), *arguments]
        with (self.home / "said").open("w+b") as said:  # a pipe would stay open with the server
            quiet = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
            code = subprocess.run(command, cwd=self.home, timeout=120, check=False, **quiet).returncode
        assert code == 0, (self.home / "said").read_text()


@contextmanager
def private_server() -> Iterator[Server]:
    """Start a server with the user `aroma`, who needs a password, and stop it at the end."""
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))[-1:]
    found = newest or [Path(name).resolve() for name in [shutil.which("initdb")] if name]
    assert found, "PostgreSQL's server is not installed: apt-get install postgresql"
    home = Path(tempfile.mkdtemp(prefix="aroma-postgres-"))
    try:
        server, password = Server(found[0].parent, home), home / "password"
        password.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (home, password):
                shutil.chown(path, "postgres", "postgres")
        options = ("--encoding=UTF8", "--no-sync", "--auth=scram-sha-256", f"--pwfile={password}")
        server.run("initdb", "-U", USER, *options)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home)
