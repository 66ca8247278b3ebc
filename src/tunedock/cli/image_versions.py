"""`tunedock image push`, `pull`, `tags`, `promote`, `rollback`, `save`, `load`: images on their way, and names that move."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunedock.cli.options import Json

if TYPE_CHECKING:
    from tunedock.image.reference import Reference
    from tunedock.image.registry import Registry
    from tunedock.image.versions import Moved

TELL_EVERY_S = 0.1

Image = Annotated[
    str, typer.Argument(metavar="IMAGE", help="An image of this machine, by name or id.", show_default=False)
]
Name = Annotated[str, typer.Argument(metavar="HOST/REPOSITORY:TAG", help="A name in a registry.", show_default=False)]
PlainHttp = Annotated[
    bool, typer.Option("--plain-http", help="Speak to a registry without TLS that is not on this machine.")
]


def commands(app: typer.Typer) -> None:
    """Adds the commands to the group `image`."""
    app.command("push", short_help="Push an image to a registry.")(push)
    app.command("pull", short_help="Pull an image from a registry.")(pull)
    app.command("tags", short_help="List tags of a repository, or a tag's history.")(tags)
    app.command("promote", short_help="Move a name such as `production` to an image.")(promote)
    app.command("rollback", short_help="Move a name back to what it stood for before.")(rollback)
    app.command("save", short_help="Write an image to a file.")(save)
    app.command("load", short_help="Load an image from a file.")(load)


def push(image: Image, name: Name, as_json: Json = False) -> None:
    """Push an image of this machine to a registry under a name there.

    Credentials are those that `docker login` has stored. What the registry has already is not sent again.
    """
    from tunedock.image import transfer
    from tunedock.image.engine import connected
    from tunedock.image.reference import parse

    target = parse(name)
    with connected() as client, progress() as tell:
        digest = transfer.push(client, image, target, tell)
    _done({"image": image, "name": str(target), "digest": digest}, f"pushed {target}, {digest}", as_json)


def pull(name: Name, as_json: Json = False) -> None:
    """Pull an image from a registry by its tag or digest."""
    from tunedock.image import transfer
    from tunedock.image.engine import connected
    from tunedock.image.reference import parse

    source = parse(name)
    with connected() as client, progress() as tell:
        digest, image = transfer.pull(client, source, tell)
    _done({"name": str(source), "digest": digest, "id": image}, f"pulled {source}, {digest}", as_json)


def tags(
    name: Annotated[
        str,
        typer.Argument(metavar="HOST/REPOSITORY[:TAG]", help="A repository, or a name that moves.", show_default=False),
    ],
    plain_http: PlainHttp = False,
    as_json: Json = False,
) -> None:
    """List the tags of a repository with their digests, or what one name has stood for, newest first."""
    from tunedock.cli.results import add_row, table
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json
    from tunedock.errors import EngineError
    from tunedock.image.reference import parse
    from tunedock.image.registry import Registry
    from tunedock.image.versions import history, is_history

    target = parse(name)
    with Registry(target.host, plain_http=plain_http) as registry:
        there = registry.tags(target.repository)
        shown = [tag for tag in there if not is_history(tag)] if target.tag is None else [target.tag]
        digests = {tag: registry.digest(target.repository, tag) for tag in shown}
    past = list(reversed(history(target.tag, there))) if target.tag else []
    if not past and not any(digests.values()):
        raise EngineError(f"it has no `{target.repository}{f':{target.tag}' if target.tag else ''}`", where=target.host)
    if as_json:
        before = [{"digest": former.digest, "until": former.until.isoformat(), "how": former.how} for former in past]
        print_json({"tags": digests, **({"history": before} if target.tag else {})})
        return
    made = table("tag", "digest", *(["until", "because"] if past else []))
    for tag, digest in digests.items():
        add_row(made, tag, digest or "-", *(["now", ""] if past else []))
    for former in past:
        because = "a promotion" if former.how == "was" else "rolled back"
        add_row(made, "", former.digest, former.until.astimezone().strftime("%Y-%m-%d %H:%M:%S"), because)
    console().print(made)


def promote(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE|TAG|DIGEST",
            help="An image of this machine, or a tag or digest of the name's own repository.",
            show_default=False,
        ),
    ],
    name: Name,
    plain_http: PlainHttp = False,
    as_json: Json = False,
) -> None:
    """Move a name such as `production` to an image; what it stood for before is kept for a rollback.

    A tag or a digest of the same repository is moved to without copying anything. Another image is looked for on this machine, and
    pushed first.
    """
    from tunedock.image import versions
    from tunedock.image.reference import parse
    from tunedock.image.registry import Registry

    target = parse(name)
    versions.movable(target)
    with Registry(target.host, plain_http=plain_http) as registry:
        there = _in_registry(registry, target, source)
        moved = versions.promote(registry, target, there or _pushed(source, target))
    _told_move(moved, as_json)


def rollback(
    name: Name,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="DIGEST",
            help="A former digest, or its beginning; the one before by default.",
            show_default=False,
        ),
    ] = None,
    plain_http: PlainHttp = False,
    as_json: Json = False,
) -> None:
    """Move a name back to what it stood for before. Nothing is copied, so it takes a second.

    Done again it goes one version further back, never forward to what was just rolled back from.
    """
    from tunedock.image import versions
    from tunedock.image.reference import parse
    from tunedock.image.registry import Registry

    target = parse(name)
    with Registry(target.host, plain_http=plain_http) as registry:
        moved = versions.roll_back(registry, target, to)
    _told_move(moved, as_json)


def save(
    image: Image,
    to: Annotated[str, typer.Option("--to", metavar="FILE", help="A file that is not there yet.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Write an image to a file as `docker save` does, and its SHA-256 beside it."""
    from tunedock.image import transfer
    from tunedock.image.engine import connected

    with connected() as client, progress() as tell:
        made = transfer.save(client, image, Path(to), tell)
    _done({"image": image, "file": to, "sha256": made}, f"saved {image} to {to}, SHA-256 {made}", as_json)


