"""Files and folders of the host that a stage gets to see in its container: those the recipe names, each at its own place.

Read-only but for the run directory, what is exported, and the caches. A folder's symbolic links lead out of it now and then (a
snapshot of the hub's cache is nothing else): what they lead to is mounted where they look for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunedock.errors import DiskError, RecipeError
from tunedock.launch.needs import FILES, HUB_SECRETS, hub_ids, local_store, variables
from tunedock.recipe.data_images import DATA_IMAGES, folder_of, images_of, pinned
from tunedock.recipe.resolve import paths_of
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run

NEVER = ("/etc", "/proc", "/sys", "/dev", "/boot")
"""Of the system's own: neither these nor anything in them."""

NOT_WHOLE = (
    *("/", "/bin", "/sbin", "/lib", "/lib64", "/usr", "/opt", "/var", "/var/lib", "/var/run", "/run", "/home", "/root"),
    *("/srv", "/mnt", "/media", "/tmp"),  # noqa: S108 - a name, not a file
)  # fmt: skip
"""What would hide the image's own files, or show more than anybody means, and so would the caller's home. Folders in them may be
mounted."""

ENGINES_OWN = ("docker.sock", "podman.sock", "containerd.sock")

SPARE_HOME = "/home/tunedock"
"""In the container, for a caller without a home of their own."""

MOST_LINKS = 512
"""Symbolic links of one folder that are followed, and entries that are looked through for some."""

LINK_DEPTH = 2

_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or folder of the host, and where it stands in the container."""

    source: str
    target: str
    read_only: bool = True

    @classmethod
    def at_its_place(cls, path: str | Path, *, read_only: bool = True) -> Bind:
        return cls(str(path), str(path), read_only)

    def mount(self) -> dict[str, Any]:
        """As an engine is told of it."""
        return {"Type": "bind", "Source": self.source, "Target": self.target, "ReadOnly": self.read_only}


@dataclass(frozen=True, slots=True)
class Caches:
    """Folders of the host that containers of one user share, made where they are not there yet."""

    home: str
    """The home in the container: the caller's own path, with nothing of the caller's in it."""
    data: Path
    """Tokenised data, shared with runs outside: numbers, no code."""
    compiled: Path
    """What containers compile. Nothing outside loads it: code that a run brings along could have written it."""
    hub: Path
    """Of Hugging Face; ModelScope's is `modelscope`."""
    modelscope: Path
    token: Path
    """The file that `hf auth login` leaves."""

    @classmethod
    def of(cls, environment: Mapping[str, str], home: str) -> Caches:
        own = Path(home) / ".cache"
        hugging_face = Path(
            environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or own) / "huggingface"
        )
        return cls(
            home=home if Path(home).name and Path(home).is_dir() else SPARE_HOME,
            data=own / "tunedock",
            compiled=own / "tunedock-in-containers",
            hub=Path(environment.get("HF_HUB_CACHE") or hugging_face / "hub"),
            modelscope=Path(environment.get("MODELSCOPE_CACHE") or own / "modelscope"),
            token=Path(environment.get("HF_TOKEN_PATH") or hugging_face / "token"),
        )

    @property
    def kernels(self) -> Path:
        return self.compiled / "kernels"


