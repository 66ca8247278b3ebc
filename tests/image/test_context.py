"""What comes into a build's context, and what never does."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tunedock.errors import DataError, DiskError, RecipeError
from tunedock.image import context
from tunedock.image.context import Sources, requirements, write, write_to
from tunedock.image.package import FOLDER, package
from tunedock.image.targets import target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "context"
    made.mkdir()
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"\0" * 8)
    (made / "config.json").write_text("{}")
    return made


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """A certificate that no one else has."""
    key, path = tmp_path / "ca-key", tmp_path / "ca.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ours", "-days", "2"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(path)], check=True, capture_output=True, timeout=60)
    return path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_of_a_training_image(folder: Path) -> None:
    write(folder, target("cpu"), Sources(package()), mounts=True)
    found = files(folder)
    top = {name for name in found if "/" not in name}
    assert top == {"Dockerfile", "locked.txt", "requirements.txt", "prepare.py"}
    assert "code/tunedock/image/targets.json" in found
    assert "code/tunedock-0.1.0.dist-info/METADATA" in found
    assert not [name for name in found if "__pycache__" in name or name.endswith(".pyc")]
    assert {oct(path.stat().st_mode)[-3:] for path in folder.rglob("*") if path.is_file()} <= {"644", "755"}
    assert "torch" in (folder / "requirements.txt").read_text()


def test_a_training_image_has_every_module_whatever_its_name(folder: Path) -> None:
    write(folder, target("cpu"), Sources(package()), mounts=True)
    modules = {path.relative_to(FOLDER) for path in FOLDER.rglob("*.py")}
    assert Path("image/credentials.py") in modules
    assert {path.relative_to(folder / "code/tunedock") for path in (folder / "code/tunedock").rglob("*.py")} == modules


def test_requirements_by_role() -> None:
    sources = Sources(package(), extras=("mlflow",))
    assert any(line.startswith("mlflow") for line in requirements(target("cpu"), sources))
    assert any(line.startswith("bitsandbytes") for line in requirements(target("cuda"), sources))
    assert any(line.startswith("pytest") for line in requirements(target("cpu", "test"), sources))
    edge = target("edge", "serve")
    assert not any(line.startswith("torch") for line in requirements(edge, Sources(package())))
    with pytest.raises(RecipeError, match="only what the service needs"):
        requirements(edge, sources)
    with pytest.raises(RecipeError, match="no extra `mlfow`"):
        requirements(target("cpu"), Sources(package(), extras=("mlfow",)))


def test_hidden_files_and_keys_stay_out(folder: Path, model: Path) -> None:
    for name in (".env", "prod.env", "server.key", "id_rsa", "credentials.json", "notes.docx"):
        (model / name).write_text("x")
    (model / ".git").mkdir()
    (model / ".git" / "config.json").write_text("x")
    made = write(folder, target("cpu", "serve"), Sources(package(), model=model), mounts=True)
    assert files(folder / "model") == {"model.safetensors", "config.json"}
    assert {"prod.env", "notes.docx"} <= set(made.left_out)


@pytest.mark.parametrize(
    ("secret", "what"),
    [
        ("hf_" + "a" * 34, "Hugging Face"),
        ("AKIA" + "A" * 16, "AWS"),
        ("ghp_" + "a" * 36, "GitHub"),
        ("-----BEGIN RSA PRIVATE " + "KEY-----", "private key"),
        ("https://me:hunter22@index.example/simple", "password"),
    ],
)
def test_a_secret_in_a_file_stops_the_build(folder: Path, model: Path, secret: str, what: str) -> None:
    (model / "README.md").write_text(f"use {secret} to download")
    with pytest.raises(DataError, match=what) as caught:
        write(folder, target("cpu", "serve"), Sources(package(), model=model), mounts=True)
    assert caught.value.where == "model/README.md"
    assert secret not in str(caught.value)


def test_our_own_package_holds_none(folder: Path) -> None:
    write(folder, target("cpu", "test"), Sources(package()), mounts=True)
    assert not list(context.secrets(folder))
    assert "source/tests/image/test_context.py" in files(folder)
    assert "source/src/tunedock/__init__.py" in files(folder)
    assert not [name for name in files(folder) if "/." in name]


def test_a_test_image_needs_a_checkout(folder: Path) -> None:
    installed = dataclasses.replace(package(), checkout=None)
    with pytest.raises(RecipeError, match="needs the tests"):
        write(folder, target("cpu", "test"), Sources(installed), mounts=True)


def test_what_is_served_is_looked_at(folder: Path, tmp_path: Path, model: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (empty, "holds no weights"),
        (tmp_path / "none", "there is no"),
        (model / "config.json", "neither"),
    ):
        with pytest.raises(RecipeError, match=message):
            write(folder, target("cpu", "serve"), Sources(package(), model=path), mounts=True)
        shutil.rmtree(folder)
        folder.mkdir()


def test_the_edge_takes_what_llama_cpp_reads(folder: Path, model: Path) -> None:
    with pytest.raises(RecipeError, match=r"can compute with \(\*\.gguf\)") as caught:
        write(folder, target("edge", "serve"), Sources(package(), model=model), mounts=True)
    assert caught.value.where == "--model"


def test_one_file_of_weights(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "tiny.gguf"
    weights.write_bytes(b"GGUF")
    weights.chmod(0o600)
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer/tokenizer.json", "chat.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    write(folder, target("edge", "serve"), Sources(package(), model=weights), mounts=True)
    copied = folder / "model/tiny.gguf"
    here = {str(path.relative_to(folder / "model")) for path in (folder / "model").rglob("*") if path.is_file()}
    assert here == {"tiny.gguf", "chat.json", "tokenizer/tokenizer.json"}  # as `tunedock export` leaves them
    assert copied.stat().st_mode & 0o444 == 0o444  # whoever the container runs as reads it
    assert weights.stat().st_mode & 0o777 == 0o600


def test_only_certificates_that_are_not_public_are_taken(folder: Path, pem: Path) -> None:
    import certifi

    pem.write_text(certifi.contents() + pem.read_text())
    write(folder, target("cpu"), Sources(package(), ca=pem), mounts=True)
    assert len(list((folder / "ca").iterdir())) == 1
    assert "COPY ca/" in (folder / "Dockerfile").read_text()


def test_no_certificate_in_the_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("nothing")
    for path in (tmp_path / "x", tmp_path / "none"):
        with pytest.raises(RecipeError) as caught:
            write(folder, target("cpu"), Sources(package(), ca=path), mounts=True)
        assert str(caught.value.where).startswith("--ca")
        shutil.rmtree(folder)
        folder.mkdir()


def test_wheels(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no wheels"):
        write(folder, target("cpu"), Sources(package(), wheels=tmp_path), mounts=True)
    shutil.rmtree(folder)
    folder.mkdir()
    os.mkfifo(tmp_path / "b-1-py3-none-any.whl")  # a builder would wait for it
    (tmp_path / "a-1-py3-none-any.whl").touch()
    write(folder, target("cpu"), Sources(package(), wheels=tmp_path), mounts=False)
    assert files(folder / "wheels") == {"a-1-py3-none-any.whl"}


def test_links_lead_no_further_than_the_folder_or_a_hubs_blobs(folder: Path, tmp_path: Path) -> None:
    """A model's folder from elsewhere could name any file of this machine."""
    (tmp_path / "secret.txt").write_text("mine")
    snapshot = tmp_path / "models--o--n/snapshots/abc"
    blobs = tmp_path / "models--o--n/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(bytes(8))
    (blobs / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    (snapshot / "notes.txt").symlink_to("config.json")
    (snapshot / "stolen.txt").symlink_to(tmp_path / "secret.txt")
    made = write(folder, target("cpu", "serve"), Sources(package(), model=snapshot), mounts=True)
    assert {path.name for path in (folder / "model").iterdir()} == {"model.safetensors", "config.json", "notes.txt"}
    assert made.left_out == ["stolen.txt"]


@pytest.mark.parametrize(("target_of_link", "said"), [("loop.json", "symbolic links"), ("none.json", "No such file")])
def test_a_link_that_leads_nowhere_is_told(
    folder: Path, tmp_path: Path, model: Path, target_of_link: str, said: str
) -> None:
    (model / "loop.json").symlink_to(target_of_link)
    with pytest.raises(DiskError, match=said):
        write(folder, target("cpu", "serve"), Sources(package(), model=model), mounts=True)


def test_a_folder_of_the_users(tmp_path: Path) -> None:
    write_to(tmp_path / "new/one", target("cpu"), Sources(package()))
    assert (tmp_path / "new/one/Dockerfile").exists()
    with pytest.raises(RecipeError, match="is not empty"):
        write_to(tmp_path / "new/one", target("cpu"), Sources(package()))
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot be made"):
        write_to(tmp_path / "file/x", target("cpu"), Sources(package()))
    with pytest.raises(RecipeError, match="there are no wheels"):
        write_to(tmp_path / "new/two", target("cpu"), Sources(package(), wheels=tmp_path))
    assert not any((tmp_path / "new/two").iterdir())  # it can be named again