def load(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What `save` wrote.", show_default=False)],
    sha256: Annotated[
        str | None,
        typer.Option(
            "--sha256", metavar="HEX", help="What its sum must be; else the file beside it says.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Load an image from a file, after its SHA-256 is found right."""
    from tunedock.image import transfer
    from tunedock.image.engine import connected

    with connected() as client, progress() as tell:
        names = transfer.load(client, Path(file), tell, sha256)
    _done({"images": names}, f"loaded {', '.join(names)}", as_json)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """What to hand on as `tell`: bytes done of bytes in all, as a bar or now and then a line."""
    from tunedock.cli.show import display

    last: dict[str, float] = {}
    with display() as show:

        def tell(task: str, done: int, total: int | None) -> None:
            now = time.monotonic()
            if done != total and now - last.get(task, 0.0) < TELL_EVERY_S:
                return
            last[task] = now
            mb = None if total is None else -(-total // 1_000_000)
            show({"kind": "progress", "time": time.time(), "task": task, "done": done // 1_000_000 if done != total else mb or 0,
                  "total": mb, "unit": "MB"})  # fmt: skip

        yield tell


def _in_registry(registry: Registry, target: Reference, source: str) -> str | None:
    """The tag or digest that the source names in the target's own repository; None where it is another image."""
    from tunedock.errors import RecipeError
    from tunedock.image.reference import is_digest, is_tag, parse

    if is_digest(source):
        return source
    if "/" not in source and ":" not in source:
        try:
            tag = is_tag(source)
        except RecipeError:
            return None
        return tag if registry.digest(target.repository, tag) else None
    found = parse(source)
    if found.place != target.place:
        return None
    wanted = found.digest or found.tag or "latest"
    return wanted if registry.digest(target.repository, wanted) else None


def _pushed(image: str, target: Reference) -> str:
    """Pushes an image of this machine into the target's repository, under a tag that says its id; its digest."""
    from tunedock.image import transfer
    from tunedock.image.engine import connected, told
    from tunedock.image.store import named

    with connected() as client, progress() as tell:
        with told(f"image {image}"):
            own = named(client, image).id.removeprefix("sha256:")
        return transfer.push(client, image, target.tagged(f"id-{own[:12]}"), tell)


def _told_move(moved: Moved, as_json: bool) -> None:
    what = {"name": moved.name, "digest": moved.digest, "before": moved.before, "changed": moved.changed}
    was = f", before {moved.before}" if moved.before else ""
    _done(what, f"{moved.name} is {moved.digest}{was if moved.changed else ', as before'}", as_json)


def _done(value: dict[str, Any], line: str, as_json: bool) -> None:
    from tunedock.cli.text import print_json, printable

    if as_json:
        print_json(value)
    else:
        print(printable(line))
