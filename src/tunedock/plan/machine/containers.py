"""Docker: client, daemon, Compose, and NVIDIA's toolkit, as far as can be told without pulling an image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunedock.plan.machine.bounds import bytes_text, measured
from tunedock.plan.machine.check import Check, absent, warning
from tunedock.plan.machine.command import Ran, Runner, run
from tunedock.plan.machine.symptoms import known_way_out

GROUP = "docker"
CDI_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
"""Where specifications of devices for containers lie."""

INSTALL = "for containers, install Docker: https://docs.docker.com/engine/install"
TOOLKIT = (
    "install nvidia-container-toolkit, then `sudo nvidia-ctk runtime configure --runtime=docker` and "
    "`sudo systemctl restart docker`"
)


def checks(has_card: bool, runner: Runner = run, cdi_folders: tuple[Path, ...] = CDI_FOLDERS) -> list[Check]:
    """`has_card`: whether the machine has an NVIDIA card, so that its toolkit matters."""
    ran = runner(["docker", "version", "--format", "{{json .}}"])
    if ran is None:
        return [absent(GROUP, "docker client", "not installed", INSTALL)]
    if ran.code is None:
        return [warning(GROUP, "docker daemon", ran.trouble, "restart it: `sudo systemctl restart docker`")]
    versions = _object(ran.out)
    client = versions.get("Client") or {}
    made = [_client(ran, client), _compose(runner)]
    server = versions.get("Server") or {}
    if not server.get("Version"):
        trouble = "the client names no daemon (podman in the place of Docker?)" if ran.ok else ran.trouble
        made.insert(1, warning(GROUP, "docker daemon", trouble, known_way_out(trouble) or "is the daemon running?"))
        return made
    info = runner(["docker", "info", "--format", "{{json .}}"])
    told = _object(info.out) if info is not None else {}
    made.insert(1, _daemon(server, told))
    made += _images(told)
    made.append(_toolkit(has_card, told, runner, cdi_folders))
    return made


def _client(ran: Ran, client: Mapping[str, Any]) -> Check:
    version = str(client.get("Version") or "")
    if not version:
        return warning(GROUP, "docker client", f"its version is unknown: {ran.trouble}", INSTALL)
    context = client.get("Context")
    found = f"{version}, context {context}" if context else version
    return measured(
        GROUP, "docker client", version, found=found, way_out="update it: https://docs.docker.com/engine/install"
    )


def _daemon(server: Mapping[str, Any], info: Mapping[str, Any]) -> Check:
    version = str(server["Version"])
    options = " ".join(str(option) for option in info.get("SecurityOptions") or [])
    parts = [version, *(str(info[key]) for key in ("OperatingSystem", "Driver") if info.get(key))]
    parts += ["rootless"] if "rootless" in options else []
    return measured(
        GROUP,
        "docker daemon",
        version,
        found=", ".join(parts),
        way_out="update it: https://docs.docker.com/engine/install",
    )


def _compose(runner: Runner) -> Check:
    """The plugin; the older program of its own lacks keys that tunedock's files need (`name`, `gpus`)."""
    plugin = runner(["docker", "compose", "version", "--short"])
    if plugin is not None and plugin.ok and plugin.out.strip():
        version = plugin.out.strip().splitlines()[-1].strip()
        return measured(GROUP, "compose", version, way_out="update it: `apt-get install docker-compose-plugin`")
    alone = runner(["docker-compose", "version", "--short"])
    if alone is not None and alone.ok and alone.out.strip():
        version = alone.out.strip().splitlines()[-1].strip()
        return warning(
            GROUP,
            "compose",
            f"{version}, the old program docker-compose, not the plugin",
            "`apt-get install docker-compose-plugin`, or the plugin's file from github.com/docker/compose",
        )
    return absent(GROUP, "compose", "no plugin", "for `docker compose`: `apt-get install docker-compose-plugin`")


def _images(info: Mapping[str, Any]) -> list[Check]:
    """Room for images, where the daemon is on this machine."""
    folder = Path(str(info.get("DockerRootDir") or ""))
    try:
        free = shutil.disk_usage(folder).free if folder.is_absolute() else None
    except OSError:  # the daemon is elsewhere, or its folder is closed to us
        free = None
    if free is None:
        return []
    found = f"{bytes_text(free)} free for {folder}"
    return [
        measured(
            GROUP, "images", free, found=found, way_out="`docker system prune`, or move `data-root` to another disk"
        )
    ]


def _toolkit(has_card: bool, info: Mapping[str, Any], runner: Runner, cdi_folders: tuple[Path, ...]) -> Check:
    """Whether a container could be given the card: by the runtime `nvidia`, or by a CDI specification."""
    name = "container toolkit"
    if not has_card:
        return absent(GROUP, name, "no NVIDIA card to hand to a container")
    ways = []
    if "nvidia" in (info.get("Runtimes") or {}):
        ways.append("runtime nvidia" + (" (default)" if info.get("DefaultRuntime") == "nvidia" else ""))
    devices = [str(device.get("ID")) for device in info.get("DiscoveredDevices") or [] if isinstance(device, Mapping)]
    if any("nvidia.com/gpu" in device for device in devices) or any(_specified(folder) for folder in cdi_folders):
        ways.append("CDI nvidia.com/gpu")
    if (
        not ways
        and "microsoft-standard" in str(info.get("KernelVersion"))
        and info.get("OperatingSystem") == "Docker Desktop"
    ):
        ways.append("Docker Desktop in WSL2")  # it brings what the toolkit does
    version = _toolkit_version(runner)
    if not ways:
        found = f"{version} installed, but the daemon does not know it" if version else "not installed"
        return warning(GROUP, name, f"{found}: containers get no GPU", TOOLKIT)
    found = f"{', '.join(ways)}: a container can be given the GPU"
    if version is None:
        return Check(GROUP, name, found)
    return measured(GROUP, name, version, found=f"{version}, {found}", way_out="update nvidia-container-toolkit")


def _toolkit_version(runner: Runner) -> str | None:
    """`NVIDIA Container Toolkit CLI version 1.17.4` -> `1.17.4`."""
    ran = runner(["nvidia-ctk", "--version"])
    words = ran.out.split() if ran is not None and ran.ok else []
    return next((word for word in words if word[:1].isdigit()), None)


def _specified(folder: Path) -> bool:
    return any(True for pattern in ("nvidia*.yaml", "nvidia*.json") for _ in folder.glob(pattern))


def _object(text: str) -> dict[str, Any]:
    """The JSON object in an output; empty for anything else (a very old client answers in its own words)."""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return {}
