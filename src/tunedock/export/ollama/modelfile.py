"""The Modelfile: what Ollama makes a model of. Text from outside stays text: nothing in it can become an instruction.

Ollama's parser ends a text in three quotes at the next three quotes, drops characters Go does not call printable, and knows no
escapes. A template says such characters in Go's own way (`go_nodes`); a system text or a license that has them is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tunedock.errors import RecipeError
from tunedock.export.ollama.go_nodes import printable

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf")

Number = int | float

_FROM_GENERATION: Mapping[str, tuple[str, type[int] | type[float], float, float]] = {
    "temperature": ("temperature", float, 0.0, 100.0),
    "top_p": ("top_p", float, 0.0, 1.0),
    "top_k": ("top_k", int, 0, 1_000_000),
    "min_p": ("min_p", float, 0.0, 1.0),
    "repetition_penalty": ("repeat_penalty", float, 0.01, 100.0),
}
"""Key of generation_config.json -> Ollama's parameter, its type, and between what it makes sense."""


def parameters(generation: Mapping[str, Any], *, num_ctx: int | None = None) -> dict[str, Number]:
    """Ollama's parameters for a generation_config.json.

    `repeat_penalty` is always said: where none is, Ollama has used 1.1, which changes what a model says. Raises RecipeError for a
    value that is no number or out of its range.
    """
    found: dict[str, Number] = {"repeat_penalty": 1.0}
    for key, (name, kind, least, most) in _FROM_GENERATION.items():
        value = generation.get(key)
        if value is None:
            continue
        usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not usable or not least <= value <= most or (kind is int and value != int(value)):
            raise RecipeError(
                f"{value!r} is no {name} between {least:g} and {most:g}", where=f"generation_config.json: {key}"
            )
        found[name] = kind(value)
    if num_ctx is not None:
        if num_ctx < 1:
            raise RecipeError(f"a context of {num_ctx} tokens holds nothing", where="num_ctx")
        found["num_ctx"] = num_ctx
    return dict(sorted(found.items()))


def modelfile(
    *,
    gguf: str,
    template: str,
    stops: Iterable[str] = (),
    settings: Mapping[str, Number] | None = None,
    system: str | None = None,
    license_text: str | None = None,
) -> str:
    """The Modelfile's text. `gguf` is the name of a file beside it; `settings` are `parameters`.

    Raises RecipeError for a text a Modelfile cannot hold.
    """
    if not _FILE.fullmatch(gguf):
        raise RecipeError(
            f"{gguf!r} is no name of a GGUF file beside the Modelfile",
            where="Modelfile: FROM",
            hint="letters, digits, `.`, `_` and `-`, ending in .gguf",
        )
    lines = [f"FROM ./{gguf}", f"TEMPLATE {_quoted(template, 'TEMPLATE')}"]
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system, 'SYSTEM')}")
    lines += [f"PARAMETER stop {_quoted(stop, 'PARAMETER stop')}" for stop in dict.fromkeys(stops)]
    lines += [f"PARAMETER {name} {_number(name, value)}" for name, value in (settings or {}).items()]
    if license_text is not None:
        lines.append(f"LICENSE {_quoted(license_text, 'LICENSE')}")
    return "\n".join(lines) + "\n"


def _quoted(text: str, where: str) -> str:
    if not text:
        raise RecipeError("an empty text", where=f"Modelfile: {where}", hint="leave it out")
    if '"""' in text:
        raise RecipeError(
            "three quotes in a row end a text, and there is no way to write them", where=f"Modelfile: {where}"
        )
    lost = next((character for character in text if not printable(character)), None)
    if lost is not None:
        raise RecipeError(
            f"Ollama drops the character U+{ord(lost):04X} without a word",
            where=f"Modelfile: {where}",
            hint="replace it: an ideographic or no-break space by a plain one, a carriage return by nothing",
        )
    return f'"""{text}"""'


def _number(name: str, value: Number) -> str:
    if not re.fullmatch(r"[a-z_]+", name) or isinstance(value, bool) or not math.isfinite(value):
        raise RecipeError(f"{value!r} is no value of {name!r}", where="Modelfile: PARAMETER")
    return format(value, ".15g") if isinstance(value, float) else str(value)
