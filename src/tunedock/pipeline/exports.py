"""What is asked of an export, checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tunedock.errors import RecipeError
from tunedock.recipe.exporting import Order, check


def order_of(fields: Mapping[str, Any]) -> Order:
    """Raises RecipeError for a value that cannot be, and for what does not go together."""
    try:
        order = Order.model_validate(dict(fields))
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        place = ".".join(map(str, item["loc"]))
        option = "--parameter" if place.startswith("parameters") else f"--{place.replace('_', '-')}"
        if place == "max_shard_size":  # else its pattern would be told
            raise RecipeError(f"`{item['input']}` is no size", where=option, hint="write 500MB or 5GB") from None
        raise RecipeError(f"`{item['input']}`: {item['msg']}", where=option) from None
    check(order)
    return order
