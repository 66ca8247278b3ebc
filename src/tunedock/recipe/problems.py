"""What is wrong with a recipe, all of it at once: a list of problems becomes one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunedock.errors import NotBuiltError, RecipeError
from tunedock.recipe.document import Key


@dataclass(frozen=True, slots=True)
class Problem:
    message: str
    """Names the key and the value given."""
    where: str | None = None
    """`recipe.yaml:12`, or `command line`."""
    hint: str | None = None
    not_built: bool = False
    key: Key = ()
    """The key it is about, so that one fault is told once."""


def error_of(problems: Sequence[Problem], hint: str | None = None) -> RecipeError:
    """One error that says every problem. A NotBuiltError when tunedock would have to grow to mend one of them.

    `hint`: a way out of all of them at once, where there are several.
    """
    kind = NotBuiltError if any(problem.not_built for problem in problems) else RecipeError
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return kind(unique[0].message, where=unique[0].where, hint=unique[0].hint)
    lines = [f"the recipe has {len(unique)} problems"]
    for problem in unique:
        lines.append(f"  {problem.where}: {problem.message}" if problem.where else f"  {problem.message}")
        if problem.hint:
            lines.append(f"    hint: {problem.hint}")
    return kind("\n".join(lines), hint=hint)
