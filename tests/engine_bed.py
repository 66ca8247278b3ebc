"""A container engine for the tests, and images to begin with: fixtures that any folder of tests may name.

`engine` is a dockerd of its own (`engine_keeper.py`), started when the first test asks and shared by the processes of one run; it
is gone when the run is. `base_image` is a bare Debian with Python, made here by debootstrap and kept in the user's cache, for no
test pulls from a hub. Where an engine cannot run, the tests that need one are skipped and say why.

Images are made anew in each run. To keep them while working on one: `python tests/engine_keeper.py FOLDER $$ &` in a shell of its
own, and `TUNEDOCK_TESTS_ENGINE=FOLDER` for pytest.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine_keeper

FOLDER = "TUNEDOCK_TESTS_ENGINE"
"""The variable that names the run's engine to all its processes."""

PROGRAMS = ("dockerd", "containerd", "runc", "ip", "iptables")
PACKAGES = "python3,python3-venv,tini,ca-certificates"
BASE = "base:debian"
MADE_S = 1500
"""Seconds for a test that may have to wait for an image, its own work included."""
OLD_S = 14 * 86400.0
"""After this long the cached Debian is made again: its mirrors have newer packages."""

LEFT_OUT = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "var/cache",
    "var/lib/apt/lists",
    "var/log",
)
"""What official slim images lack too."""

RELEASES = {(3, 11): "bookworm", (3, 13): "trixie"}
"""Python -> the Debian that has it: wheels that are here for the tests' Python are of use in the image then."""


@dataclass(frozen=True)
class Engine:
    folder: Path

    @property
    def host(self) -> str:
        return f"unix://{engine_keeper.socket_of(self.folder)}"

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to use it."""
        return {"DOCKER_HOST": self.host}


@dataclass(frozen=True)
class HostSettings:
    """What a build on this machine needs to reach its packages, found as pip finds it."""

    ca: Path | None
    """A bundle of certificates, where the machine trusts more than the public ones."""
    wheels: Path | None
    """A folder of wheels that pip looks into."""
    index: str | None
    """The package index, where it is not PyPI."""


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the processes xdist starts inherit it
        os.environ.setdefault(FOLDER, str(own_folder()))


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = own_folder()
    if hasattr(config, "workerinput") or not folder.exists():
        return
    (folder / "stop").touch()
    end = time.monotonic() + 2 * engine_keeper.STOP_S
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.1)
    for lock in folder.parent.glob(f"{folder.name}*.lock"):
        lock.unlink(missing_ok=True)


@pytest.hookimpl(tryfirst=True)  # before pytest-timeout reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test is the first to name an image waits until it is made, on a busy machine for minutes."""
    for item in items:
        waits = {"cpu_train_image", "base_image"} & set(getattr(item, "fixturenames", ()))
        if waits and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(MADE_S))


def own_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"td-engine-{os.getpid()}"


@pytest.fixture(scope="session")
def engine() -> Engine:
    """A dockerd that answers. Skips where none can run."""
    folder = Path(os.environ[FOLDER])
    with only_one(folder):
        if not engine_keeper.answers(folder):
            start(folder)
    return Engine(folder)


