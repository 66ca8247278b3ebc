"""`tunedock bundle`, as a user calls it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ssh_bed import Machine
from tunedock.cli.bundle import size_of
from tunedock.errors import RecipeError

DEMO = Path(__file__).parents[2] / "examples/demo"
Tunedock = Callable[..., tuple[int, str, str]]


def test_the_whole_way(
    tunedock: Tunedock, tmp_path: Path, other_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tunedock("bundle", "key", "release")[0] == 0
    code, out, err = tunedock(
        "bundle", "create", str(DEMO / "recipe.yaml"), "--to", "one", "--key", "release", "--split", "4M"
    )
    assert code == 0, err
    assert "bundled" in out
    assert (tmp_path / "one/content/model/model.safetensors.part0001").is_file()
    code, out, err = tunedock("bundle", "verify", "one", "--trust", "release.pub")
    assert code == 0, err
    assert "signed by release.pub" in out
    code, out, err = tunedock(
        "bundle", "create", str(DEMO / "recipe.yaml"), "train.max_steps=3", "--to", "two", "--diff", "one", "--json"
    )
    assert code == 0, err
    made = json.loads(out)
    assert made["here"] == 1
    assert not made["signed"]
    code, out, err = tunedock("bundle", "load", "two", "--to", "there", "--old", "one", "--json")
    assert code == 0, err
    assert "nobody signed this bundle" in err
    assert json.loads(out)["trusted"] is False
    assert "max_steps: 3" in (tmp_path / "there/recipe.yaml").read_text()
    target = f"other:{other_machine.folder}/by-command"
    code, out, err = tunedock("bundle", "send", "one", target, "--ssh-config", str(other_machine.config), "--no-rsync")
    assert code == 0, err
    assert "checked there" in out
    assert shutil.which("openssl") is None or (other_machine.folder / "by-command/SHA256SUMS.sig").is_file()


def test_a_changed_byte_is_an_exit_code_and_a_name(tunedock: Tunedock, tmp_path: Path) -> None:
    recipe, bundle = str(DEMO / "recipe.yaml"), tmp_path / "b"
    assert tunedock("bundle", "create", recipe, "--to", str(bundle))[0] == 0
    file = bundle / "content/model/config.json"
    file.write_bytes(file.read_bytes().replace(b"{", b"[", 1))
    code, _out, err = tunedock("bundle", "verify", str(bundle))
    assert code == 6
    assert "error: content/model/config.json: its SHA-256 is" in err
    code, out, _err = tunedock("bundle", "load", str(bundle), "--to", str(tmp_path / "to"), "--json")
    assert code == 6
    assert json.loads(out)["error"]["where"] == "content/model/config.json"
    assert not (tmp_path / "to").exists()


def test_mistakes_are_told(tunedock: Tunedock, tmp_path: Path) -> None:
    assert "nothing to bundle" in tunedock("bundle", "create", "--to", str(tmp_path / "b"))[2]
    assert "is no size" in tunedock("bundle", "create", "--to", str(tmp_path / "b"), "--split", "much")[2]
    assert "no place on another machine" in tunedock("bundle", "send", str(tmp_path), "nowhere")[2]
    assert "its own recipe" in tunedock("bundle", "create", "r.yaml", "--run", "r", "--to", str(tmp_path / "b"))[2]


SIZES = [("4G", 4 << 30), ("700M", 700 << 20), ("1.5GiB", 3 << 29), ("10kB", 10 << 10), ("7", 7)]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


def test_what_is_no_size() -> None:
    with pytest.raises(RecipeError):
        size_of("4 gigs")
