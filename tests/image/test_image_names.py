"""What names of images mean."""

from __future__ import annotations

import pytest

from tunedock.errors import RecipeError
from tunedock.image.reference import parse

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("name", "place", "tag", "digest"),
    [
        ("support-bot:production", "docker.io/library/support-bot", "production", None),
        ("team/bot", "docker.io/team/bot", None, None),
        ("localhost/bot:1", "localhost/bot", "1", None),
        ("127.0.0.1:5000/a/b_c__d-e:v1.2", "127.0.0.1:5000/a/b_c__d-e", "v1.2", None),
        ("[::1]:5000/bot:1", "[::1]:5000/bot", "1", None),
        (f"harbor.example/p/bot@{DIGEST}", "harbor.example/p/bot", None, DIGEST),
        (f"harbor.example/p/bot:1@{DIGEST}", "harbor.example/p/bot", "1", DIGEST),
        ("index.docker.io/team/bot:1", "docker.io/team/bot", "1", None),
    ],
)
def test_names(name: str, place: str, tag: str | None, digest: str | None) -> None:
    found = parse(name)
    assert (found.place, found.tag, found.digest) == (place, tag, digest)
    assert str(parse(str(found))) == str(found)


@pytest.mark.parametrize(
    "name",
    [
        "", ":", "@", "Bot", "a//b", "a/../b", "../a", "a:b:c", "bot:", f"bot@{DIGEST}00", "bot@sha256:zz", "bot:-x", "-x/bot",
        "http://host/bot", "user@host/bot", "host:99999999/bot", "bot:" + "x" * 129, "a" * 300, "bot\n", "bot:1\n", "ho st/bot",
        "..:5/a", "host:99999/bot", "[::1]:70000/bot",
    ],
)  # fmt: skip
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(name)
    assert caught.value.hint
