"""What every section of a recipe is, and the kinds of value that several have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # `r: true` is no rank, `"3"` no number: YAML has types, so nothing is guessed from text
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def switch(value: object) -> object:
    """`on` and `off`, which YAML 1.1 and some editors take for true and false."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def shorthand(key: str, accepts: Any) -> BeforeValidator:
    """A bare string stands for `{key: string}`. `accepts` is what editors are told may stand here."""
    return BeforeValidator(
        lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=str | accepts
    )


def tagged(default: str) -> Callable[[Any], Any]:
    """Of a union told apart by `kind`: `name` is `{kind: name}`, and settings without a kind are of the kind `default`."""

    def kind(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": default, **value} if isinstance(value, dict) else value

    return kind
