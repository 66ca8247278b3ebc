"""Names of models, aliases and versions, and MLflow's address of a version: `models:/support@production`, `models:/support/3`.

They come from command lines and from registries that others may write to, and go into terminals, paths of addresses and metrics.
Aliases keep MLflow's rules, and are no bare number either; names are narrower than MLflow's, which only excludes `/` and `:`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunedock.errors import RecipeError
from tunedock.registry import PRODUCTION

SCHEME = "models:/"

_MODEL = re.compile(r"\w(?:[\w .-]{0,126}[\w-])?")
_ALIAS = re.compile(r"[\w-]{1,255}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_RESERVED = re.compile(r"latest|v?[0-9]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reference:
    """What an address means: an alias of a model, or one version of it."""

    model: str
    alias: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.model}{f'@{self.alias}' if self.alias else f'/{self.version}'}"

    @property
    def called(self) -> str:
        """The name clients use, where none is given. No alias can be `vN`, so a version's name is no alias's."""
        if self.alias == PRODUCTION:
            return self.model
        return f"{self.model}@{self.alias if self.alias else f'v{self.version}'}"


def parse(text: str) -> Reference:
    """Raises RecipeError for what is no address of a version."""
    rest = text.removeprefix(SCHEME)
    model, at, alias = rest.partition("@")
    if at:
        if _VERSION.fullmatch(alias.removeprefix("v")):
            raise RecipeError(
                f"`{_shown(alias)}` is a version and no alias",
                where=_shown(text),
                hint=f"write {SCHEME}{_shown(model)}/{alias.removeprefix('v')}",
            )
        return Reference(model_name(model, text), alias=alias_name(alias, text))
    model, slash, version = rest.partition("/")
    if not slash:
        raise RecipeError(
            "it names neither an alias nor a version",
            where=_shown(text),
            hint=f"write {SCHEME}{_shown(model)}@{PRODUCTION}, or {SCHEME}{_shown(model)}/3",
        )
    if not _VERSION.fullmatch(version):
        raise RecipeError(
            f"`{_shown(version)}` is no version, and stages are MLflow's old way",
            where=_shown(text),
            hint=f"an alias moves and is served as it does: {SCHEME}{_shown(model)}@{PRODUCTION}",
        )
    return Reference(model_name(model, text), version=version)


def model_name(text: str, where: str = "NAME") -> str:
    """Raises RecipeError for what may not be a model's name."""
    if not _MODEL.fullmatch(text):
        raise RecipeError(
            f"`{_shown(text)}` is no name of a model: up to 128 letters, digits, `_`, `-`, `.` and blanks, "
            "and neither `.` nor a blank at an end",
            where=_shown(where),
            hint="a name such as `support` or `support-bot`",
        )
    return text


def is_alias(text: str) -> bool:
    """Whether it may be one, and is no version's number."""
    return bool(_ALIAS.fullmatch(text)) and not _RESERVED.fullmatch(text)


def alias_name(text: str, where: str = "alias") -> str:
    """Raises RecipeError for what may not be an alias."""
    if not _ALIAS.fullmatch(text):
        raise RecipeError(
            f"`{_shown(text)}` is no alias: 1 to 255 letters, digits, `_` and `-`",
            where=_shown(where),
            hint="a name such as `production` or `staging`",
        )
    if _RESERVED.fullmatch(text):
        raise RecipeError(
            f"`{text}` is reserved: it would be taken for a version",
            where=_shown(where),
            hint="a name such as `production` or `staging`",
        )
    return text


def version_number(text: str, where: str = "VERSION") -> str:
    """Raises RecipeError for what is no version's number."""
    found = text.removeprefix("v")
    if not _VERSION.fullmatch(found):
        raise RecipeError(
            f"`{_shown(text)}` is no version, which is a number from 1 on",
            where=where,
            hint="`tunedock models list NAME` lists those there are",
        )
    return found


def _shown(text: str) -> str:
    """Short, and nothing that moves a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])


def image_reference(text: str) -> str:
    """Raises RecipeError for what is no name of an image. Whether there is such an image is not asked."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,499}", text):
        raise RecipeError(
            f"`{_shown(text)}` is no name of an image",
            where="--image",
            hint="registry.example/support@sha256:..., or a tag",
        )
    return text
