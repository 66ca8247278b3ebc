"""`formatting`, `ranking`, `columns` and `tags` of a data set -> a source's format and columns, or why tunedock cannot say it.

Once an entry has `columns`, every column it leaves out is none at all, not its default; the same goes for `tags`. tunedock would
read a column by its usual name, so one that LLaMA-Factory does not read is mapped to `NO_COLUMN`, a name no row has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunedock.recipe.importers_words import nearest, shown, tables

NO_COLUMN = "(none)"
"""Stands in `columns` for a column that is not to be read."""
PAIRWISE = ("dpo", "reward", "orpo", "simpo")
_MEDIA = ("images", "videos", "audios")
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}


@dataclass
class Columns:
    format: str | None = None
    format_key: str = "formatting"
    format_note: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    """The recipe's `columns`."""
    became: dict[str, str] = field(default_factory=dict)
    """Key of the entry -> our name of the column."""
    left: dict[str, str] = field(default_factory=dict)
    """Key of the entry -> why it has no place in a recipe; as `became`, also of keys it does not have."""
    notes: dict[str, str] = field(default_factory=dict)
    """Key the entry does not have -> what that means."""
    shut: list[str] = field(default_factory=list)
    """Our names of columns that LLaMA-Factory does not read, and tunedock shall not."""
    refusals: list[tuple[str, str, str | None, bool]] = field(default_factory=list)
    """(key, why, the way out, whether it is a mistake rather than something not built)."""

    def refuse(self, key: str, why: str, hint: str | None = None, *, built: bool = True) -> None:
        self.refusals.append((key, why, hint, built))


def of_entry(info: Mapping[str, Any], kind: str, seen: frozenset[str] | None) -> Columns:
    """An entry of dataset_info.json. `kind` is the objective's, `seen` the columns its rows have, None where they are not known."""
    found = Columns()
    formatting = info.get("formatting") or "alpaca"
    if not isinstance(formatting, str) or formatting not in _FORMATS:
        hint = nearest(str(formatting), list(_FORMATS))
        found.refuse("formatting", f"LLaMA-Factory has {', '.join(_FORMATS)}, not {shown(formatting)}", hint)
        return found
    columns, tags = _names(info, "columns", found), _names(info, "tags", found)
    for name in _MEDIA:
        if columns[name] is not None:
            found.refuse(
                f"columns.{name}", "images, videos and sounds are not read", "train on text alone", built=False
            )
    ranking = _ranking(info, columns, kind, found)
    if formatting == "alpaca":
        wanted = _alpaca(columns, kind, ranking, seen, found)
    else:
        wanted = _spoken(info, columns, tags, kind, found)
    for name, ours in (("system", "system"), ("tools", "tools")):
        if kind != "pretrain":
            wanted[name] = (ours, columns[name])
    if ranking:
        for name in ("chosen", "rejected"):
            if columns[name] is None:
                found.refuse(f"columns.{name}", "`ranking: true` needs it", "name the column")
            wanted[name] = (name, columns[name])
    if columns["kto_tag"] is not None and kind == "kto":
        wanted["kto_tag"] = ("label", columns["kto_tag"])
    found.format = (
        "preference"
        if ranking
        else "labelled"
        if kind == "kto"
        else "text"
        if kind == "pretrain"
        else _FORMATS[formatting]
    )
    _map(wanted, seen, found)
    _rest(info, formatting, found)
    return found


def of_converter(info: Mapping[str, Any], seen: frozenset[str] | None) -> Columns:
    """An entry of v1's data sets, whose converter names the format."""
    found = Columns(format_key="converter")
    converters = tables()["dataset_info"]["converters"]
    converter = info.get("converter")
    if converter is None:
        found.refuse(
            "converter",
            "without one the rows have v1's own form, whose texts are `{type, value}`",
            f"name one of {', '.join(converters)} where the rows have that form",
            built=False,
        )
        return found
    if not isinstance(converter, str) or converter not in converters:
        found.refuse(
            "converter",
            f"tunedock knows {', '.join(converters)}",
            nearest(str(converter), list(converters)),
            built=False,
        )
        return found
    found.format = converters[converter]
    if converter == "alpaca" and (seen is None or "input" in seen):
        found.format_note = "`input` follows `instruction` after a line break; v1 puts nothing between them"
    without = {"alpaca": ("history", "tools"), "sharegpt": ("system",)}.get(converter, ())
    _map({name: (name, None) for name in without}, seen, found)
    return found


