"""The Modelfile of an export, and what came of holding its template against the model's own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunedock.errors import CheckError
from tunedock.export.gguf.vocabulary import adds_bos
from tunedock.export.ollama.compare import Comparison, compare, require
from tunedock.export.ollama.derive import derive
from tunedock.export.ollama.modelfile import Number, modelfile, parameters
from tunedock.export.ollama.own import own_render
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.session import Base

MODELFILE = "Modelfile"
CONTEXT = 4096
"""Tokens of the context Ollama is given, where neither the model has fewer nor the run's rows have more."""

_FIXED = re.compile(r'^(?:TEMPLATE """.*?"""|PARAMETER stop """.*?""")$', re.MULTILINE | re.DOTALL)


def make(
    folder: Path,
    gguf: str,
    base: Base,
    facts: ChatFacts,
    *,
    generation: Mapping[str, Any],
    longest: int,
    system: str | None,
    given: Mapping[str, Number],
) -> Comparison:
    """Writes the Modelfile. `generation` is the model's generation config, `longest` its largest context, `given` parameters that
    are asked for.

    Raises CheckError where a plain conversation is rendered otherwise, RecipeError for a text that cannot be said.
    """
    tokenizer = base.tokenizer
    render = own_render(tokenizer, facts.stop_ids)
    derived = derive(render, bos=str(tokenizer.bos_token) if adds_bos(tokenizer) else "", thinking=facts.thinking)
    comparison = compare(derived, render)
    require(comparison)
    context = min(longest, max(CONTEXT, base.recipe.data.max_length))
    text = modelfile(
        gguf=gguf,
        template=derived.template,
        stops=tokenizer.convert_ids_to_tokens(facts.stop_ids),
        settings={**parameters(generation, num_ctx=context), **given},
        system=system if system is not None else facts.system,
    )
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    return comparison


def fixed(folder: Path) -> str:
    """A hash (hex) of what in a Modelfile must stay as it was made: template and stops. System text and parameters are anybody's.

    Raises CheckError where there is no Modelfile.
    """
    try:
        text = (folder / MODELFILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckError(f"cannot be read: {error}", where=str(folder / MODELFILE), hint="export again") from None
    return hashlib.sha256("\n".join(sorted(_FIXED.findall(text))).encode()).hexdigest()