@pytest.fixture
def engine_here(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine, as the one this process and its children use."""
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    return engine


@pytest.fixture(scope="session")
def base_image(engine: Engine) -> str:
    """The name of a Debian with python3, its venv, tini and certificates."""
    from tunedock.image.engine import Endpoint, connected

    with only_one(engine.folder), connected(Endpoint(engine.host, "the tests"), timeout_s=240) as client:
        if not client.images.list(BASE):
            client.api.import_image_from_file(str(debian()), repository="base", tag="debian")
    return BASE


@pytest.fixture(scope="session")
def host_settings() -> HostSettings:
    return read_settings()


@pytest.fixture(scope="session")
def cpu_train_image(engine: Engine, base_image: str, host_settings: HostSettings) -> str:
    """The name of an image that trains on the CPU, made once a run by `tunedock image build`; a minute or two."""
    name = "tunedock-train:cpu"
    with only_one(engine.folder.with_name(f"{engine.folder.name}-cpu")):
        if not (engine.folder / "cpu.done").exists():
            built = image_build(engine, host_settings, "cpu", "--base", base_image, "--tag", name)
            assert built.returncode == 0, f"{built.stdout[-2000:]}{built.stderr[-6000:]}"
            (engine.folder / "cpu.done").write_text(built.stdout)
    return name


def image_build(
    engine: Engine, settings: HostSettings, *arguments: str, limit_s: float = 1200
) -> subprocess.CompletedProcess[str]:
    """`tunedock image build`, with what this machine needs to reach its packages."""
    found = {"--ca": settings.ca, "--wheels": settings.wheels, "--index": settings.index}
    given = [str(word) for pair in found.items() if pair[1] is not None for word in pair]
    command = [sys.executable, "-m", "tunedock", "image", "build", *arguments, *given, "--json"]
    environment = {**os.environ, **engine.environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)


def start(folder: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    folder.mkdir(mode=0o700, exist_ok=True)
    watched = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    script = [sys.executable, str(Path(engine_keeper.__file__)), str(folder), str(watched)]
    with (folder / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(script, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + engine_keeper.START_S
    tail = ""
    while time.monotonic() < end:
        if engine_keeper.answers(folder):
            return
        if keeper.poll() is not None:
            pytest.skip(f"dockerd cannot run here: {tail or 'it ended at once'}")
        logs = [folder / "dockerd.log", folder / "keeper.log"]
        tail = " ".join([*("".join(log.read_text(errors="replace")[-300:] for log in logs if log.exists())).split()])
        time.sleep(0.1)
    (folder / "stop").touch()
    pytest.skip(f"dockerd did not answer within {engine_keeper.START_S:.0f} s: {tail}")


def why_not() -> str | None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a dockerd of the tests' own needs root on Linux"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path()) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def path() -> str:
    """PATH with the folders of administrators, which some shells leave out."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def lock_of(folder: Path) -> Path:
    return folder.with_suffix(".lock")


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    with lock_of(folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def debian() -> Path:
    """An archive of a bare Debian; made once, about a minute."""
    if shutil.which("debootstrap", path=path()) is None:
        pytest.skip("not installed: debootstrap")
    release = RELEASES.get(sys.version_info[:2], "bookworm")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunedock-tests"
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"debian-{release}.tar"
    with only_one(cache / "debian"):
        if not archive.exists() or time.time() - archive.stat().st_mtime > OLD_S:
            # In memory where there is room: the packages' installer waits for the disk after each file.
            memory = Path("/dev/shm")
            roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30
            with tempfile.TemporaryDirectory(prefix="td-debian-", dir=memory if roomy else None) as made:
                bootstrap(release, Path(made), archive)
    return archive


def bootstrap(release: str, root: Path, archive: Path) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "PATH": path()})
    if done.returncode:
        pytest.skip(f"debootstrap cannot make a Debian here: {' '.join(done.stdout.split())[-300:]}")
    part = archive.with_suffix(".part")
    excluded = [f"--exclude=./{place}/*" for place in (*LEFT_OUT, "dev", "proc", "sys")]
    subprocess.run(["tar", "-C", str(root), "-cf", str(part), *excluded, "."], check=True, timeout=120)
    part.replace(archive)


def read_settings(environment: Mapping[str, str] = os.environ) -> HostSettings:
    """What `pip config list` and the environment name, as far as a build is to be given it."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    # `:env:.cert='...'`, `global.find-links='/a /b'`: later lines stand for weaker sources.
    values: dict[str, str] = {}
    for key, value in re.findall(r"^\S*?\.([a-z-]+)='(.*)'$", listed, re.MULTILINE):
        values.setdefault(key, value.replace("\\n", " "))
    bundle = values.get("cert") or environment.get("SSL_CERT_FILE")
    folders = [Path(place) for place in values.get("find-links", "").split() if Path(place).is_dir()]
    return HostSettings(
        ca=Path(bundle) if bundle and Path(bundle).is_file() else None,
        wheels=next((folder for folder in folders if any(folder.glob("*.whl"))), None),
        index=values.get("index-url"),
    )
