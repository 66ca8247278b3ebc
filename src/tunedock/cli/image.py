"""`tunedock image`: `build`, `list`, `inspect` and `lint` here; what names and carries images is `image_versions`'."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunedock.cli import image_versions
from tunedock.cli.options import RUNS_DIR, Json, RunsDir, group
from tunedock.errors import CheckError

if TYPE_CHECKING:
    from tunedock.image.store import Image

app = group("Make, name, check and carry images.")

TargetName = Annotated[
    str, typer.Argument(metavar="cuda|rocm|npu|cpu|edge", help="The kind of machine it is for.", show_default=False)
]
ImageName = Annotated[
    str, typer.Argument(metavar="IMAGE", help="An image's name, or the beginning of its id.", show_default=False)
]


@app.command("build", short_help="Make an image to train, to serve or to test in.")
def build(
    target: TargetName,
    role: Annotated[str, typer.Option("--role", metavar="train|serve|test", help="What the image is for.")] = "train",
    tag: Annotated[
        str | None, typer.Option("--tag", metavar="NAME", help="Its name; by default tunedock-ROLE:TARGET.")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="Label it with a run's recipe, data and metrics; to serve, with its model inside.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PATH", help="To serve: a model's folder, or a .gguf file, to put inside."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="DIR", help="To serve: an adapter to put inside.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="vllm|sglang", help="To serve: an inference engine to put inside.")
    ] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option("--extra", metavar="NAME", help="Optional packages of tunedock, by the extra's name."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="IMAGE", help="In the place of the target's base image, a mirror's.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Name the base image by the digest its tag has now.")] = False,
    index: Annotated[
        str | None,
        typer.Option("--index", metavar="URL", help="A package index in the place of PyPI; a password stays out."),
    ] = None,
    torch_index: Annotated[
        str | None, typer.Option("--torch-index", metavar="URL", help="Where PyTorch lies; an empty one: in the index.")
    ] = None,
    wheels: Annotated[
        str | None, typer.Option("--wheels", metavar="DIR", help="A folder of packages that are looked for there, too.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Take packages from --wheels alone.")] = False,
    ca: Annotated[
        str | None,
        typer.Option("--ca", metavar="FILE", help="Certificates to trust, in PEM: behind a proxy that reads traffic."),
    ] = None,
    platform: Annotated[
        str | None, typer.Option("--platform", metavar="linux/arm64", help="In the place of this machine's own.")
    ] = None,
    builder: Annotated[
        str | None, typer.Option("--builder", metavar="docker|podman|buildah", help="By default the best there is.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Make every layer anew.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the Dockerfile and end.")] = False,
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="DIR", help="Write the Dockerfile and all it copies there, and end."),
    ] = None,
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Make an image to train, to serve or to test in.

    Its Dockerfile is written for the target. Packages have fixed versions and lie below the code: a changed line is built in
    seconds. What the builder prints goes to standard error.
    """
    from tunedock.cli.text import print_json, printable
    from tunedock.image import build as building
    from tunedock.image.context import Sources, write_to
    from tunedock.image.dockerfile import dockerfile
    from tunedock.image.package import package
    from tunedock.image.targets import target as row_of

    row = row_of(target, role, engine)
    labels: dict[str, str] = {}
    if run is not None:
        from tunedock.pipeline.run_labels import labels_of, served_by

        labels = labels_of(run, Path(runs_dir))
        if role == "serve" and not model and not adapter:
            model, adapter = served_by(run, Path(runs_dir))
    sources = Sources(
        package(),
        tuple(extra or ()),
        *(Path(path).absolute() if path else None for path in (wheels, ca, model, adapter)),
    )
    if show:
        print(dockerfile(row, sources.options(mounts=True)), end="")
        return
    if context is not None:
        made = write_to(Path(context), row, sources)
        print(f"wrote {printable(made.folder)}; next: docker build {printable(made.folder)}")
        return
    request = building.Request(
        row,
        sources,
        tag=tag,
        base=base,
        pin=pin,
        index=index,
        torch_index=torch_index,
        offline=offline,
        platform=platform,
        builder=builder,
        fresh=no_cache,
        labels=labels,
    )
    built = building.build(request, lambda line: print(printable(line), file=sys.stderr, flush=True))
    if as_json:
        image = built.image.to_json() if built.image is not None else None
        print_json({"name": built.name, "builder": built.builder, "seconds": built.seconds, "image": image})
        return
    if built.left_out:
        print(f"left out of the image: {printable(', '.join(built.left_out))}", file=sys.stderr)
    if built.image is not None:
        _show_layers(built.image)
    print(f"made {printable(built.name)} in {built.seconds:.0f} s with {built.builder}")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the images made here, newest first."""
    from tunedock.cli.results import add_row, table
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json
    from tunedock.image.engine import connected, told
    from tunedock.image.store import ROLE, TARGET, images
    from tunedock.plan.machine.bounds import bytes_text

    with connected() as client, told("the container engine"):
        found = images(client)
    if as_json:
        print_json([image.to_json() for image in found])
        return
    if not found:
        print("no images; `tunedock image build` makes one", file=sys.stderr)
        return
    made = table("image", "target", "role", "version", "commit", "platform", "created", "size", numbers_from=7)
    for image in found:
        label = {key.rsplit(".", 1)[1]: value for key, value in image.labels.items() if "." in key}
        commit = label.get("revision", "-")
        shown = commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
        names = ", ".join(image.names) or image.id.removeprefix("sha256:")[:12]
        about = (image.labels.get(TARGET, "-"), image.labels.get(ROLE, "-"), label.get("version", "-"), shown)
        add_row(made, names, *about, image.platform, image.created[:16].replace("T", " "), bytes_text(image.bytes))
    console().print(made)


@app.command("inspect", short_help="Show an image: labels, layers, how it starts.")
def inspect(
    name: ImageName,
    sbom: Annotated[bool, typer.Option("--sbom", help="Print its bill of materials (CycloneDX), and end.")] = False,
    packages: Annotated[bool, typer.Option("--packages", help="Print what `pip freeze` says in it, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Show an image: its labels, what each layer weighs, how it starts."""
    from tunedock.cli.results import add_row, table
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json, printable
    from tunedock.image import store
    from tunedock.image.engine import connected, told

    with connected() as client, told(name):
        if sbom or packages:
            print(printable(store.file(client, name, store.SBOM if sbom else store.FREEZE).decode("utf-8")), end="")
            return
        image = store.inspect(client, name)
    if as_json:
        print_json(image.to_json())
        return
    made = table("", "")
    made.show_header = False
    about = {
        "names": ", ".join(image.names),
        "id": image.id,
        "platform": image.platform,
        "created": image.created[:19].replace("T", " "),
        "user": image.user or "root",
        "entry": " ".join(image.entrypoint),
        "command": " ".join(image.command),
        "ports": ", ".join(image.ports) or "none",
        "health": " ".join(image.health[1:]) or "not checked",
        **image.labels,
    }
    for key, value in about.items():
        add_row(made, key, value)
    out = console()
    out.print(made)
    out.print()
    _show_layers(image)


