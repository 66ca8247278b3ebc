"""`tunedock monitoring`, as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML


def monitoring(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunedock", "monitoring", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_a_folder_for_a_gateway_here(tmp_path: Path) -> None:
    done = monitoring(tmp_path, "watched", "--key-file", "prometheus.key")
    assert done.returncode == 0, done.stderr
    assert [Path(line) for line in done.stdout.splitlines()] == sorted(
        (path.relative_to(tmp_path) for path in (tmp_path / "watched").rglob("*.*") if path.is_file()),
        key=lambda path: (len(path.parts), path),
    )
    [job] = YAML(typ="safe").load(tmp_path / "watched/prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
    assert job["authorization"]["credentials_file"] == str(tmp_path / "prometheus.key")
    again = monitoring(tmp_path, "watched")
    assert again.returncode == 2 and "watched/prometheus.yml: it is there already" in again.stderr
    assert monitoring(tmp_path, "watched", "--force").returncode == 0


def test_an_address_that_is_none(tmp_path: Path) -> None:
    done = monitoring(tmp_path, "watched", "--gateway", "gw.example")
    assert done.returncode == 2 and "--gateway: `gw.example` is no address" in done.stderr
    assert not (tmp_path / "watched").exists()
    done = monitoring(tmp_path, "watched", "--runs", "here")
    assert done.returncode == 2 and "127.0.0.1:9400" in done.stderr