def _names(info: Mapping[str, Any], section: str, found: Columns) -> dict[str, str | None]:
    """`columns` or `tags`, complete: with the section in the entry, what it leaves out is None; without it, its default."""
    defaults: dict[str, str | None] = tables()["dataset_info"][section]
    given = info.get(section)
    if given is None:
        return dict(defaults)
    if not isinstance(given, Mapping):
        found.refuse(section, "it should be a mapping of names", None)
        return dict(defaults)
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            found.refuse(f"{section}.{name}", f"it should be a name, not {shown(value)}", None)
        elif name not in defaults:
            hint = nearest(str(name), list(defaults))
            if hint:
                found.refuse(f"{section}.{name}", "there is no such name", hint)
            else:
                found.left[f"{section}.{name}"] = "LLaMA-Factory reads no such name"
    return {name: value if isinstance(value := given.get(name), str) else None for name in defaults}


def _ranking(info: Mapping[str, Any], columns: Mapping[str, str | None], kind: str, found: Columns) -> bool:
    ranking = info.get("ranking") or False
    if not isinstance(ranking, bool):
        found.refuse("ranking", "it should be true or false", None)
        return False
    tagged = columns["kto_tag"] is not None
    if ranking and kind not in (*PAIRWISE, "kto"):
        found.refuse(
            "ranking",
            f"`objective: {kind}` reads no pairs; LLaMA-Factory would drop every row",
            "use `stage: dpo` or `rm`; in a recipe, `objective: dpo` or `reward`",
        )
    elif not ranking and kind in PAIRWISE:
        found.refuse(
            "ranking", f"`objective: {kind}` compares two answers, and this data set has none", "set `ranking: true`"
        )
    if tagged and kind != "kto":
        found.refuse(
            "columns.kto_tag",
            f"`objective: {kind}` reads no verdicts; LLaMA-Factory would drop such rows",
            "use `stage: kto`; in a recipe, `objective: kto`",
        )
    elif tagged and ranking:
        found.refuse("ranking", "`columns.kto_tag` says that a row has one answer, this that it has two", "keep one")
    elif kind == "kto" and not tagged and not ranking:
        found.refuse(
            "columns.kto_tag",
            "`objective: kto` needs the column of verdicts, or pairs",
            "name it, or set `ranking: true` where rows have `chosen` and `rejected`",
        )
    if "ranking" in info:
        found.left["ranking"] = (
            "the format tells it; each pair is a wanted and an unwanted answer"
            if ranking and kind == "kto"
            else "the format tells it"
        )
    return ranking


_Wanted = dict[str, tuple[str, str | None]]
"""LLaMA-Factory's name of a column -> (ours, the file's, or None where it is not read)."""


def _alpaca(
    columns: Mapping[str, str | None], kind: str, ranking: bool, seen: frozenset[str] | None, found: Columns
) -> _Wanted:
    prompt, query, first = columns["prompt"], columns["query"], "prompt"
    if prompt is None:
        prompt, query, first = query, None, "query"
    if prompt is None:
        found.refuse(
            "columns.prompt",
            "once `columns` is there, what it leaves out is none: there is no prompt",
            "name the column",
        )
    if kind == "pretrain":
        if query is not None and (seen is None or query in seen):
            why = f"the text is one column here, and LLaMA-Factory joins `{prompt}` and `{query}`"
            found.refuse(
                "columns.query",
                why,
                f"write `columns: {{prompt: {prompt}}}`, or join the columns in the file",
                built=False,
            )
        return {first: ("text", prompt)}
    wanted: _Wanted = {first: ("instruction", prompt)}
    wanted["query" if first == "prompt" else "-"] = ("input", query)
    wanted["history"] = ("history", columns["history"])
    if not ranking:
        wanted["response"] = ("completion" if kind == "kto" else "output", columns["response"])
        if columns["response"] is None and kind != "ppo":
            why = "once `columns` is there, what it leaves out is none: there is no answer to train on"
            found.refuse("columns.response", why, "name the column")
    return wanted