@app.command("lint", short_help="Check Dockerfiles: ours by default.")
def lint(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[DOCKERFILE]...", help="By default those of all targets and roles.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check Dockerfiles by hadolint and by rules of our own.

    Ends with exit code 6 when a rule is broken.
    """
    from dataclasses import asdict

    from tunedock.cli.results import add_row, table
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json
    from tunedock.image import lint as linting
    from tunedock.image.dockerfile import all_dockerfiles

    texts = {path: linting.read(Path(path)) for path in files} if files else all_dockerfiles()
    found = {name: [*linting.check(text), *linting.hadolint(text)] for name, text in texts.items()}
    broken = sum(map(len, found.values()))
    error = (
        CheckError(f"{broken} rule(s) broken", where="image lint", hint="each line names its rule") if broken else None
    )
    if as_json:
        problems = {name: [asdict(problem) for problem in each] for name, each in found.items()}
        print_json({"files": problems, **({"error": error.to_json()} if error else {})})
        if error:
            raise typer.Exit(error.exit_code)
        return
    made = table("file", "line", "rule", "")
    for name, problems_of in found.items():
        for problem in problems_of:
            add_row(made, name, problem.line, problem.rule, problem.message)
    if error:
        console().print(made)
        raise error
    print(f"{len(found)} Dockerfile(s), nothing to say")


def _show_layers(image: Image) -> None:
    from tunedock.cli.results import add_row, table
    from tunedock.cli.show import console
    from tunedock.cli.text import one_line
    from tunedock.plan.machine.bounds import bytes_text

    made = table("layer", "size", numbers_from=1)
    for layer in image.layers:
        add_row(made, one_line(layer.step, 100), bytes_text(layer.bytes))
    add_row(made, "all of it", bytes_text(image.bytes))
    console().print(made)


image_versions.commands(app)
