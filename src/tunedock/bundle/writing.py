"""Files put into a bundle: one after another, each whole or not at all, and none a second time.

A journal (`.creating.jsonl`) notes what has been put in and from what. A call that goes on where another was stopped keeps a file
when its source is the same and it still has its sum. SHA256SUMS comes last: until then the folder is no bundle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tunedock.bundle.listing import FILES, PART, SIGNATURE, SUMS, is_part, pieces, write_list, wrong_path
from tunedock.errors import DiskError, RecipeError, RunError
from tunedock.image.transfer import BLOCK, Tell, sum_of

JOURNAL = ".creating.jsonl"


class Writer:
    """Puts files into a folder that is new, empty, or left by a call that was stopped."""

    def __init__(self, folder: Path, *, split: int | None, old: Mapping[str, str], tell: Tell) -> None:
        """`split`: the most bytes of a file. `old`: FILES of older bundles; what they have the same is not put in.

        Raises RunError for a folder with something else in it.
        """
        self.folder = folder
        self.files: dict[str, str] = {}
        self.whole_bytes = 0
        self.total: int | None = None
        """Bytes there will be, where that is known."""
        self._split = split
        self._old = old
        self._tell = tell
        self._sums: dict[str, str] = {}
        with writing(folder):
            self._new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            journal = folder / JOURNAL
            if any(folder.iterdir()) and not journal.is_file():
                raise RunError("the folder is in use", where=str(folder), hint="give a folder that is new or empty")
            self._known = _read_journal(journal)
            self._journal = journal.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                "another process makes a bundle here", where=str(folder), hint="wait for it, or stop it"
            ) from None

    def add_bytes(self, path: str, data: bytes) -> None:
        made = hashlib.sha256(data).hexdigest()
        if self._keep(path, made):
            return
        with writing(self.folder):
            self._write(path, [data], len(data), made)

    def add_file(self, path: str, source: Path) -> None:
        """Raises DiskError where the source cannot be read or the bundle not be written."""
        with writing(source):
            state = source.stat()
        stamp = [str(source), state.st_size, state.st_mtime_ns]
        if self._keep(path, stamp):
            return
        with writing(source):
            if path in self._old and sum_of(source) == self._old[path]:
                self._note(path, stamp, self._old[path], state.st_size)
                return
            with source.open("rb") as file:
                self._write(path, _blocks(file), state.st_size, stamp)

    def stage(self, data: IO[bytes]) -> tuple[Path, str]:
        """Writes what is to be put in under a name its sum decides; the file and its sum. `add_staged` puts it in."""
        aside = self.folder / ".staged"
        made = hashlib.sha256()
        with writing(aside), aside.open("wb") as file:
            for block in _blocks(data):
                made.update(block)
                file.write(block)
        sum_ = made.hexdigest()
        with writing(aside):
            return aside.rename(self.folder / f".staged-{sum_}"), sum_

    def add_staged(self, path: str, staged: Path, sum_: str) -> None:
        with writing(staged):
            size = staged.stat().st_size
            if path in self.files or self._keep(path, sum_):
                staged.unlink(missing_ok=True)
            elif self._old.get(path) == sum_:
                self._note(path, sum_, sum_, size)
                staged.unlink()
            elif self._split is not None and size > self._split:
                with staged.open("rb") as file:
                    self._write(path, _blocks(file), size, sum_)
                staged.unlink()
            else:
                place = self.folder / path
                place.parent.mkdir(parents=True, exist_ok=True)
                staged.rename(place)
                self._sums[path] = sum_
                self._note(path, sum_, sum_, size)

    def noted(self, key: str) -> Any:
        """What `note` was told under this key, by this call or one before."""
        return self._known.get(key, {}).get("stamp")

    def note(self, key: str, value: Any) -> None:
        self._log({"path": key, "stamp": value})

    def has(self, path: str, sum_: str) -> bool:
        """Whether a file is in (or in an older bundle) with this sum; it is then one of FILES."""
        return path in self.files or self._keep(path, sum_)

    def finish(self, top: Mapping[str, bytes], sign: Callable[[bytes], bytes] | None) -> None:
        """The lists, and the signature where `sign` makes one. The journal goes, so what is left is a bundle."""
        self._journal.close()
        listed = self.folder / SUMS
        with writing(self.folder):
            for name, data in {**top, FILES: write_list(self.files).encode()}.items():
                _whole(self.folder / name, data)
                self._sums[name] = hashlib.sha256(data).hexdigest()
            (self.folder / "install.sh").chmod(0o755)
            self._clear()
            data = write_list(self._sums).encode()
            if sign is not None:
                _whole(self.folder / SIGNATURE, sign(data))
            _whole(listed, data)
            (self.folder / JOURNAL).unlink()

    def leave(self) -> None:
        """Where making it has failed: what is in stays for the next call; a folder in which nothing is yet is left as it was."""
        if any("sha256" in line for line in self._known.values()):
            return
        with suppress(OSError):
            self._clear()
            for folder in sorted(self.folder.rglob("*/"), reverse=True):
                folder.rmdir()
            (self.folder / JOURNAL).unlink()
            if self._new:
                self.folder.rmdir()

    @property
    def bytes_here(self) -> int:
        """Of what lies in the folder so far."""
        return sum((self.folder / path).stat().st_size for path in self._sums)

    def _clear(self) -> None:
        """Takes away what a stopped call left that this one does not want."""
        for place, _folders, names in os.walk(self.folder):
            for name in names:
                file = Path(place) / name
                if file.relative_to(self.folder).as_posix() not in {*self._sums, JOURNAL}:
                    file.unlink()

    def _keep(self, path: str, stamp: Any) -> bool:
        """Whether the file is in already, made of the same; its sums are taken again."""
        _accept(path)
        known = self._known.get(path)
        if known is None or (known.get("stamp"), known.get("split")) != (stamp, self._split) or "sha256" not in known:
            return False
        parts: dict[str, str] = known["parts"]
        try:
            if any(sum_of(self.folder / part) != sum_ for part, sum_ in parts.items()):
                return False
        except OSError:
            return False
        if not parts and self._old.get(path) != known["sha256"]:
            return False
        self._sums |= parts
        self.files[path] = known["sha256"]
        self.whole_bytes += known["bytes"]
        return True

    def _write(self, path: str, blocks: Iterator[bytes] | Sequence[bytes], size: int, stamp: Any) -> None:
        whole, done = hashlib.sha256(), 0
        split = self._split if self._split is not None and size > self._split else None
        for number, part in enumerate(_cut(iter(blocks), split)):
            name = path if split is None else f"{path}{PART}{number:04d}"
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            aside = place.with_name(f".{place.name}.writing")
            made = hashlib.sha256()
            with aside.open("wb") as file:
                for block in part:
                    made.update(block)
                    whole.update(block)
                    file.write(block)
                    done += len(block)
                    self._tell("bundle", self.whole_bytes + done, self.total)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(place)
            self._sums[name] = made.hexdigest()
        if done != size:
            raise RecipeError(
                f"it changed while it was read ({done:,} bytes of {size:,})", where=path, hint="create the bundle again"
            )
        self._note(path, stamp, whole.hexdigest(), size)

    def _note(self, path: str, stamp: Any, sum_: str, size: int) -> None:
        self.files[path] = sum_
        self.whole_bytes += size
        parts = {part: self._sums[part] for part in pieces(self._sums, path)}
        self._log({"path": path, "stamp": stamp, "sha256": sum_, "bytes": size, "parts": parts, "split": self._split})

    def _log(self, line: dict[str, Any]) -> None:
        self._known[line["path"]] = line
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()


def _accept(path: str) -> None:
    reason = "looks like a part of a split file" if is_part(path) else wrong_path(path)
    if reason:
        raise RecipeError(f"the name {path!r} {reason}", where="bundle create", hint="rename the file, or leave it out")


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last line may be cut
                value = json.loads(line)
                known[value["path"]] = value
    return known


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _cut(blocks: Iterator[bytes], size: int | None) -> Iterator[Iterator[bytes]]:
    """The blocks as runs of `size` bytes, or as one; each must be used up before the next."""
    if size is None:
        yield blocks
        return
    rest = b""

    def run() -> Iterator[bytes]:
        nonlocal rest
        left = size
        while left:
            block = rest or next(blocks, b"")
            if not block:
                return
            yield block[:left]
            left, rest = left - len(block[:left]), block[left:]

    while rest := rest or next(blocks, b""):
        yield run()


def _whole(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turns an OSError into a DiskError that says what is wrong."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{error.strerror or error} ({error.filename or where})",
            where=str(where),
            hint="free disk space, or give another place",
        ) from error