def _spoken(
    info: Mapping[str, Any],
    columns: Mapping[str, str | None],
    tags: Mapping[str, str | None],
    kind: str,
    found: Columns,
) -> _Wanted:
    if kind == "pretrain":
        found.refuse(
            "formatting",
            "`objective: pretrain` reads a column of text, not turns",
            "use `formatting: alpaca`",
            built=False,
        )
        return {}
    if columns["messages"] is None:
        found.refuse(
            "columns.messages",
            "once `columns` is there, what it leaves out is none: there are no turns",
            "name the column",
        )
    wanted: _Wanted = {"messages": ("conversations", columns["messages"])}
    for tag, names in (("role_tag", ("from", "role")), ("content_tag", ("value", "content"))):
        if tags[tag] is None:
            found.refuse(f"tags.{tag}", "once `tags` is there, what it leaves out is none", "name it")
        elif tags[tag] in names:
            found.left[f"tags.{tag}"] = "read by its usual name"
        else:
            wanted[tag] = (tag.removesuffix("_tag"), tags[tag])
    for tag, roles in tables()["dataset_info"]["roles"].items():
        _role(info, tag, tags[tag], roles, found)
    return wanted


def _role(info: Mapping[str, Any], tag: str, role: str | None, roles: list[str], found: Columns) -> None:
    key = f"tags.{tag}"
    if role is None:
        if tag in ("user_tag", "assistant_tag"):
            found.refuse(
                key,
                "once `tags` is there, what it leaves out is none: LLaMA-Factory would drop every row",
                "name the role",
            )
        elif info.get("tags") is not None:
            found.notes[key] = f"LLaMA-Factory drops rows with such turns; tunedock reads them as {' or '.join(roles)}"
    elif role.lower() in roles:
        found.left[key] = "read by its usual name"
    else:
        found.refuse(
            key,
            f"this role is read under the names {', '.join(roles)} alone",
            f"rename `{role}` in the file",
            built=False,
        )


def _map(wanted: _Wanted, seen: frozenset[str] | None, found: Columns) -> None:
    """`columns` as short as it can be: a name that is read unasked is left out, unless another spelling of it would go before."""
    spellings: dict[str, list[str]] = tables()["dataset_info"]["spellings"]
    for name, (ours, theirs) in wanted.items():
        group = spellings.get(ours, [ours])
        if theirs is None:
            if ours in ("input", "history", "system", "tools") and (
                seen is None or any(other in seen for other in group)
            ):
                found.columns[ours] = NO_COLUMN
                found.shut.append(ours)
            continue
        alone = seen is not None and not any(other in seen for other in group if other != theirs)
        if not (
            (theirs == ours and len(group) == 1 and ours not in ("role", "content")) or (theirs in group and alone)
        ):
            found.columns[ours] = theirs
        found.became[f"tags.{name}" if name.endswith("_tag") and name != "kto_tag" else f"columns.{name}"] = ours


def _rest(info: Mapping[str, Any], formatting: str, found: Columns) -> None:
    """What stands in the entry and has not been told of."""
    told = {*found.became, *found.left, *(key for key, *_ in found.refusals)}
    for section in ("columns", "tags"):
        given = info.get(section)
        for name in given if isinstance(given, Mapping) else ():
            if f"{section}.{name}" not in told:
                found.left[f"{section}.{name}"] = f"`formatting: {formatting}` does not read it here"
