"""A bundle sent to another machine by ssh: only what is not there yet, and from where it stopped.

rsync does it where both machines have it, else sftp, which goes on with a file that is there in part. Then the other machine
takes the sums itself, and what does not hold is sent once more. Programs are called by lists of arguments; host keys are checked as
ssh is told to, and no password is asked for here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunedock.bundle.listing import SIGNATURE, SUMS, read_list, read_small
from tunedock.bundle.writing import JOURNAL
from tunedock.errors import CheckError, DependencyError, DiskError, LostPeerError, RecipeError
from tunedock.image.transfer import Tell

ASK_S = 60.0
SUMS_S = 6 * 3600.0
LAST = 8192
"""Characters of an output that are kept."""
_CARRIED = re.compile(r"(?:^|\r)\s*([\d,.]+)\s+\d+%")
_TARGET = re.compile(r"(?P<host>(?:[\w.+-]+@)?(?:[A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.]+\])):(?P<folder>[^\0\n]+)")

_LOOK = """set -eu
mkdir -p "$1" && cd "$1"
command -v rsync >/dev/null 2>&1 && echo "has rsync"
df -Pk . | awk 'NR == 2 { print "free", $4 }'
find . -type f -exec wc -c {} + | sed '/ total$/d' || true
"""
"""Said to the other machine's shell: makes the folder, and tells what is in it."""

_CHECK = """set -eu
cd "$1"
if command -v sha256sum >/dev/null 2>&1; then sums() { sha256sum "$@"; }; else sums() { shasum -a 256 "$@"; }; fi
if sums -c SHA256SUMS >/dev/null 2>&1; then
    echo "all hold"
else
    sums -c SHA256SUMS 2>/dev/null | sed '/: OK$/d'
fi
"""


@dataclass(frozen=True, slots=True)
class Target:
    host: str
    folder: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """`[user@]host:folder`. Raises RecipeError for what is none."""
        match = _TARGET.fullmatch(text)
        if match is None or text.startswith("-") or match["folder"].startswith("-"):
            raise RecipeError(
                "this is no place on another machine",
                where=text[:200],
                hint="write `host:folder` or `user@host:folder`",
            )
        return cls(match["host"], match["folder"].removeprefix("~/"))  # both ssh and sftp begin at home


@dataclass(frozen=True, slots=True)
class Options:
    port: int | None = None
    identity: Path | None = None
    config: Path | None = None
    """A file of ssh's, in place of ~/.ssh/config."""

    def arguments(self, port: str) -> list[str]:
        """For ssh (`port` is -p) and sftp (-P). No password is asked for: a key or an agent must do."""
        made = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
        made += ["-F", str(self.config)] if self.config else []
        made += [port, str(self.port)] if self.port else []
        return made + (["-i", str(self.identity)] if self.identity else [])


@dataclass(frozen=True, slots=True)
class Sent:
    files: int
    bytes: int
    """Sent by this call; what was there is not counted."""
    by: str


def send(bundle: Path, target: Target, options: Options, tell: Tell, *, rsync: bool = True) -> Sent:
    """Brings a bundle to another machine, and has it check every file there.

    Raises CheckError for a bundle that is not whole, here or there, DiskError where there is no room there, LostPeerError
    where the other machine cannot be reached or is lost on the way; the next call goes on from there. Without `rsync`, by sftp.
    """
    if (bundle / JOURNAL).exists():
        raise CheckError(
            "this bundle is not finished",
            where=str(bundle),
            hint="call `tunedock bundle create` again, which goes on with it",
        )
    sums = read_list(read_small(bundle / SUMS, SUMS), SUMS)
    names = [*sorted(sums), *([SIGNATURE] if (bundle / SIGNATURE).is_file() else []), SUMS]  # the list last
    sizes = {name: _size(bundle, name) for name in names}
    there, has_rsync, free = _look(target, options)
    left = sum(max(0, size - there.get(name, 0)) for name, size in sizes.items())
    if free < left:
        raise DiskError(
            f"{left / 1e9:,.2f} GB are to be sent and {free / 1e9:,.2f} GB are free there",
            where=f"{target.host}:{target.folder}",
        )
    by = "rsync" if rsync and has_rsync and shutil.which("rsync") else "sftp"
    carry = _by_rsync if by == "rsync" else _by_sftp
    sent = carry(bundle, target, options, sizes, there, tell)
    if wrong := _wrong_there(target, options, names):
        sent += carry(bundle, target, options, {name: sizes[name] for name in wrong if name in sizes}, {}, tell)
        if wrong := _wrong_there(target, options, names):
            raise CheckError(
                "the file does not hold its sum on the other machine",
                where=f"{target.host}: {wrong[0]}",
                hint="send it again",
            )
    return Sent(len(names), sent, by)


def _size(bundle: Path, name: str) -> int:
    path = bundle / name
    if path.is_symlink() or not path.is_file():
        raise CheckError("the file is missing", where=name, hint="`tunedock bundle verify` checks a bundle")
    return path.stat().st_size


def _look(target: Target, options: Options) -> tuple[dict[str, int], bool, int]:
    """Sizes of what is there, whether it has rsync, and the bytes that are free."""
    sizes, has_rsync, free = {}, False, 0
    for line in _there(target, options, _LOOK, ASK_S).splitlines():
        first, _, rest = line.strip().partition(" ")
        if line == "has rsync":
            has_rsync = True
        elif first == "free" and rest.isdecimal():
            free = int(rest) << 10
        elif first.isdecimal() and rest.startswith("./"):
            sizes[rest.removeprefix("./")] = int(first)
    return sizes, has_rsync, free


