"""The reference pages, made from what the program itself knows: `docs/generate.py` writes them, a test keeps them fresh."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from tunedock import errors
from tunedock.cli.app import app
from tunedock.recipe.schema import Recipe

_MADE = "<!-- Made by docs/generate.py; change the code, then run `make docs`. -->\n"


def pages() -> dict[str, str]:
    """File name under `docs/reference` -> Markdown."""
    return {"commands.md": commands_page(), "recipe.md": recipe_page(), "exit-codes.md": exit_codes_page()}


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
