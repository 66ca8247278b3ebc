"""What `tunedock monitoring` writes, held against promtool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tunedock.errors import RecipeError
from tunedock.launch.scraping import GATEWAYS, Address, Scraped, address, prometheus_yaml, write

ALL = Scraped(
    gateways=[Address("gw-1:8000"), Address("[::1]:8443", tls=True)],
    runs=[Address("127.0.0.1:9400")],
    key_file="prometheus.key",
    ca_file="ca.pem",
    server_name="gw.example",
)


def test_the_folder_works_as_it_is(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Debian's prometheus, is not installed here")
    written = write(tmp_path, ALL)
    assert all(path.is_file() for path in written)
    for name in ("prometheus.key", "ca.pem"):
        (tmp_path / name).touch()
    done = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and "2 rule files found" in done.stdout, done.stdout + done.stderr


def test_each_is_scraped_as_it_is_to_be() -> None:
    found = YAML(typ="safe").load(prometheus_yaml(ALL))
    gateways, runs = found["scrape_configs"]
    assert gateways == {
        "job_name": GATEWAYS,
        "authorization": {"credentials_file": "prometheus.key"},
        "tls_config": {"ca_file": "ca.pem", "server_name": "gw.example"},
        "static_configs": [
            {"targets": ["gw-1:8000"]},
            {"targets": ["[::1]:8443"], "labels": {"__scheme__": "https"}},
        ],
    }
    assert "authorization" not in runs and runs["static_configs"] == [{"targets": ["127.0.0.1:9400"]}]


def test_only_what_is_scraped_is_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "gateways", Scraped(gateways=[Address("gw:8000")]))
    assert not (tmp_path / "gateways/alerts.yml").exists()
    write(tmp_path / "runs", Scraped(runs=[Address("here:9400")]))
    assert not (tmp_path / "runs/serving-rules.yml").exists()


def test_thresholds_that_somebody_changed_are_theirs(tmp_path: Path) -> None:
    write(tmp_path, ALL)
    (tmp_path / "serving-rules.yml").write_text("mine")
    (tmp_path / "prometheus.yml").unlink()
    with pytest.raises(RecipeError, match="it is there already") as raised:
        write(tmp_path, ALL)
    assert raised.value.where == str(tmp_path / "serving-rules.yml")
    assert (tmp_path / "serving-rules.yml").read_text() == "mine" and not (tmp_path / "prometheus.yml").exists()
    write(tmp_path, ALL, over=True)
    assert (tmp_path / "serving-rules.yml").read_text() != "mine"


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("127.0.0.1:8000", Address("127.0.0.1:8000")),
        ("http://gw:8000/v1", Address("gw:8000")),
        ("https://gw.example:8443/", Address("gw.example:8443", tls=True)),
        ("https://[::1]:8443/metrics", Address("[::1]:8443", tls=True)),
    ],
)
def test_addresses_are_taken_as_the_gateway_tells_them(text: str, means: Address) -> None:
    assert address(text, "--gateway") == means


@pytest.mark.parametrize("text", ["gw", "gw:", "ftp://gw:1", "http://a:b@gw:8000", "gw:8000/other", "gw:8000\n- x", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no address"):
        address(text, "--gateway")
