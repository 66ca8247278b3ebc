"""The audit of administrative acts: who did what to whose access, served what or moved which version, and when, as JSON lines.

Never a secret. A line is on the disk before the act is done: an act that cannot be told is not done.
"""

from __future__ import annotations

import errno
import getpass
import json
import os
import socket
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunedock.access.store import Store
from tunedock.errors import DiskError, RecipeError


@dataclass(frozen=True, slots=True)
class Audit:
    path: Path

    @classmethod
    def beside(cls, store: Store, path: Path | None) -> Audit:
        """The file that is named, else the one beside a SQLite store. Raises RecipeError where there is neither."""
        if path is not None:
            return cls(path)
        if not store.is_sqlite:
            raise RecipeError(
                "a store on a server has no folder for its audit",
                where="--audit",
                hint="name a file: `--audit access.audit.jsonl`",
            )
        own = Path(store.name)
        return cls(own.with_name(f"{own.name}.audit.jsonl"))

    def write(self, act: str, at: float, **what: Any) -> None:
        """Appends a line, and waits until the disk has it. Raises DiskError."""
        when = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": when, "by": who(), "host": socket.gethostname(), "act": act, **what})
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                data = f"{line}\n".encode()
                if os.write(file, data) < len(data):  # one call: lines of two processes do not mix
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if stat.S_ISREG(os.fstat(file).st_mode):  # not a pipe, nor a container's /dev/stdout
                    os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise DiskError(
                f"the audit cannot be written, so nothing was done: {error.strerror}",
                where=str(self.path),
                hint="free space, or name another file by --audit",
            ) from error


def who() -> str:
    """The user by whose rights this runs, not what LOGNAME or USER say; a number where it has no name, as in containers."""
    if not hasattr(os, "getuid"):
        return getpass.getuser()
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
