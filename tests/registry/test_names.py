"""Names of models and aliases, and MLflow's addresses: what is taken, and what is refused before it goes anywhere."""

from __future__ import annotations

import pytest

from tunedock.errors import RecipeError
from tunedock.registry.names import Reference, alias_name, image_reference, model_name, parse, version_number


@pytest.mark.parametrize(
    ("text", "wanted", "called"),
    [
        ("models:/support@production", Reference("support", alias="production"), "support"),
        ("models:/support@staging", Reference("support", alias="staging"), "support@staging"),
        ("models:/support/3", Reference("support", version="3"), "support@v3"),
        ("models:/a bot v1.2@blue-green_1", Reference("a bot v1.2", alias="blue-green_1"), "a bot v1.2@blue-green_1"),
        ("models:/客服@production", Reference("客服", alias="production"), "客服"),
    ],
)  # fmt: skip
def test_addresses(text: str, wanted: Reference, called: str) -> None:
    assert parse(text) == wanted
    assert wanted.called == called
    assert str(wanted) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models:/support", "neither an alias nor a version"),
        ("models:/support/latest", "no version"),
        ("models:/support/Production", "MLflow's old way"),
        ("models:/support/0", "no version"),
        ("models:/support/1/2", "no version"),
        ("models:/support@latest", "reserved"),
        ("models:/support@V3", "reserved"),
        ("models:/support@v3", "write models:/support/3"),
        ("models:/support@3", "write models:/support/3"),
        ("models:/support@", "no alias"),
        ("models:/support@a b", "no alias"),
        ("models:/@production", "no name of a model"),
        ("models:/../etc/passwd@production", "no name of a model"),
        ("models:/a:b@production", "no name of a model"),
        ("models:/\x1b[31mred@production", "no name of a model"),
        ("models:/support@\u202eprod", "no alias"),
    ],
)
def test_addresses_that_are_none(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        parse(text)
    assert str(caught.value).replace("\n", "").isprintable()


def test_names() -> None:
    for name in ("a", "support", "support-bot_2.1", "客服", "x" * 128):
        assert model_name(name) == name
    for name in ("", ".", "..", "a/b", "a:b", "a@b", "a%2e", " a", "a ", "a.", "x" * 129, "a\nb", "a'b", "-a"):
        with pytest.raises(RecipeError, match="no name of a model"):
            model_name(name)
    assert alias_name("a" * 255) == "a" * 255
    for alias in ("a" * 256, "", "a.b", "latest", "LATEST", "v1", "V007", "7"):
        with pytest.raises(RecipeError):
            alias_name(alias)
    assert [version_number("3"), version_number("v3")] == ["3", "3"]
    for number in ("0", "-1", "1.0", "", "three", "1" * 10, "٣"):
        with pytest.raises(RecipeError, match="no version"):
            version_number(number)
    assert image_reference("registry:5000/support@sha256:" + "a" * 64)
    for image in ("", "a b", "a;b", "-x", "a\nb", "$(id)"):
        with pytest.raises(RecipeError, match="no name of an image"):
            image_reference(image)
