"""The build context: a folder with what a Dockerfile copies, and nothing else, so that nothing else can come into a layer.

    Dockerfile  locked.txt  requirements.txt  prepare.py
    code/       the package and its metadata (a test image: source/, the checkout's files)
    wheels/     packages that need not be fetched; the builder alone sees them
    ca/         certificates to trust
    model/ adapter/   what is served

Files whose names say that they hold secrets stay out, and one that holds what looks like a secret stops the build by name.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunedock.errors import DataError, DiskError, RecipeError
from tunedock.image.dockerfile import Options, dockerfile
from tunedock.image.package import ENTRY_POINTS, FOLDER, Package
from tunedock.image.targets import LOCKED, Target, test_files

HIDDEN = (
    ".*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_ed25519*", "id_ecdsa*", "credentials*", "*.netrc",
    "*.pyc", "__pycache__", "*.egg-info", "node_modules",
)  # fmt: skip
"""Names that never come into a context: hidden files, keys, what Python makes itself."""

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an OpenAI key": r"\bsk-(?:proj-)?[A-Za-z0-9_-]{32,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "a private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"{}<>]+:(?!(?i:pass|secret|token))[^\s/:@'\"{}<>]{6,}@[a-z0-9]",
}  # fmt: skip
WEIGHTS = ("*.safetensors", "*.gguf", "*.bin")

LOOKED_AT = 1 << 20
"""Bytes of a file that are searched for secrets; weights are not text."""

SERVED = (
    "*.safetensors",
    "*.gguf",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.md",
    "*.bin",
    "LICENSE*",
    "NOTICE*",
)
"""What a model's folder may bring: whatever else lies there (runs, optimizers' states, notes) stays out."""

GGUF_TOKENIZER = "tokenizer"
BESIDE_GGUF = ("chat.json", "export.json")
"""What the gateway reads beside a GGUF file, as `tunedock export` leaves it: the tokenizer, where answers end, whose it is."""

_MODES = (0o755, 0o644)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where what goes into an image comes from."""

    package: Package
    extras: tuple[str, ...] = ()
    wheels: Path | None = None
    ca: Path | None = None
    model: Path | None = None
    adapter: Path | None = None

    def options(self, mounts: bool) -> Options:
        return Options(mounts, self.ca is not None, self.model is not None, self.adapter is not None)


@dataclass(slots=True)
class Context:
    folder: Path
    left_out: list[str] = field(default_factory=list)
    """Files of a model's folder that were not taken."""


def write(folder: Path, target: Target, sources: Sources, *, mounts: bool) -> Context:
    """Fills an empty folder. Raises RecipeError for what is not there, DataError for a file with a secret in it."""
    context = Context(folder)
    try:
        _text(folder / "Dockerfile", dockerfile(target, sources.options(mounts)))
        _text(folder / "requirements.txt", "".join(f"{line}\n" for line in requirements(target, sources)))
        _copy(LOCKED, folder / "locked.txt")
        _copy(FOLDER / "image/inside/prepare.py", folder / "prepare.py")
        (folder / "wheels").mkdir()
        for wheel in _wheels(sources.wheels):
            _link(wheel, folder / "wheels" / wheel.name)
        if sources.ca is not None:
            _certificates(sources.ca, folder / "ca")
        _code(folder, target, sources.package)
        for name, source in (("model", sources.model), ("adapter", sources.adapter)):
            if source is not None:
                kinds = ("*.gguf",) if target.small else WEIGHTS
                context.left_out += _served(source, folder / name, f"--{name}", kinds)
    except OSError as error:
        raise DiskError(
            f"the build's files cannot be put together: {error.strerror or error}", where=str(error.filename or folder)
        ) from error
    found = next(secrets(folder), None)
    if found is not None:
        place, what = found
        raise DataError(
            f"holds what looks like {what}; an image would hand it to whoever pulls it",
            where=str(place.relative_to(folder)),
            hint="take it out of the file; at run time a container gets secrets as environment or mounted files",
        )
    return context


def requirements(target: Target, sources: Sources) -> list[str]:
    """Names for pip, without versions: those are `locked.txt`'s."""
    if target.light:
        if sources.extras:
            raise RecipeError(
                "this image has only what the service needs, and none of tunedock's optional packages",
                where=f"--extra {sources.extras[0]}",
                hint="leave it out, or serve without --engine and on another target than edge",
            )
        return list(target.packages)
    return [*sources.package.needed((*target.extras, *sources.extras)), *target.packages]


def secrets(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, what it seems to hold). The tests' own files are full of made-up ones, and are not looked at."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix in (".whl", ".safetensors", ".gguf") or "source/tests" in path.as_posix():
            continue
        with path.open("rb") as file:
            yield from ((path, what) for what in secrets_in(file.read(LOOKED_AT)))


def secrets_in(data: bytes) -> Iterator[str]:
    """What a text seems to hold of secrets."""
    text = data.decode("utf-8", errors="replace")
    for what, pattern in SECRETS.items():
        if re.search(pattern, text):
            yield what


