"""Bundles made, checked and installed; changed by a byte, cut, stopped, hostile; by `load` and by `install.sh`."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle_bed import bundle_of, content_of, contents, quiet
from tunedock.bundle.create import Wanted, create
from tunedock.bundle.keys import check, make_key, sign
from tunedock.bundle.listing import FACTS, FILES, SIGNATURE, SUMS, read_list, write_list
from tunedock.bundle.load import load
from tunedock.bundle.verify import verify
from tunedock.bundle.writing import JOURNAL
from tunedock.errors import CheckError, DiskError, RecipeError, RunError
from tunedock.image.transfer import sum_of

MB = 1 << 20
SMALL = {
    "content/recipe.yaml": b"model: model\n",
    "content/model/weights": bytes(range(256)) * 40,
    "content/empty": b"",
}


def install(bundle: Path, to: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`install.sh` by a POSIX shell."""
    command = ["sh", str(bundle / "install.sh"), "--to", str(to), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def rewritten(bundle: Path, name: str, sums: dict[str, str]) -> None:
    """A list changed by someone who can count: the sums above it are made right again."""
    (bundle / name).write_text(write_list(sums))
    if name != SUMS:
        above = read_list((bundle / SUMS).read_text(), SUMS)
        rewritten(bundle, SUMS, above | {name: sum_of(bundle / name)})


@pytest.mark.parametrize("split", [None, MB])
def test_made_checked_and_installed(tmp_path: Path, split: int | None) -> None:
    files = SMALL | {"content/model/large": random.Random(0).randbytes(5 * MB // 2), "content/exact": bytes(2 * MB)}
    made = bundle_of(tmp_path, files, split=split)
    bundle = tmp_path / "bundle"
    assert (made.files, made.here) == (5, 5)
    assert made.facts.bytes == made.facts.whole_bytes == sum(map(len, files.values()))
    parts = sorted(path.name for path in bundle.rglob("*.part*"))
    assert parts == (
        ["exact.part0000", "exact.part0001", "large.part0000", "large.part0001", "large.part0002"] if split else []
    )
    assert max(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) <= (split or 1 << 40)
    found = verify(bundle, quiet)
    assert (found.signed, found.trusted, found.missing) == (False, None, [])
    assert not (bundle / JOURNAL).exists()
    expected = {name.removeprefix("content/"): data for name, data in files.items()}
    load(bundle, tmp_path / "loaded", quiet)
    assert contents(tmp_path / "loaded") == expected
    done = install(bundle, tmp_path / "installed")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "installed") == expected


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A signed bundle with a file of every kind, and the key to trust."""
    folder = tmp_path_factory.mktemp("signed")
    trust = make_key(folder / "key")
    files = SMALL | {
        "wheels/a-1-py3-none-any.whl": b"wheel",
        "content/large": bytes(MB) + b"end",
        "images/" + "0" * 64: b"layer",
    }
    bundle_of(folder, files, key=folder / "key", split=MB)
    return folder / "bundle", trust


@given(data=st.data())
def test_a_changed_byte_of_any_file_is_named(
    signed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    bundle, trust = signed
    name = data.draw(
        st.sampled_from(sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()))
    )
    before = (bundle / name).read_bytes()
    where = data.draw(st.integers(0, max(0, len(before) - 1)))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(before or b"\0")
    if before:
        changed[where] ^= 1 << bit
    try:
        (bundle / name).write_bytes(changed)
        with pytest.raises(CheckError) as caught:
            verify(bundle, quiet, trust=trust)
        named = (
            {name, SIGNATURE} if name in (SUMS, SIGNATURE) else {name}
        )  # of the list and its signature, who knows which
        assert caught.value.where in named
        if name != SIGNATURE:  # without a key the signature means nothing
            with pytest.raises(CheckError):
                verify(bundle, quiet)
    finally:
        (bundle / name).write_bytes(before)
    assert verify(bundle, quiet, trust=trust).trusted == trust


@pytest.mark.parametrize("name", [SUMS, FILES, FACTS, "content/model/weights", "content/large.part0001"])
def test_the_script_finds_a_changed_byte_too(signed: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(signed[0], tmp_path / "bundle")
    file = tmp_path / "bundle" / name
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    done = install(tmp_path / "bundle", tmp_path / "to", "--no-images", "--no-wheels")
    assert done.returncode == 6
    assert name in done.stderr or name == SUMS
    assert not (tmp_path / "to").exists()


def test_the_script_checks_who_signed(signed: tuple[Path, Path], tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("not installed: openssl")
    bundle, trust = signed
    options = ["--no-images", "--no-wheels", "--trust"]
    assert install(bundle, tmp_path / "right", *options, str(trust)).returncode == 0
    done = install(bundle, tmp_path / "wrong", *options, str(make_key(tmp_path / "other")))
    assert done.returncode == 6
    assert "the signature is not by the key" in done.stderr
    assert not (tmp_path / "wrong").exists()


def test_another_key_is_refused(signed: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="the signature is not by the key") as caught:
        verify(signed[0], quiet, trust=make_key(tmp_path / "other"))
    assert caught.value.where == SIGNATURE


def test_unsigned_is_refused_where_a_key_is_trusted(tmp_path: Path) -> None:
    bundle_of(tmp_path, SMALL)
    with pytest.raises(CheckError, match="nobody signed"):
        verify(tmp_path / "bundle", quiet, trust=make_key(tmp_path / "key"))


def test_keys(tmp_path: Path) -> None:
    public = make_key(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    check(b"data", sign(b"data", tmp_path / "key"), public)
    with pytest.raises(RunError, match="there already"):
        make_key(tmp_path / "key")
    (tmp_path / "half.pub").write_text("another's")
    with pytest.raises(RunError, match="there already"):
        make_key(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    assert (tmp_path / "half.pub").read_text() == "another's"
    long = tmp_path / ("n" * 253)  # with `.pub` it is longer than a name may be
    with pytest.raises(DiskError, match="too long"):
        make_key(long)
    assert not long.exists()
    with pytest.raises(RecipeError, match="no private"):
        sign(b"data", public)
    with pytest.raises(RecipeError, match="no public"):
        check(b"data", b"", tmp_path / "key")
    with pytest.raises(RecipeError, match="cannot be read"):
        sign(b"data", tmp_path / "none")


# Hostile bundles: what someone makes who can count sums.


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundle_of(tmp_path, SMALL)
    return tmp_path / "bundle"


@pytest.mark.parametrize("name", [SUMS, FILES])
@pytest.mark.parametrize("path", ["../outside", "/etc/outside", "content/../../outside"])
def test_a_list_that_leaves_the_bundle(bundle: Path, tmp_path: Path, name: str, path: str) -> None:
    (tmp_path / "outside").write_text("secret")
    listed = read_list((bundle / name).read_text(), name)
    rewritten(bundle, name, listed | {path: sum_of(tmp_path / "outside")})
    with pytest.raises(CheckError, match="leaves the bundle") as caught:
        load(bundle, tmp_path / "to", quiet)
    assert caught.value.where == name
    assert not (tmp_path / "to").exists()
    done = install(bundle, tmp_path / "to")
    assert done.returncode == 6
    assert "path" in done.stderr
    assert not (tmp_path / "to").exists()


def test_links_are_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SMALL["content/model/weights"])
    file = bundle / "content/model/weights"
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckError, match="no plain file") as caught:
        verify(bundle, quiet)
    assert caught.value.where == "content/model/weights"
    assert "link" in install(bundle, tmp_path / "to").stderr


def test_a_linked_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "content/model").rename(tmp_path / "model")
    (bundle / "content/model").symlink_to(tmp_path / "model")
    with pytest.raises(CheckError, match="no plain file"):
        verify(bundle, quiet)


def test_a_pipe_does_not_hold_us_up(bundle: Path, tmp_path: Path) -> None:
    (bundle / "content/empty").unlink()
    os.mkfifo(bundle / "content/empty")
    with pytest.raises(CheckError, match="no plain file"):
        verify(bundle, quiet)
    done = install(bundle, tmp_path / "to")
    assert done.returncode == 6
    assert "no plain file" in done.stderr
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", ["content/more", "SHA256SUMS.part", "content/SHA256SUMS", "content/a b", "two\nlines"])
def test_a_file_nobody_named(bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle / name).write_text("x")
    with pytest.raises(CheckError, match="does not name this file") as caught:
        verify(bundle, quiet)
    assert caught.value.where == name
    done = install(bundle, tmp_path / "to")
    assert done.returncode == 6
    assert "does not name this file" in done.stderr
    assert not (tmp_path / "to").exists()


def test_a_file_that_is_not_there(bundle: Path, tmp_path: Path) -> None:
    (bundle / "content/empty").unlink()
    with pytest.raises(CheckError, match="missing") as caught:
        verify(bundle, quiet)
    assert caught.value.where == "content/empty"
    assert "content/empty" in install(bundle, tmp_path / "to").stderr


def test_a_file_in_one_list_alone(bundle: Path) -> None:
    files = read_list((bundle / FILES).read_text(), FILES)
    rewritten(bundle, FILES, files | {"content/none": "0" * 64})
    with pytest.raises(CheckError, match="missing") as caught:
        verify(bundle, quiet)
    assert caught.value.where == "content/none"
    del files["content/empty"]
    rewritten(bundle, FILES, files)
    with pytest.raises(CheckError, match="FILES does not know"):
        verify(bundle, quiet)


def test_two_sums_for_a_file(bundle: Path) -> None:
    files = read_list((bundle / FILES).read_text(), FILES)
    rewritten(bundle, FILES, files | {"content/empty": "0" * 64})
    with pytest.raises(CheckError, match="two sums") as caught:
        verify(bundle, quiet)
    assert caught.value.where == "content/empty"


def test_a_file_that_grew(bundle: Path) -> None:
    os.truncate(bundle / "content/empty", 1 << 40)  # sparse: it would be hashed for hours
    with pytest.raises(CheckError, match="more than there should be") as caught:
        verify(bundle, quiet)
    assert caught.value.where == "content/empty"


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="missing"):
        verify(tmp_path, quiet)
    (tmp_path / SUMS).write_bytes(b"\xff")
    with pytest.raises(CheckError, match="no text"):
        verify(tmp_path, quiet)
    (tmp_path / SUMS).write_text("")
    with pytest.raises(CheckError, match=r"does not name FILES|does not name bundle.json"):
        verify(tmp_path, quiet)


def test_a_file_that_changes_after_the_check_is_found(bundle: Path, tmp_path: Path) -> None:
    found = verify(bundle, quiet)
    (bundle / "content/model/weights").write_bytes(b"\0" * len(SMALL["content/model/weights"]))
    with pytest.raises(CheckError, match="not what the bundle says"):
        list(found.blocks("content/model/weights"))


# Diffs.


def test_a_diff_holds_what_changed_and_installs_with_the_old_one(tmp_path: Path) -> None:
    large = {"content/model/large": random.Random(1).randbytes(3 * MB)}
    bundle_of(tmp_path / "old", SMALL | large, split=MB)
    new = SMALL | large | {"content/recipe.yaml": b"model: model\nseed: 1\n", "content/data/new": b"row\n"}
    del new["content/empty"]
    made = bundle_of(tmp_path / "new", new, older=[tmp_path / "old/bundle"])
    bundle, old = tmp_path / "new/bundle", tmp_path / "old/bundle"
    assert (made.files, made.here) == (4, 2)
    assert sorted(contents(bundle)) == [FILES, SUMS, FACTS, "content/data/new", "content/recipe.yaml", "install.sh"]
    assert verify(bundle, quiet).missing == ["content/model/large", "content/model/weights"]
    assert verify(bundle, quiet, older=[old]).missing == []
    with pytest.raises(CheckError, match="in an older bundle: tiny"):
        load(bundle, tmp_path / "none", quiet)
    assert "older bundle" in install(bundle, tmp_path / "none").stderr
    assert not (tmp_path / "none").exists()
    expected = {name.removeprefix("content/"): data for name, data in new.items()}
    load(bundle, tmp_path / "loaded", quiet, older=[old])
    assert contents(tmp_path / "loaded") == expected
    done = install(bundle, tmp_path / "installed", "--old", str(old))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "installed") == expected


def test_a_diff_is_held_to_the_bundle_it_builds_on(tmp_path: Path) -> None:
    bundle_of(tmp_path / "old", SMALL)
    bundle_of(tmp_path / "other", {"content/model/weights": b"other"})
    bundle_of(tmp_path / "new", SMALL, older=[tmp_path / "old/bundle"])
    with pytest.raises(CheckError, match="none of the bundles it builds on"):
        verify(tmp_path / "new/bundle", quiet, older=[tmp_path / "other/bundle"])
    (tmp_path / "old/bundle/content/model/weights").write_bytes(b"\1" * len(SMALL["content/model/weights"]))
    with pytest.raises(CheckError, match="not the one meant") as caught:
        verify(tmp_path / "new/bundle", quiet, older=[tmp_path / "old/bundle"])
    assert "content/model/weights" in str(caught.value.where)
    assert (
        "content/model/weights"
        in install(tmp_path / "new/bundle", tmp_path / "to", "--old", str(tmp_path / "old/bundle")).stderr
    )


# Stopped, and gone on with.


class Stopped(Exception):  # noqa: N818 - an ending, not a mistake
    """In place of a kill."""


@pytest.mark.parametrize("split", [None, MB])
def test_creating_goes_on_where_it_was_stopped(tmp_path: Path, split: int | None) -> None:
    files = {f"content/{letter}": random.Random(letter).randbytes(2 * MB + 7) for letter in "abcd"}
    content = content_of(tmp_path / "source", files)
    stops = [3 * MB]

    def stop(task: str, done: int, total: int | None) -> None:
        if stops and done > stops[0]:
            raise Stopped

    with pytest.raises(Stopped):
        create(Wanted("tiny", content, split=split), tmp_path / "bundle", stop)
    with pytest.raises(CheckError, match="missing"):
        verify(tmp_path / "bundle", quiet)  # no bundle yet
    kept = tmp_path / "bundle/content" / ("a.part0000" if split else "a")
    before = kept.stat().st_mtime_ns
    stops.clear()
    create(Wanted("tiny", content, split=split), tmp_path / "bundle", stop)
    assert kept.stat().st_mtime_ns == before
    load(tmp_path / "bundle", tmp_path / "to", quiet)
    assert contents(tmp_path / "to") == {name.removeprefix("content/"): data for name, data in files.items()}
    assert not [name for name in contents(tmp_path / "bundle") if name.rpartition("/")[2].startswith(".")]


def test_what_changed_in_between_is_put_in_again(tmp_path: Path) -> None:
    content = content_of(tmp_path / "source", {"content/a": b"old", "content/b": b"same", "content/c": bytes(MB)})

    def stop(task: str, done: int, total: int | None) -> None:
        if done > 100:
            raise Stopped

    with pytest.raises(Stopped):
        create(Wanted("tiny", content), tmp_path / "bundle", stop)
    (tmp_path / "source/content/a").write_bytes(b"newer")  # the source
    (tmp_path / "bundle/content/b").write_bytes(b"rots")  # what was put in
    create(Wanted("tiny", content), tmp_path / "bundle", quiet)
    load(tmp_path / "bundle", tmp_path / "to", quiet)
    assert contents(tmp_path / "to") == {"a": b"newer", "b": b"same", "c": bytes(MB)}


def test_loading_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    bundle_of(tmp_path, SMALL)
    load(tmp_path / "bundle", tmp_path / "to", quiet)
    (tmp_path / "to/recipe.yaml").write_text("half")
    before = (tmp_path / "to/model/weights").stat().st_mtime_ns
    load(tmp_path / "bundle", tmp_path / "to", quiet)
    assert (tmp_path / "to/recipe.yaml").read_bytes() == SMALL["content/recipe.yaml"]
    assert (tmp_path / "to/model/weights").stat().st_mtime_ns == before


# What is refused before anything is written.


def test_mistakes_in_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to bundle"):
        create(Wanted("tiny"), tmp_path / "bundle", quiet)
    with pytest.raises(RecipeError, match="too many"):
        bundle_of(tmp_path, SMALL, split=10)
    with pytest.raises(RecipeError, match="cannot be read"):
        bundle_of(tmp_path, SMALL, key=tmp_path / "none")
    with pytest.raises(RecipeError, match="no wheel"):
        bundle_of(tmp_path, SMALL, wheels=tmp_path)
    with pytest.raises(DiskError, match="No such file"):
        bundle_of(tmp_path, SMALL, compose=tmp_path / "none")
    assert not (tmp_path / "bundle").exists()
    for name in ("two\nlines", "\udcff"):
        with pytest.raises(RecipeError, match="no line of text"):
            create(Wanted(name, content_of(tmp_path / "named", SMALL)), tmp_path / "named bundle", quiet)
    assert not (tmp_path / "named bundle").exists()
    with pytest.raises(RunError, match="in use"):
        bundle_of(tmp_path / "source", SMALL)
        create(Wanted("tiny", content_of(tmp_path / "s", SMALL)), tmp_path / "s", quiet)
    with pytest.raises(RecipeError, match="looks like a part"):
        bundle_of(tmp_path / "x", {"content/a.part0000": b"x"})
    with pytest.raises(RecipeError, match="characters"):
        bundle_of(tmp_path / "y", {"content/a;b": b"x"})


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
    with pytest.raises(DiskError, match="are free"):
        bundle_of(tmp_path, SMALL)


def test_one_at_a_time(tmp_path: Path) -> None:
    content = content_of(tmp_path / "source", SMALL)

    def second(task: str, done: int, total: int | None) -> None:
        with pytest.raises(RunError, match="another process makes a bundle here"):
            create(Wanted("tiny", content), tmp_path / "bundle", quiet)

    create(Wanted("tiny", content), tmp_path / "bundle", second)
    assert verify(tmp_path / "bundle", quiet).files.keys() == SMALL.keys()
