"""What pydantic finds wrong with a recipe, in the recipe's own words: key, value, what should stand there, and the way out."""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic import ValidationError

from tunedock.recipe.document import Key, at, dotted
from tunedock.recipe.kinds import KINDS
from tunedock.recipe.merge import Merge
from tunedock.recipe.problems import Problem
from tunedock.recipe.schema import Recipe
from tunedock.recipe.tracking import masked
from tunedock.recipe.words import hint_for, section_name, sections

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "too_short": "a list of at least {min_length}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "literal_error": "{expected}",
}
"""pydantic's error type -> what the recipe should have there."""

_NO_MAPPING = ("model_type", "model_attributes_type", "dict_type")

_SECTION_HINT = {
    "data": "write `data: {train: rows.jsonl}`",
    "model": "write a hub id or a folder: `model: Qwen/Qwen3-8B`",
    "adapter": "write `adapter: lora`, or `adapter: {kind: lora, r: 16}`",
    "objective": "write `objective: dpo`, or `objective: {kind: dpo, beta: 0.1}`",
}

_OLD_BOOLEANS = ("yes", "no", "on", "off", "True", "False", "TRUE", "FALSE", "Yes", "No")

_MISSING = {
    "model": "give a hub id or a folder: `model: Qwen/Qwen3-8B`",
    "model.path": "give a hub id or a folder: `model: Qwen/Qwen3-8B`",
    "data": "give the training data: `data: {train: rows.jsonl}`",
    "data.train": "give the training data: `data: {train: rows.jsonl}`",
}


ENVIRONMENT: Key = ("launch", "container", "env")


def choices(key: Key) -> list[str]:
    """The values a key can have today, read from the JSON schema so that they cannot go stale."""
    if key[-1] == "kind":
        return list(sections()[section_name(key[:-1])]["kind"])
    schema = Recipe.model_json_schema(mode="serialization")
    node: Any = schema
    for part in key:
        kinds = [_resolved(kind, schema) for kind in node.get("oneOf", [node])]
        node = _resolved(next(kind["properties"][part] for kind in kinds if part in kind["properties"]), schema)
    node = node.get("items", node)
    return [str(value) for value in node.get("enum", [node.get("const")])]


def _resolved(node: Any, schema: Any) -> Any:
    return schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def explain(error: ValidationError, values: dict[str, Any], merge: Merge) -> list[Problem]:
    """One problem a key, missing keys last: what was written wrong often tells why they are missing."""
    by_key: dict[Key, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_key.setdefault(_key(item["loc"], values), []).append(item)
    problems = []
    for key, items in by_key.items():
        inside = any(other != key and other[: len(key)] == key for other in by_key)
        if inside and isinstance(items[0]["input"], list):
            continue  # `[q_proj, 3]` is no text, says the other half of a union; the item that is wrong is told by itself
        problems.append(_problem(key, items, values, merge))
    return sorted(problems, key=lambda problem: problem.message.endswith("is missing"))


def _key(loc: tuple[int | str, ...], values: dict[str, Any]) -> Key:
    """The key an error is about: pydantic's path without the names of union members."""
    key: Key = ()
    told: Key = ()  # the section whose kind was passed over: a key of its own may be called like one
    for part in loc:
        kinds = sections().get(section_name(key), {}).get("kind", ()) if key else ()
        if part in kinds and key != told:
            told = key
            continue
        above = at(values, key)
        if isinstance(above, dict) or (isinstance(above, list) and isinstance(part, int)):
            key = (*key, part)
    return key


def _problem(key: Key, items: list[Any], values: dict[str, Any], merge: Merge) -> Problem:
    name, kind, value = dotted(key), items[0]["type"], items[0]["input"]
    origin = merge.origin(key)
    where = str(origin) if origin else None
    if kind == "missing":
        return Problem(f"`{name}` is missing", where, _MISSING.get(name), key=key)
    if kind == "extra_forbidden":
        section = at(values, key[:-1])
        if key[:-1] in KINDS:
            tag: str | None = str(section.get("kind", KINDS[key[:-1]] or "sft"))
        else:
            tag = section.get("kind") if isinstance(section, dict) else None
        return Problem(f"`{name}` is not a key of a recipe", where, hint_for(key, tag), key=key)
    if kind == "union_tag_invalid":
        return _wrong_kind((*key, "kind"), values, where)
    expected = " or ".join(dict.fromkeys(_expected(item) for item in items))
    hint = _SECTION_HINT.get(name) if kind in _NO_MAPPING else _value_hint(name, value, items[0])
    if key[: len(ENVIRONMENT)] == ENVIRONMENT and isinstance(value, str) and "=" in value:
        value = f"{value.partition('=')[0]}=***"  # refused because it may be a secret; it is not to be told either
    return Problem(f"`{name}: {_shown(value)}` should be {expected}", where, hint, key=key)


def _wrong_kind(key: Key, values: dict[str, Any], where: str | None) -> Problem:
    value, kinds = at(values, key), choices(key)
    near = difflib.get_close_matches(str(value), kinds, n=1)
    message = f"`{dotted(key)}: {_shown(value)}` should be {', '.join(kinds[:-1])} or {kinds[-1]}"
    return Problem(message, where, f"did you mean `{near[0]}`?" if near else None, key=key)


def _expected(item: Any) -> str:
    text = _EXPECTED.get(item["type"])
    if text:
        return text.format(**item.get("ctx", {})).replace("'", "")
    return str(item["msg"]).removeprefix("Value error, should be ")  # of a section's own validators


def _value_hint(name: str, value: Any, item: Any) -> str | None:
    kind = item["type"]
    if value is None:
        return f"give a value, or leave out `{name}` for its default"
    if kind == "literal_error":
        options = item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches("no" if value is False else str(value), options, n=1)
        return f"did you mean `{near[0]}`?" if near else None
    if kind == "string_type" and isinstance(value, bool | int | float | dict):
        return "put text that looks like a number or a mapping in quotes"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind in ("float_type", "int_type") and isinstance(value, str) and _is_number(value):
        return "write the number without quotes"
    if kind == "bool_type" and value in _OLD_BOOLEANS:
        return "YAML 1.2 knows true and false only"
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    """A value as it could stand in the file, in one line and not too long; passwords of addresses left out."""
    if isinstance(value, dict) and len(value) > 3:
        return "(a mapping)"
    plain = isinstance(value, str) and value.strip() and not _is_number(value)
    text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    text = masked(" ".join(str(text).split()))
    return text if len(text) <= 60 else text[:57] + "..."