def binds_of(
    recipe: Recipe,
    stage: str,
    run: Path,
    *,
    caches: Caches,
    environment: Mapping[str, str],
    network: str,
    request: Mapping[str, Any] | None = None,
    writable: Sequence[Path] = (),
    make: bool = True,
) -> list[Bind]:
    """What a stage of a resolved recipe is shown, by where it stands. `writable`: further folders it writes to; `make`: whether
    caches that are not there are made.

    Raises RecipeError for what is never shown, DiskError where a cache cannot be made.
    """
    found = {**dict(_named(recipe, request or {})), **_stores(recipe, stage, environment)}
    mounts = enumerate(recipe.launch.container.mounts)
    found |= {f"launch.container.mounts.{i}": Bind.at_its_place(m.path, read_only=m.read_only) for i, m in mounts}
    binds = [Bind.at_its_place(path, read_only=False) for path in (run, *writable)]
    for key, bind in found.items():
        refuse(bind.source, key)
        binds += with_links(bind)
    for path in (run, *writable):
        refuse(str(path), "train.output_dir" if path == run else "--to")
    binds += [*_data_images(recipe, run, caches), *_caches(recipe, stage, caches, network)]
    binds += [Bind.at_its_place(path) for path in _files(recipe, stage, network, environment, caches)]
    if make:
        for bind in binds:
            if not bind.read_only or bind.source == str(caches.hub):
                _made(Path(bind.source))
            if bind.source == str(caches.data):
                _made(caches.data / "kernels")  # where the next one goes
    return _without_doubles(binds)


def refuse(path: str, key: str) -> None:
    """Raises RecipeError for a path that is never mounted; links in it count for what they lead to."""
    for place in dict.fromkeys((os.path.normpath(path), os.path.realpath(path))):
        system = next((each for each in NEVER if place == each or place.startswith(f"{each}/")), None)
        if system is not None:
            raise RecipeError(
                f"`{path}` belongs to the machine's own {system}, which no container gets to see",
                where=key,
                hint="copy what the run needs to a folder of its own, and name that",
            )
        if place in NOT_WHOLE or place == str(Path.home()):
            raise RecipeError(
                f"the whole of `{place}` is not mounted into a container",
                where=key,
                hint="name the folder in it that the run needs",
            )
        if place.rsplit("/", 1)[-1] in ENGINES_OWN:
            raise RecipeError(
                f"`{path}` is the container engine's socket: who has it, has the machine",
                where=key,
                hint="leave it out",
            )


def _named(recipe: Recipe, request: Mapping[str, Any]) -> Iterator[tuple[str, Bind]]:
    """(key, what is mounted for it) of the local paths that a recipe and a request name."""
    for key, path, read in paths_of(recipe):
        if not path.startswith("/") or key == "train.output_dir" or key.startswith("launch."):
            continue
        place = _before_the_glob(path)
        writes = not read or key == "data.cache_dir"
        if writes or Path(place).exists():  # what is not there is an error of the stage's own, with its own words
            yield key, Bind.at_its_place(place, read_only=not writes)
    tasks = (request.get("overrides") or {}).get("tasks_path")
    if isinstance(tasks, str):
        yield "eval.tasks_path", Bind.at_its_place(tasks)


def _stores(recipe: Recipe, stage: str, environment: Mapping[str, str]) -> dict[str, Bind]:
    """The folder of a tracker's store that is a file here. Raises RecipeError for one whose place depends on where is called."""
    uri = recipe.track.mlflow.tracking_uri or environment.get("MLFLOW_TRACKING_URI")
    path = None if uri is None else local_store(uri)
    if path is None or "mlflow" not in recipe.train.report_to or stage not in ("train", "eval"):
        return {}
    if not path.startswith("/"):
        raise RecipeError(
            f"`{uri}` is a path from the working directory, which a container has not",
            where="track.mlflow.tracking_uri",
            hint=f"write it in full: `{str(uri)[: len(str(uri)) - len(path)]}{Path.cwd() / path}`",
        )
    folder = Path(path).parent if str(uri).startswith("sqlite:") else Path(path)
    return {"track.mlflow.tracking_uri": Bind.at_its_place(folder, read_only=False)}


def _before_the_glob(path: str) -> str:
    """The deepest folder that a pattern stays in."""
    parts: list[str] = []
    for part in Path(path).parts:
        if _GLOB.search(part) and not Path(*parts, part).exists():
            break
        parts.append(part)
    return str(Path(*parts))


def with_links(bind: Bind) -> list[Bind]:
    """A folder, and what links in it lead to. Raises RecipeError for what is never shown."""
    return [bind, *_links(bind)]


