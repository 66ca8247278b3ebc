"""A real PostgreSQL of the tests' own, on a socket in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None) or Path(shutil.which("pg_ctl") or "/nowhere").parent
IS_HERE = (BIN / "initdb").exists()


class Server:
    """A cluster in a folder, reached by its socket there; run by another user where we are root, for it will not be root's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._as: Sequence[str] = ()
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._as = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
        self._run("initdb", "-A", "trust", "-U", "tunedock", "--no-sync", "-D", str(folder / "data"))

    def database(self, name: str) -> str:
        self._run("createdb", "-h", str(self.folder), "-U", "tunedock", name)
        return f"postgresql://tunedock@/{name}?host={self.folder}"

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start"
        )

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", mode, "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(BIN / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60, cwd="/")


@contextmanager
def server() -> Iterator[Server]:
    # pytest's folders are their user's alone, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        made = Server(Path(folder))
        made.start()
        yield made
        made.stop()
