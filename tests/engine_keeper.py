"""A private dockerd for one run of the tests: `python engine_keeper.py FOLDER PID` keeps it until the process PID is gone.

Its images, sockets and state lie in FOLDER, it has a bridge and addresses of its own, and it touches no rule of another engine on
the machine: it is told to leave iptables alone, and the three rules it needs (out, back, and the translation of addresses) are
added and taken away here. At the end nothing is left: no process, no mount, no bridge, no rule, no file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

START_S = 60.0
STOP_S = 20.0
LIFE_S = 3 * 3600.0
"""Whatever happens, the engine is gone after this long."""


def socket_of(folder: Path) -> Path:
    return folder / "docker.sock"


def answers(folder: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(socket_of(folder)))
            probe.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in probe.recv(64)
        except OSError:
            return False


def run(*arguments: str, check: bool = True) -> str | None:
    """What it prints; None where it fails and may."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30)
    if done.returncode and check:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip()}")
    return None if done.returncode else done.stdout


class Network:
    """A bridge, and the rules that let its containers out. Its number is the second of its addresses' four."""

    def __init__(self) -> None:
        taken = run("ip", "-o", "-4", "addr") or ""
        for number in range(200 + os.getpid() % 40, 256):
            if f" 10.{number}." in taken:
                continue
            if run("ip", "link", "add", f"td{number}", "type", "bridge", check=False) is not None:
                break  # else another run of the tests was quicker
        else:
            raise SystemExit("no addresses are free for a bridge")
        self.bridge = f"td{number}"
        self.range = f"10.{number}.0.0/16"
        self.address = f"10.{number}.0.1/24"
        self.pool = f"base=10.{number}.128.0/17,size=24"
        self.rules = (
            ("-t", "nat", "POSTROUTING", "-s", self.range, "!", "-d", self.range, "-j", "MASQUERADE"),
            ("-t", "filter", "FORWARD", "-s", self.range, "-j", "ACCEPT"),
            ("-t", "filter", "FORWARD", "-d", self.range, "-j", "ACCEPT"),
        )

    def up(self) -> None:
        run("ip", "addr", "add", self.address, "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        for table, name, chain, *rule in self.rules:
            run("iptables", table, name, "-I", chain, *rule)

    def down(self) -> None:
        for table, name, chain, *rule in self.rules:
            run("iptables", table, name, "-D", chain, *rule, check=False)
        run("ip", "link", "delete", self.bridge, check=False)

    @property
    def mtu(self) -> str:
        """That of the way out: a container that sends larger packets through a tunnel waits for ever."""
        told = run("ip", "-o", "route", "get", "198.51.100.1", check=False)
        words = (told or "").split()
        device = words[words.index("dev") + 1] if "dev" in words else ""
        size = Path("/sys/class/net") / device / "mtu"
        return size.read_text().strip() if device and size.exists() else "1500"


def command(folder: Path, network: Network) -> list[str]:
    # Not the machine's own configuration; gVisor where it is installed.
    sandbox = shutil.which("runsc")
    runtimes = {} if sandbox is None else {"runtimes": {"runsc": {"path": sandbox, "runtimeArgs": ["--network=none"]}}}
    (folder / "none.json").write_text(json.dumps(runtimes))
    return [
        "dockerd",
        f"--config-file={folder / 'none.json'}",
        f"--data-root={folder / 'data'}",
        f"--exec-root={folder / 'exec'}",
        f"--pidfile={folder / 'dockerd.pid'}",
        f"--host=unix://{socket_of(folder)}",
        "--iptables=false",
        "--ip6tables=false",
        f"--bridge={network.bridge}",
        f"--mtu={network.mtu}",
        f"--default-address-pool={network.pool}",
        "--shutdown-timeout=2",
    ]


def keep(folder: Path, watched: int) -> None:
    network = Network()
    end = time.monotonic() + LIFE_S
    daemon = None
    try:
        (folder / "bridge.json").write_text(json.dumps({"bridge": network.bridge, "range": network.range}))
        network.up()
        with (folder / "dockerd.log").open("wb") as log:
            daemon = subprocess.Popen(command(folder, network), stdout=log, stderr=log, start_new_session=True)
        while time.monotonic() < end and daemon.poll() is None and alive(watched) and not (folder / "stop").exists():
            time.sleep(0.3)
    finally:
        if daemon is not None:
            stop(folder, daemon)
        network.down()
        clear(folder)


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def stop(folder: Path, daemon: subprocess.Popen[bytes]) -> None:
    """By its signal, which stops the containers too; whatever of it is still there after a while is killed."""
    daemon.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(daemon.pid, signal.SIGKILL)
    for pid in belonging(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    daemon.wait(STOP_S)


def belonging(folder: Path) -> Sequence[int]:
    """containerd and its shims, and what runs in containers: they name the folder, or their root is in it."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            root = (process / "mountinfo").read_text().split("\n", 1)[0]
            if str(folder / "exec").encode() in (process / "cmdline").read_bytes() or f"={folder}/data/" in root:
                found.append(int(process.name))
    return found


def clear(folder: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in sorted((place for place in mounts if place.startswith(f"{folder}/")), reverse=True):
        run("umount", "--lazy", place, check=False)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    keep(Path(sys.argv[1]), int(sys.argv[2]))
