"""`tunedock bundle create`, `verify`, `load`, `send`, `key`: all a machine without a network needs, in one folder."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunedock.cli.options import RUNS_DIR, Json, RunsDir, group, recipe_files

if TYPE_CHECKING:
    from tunedock.bundle.content import Content

app = group("Carry images, wheels, model, data and recipe to a machine without a network.")

Folder = Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)]
Trust = Annotated[
    str | None,
    typer.Option("--trust", metavar="KEY.pub", help="Refuse what this key did not sign.", show_default=False),
]
Old = Annotated[
    list[str] | None,
    typer.Option(
        "--old", metavar="BUNDLE", help="The bundle this one builds on; may be given again.", show_default=False
    ),
]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@app.command("create", short_help="Make a bundle.")
def create(
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="A folder that is new or empty.", show_default=False)],
    recipe: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE.yaml|KEY=VALUE", help="A recipe whose model and data go in.", show_default=False
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="RUN", help="A run: its recipe, and what it made.", show_default=False),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", metavar="NAME", help="An image of this machine; may be given again.", show_default=False
        ),
    ] = None,
    wheels: Annotated[
        str | None, typer.Option("--wheels", metavar="DIR", help="A folder of wheels.", show_default=False)
    ] = None,
    requirements: Annotated[
        str | None,
        typer.Option("--requirements", metavar="FILE", help="Make wheels of these, by pip.", show_default=False),
    ] = None,
    compose: Annotated[
        str | None,
        typer.Option(
            "--compose", metavar="FILE", help="A compose file, in place of the one that trains.", show_default=False
        ),
    ] = None,
    without_model: Annotated[bool, typer.Option("--without-model", help="Leave the base model out.")] = False,
    without_data: Annotated[bool, typer.Option("--without-data", help="Leave the data out.")] = False,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="SIZE", help="Cut files larger than this, such as 4G.", show_default=False),
    ] = None,
    diff: Annotated[
        list[str] | None,
        typer.Option(
            "--diff",
            metavar="OLD",
            help="Put in what changed since this bundle; may be given again.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="KEY", help="Sign it with this private key.", show_default=False)
    ] = None,
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Make a bundle: images, wheels, and what a recipe reads or a run made, with sums, a signature and a script that installs it.

    A call that was stopped is called again: files that are in already are kept.
    """
    from dataclasses import asdict

    from tunedock.bundle.create import Wanted
    from tunedock.bundle.create import create as make
    from tunedock.cli.image_versions import progress

    wanted = Wanted(
        name=Path(to).resolve().name,
        content=_content(recipe or [], run, Path(runs_dir), data=not without_data, model=not without_model),
        images=image or [],
        wheels=_path(wheels),
        requirements=_path(requirements),
        compose=_path(compose),
        split=None if split is None else size_of(split),
        older=[Path(old) for old in diff or []],
        key=_path(key),
    )
    with progress() as tell:
        made = make(wanted, Path(to), tell)
    lines = [f"bundled {made.files:,} files, {_gb(made.facts.bytes)} in {to}"]
    if made.facts.older:
        lines[0] += (
            f"; {made.files - made.here:,} files, {_gb(made.facts.whole_bytes - made.facts.bytes)}, are in the older bundle"
        )
    if made.left_out:
        lines.append(f"left out, for nothing there would read it: {', '.join(made.left_out[:5])}")
    if key is None:
        lines.append("nobody signed it; `--key` does (`tunedock bundle key FILE` makes one)")
    _done({**asdict(made), "to": to, "signed": key is not None}, lines, as_json)


@app.command("verify", short_help="Check every byte of a bundle, and who signed it.")
def verify(bundle: Folder, trust: Trust = None, old: Old = None, as_json: Json = False) -> None:
    """Check every byte of a bundle, and who signed it. Ends with exit code 6 and names the file that is wrong."""
    from dataclasses import asdict

    from tunedock.bundle.verify import verify as check
    from tunedock.cli.image_versions import progress

    with progress() as tell:
        found = check(Path(bundle), tell, trust=_path(trust), older=[Path(folder) for folder in old or []])
    lines = [f"{found.facts.name}: {len(found.files):,} files, {_gb(found.facts.whole_bytes)}, all as they should be"]
    if found.missing:
        lines[0] = f"{found.facts.name}: {len(found.files) - len(found.missing):,} files are as they should be"
        lines.append(
            f"{len(found.missing):,} more are in an older bundle: {', '.join(o.name for o in found.facts.older)}"
        )
    lines.append(_who(found.signed, found.trusted))
    value = {
        **asdict(found.facts),
        "signed": found.signed,
        "trusted": found.trusted is not None,
        "missing": found.missing,
    }
    _done(value, lines, as_json)


