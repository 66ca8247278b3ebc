"""`tunedock models register`, `list`, `show`, `promote`, `rollback`, `unalias`: versions of models, and which one is served."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunedock.cli.options import RUNS_DIR, Json, RunsDir, group
from tunedock.registry import DEFAULT_REGISTRY, PRODUCTION

if TYPE_CHECKING:
    from tunedock.registry.acts import Acts, Moved
    from tunedock.registry.client import ModelEntry, Registry
    from tunedock.registry.history import Standing
    from tunedock.registry.record import Version

app = group("Keep versions of models, and say which one is served.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A model, as clients call it.", show_default=False)]
At = Annotated[
    str,
    typer.Option(
        "--registry", metavar="FILE|URL", help="A SQLite file, postgresql://USER@HOST/DATABASE, or MLflow's server."
    ),
]
AuditFile = Annotated[
    str | None,
    typer.Option(
        "--audit", metavar="FILE", help="Where acts are noted; beside a registry in a file by default.", show_default=False
    ),
]  # fmt: skip
VersionArgument = Annotated[
    str, typer.Argument(metavar="VERSION|ALIAS", help="A version's number, or the alias of one.", show_default=False)
]


@app.command("register")
def register(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|DIR|FILE.gguf",
            help="A run, an exported folder, an adapter, or a GGUF file.",
            show_default=False,
        ),
    ],
    alias: Annotated[
        str | None, typer.Option("--alias", metavar="ALIAS", help="Promote it at once.", show_default=False)
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="REF", help="The image it is served in, by its digest.", show_default=False),
    ] = None,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="What is new about it.", show_default=False)] = "",
    registry: At = DEFAULT_REGISTRY,
    audit: AuditFile = None,
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Register a version of a model: where its files are, their sums, and what it came from.

    The files stay where they are. A gateway that loads them checks the sums, and refuses files that have changed.
    """
    from tunedock.cli.image_versions import progress
    from tunedock.cli.text import print_json, printable
    from tunedock.registry.names import alias_name, image_reference, model_name
    from tunedock.registry.source import kind_of, record_of

    model_name(name)
    if alias is not None:
        alias_name(alias, "--alias")
    kind, place = kind_of(source, Path(runs_dir))
    reference = None if image is None else image_reference(image)
    acts = _acts(registry, audit, create=True)
    with progress() as tell:
        record = record_of(
            kind, place, Path(runs_dir), image=reference, tell=lambda done, all_: tell("read", done, all_)
        )
    made = acts.register(name, place, record, note=note, alias=alias)
    if as_json:
        print_json(_version_json(made, acts.registry.entry(name)))
    else:
        print(printable(f"{name} version {made.number}{f', {alias}' if alias else ''}: {place}"))


@app.command("list")
def list_(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One model's versions.", show_default=False)
    ] = None,
    registry: At = DEFAULT_REGISTRY,
    as_json: Json = False,
) -> None:
    """List the models of a registry, or the versions of one and what its aliases stood for."""
    opened = _opened(registry)
    if name is None:
        _list_models(opened, as_json)
    else:
        _list_versions(opened, name, as_json)


@app.command("show")
def show(name: Name, version: VersionArgument, registry: At = DEFAULT_REGISTRY, as_json: Json = False) -> None:
    """Show what one version is: its run, data, image, base, figures, and the sums of its files."""
    from tunedock.cli.results import add_row, number, table
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json
    from tunedock.run.store import flatten

    opened = _opened(registry)
    entry = opened.entry(name)
    found = opened.version(name, _number(entry, version))
    told = _version_json(found, entry)
    if as_json:
        print_json(told)
        return
    told |= {"aliases": ", ".join(told["aliases"]) or "-", "created": _day(found.created_s), "note": found.note or "-"}
    made = table("", "")
    made.show_header = False
    for key, value in flatten(
        {key: value for key, value in told.items() if key not in ("files", "base_files")}
    ).items():
        add_row(made, key.replace("_", " "), value if isinstance(value, str) else number(value))
    size = sum(one.bytes for one in found.record.sums().values())
    add_row(made, "files", f"{len(found.record.files)} of {size:,} bytes in all")
    console().print(made)


@app.command("promote")
def promote(
    name: Name,
    version: VersionArgument,
    to: Annotated[str, typer.Option("--to", metavar="ALIAS", help="The alias that moves.")] = PRODUCTION,
    canary: Annotated[
        str | None,
        typer.Option("--canary", metavar="SHARE", help="For this share of the callers alone: 10%.", show_default=False),
    ] = None,
    registry: At = DEFAULT_REGISTRY,
    audit: AuditFile = None,
    as_json: Json = False,
) -> None:
    """Move an alias such as `production` to a version. Gateways follow within a second, and drop no request.

    With --canary the alias stays, and the version answers a share of the callers, always the same ones; `--canary 0%` ends that.
    """
    from tunedock.registry.canary import parse_percent

    percent = None if canary is None else parse_percent(canary)
    acts = _acts(registry, audit)
    number = _number(acts.registry.entry(name), version)
    _told(acts.promote(name, number, to, percent), as_json)