def _links(bind: Bind) -> Iterator[Bind]:
    """What symbolic links in a mounted folder lead to outside of it."""
    root = os.path.realpath(bind.source)
    if not Path(root).is_dir():
        return
    for link, place in _found_links(Path(bind.source), LINK_DEPTH, [MOST_LINKS]):
        real = os.path.realpath(link)
        if not Path(real).exists() or real == root or real.startswith(f"{root}/"):
            continue
        refuse(real, str(link))
        yield Bind(real, place, bind.read_only)


def _found_links(folder: Path, depth: int, left: list[int]) -> Iterator[tuple[str, str]]:
    """(a symbolic link, the place it names) of a folder and its folders."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                left[0] -= 1
                if left[0] < 0:
                    return
                if entry.is_symlink():
                    yield entry.path, os.path.normpath(folder / Path(entry.path).readlink())
                elif depth > 1 and entry.is_dir():
                    yield from _found_links(Path(entry.path), depth - 1, left)
    except OSError:
        return  # who reads it says what is wrong


def _data_images(recipe: Recipe, run: Path, caches: Caches) -> Iterator[Bind]:
    """Data in images, each the content that the run began with."""
    revisions = (
        Run(run).state().lineage.get(DATA_IMAGES, {}) if images_of(recipe) and (run / "run.json").exists() else {}
    )
    for source in images_of(pinned(recipe, revisions)):
        if source.revision is not None:
            name = folder_of(source.revision, Path()).name
            yield Bind(str(caches.data / "images" / name), f"{caches.home}/.cache/tunedock/images/{name}")


def _caches(recipe: Recipe, stage: str, caches: Caches, network: str) -> Iterator[Bind]:
    """For who may write to them: another user's stage has what it tokenises and compiles in its own home, until it ends."""
    if recipe.launch.container.user == "caller":
        inside = f"{caches.home}/.cache/tunedock"
        if recipe.data.cache_dir is None:
            yield Bind(str(caches.data), inside, read_only=False)
        yield Bind(str(caches.kernels), f"{inside}/kernels", read_only=False)
        yield Bind.at_its_place(caches.compiled, read_only=False)
    if hub_ids(recipe, stage):
        hub = caches.modelscope if recipe.hub == "modelscope" else caches.hub
        yield Bind.at_its_place(hub, read_only=network == "none")


def _files(recipe: Recipe, stage: str, network: str, environment: Mapping[str, str], caches: Caches) -> Iterator[str]:
    """Files that passed variables name, and the hub's token where only its own file has it."""
    names = variables(recipe, stage, network)
    for name in FILES:
        path = environment.get(name, "")
        if name in names and path.startswith("/") and Path(path).exists():
            yield os.path.normpath(path)
    if set(names) & set(HUB_SECRETS["hf"]) and not environment.get("HF_TOKEN") and caches.token.is_file():
        yield str(caches.token)


def _without_doubles(binds: Sequence[Bind]) -> list[Bind]:
    """One for each place, writable where any is; none for what a wider one shows as well."""
    places: dict[str, Bind] = {}
    for bind in binds:
        before = places.get(bind.target)
        if before is None or (before.read_only and not bind.read_only):
            places[bind.target] = bind
    kept: list[Bind] = []
    for bind in sorted(places.values(), key=lambda each: each.target):
        around = [each for each in kept if bind.target.startswith(f"{each.target.rstrip('/')}/")]
        shown = bool(around) and bind.source == bind.target and around[-1].read_only == bind.read_only
        if not (shown and around[-1].source == around[-1].target):
            kept.append(bind)
    return kept


def _made(place: Path) -> None:
    """Made by us, so that it is the caller's: an engine would make it root's, or not start."""
    try:
        if not place.exists():
            place.mkdir(parents=True)
    except OSError as error:
        raise DiskError(f"cannot make the folder: {error.strerror}", where=str(place)) from None