@app.command("load", short_help="Install a bundle, after all of it is checked.")
def load(
    bundle: Folder,
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="Where its content goes.", show_default=False)],
    trust: Trust = None,
    old: Old = None,
    no_images: Annotated[bool, typer.Option("--no-images", help="Load no images.")] = False,
    no_wheels: Annotated[bool, typer.Option("--no-wheels", help="Make no environment of the wheels.")] = False,
    as_json: Json = False,
) -> None:
    """Install a bundle: content into a folder, images into the engine, wheels into an environment. No network is needed.

    Without tunedock, `sh BUNDLE/install.sh --to DIR` does the same.
    """
    from tunedock.bundle.load import load as install
    from tunedock.cli.image_versions import progress

    with progress() as tell:
        done = install(
            Path(bundle),
            Path(to),
            tell,
            trust=_path(trust),
            older=[Path(folder) for folder in old or []],
            images=not no_images,
            wheels=not no_wheels,
        )
    if done.bundle.trusted is None:
        print(f"warning: {_who(done.bundle.signed, None)}", file=sys.stderr)
    lines = [f"installed {done.bundle.facts.name} to {to}"]
    if done.images:
        lines.append(f"images: {', '.join(done.images)}")
    if done.environment is not None:
        lines.append(f"environment: {done.environment}")
    value = {
        "name": done.bundle.facts.name,
        "to": to,
        "images": done.images,
        "environment": None if done.environment is None else str(done.environment),
        "signed": done.bundle.signed,
        "trusted": done.bundle.trusted is not None,
    }
    _done(value, lines, as_json)


@app.command("send", short_help="Bring a bundle to another machine by ssh.")
def send(
    bundle: Folder,
    target: Annotated[str, typer.Argument(metavar="[USER@]HOST:DIR", help="Where it goes.", show_default=False)],
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", help="The port of ssh there.", show_default=False)
    ] = None,
    identity: Annotated[
        str | None, typer.Option("--identity", metavar="FILE", help="The key that lets us in.", show_default=False)
    ] = None,
    config: Annotated[
        str | None, typer.Option("--ssh-config", metavar="FILE", help="A configuration of ssh.", show_default=False)
    ] = None,
    no_rsync: Annotated[bool, typer.Option("--no-rsync", help="Use sftp even where both have rsync.")] = False,
    as_json: Json = False,
) -> None:
    """Bring a bundle to another machine by ssh, and have it check every file there.

    Only what is not there yet is sent, and a file that is there in part is gone on with: after a lost connection, call it again.
    """
    from tunedock.bundle.send import Options, Target
    from tunedock.bundle.send import send as carry
    from tunedock.cli.image_versions import progress

    where = Target.parse(target)
    with progress() as tell:
        sent = carry(Path(bundle), where, Options(port, _path(identity), _path(config)), tell, rsync=not no_rsync)
    value = {"to": target, "files": sent.files, "bytes": sent.bytes, "by": sent.by}
    lines = [f"{sent.files:,} files are at {target}, checked there; {_gb(sent.bytes)} were sent by {sent.by}"]
    _done(value, lines, as_json)


@app.command("key", short_help="Make a pair of keys to sign bundles with.")
def key(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="The private key; the public one is FILE.pub.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Make a pair of keys (ed25519): the private one signs bundles, the public one goes to who checks them."""
    from tunedock.bundle.keys import make_key

    public = make_key(Path(file))
    _done(
        {"private": file, "public": str(public)},
        [
            f"{file} signs, keep it to yourself; give {public} to those who are to trust it, by another way than the bundle"
        ],
        as_json,
    )


def size_of(text: str) -> int:
    """`4G`, `700M`, `1.5GiB` in bytes; as with `split`, a letter is a power of 1024. Raises RecipeError."""
    from tunedock.errors import RecipeError

    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"`{text}` is no size", where="--split", hint="for example 4G or 700M")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _content(recipe: list[str], run: str | None, runs_dir: Path, *, data: bool, model: bool) -> Content:
    from tunedock.bundle import content
    from tunedock.errors import RecipeError
    from tunedock.run.store import find

    if run is not None:
        if recipe:
            raise RecipeError("a run has its own recipe", where="bundle create", hint="give a recipe or --run")
        return content.of_run(find(run, runs_dir), data=data, model=model)
    if not recipe:
        return content.Content()
    from tunedock.pipeline import resolve_recipe

    return content.of_recipe(resolve_recipe(*recipe_files(recipe)), data=data, model=model)


def _who(signed: bool, trusted: Path | None) -> str:
    if trusted is not None:
        return f"signed by {trusted}"
    if signed:
        return "it is signed; by whom was not checked, for --trust names no key"
    return "nobody signed this bundle: its sums find damage, not a change by someone else"


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 5e6 else f"{count / 1e3:,.0f} kB"


def _done(value: dict[str, Any], lines: list[str], as_json: bool) -> None:
    from tunedock.cli.text import print_json, printable

    if as_json:
        print_json(value)
    else:
        print("\n".join(printable(line) for line in lines))
