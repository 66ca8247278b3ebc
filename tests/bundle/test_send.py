"""Bundles sent to a real sshd: by rsync and by sftp, stopped in the middle, changed there, refused."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bundle_bed import bundle_of, contents, quiet
from ssh_bed import Machine
from tunedock.bundle import send as sending
from tunedock.bundle.listing import SUMS
from tunedock.bundle.send import Options, Target, send
from tunedock.bundle.verify import verify
from tunedock.bundle.writing import JOURNAL
from tunedock.errors import CheckError, LostPeerError, RecipeError

MB = 1 << 20
FILES = {
    "content/recipe.yaml": b"model: model\n",
    "content/model/large": random.Random(0).randbytes(3 * MB),
    "content/data/a (1), b.jsonl": b"{}\n",
    "content/数据.jsonl": b"{}\n",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    bundle_of(folder, FILES)
    return folder / "bundle"


def needs(by: str) -> bool:
    if by == "rsync" and shutil.which("rsync") is None:
        pytest.skip("not installed: rsync")
    return by == "rsync"


@pytest.mark.parametrize("by", ["rsync", "sftp"])
def test_sent_checked_and_not_sent_again(bundle: Path, other_machine: Machine, by: str) -> None:
    to = other_machine.folder / f"it's new; $(here) {by}"
    target, options = Target("other", str(to)), Options(config=other_machine.config)
    sent = send(bundle, target, options, quiet, rsync=needs(by))
    assert sent.by == by
    assert sent.bytes >= 3 * MB
    assert contents(to) == contents(bundle)
    verify(to, quiet)
    os.truncate(to / "content/model/large", MB)  # as a lost connection leaves it
    (to / "content/recipe.yaml").write_bytes(b"model: mXdel\n")  # rots, with the right size and time
    os.utime(to / "content/recipe.yaml", ns=(0, (bundle / "content/recipe.yaml").stat().st_mtime_ns))
    resumed = send(bundle, target, options, quiet, rsync=needs(by))
    assert 2 * MB <= resumed.bytes <= 2 * MB + 4096
    assert contents(to) == contents(bundle)


def test_a_list_that_is_gone_there_is_no_success(bundle: Path, other_machine: Machine) -> None:
    target, options = Target("other", str(other_machine.folder / "none")), Options(config=other_machine.config)
    sending._look(target, options)
    assert sending._wrong_there(target, options, ["content/a", SUMS]) == ["content/a", SUMS]


def test_an_unknown_host_key_is_refused(bundle: Path, other_machine: Machine) -> None:
    to = other_machine.folder / "unknown"
    with pytest.raises(LostPeerError, match="Host key verification failed") as caught:
        send(bundle, Target("other", str(to)), Options(config=other_machine.unknown), quiet)
    assert "compare it" in str(caught.value.hint)
    assert not to.exists()


def test_nobody_is_let_in_without_a_key(bundle: Path, other_machine: Machine, tmp_path: Path) -> None:
    text = other_machine.config.read_text()
    (tmp_path / "config").write_text(
        "\n".join(line for line in text.splitlines() if "IdentityFile" not in line) + "\n IdentityFile none\n"
    )
    with pytest.raises(LostPeerError, match="Permission denied") as caught:
        send(bundle, Target("other", "x"), Options(config=tmp_path / "config"), quiet)
    assert "ssh-copy-id" in str(caught.value.hint)


def test_nobody_answers(bundle: Path) -> None:
    with pytest.raises(LostPeerError, match="ssh ended with 255") as caught:
        send(bundle, Target("127.0.0.1", "x"), Options(port=9), quiet)
    assert "goes on where it stopped" in str(caught.value.hint)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "-oProxyCommand=id:x", "host:-x", "ho st:x", "host;id:x", "$(id):x", "host:a\nb"]
)
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="no place on another machine"):
        Target.parse(text)


@pytest.mark.parametrize(
    ("text", "host", "folder"),
    [("h:d", "h", "d"), ("me@h.example:/a b", "me@h.example", "/a b"), ("[::1]:d", "[::1]", "d"), ("h:~/d", "h", "d")],
)
def test_places(text: str, host: str, folder: str) -> None:
    assert Target.parse(text) == Target(host, folder)


def test_half_a_bundle_is_not_sent(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "half")
    (tmp_path / "half/content/recipe.yaml").unlink()
    with pytest.raises(CheckError, match="missing"):
        send(tmp_path / "half", Target("h", "d"), Options(), quiet)
    (tmp_path / "half" / JOURNAL).touch()
    with pytest.raises(CheckError, match="not finished"):
        send(tmp_path / "half", Target("h", "d"), Options(), quiet)


@pytest.mark.long
@pytest.mark.parametrize("by", ["rsync", "sftp"])
def test_killed_in_the_middle_and_gone_on_with(other_machine: Machine, tmp_path: Path, by: str) -> None:
    """The sender and its ssh are killed while a large file is on its way; the next call sends the rest."""
    size = 400 * MB
    bundle_of(tmp_path, {"content/large": os.urandom(size)})  # nothing twice: rsync would send it once
    to = other_machine.folder / f"killed-{by}"
    command = [sys.executable, "-m", "tunedock", "bundle", "send", str(tmp_path / "bundle"), f"other:{to}"]
    command += ["--ssh-config", str(other_machine.config), *([] if needs(by) else ["--no-rsync"])]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    large = to / "content/large"
    end = time.monotonic() + 120
    while not (large.exists() and large.stat().st_size > 40 * MB):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    time.sleep(1.0)  # the other side ends too
    there = large.stat().st_size
    assert there < size, "it was too quick to be stopped"
    sent = send(
        tmp_path / "bundle", Target("other", str(to)), Options(config=other_machine.config), quiet, rsync=by == "rsync"
    )
    print(f"{by}: {there / MB:.0f} MB of {size / MB:.0f} were there, {sent.bytes / MB:.0f} MB sent after")
    assert sent.bytes < size - 30 * MB
    verify(to, quiet)
