"""The reference pages, made from what the program itself knows: `docs/generate.py` writes them, a test keeps them fresh."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from tunedock import errors
from tunedock.cli.app import app
from tunedock.recipe.optimizers import table
from tunedock.recipe.schema import Recipe

_MADE = "<!-- Made by docs/generate.py; change the code, then run `make docs`. -->\n"


def pages() -> dict[str, str]:
    """File name under `docs/reference` -> Markdown."""
    return {
        "commands.md": commands_page(),
        "recipe.md": recipe_page(),
        "optimizers.md": optimizers_page(),
        "exit-codes.md": exit_codes_page(),
    }


def commands_page() -> str:
    parts = [_MADE, "# Commands\n"]
    for path, command in _commands("tunedock", typer.main.get_command(app)):
        parts.append(f"## `{path}`\n\n{_flow(command.help or '')}\n")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join([path, *(_usage(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
        parts.append(f"```\n{usage}\n```\n")
        rows = [(_declaration(p), _about(p)) for p in (*arguments, *options) if p.name not in ("help", "_help")]
        if rows:
            parts.append(_table(("argument or option", "meaning"), rows))
    return "\n".join(parts)


_OPTIMIZERS = """# Optimizers

`train.optim` takes the names of transformers, and `muon`. A name makes the optimizer that transformers' Trainer makes of it,
with the recipe's `adam_beta1`, `adam_beta2`, `adam_epsilon` and `weight_decay`; `train.optim_args` are its further arguments.
Weight decay spares norms and biases. States are part of every checkpoint, those in 8 bits too: a resumed run goes on bit by
bit.

`tunedock plan` counts the states; bytes are those of one trained number. Packages: `pip install 'tunedock[optimizers]'`
brings those of schedule-free, GaLore, APOLLO and StableAdamW, `tunedock[quantize]` bitsandbytes.
"""

_OPTIMIZER_NOTES = """## Which matrices

Muon makes the singular values of an update equal, which means something for a matrix between hidden states. It takes every
trained weight of two dimensions but embeddings and heads, the two factors of a LoRA each by itself; AdamW takes the rest. Its
steps are scaled by 0.2 times the root of the longer side (arXiv 2502.16982), so that one learning rate and one weight decay,
as for AdamW, serve both. `optim_args: adjust_lr_fn=original` takes the scale of the first publication; `momentum`,
`nesterov`, `ns_steps` and `eps` are further arguments.

GaLore and APOLLO hold the moments of whole matrices at a low rank, so they go with `adapter: full` or `freeze`.
`train.optim_target_modules` says of which: `all-linear`, or words or expressions, as transformers reads them; those of
attention and feed-forward parts by default. What is not named goes by the optimizer's plain step.

## Schedule-free

The weights that are trained are not the weights that are good: the optimizer keeps an average of them. Validation, the best
checkpoint and the result are of the average; a checkpoint holds the weights of training, and what it takes to average them.
There is no schedule (`lr_scheduler_type: constant`, which is the default with these), a warm-up is the optimizer's own.

## Not taken