def _code(folder: Path, target: Target, package: Package) -> None:
    code = folder / "code"
    if target.role == "test":
        if package.checkout is None:
            raise RecipeError(
                "a test image needs the tests, and an installed tunedock has none",
                where="--role test",
                hint="run it from a checkout of the repository",
            )
        code = folder / "source/src"
        for name in test_files():
            place = package.checkout / name
            if place.is_dir():
                _tree(place, folder / "source" / name)
            elif place.exists():
                _copy(place, folder / "source" / name)
    _tree(FOLDER, code / "tunedock")
    about = code / f"tunedock-{package.version}.dist-info"
    _text(about / "METADATA", package.metadata())
    _text(about / "entry_points.txt", ENTRY_POINTS)
    _text(about / "INSTALLER", "tunedock\n")


def hidden(name: str) -> bool:
    """Whether a file's name says that it is to stay out. A module may be about credentials: what it holds is looked at as well."""
    if name.endswith(".py"):
        return name.startswith(".")
    return any(fnmatch.fnmatch(name, pattern) for pattern in HIDDEN)


def _tree(source: Path, target: Path, keep: Iterable[str] = ("*",)) -> list[str]:
    """Copies the files whose names `keep` has and `HIDDEN` has not; the others' paths come back.

    Links are followed within the folder and, of a snapshot in a hub's cache, to the blobs beside it; no further.
    """
    left_out = []
    patterns = tuple(keep)
    own = source.resolve()
    roots = (own, own.parents[1] / "blobs") if own.parent.name == "snapshots" else (own,)
    for place, folders, files in os.walk(source):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in sorted(files):
            path = here / name
            real = Path(os.path.realpath(path))
            inside = not path.is_symlink() or any(real.is_relative_to(root) for root in roots)
            if hidden(name) or not inside or not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                left_out.append(str(path.relative_to(source)))
                continue
            copied = target / path.relative_to(source)
            (_link if path.stat().st_size > LOOKED_AT else _copy)(path, copied)
    return left_out


def _served(source: Path, target: Path, where: str, kinds: Sequence[str]) -> list[str]:
    """A GGUF file and what an export left beside it, or a folder as transformers and PEFT write them."""
    if source.is_file():
        if source.suffix != ".gguf":
            raise RecipeError(f"{source} is neither a folder nor a .gguf file", where=where)
        _link(source, target / source.name)
        for name in BESIDE_GGUF:
            if (source.parent / name).is_file():
                _copy(source.parent / name, target / name)
        tokenizer = source.parent / GGUF_TOKENIZER
        return _tree(tokenizer, target / GGUF_TOKENIZER, SERVED) if tokenizer.is_dir() else []
    if not source.is_dir():
        raise RecipeError(f"there is no {source}", where=where)
    left_out = _tree(source, target, SERVED)
    if not any(any(target.rglob(kind)) for kind in kinds):
        raise RecipeError(
            f"{source} holds no weights that this image can compute with ({', '.join(kinds)})",
            where=where,
            hint="a folder of `tunedock export`, a run's `model`; for edge a .gguf file",
        )
    return left_out


def _certificates(bundle: Path, folder: Path) -> None:
    """A file a certificate, as update-ca-certificates wants it; of a whole bundle those that are not public, which any base has."""
    try:
        text = bundle.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=f"--ca {bundle}") from error
    found = _pem(text)
    if not found:
        raise RecipeError("holds no certificate in PEM form", where=f"--ca {bundle}")
    public = _public()
    for number, certificate in enumerate([one for one in found if "".join(one.split()) not in public] or found):
        _text(folder / f"tunedock-{number:03}.crt", certificate + "\n")


def _pem(text: str) -> list[str]:
    return re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)


def _public() -> set[str]:
    """The certificates that Python's packages trust, without white space; none where that list is not installed."""
    try:
        import certifi
    except ImportError:
        return set()
    return {"".join(one.split()) for one in _pem(certifi.contents())}


def _wheels(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    found = sorted(path for kind in ("*.whl", "*.tar.gz") for path in folder.glob(kind) if path.is_file())
    if not found:
        raise RecipeError(
            "there are no wheels in it", where=f"--wheels {folder}", hint="`pip download --dest` fills such a folder"
        )
    return found


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(_MODES[1])


def _copy(source: Path, target: Path) -> None:
    """Content and time, and permissions that are the same whatever the umask: layers are compared by them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(_MODES[0] if os.access(source, os.X_OK) else _MODES[1])
    stat = source.stat()
    os.utime(target, ns=(stat.st_mtime_ns, stat.st_mtime_ns))


def _link(source: Path, target: Path) -> None:
    """The same file under another name, where the disk is the same and all may read it: wheels and weights are large."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.stat().st_mode & 0o444 != 0o444:
            raise PermissionError
        os.link(source.resolve(), target)
    except OSError:
        _copy(source, target)


def write_to(folder: Path, target: Target, sources: Sources) -> Context:
    """`write`, for a builder of the user's own: all of it or nothing. Raises RecipeError for a folder that holds something."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RecipeError("is not empty", where=f"--context {folder}", hint="name a new folder")
    except OSError as error:
        raise DiskError(f"cannot be made: {error.strerror}", where=f"--context {folder}") from error
    try:
        return write(folder, target, sources, mounts=True)
    except BaseException:
        for made in folder.iterdir():
            shutil.rmtree(made, ignore_errors=True) if made.is_dir() else made.unlink(missing_ok=True)
        raise