@app.command("rollback")
def rollback(
    name: Name,
    from_: Annotated[str, typer.Option("--from", metavar="ALIAS", help="The alias that goes back.")] = PRODUCTION,
    registry: At = DEFAULT_REGISTRY,
    audit: AuditFile = None,
    as_json: Json = False,
) -> None:
    """Take back what was done last: end a canary that runs, else move the alias to the version before.

    Done again it goes one version further back, never forward to what was just rolled back from.
    """
    _told(_acts(registry, audit).roll_back(name, from_), as_json)


@app.command("unalias")
def unalias(
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The alias to drop.", show_default=False)],
    registry: At = DEFAULT_REGISTRY,
    audit: AuditFile = None,
    as_json: Json = False,
) -> None:
    """Drop an alias. Gateways go on with what they serve by it until they are started again."""
    _told(_acts(registry, audit).drop_alias(name, alias), as_json)


def _opened(place: str, *, create: bool = False) -> Registry:
    from tunedock.registry.client import Registry

    return Registry.open(place, create=create)


def _acts(place: str, audit: str | None, *, create: bool = False) -> Acts:
    from tunedock.registry.acts import Acts, audit_of

    registry = _opened(place, create=create)
    return Acts(registry, audit_of(registry, None if audit is None else Path(audit)))


def _number(entry: ModelEntry, text: str) -> str:
    """A version's number, given as that or by an alias."""
    from tunedock.errors import RecipeError
    from tunedock.registry.names import is_alias, version_number

    if not is_alias(text):  # nor is one that another tool has called `3`
        return version_number(text)
    if text not in entry.aliases:
        raise RecipeError(
            f"`{entry.name}` has no alias `{text}`",
            where="VERSION",
            hint=f"`tunedock models list {entry.name}` lists its versions and aliases",
        )
    return entry.aliases[text]


def _list_models(registry: Registry, as_json: bool) -> None:
    from tunedock.cli.results import add_row, table
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json

    entries = registry.entries()
    if as_json:
        print_json({"models": [_entry_json(entry) for entry in entries]})
        return
    made = table("model", "alias", "version")
    for entry in entries:
        rows = [(alias, _standing(entry.standing(alias))) for alias in sorted(entry.aliases)] or [("-", "-")]
        for at, (alias, stands) in enumerate(rows):
            add_row(made, "" if at else entry.name, alias, stands)
    console().print(made)


def _list_versions(registry: Registry, name: str, as_json: bool) -> None:
    from tunedock.cli.results import add_row, number, table
    from tunedock.cli.show import console
    from tunedock.cli.text import one_line, print_json
    from tunedock.registry.history import notes

    entry, versions = registry.entry(name), registry.versions(name)
    past = {alias: notes(alias, entry.tags) for alias in sorted(entry.aliases)}
    if as_json:
        told = [
            {"version": one} if isinstance(one, str) else _version_json(one, entry, files=False) for one in versions
        ]
        acts = {alias: [{"at": note.at_ns / 1e9, **note.to_json()} for note in each] for alias, each in past.items()}
        print_json({**_entry_json(entry), "versions": told, "history": acts})
        return
    made = table("version", "alias", "created", "run", "eval loss", "note")
    for one in versions:
        if isinstance(one, str):
            add_row(made, one, ", ".join(entry.aliases_of(one)) or "-", "-", "not of tunedock", "-", "-")
            continue
        loss = (one.record.metrics or {}).get("eval_loss")
        aliases = ", ".join(entry.aliases_of(one.number)) or "-"
        run = one.record.run or one.place.name
        add_row(made, one.number, aliases, _day(one.created_s), run, number(loss), one_line(one.note, 60) or "-")
    console().print(made)
    for alias in sorted(entry.aliases):
        if entry.standing(alias).canary is not None:
            console().print(f"{alias}: {_standing(entry.standing(alias))}", markup=False)


def _told(moved: Moved, as_json: bool) -> None:
    from tunedock.cli.text import print_json, printable

    if as_json:
        print_json(moved.to_json())
        return
    was = f"; it was {_standing(moved.before)}" if moved.changed else ", as before"
    print(printable(f"{moved.model}@{moved.alias} is {_standing(moved.now)}{was}"))


def _standing(standing: Standing) -> str:
    if standing.version is None:
        return "nothing"
    canary = standing.canary
    return f"version {standing.version}" + (f", {canary.percent:g}% version {canary.version}" if canary else "")


def _entry_json(entry: ModelEntry) -> dict[str, Any]:
    standings = {alias: entry.standing(alias) for alias in sorted(entry.aliases)}
    canaries = {
        alias: {"version": one.canary.version, "percent": one.canary.percent}
        for alias, one in standings.items()
        if one.canary is not None
    }
    return {"model": entry.name, "note": entry.note, "aliases": dict(entry.aliases), "canaries": canaries}


def _version_json(version: Version, entry: ModelEntry, *, files: bool = True) -> dict[str, Any]:
    told = {
        "model": version.model,
        "version": version.number,
        "aliases": entry.aliases_of(version.number),
        "created": version.created_s,
        "note": version.note,
        "path": str(version.place),
        **version.record.lineage(),
    }
    if files:
        told["files"] = {name: one.sha256 for name, one in version.record.sums().items()}
    return told


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