| name | why | instead |
| --- | --- | --- |
"""


def optimizers_page() -> str:
    """The table of optimizers, and what is particular about some."""
    rows = [
        (
            f"`{name}`",
            facts.package or "-",
            facts.stores,
            "by shape" if facts.low_rank else f"{facts.bytes:g}" if facts.matrix_bytes is None else "4 or 8",
            facts.note,
        )
        for name, facts in table().items()
        if facts.refused is None
    ]
    refused = [
        f"| `{name}` | {facts.refused} | `{facts.instead}` |" for name, facts in table().items() if facts.refused
    ]
    known_ = _table(("name", "package", "what it stores", "bytes", "notes"), rows)
    return "\n".join([_MADE, _OPTIMIZERS, known_, _OPTIMIZER_NOTES.rstrip("\n"), *refused]) + "\n"


def recipe_page() -> str:
    """Every key by section, from the schema that checks recipes."""
    schema = Recipe.model_json_schema(mode="serialization")
    intro = (
        "A recipe is one YAML file. A section of defaults may be left out. `model`, `objective`, `adapter` and each source of "
        "data may be a bare string: `model: Qwen/Qwen3-8B`, `objective: dpo`, `adapter: full`, `train: rows.jsonl`. "
        "`tunedock recipe show` prints every value and where it came from."
    )
    parts = [_MADE, "# Recipe\n", f"{intro}\n"]
    for title, section in _sections(schema, schema["$defs"]):
        parts.append(f"## {title}\n")
        if section.get("description") and title != TOP:
            parts.append(f"{_flow(section['description'])}\n")
        rows = [
            (f"`{name}`", _type(key), _default(section, name, key), _flow(key.get("description", "")))
            for name, key in section["properties"].items()
        ]
        parts.append(_table(("key", "value", "default", "meaning"), rows))
    return "\n".join(parts)


def exit_codes_page() -> str:
    """The codes and their meaning, from the tree at the top of `tunedock.errors`."""
    meanings = dict(re.findall(r"^\s*[├└]── (\w+) +\d+ +(.+)$", errors.__doc__ or "", re.MULTILINE))
    rows = [("0", "", "all went well")]
    for code, names in errors.exit_codes().items():
        if code == errors.TunedockError.exit_code:
            rows.append((str(code), "", "a question was answered by no"))
            continue
        rows.append((str(code), ", ".join(f"`{name}`" for name in names), meanings[names[0]]))
    intro = (
        "A command ends with one of these codes. They are stable. With `--json` the error stands on standard output as "
        '`{"error": {"kind", "message", "where", "hint"}}`, `kind` being the name below.'
    )
    return "\n".join([_MADE, "# Exit codes\n", f"{intro}\n", _table(("code", "error", "meaning"), rows)])


TOP = "Top level"


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        yield from _commands(f"{path} {name}", child)


def _usage(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    name = f"{name}..." if parameter.nargs == -1 else name
    return name if parameter.required else f"[{name}]"


def _declaration(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return f"`{' '.join(filter(None, (', '.join(parameter.opts), parameter.metavar)))}`"


def _about(parameter: Any) -> str:
    default = parameter.default
    default = getattr(default, "value", default)
    about = _flow(parameter.help or "")
    return f"{about} Default: `{default}`." if isinstance(default, str) and default else about


def _sections(schema: dict[str, Any], defs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(title, schema) of every mapping in the recipe, in the order of its keys."""
    yield TOP, schema

    def below(section: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, key in section["properties"].items():
            here = f"{path}.{name}" if path else name
            found = list(dict.fromkeys(_references(key)))
            for reference in found:
                child = defs[reference]
                if "properties" not in child or here in ("data.validation", "data.test"):
                    continue  # sources of validation and test are those of `data.train`
                kind = child["properties"].get("kind", {}).get("const")
                yield f"`{here}`" + (f" of kind `{kind}`" if kind and len(found) > 1 else ""), child
                yield from below(child, here)

    yield from below(schema, "")


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].rsplit("/", 1)[-1]
        for name, child in value.items():
            if name in ("anyOf", "oneOf", "items", "allOf"):
                yield from _references(child)
    elif isinstance(value, list):
        for child in value:
            yield from _references(child)


def _type(key: dict[str, Any]) -> str:
    """What may stand there, in words."""
    if "const" in key:
        return f"`{key['const']}`"
    if "enum" in key:
        return ", ".join(f"`{value}`" for value in key["enum"])
    for union in ("anyOf", "oneOf"):
        if union in key:
            return " or ".join(dict.fromkeys(_type(option) for option in key[union] if option.get("type") != "null"))
    if "$ref" in key:
        return "section"
    if key.get("type") == "array":
        return f"list of {_type(key.get('items', {}))}"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "string": "text",
        "object": "mapping",
    }
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {key[name]:,}" for name, sign in signs.items() if name in key]
    return " ".join([words.get(str(key.get("type")), "any value"), ", ".join(limits)]).strip()


def _default(section: dict[str, Any], name: str, key: dict[str, Any]) -> str:
    """In serialization mode the schema calls every key required, so only a default tells; sections have their own table."""
    if any(True for _ in _references(key)) and key.get("type") != "array":
        return ""
    if "default" not in key:
        return "" if "const" in key else "required"
    return "" if key["default"] is None else f"`{json.dumps(key['default'], ensure_ascii=False)}`"


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _flow(text: str) -> str:
    return " ".join(text.split())