def _wrong_there(target: Target, options: Options, names: Sequence[str]) -> list[str]:
    """Files that do not hold their sums there; all of them where their list does not even name one."""
    said = _there(target, options, _CHECK, SUMS_S).splitlines()
    if "all hold" in said:
        return []
    wrong = {line.rpartition(": ")[0] for line in said}
    return [name for name in names if name in wrong] or list(names)


def _there(target: Target, options: Options, script: str, limit_s: float) -> str:
    """What a script prints on the other machine; its shell reads it from standard input, and the folder as its one argument."""
    host = target.host.replace("[", "").replace("]", "")
    remote = f"sh -s -- {shlex.quote(target.folder)}"  # ssh hands this to a shell there, so it is quoted for one
    return _run([_program("ssh"), *options.arguments("-p"), "--", host, remote], script, target, limit_s)


def _by_rsync(
    bundle: Path, target: Target, options: Options, sizes: dict[str, int], there: dict[str, int], tell: Tell
) -> int:
    """rsync goes on with files that are there in part (`--partial --inplace`), block by block."""
    shell = shlex.join([_program("ssh"), *options.arguments("-p")])  # rsync takes it apart again, quotes and all
    total = sum(sizes.values())
    with tempfile.NamedTemporaryFile() as names:
        names.write("\0".join(sizes).encode())
        names.flush()
        command = [_program("rsync"), "--times", "--partial", "--inplace", "--no-whole-file", "--executability"]
        command += ["--from0", f"--files-from={names.name}", "--stats", "--info=progress2", "--outbuf=N"]
        if not there:  # nothing, or nothing that is believed: size and time say nothing then
            command.append("--ignore-times")
        command += ["--protect-args", "-e", shell, "--", f"{bundle.absolute()}/", f"{target.host}:{target.folder}/"]
        said = _followed(command, target, lambda done: tell("send", min(done, total), total))
    tell("send", total, total)
    literal = re.search(r"Literal data: ([\d,.]+)", said)
    return _number(literal[1]) if literal else 0


def _by_sftp(
    bundle: Path, target: Target, options: Options, sizes: dict[str, int], there: dict[str, int], tell: Tell
) -> int:
    """A file after another, so that progress is told and a stop costs no more than what is on its way."""
    todo = {name: size for name, size in sizes.items() if there.get(name) != size}
    total, done, sent = sum(todo.values()), 0, 0
    folders = sorted({parent.as_posix() for name in todo for parent in Path(name).parents if parent.as_posix() != "."})
    batch = [f"-mkdir {_quoted(f'{target.folder}/{folder}')}" for folder in folders]
    for name, size in todo.items():
        part = there.get(name, 0)
        verb = "reput" if 0 < part < size else "put"
        batch.append(f"{verb} {_quoted(str(bundle / name))} {_quoted(f'{target.folder}/{name}')}")
        sent += size - part if verb == "reput" else size
        done += size
        if len(batch) >= 200 or size > 64 << 20 or done == total:
            with tempfile.NamedTemporaryFile("w", suffix=".sftp", encoding="utf-8") as file:
                file.write("\n".join(batch) + "\n")
                file.flush()
                _run([_program("sftp"), "-b", file.name, *options.arguments("-P"), "--", target.host], "", target, None)
            batch = []
            tell("send", done, total)
    return sent


def _quoted(path: str) -> str:
    """For sftp's own reader of commands, which knows double quotes, backslashes and globs."""
    return '"' + re.sub(r'(["\\*?\[\]])', r"\\\1", path) + '"'


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise DependencyError(f"`{name}` is not installed", where="bundle send", hint="install OpenSSH's client")
    return found


def _number(text: str) -> int:
    return int(re.sub(r"\D", "", text))


def _followed(command: list[str], target: Target, tell: Callable[[int], None]) -> str:
    """Runs rsync, and tells the bytes it says it has carried so far; the last of what it prints."""
    said = ""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process,  # noqa: S603
    ):
        try:
            while piece := os.read(process.stdout.fileno(), 4096) if process.stdout else b"":
                said = (said + piece.decode(errors="replace"))[-LAST:]
                if found := _CARRIED.findall(said):
                    tell(_number(found[-1]))
        except BaseException:
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            raise _lost(command, process.returncode, errors.read(), target)
    return said


def _run(command: list[str], given: str, target: Target, limit_s: float | None) -> str:
    try:
        done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=limit_s)  # noqa: S603 - no shell
    except subprocess.TimeoutExpired:
        raise LostPeerError(
            "it gives no answer", where=target.host, hint="call it again, which goes on where it stopped"
        ) from None
    if done.returncode:
        raise _lost(command, done.returncode, done.stderr, target)
    return done.stdout.decode(errors="replace")


def _lost(command: list[str], code: int, errors: bytes, target: Target) -> LostPeerError:
    said = " ".join(errors.decode(errors="replace").split())[-400:]
    return LostPeerError(f"{Path(command[0]).name} ended with {code}: {said}", where=target.host, hint=_way_out(said))


def _way_out(said: str) -> str:
    if "Host key verification failed" in said or "host key is known" in said:
        return "this machine does not know the other's host key: `ssh HOST` once, and compare it"
    if "Permission denied (" in said:
        return "ssh lets us in by a key or an agent alone: `ssh-copy-id`, or --identity FILE"
    return "call it again, which goes on where it stopped; `ssh -v` says more about the connection"
