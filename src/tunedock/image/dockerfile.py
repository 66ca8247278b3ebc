"""A target's row and a few options -> the text of its Dockerfile: no file is read, nothing is asked.

Stages: `system` is the base image with the packages that both others stand on; `builder` makes a virtual environment from locked
versions; the last copies it, then what a service serves, then the code. So a changed line of tunedock rebuilds the last two layers,
in seconds, and neither a compiler nor pip's cache reaches the image.

There is no `# syntax=` line: it would fetch a frontend from a hub, which an air gap has not. Without BuildKit (`mounts` false) the
same file is written without mounts: wheels are copied into the builder, whose layers do not come along.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunedock.image.targets import ROLES, Target, engine_targets, engines, names, target

HOME = "/home/tunedock"
USER = 10001
"""Whom a container runs as unless told otherwise: no one's number on the hosts we know of."""

ENVIRONMENT = "/opt/venv"
ENGINE = "/opt/engine"
PLACE = "/opt/tunedock"
CODE = f"{PLACE}/code"
SOURCE = f"{PLACE}/source"
MODEL = f"{PLACE}/model"
ADAPTER = f"{PLACE}/adapter"
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
"""Where Debian and Ubuntu keep the certificates that are trusted, in one file."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a Dockerfile is written for, beside its target."""

    mounts: bool = True
    """Whether the builder knows `RUN --mount`."""
    ca: bool = False
    """Whether `ca/` holds certificates that the image shall trust."""
    model: bool = False
    adapter: bool = False
    """Whether `model/` and `adapter/` are to be in the image."""


def dockerfile(target: Target, options: Options = Options()) -> str:
    """The text; its build context is what `context.write` makes."""
    blocks = [
        *_heading(target),
        *_system(target, options),
        *_builder(target, options),
        *(_engine(target, options) if target.engine else ()),
        *_last(target, options),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


Block = Sequence[str]

_PIP_SETTINGS = "ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1"
_INDEX = ("ARG INDEX=", "ARG OFFLINE=")

_APART = "# hadolint ignore=DL3059"
"""Steps on their own: what comes before them changes less often, and stays as it is."""


def _heading(target: Target) -> Iterator[Block]:
    yield (
        f"# tunedock, {target.role} on {target.name} ({target.about}).",
        "# Written by `tunedock image build`: change the rows in image/targets.json or image/dockerfile.py, not this file.",
    )
    yield (f"# {target.why_base} A mirror's, or one with a digest, may stand here.", f"ARG BASE={target.base}")


def _system(target: Target, options: Options) -> Iterator[Block]:
    yield (
        "# --- What the stages below stand on. The base may have a user of its own; the image's is set at the end.",
        "FROM ${BASE} AS system",
        "# hadolint ignore=DL3002",
        "USER 0",
    )
    yield (
        "# What the base has already is not fetched: with a base that has all of it, no mirror of the distribution is needed.",
        *_install(target.system),
    )
    if options.ca:
        yield (
            "# Certificates of the network this image was made in, for the builder and for whoever runs it.",
            "COPY ca/ /usr/local/share/ca-certificates/",
            "RUN update-ca-certificates",
            f"ENV SSL_CERT_FILE={BUNDLE} \\",
            f"    REQUESTS_CA_BUNDLE={BUNDLE} \\",
            f"    PIP_CERT={BUNDLE}",
        )


def _install(packages: Sequence[str]) -> list[str]:
    """Lines of a RUN that installs what is missing."""
    return [
        "RUN set -eu; \\",
        f"    for package in {' '.join(packages)}; do \\",
        '      dpkg-query --show "$package" >/dev/null 2>&1 || echo "$package" >> /tmp/missing; \\',
        "    done; \\",
        "    if [ -e /tmp/missing ]; then \\",
        "      apt-get update; \\",
        "      xargs apt-get install --yes --no-install-recommends < /tmp/missing; \\",
        "    fi; \\",
        "    rm -rf /tmp/missing /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb",
    ]


def _builder(target: Target, options: Options) -> Iterator[Block]:
    yield (
        "# --- The virtual environment. Nothing of this stage but what is copied below comes into the image.",
        "FROM system AS builder",
        _PIP_SETTINGS,
    )
    yield (
        "# For the bill of materials: before anything is installed that is only the builder's.",
        f"RUN mkdir {PLACE} \\",
        "    && dpkg-query --show --showformat='${Package} ${Version} ${Architecture}\\n' > /tmp/system.txt \\",
        f"    && python3 -m venv {ENVIRONMENT}",
    )
    if target.build:
        settings = [f'ENV {name}="{value}"' for name, value in target.build_environment]
        yield ("# Compilers, for packages without a wheel.", *settings, *_install(target.build))
    arguments = ["# The package index (PyPI by default); OFFLINE=1: the folder of wheels alone.", *_INDEX]
    if target.torch_index:
        arguments += [
            "# Where this target's PyTorch lies, beside the index; empty: the index decides.",
            f"ARG TORCH_INDEX={target.torch_index}",
        ]
    yield arguments
    copies = ["COPY locked.txt requirements.txt /build/"]
    if not options.mounts:
        copies += ["COPY wheels/ /wheels/"]
    yield copies
    apart = [_APART] if target.torch_index or (target.build and options.mounts) else []
    if target.torch_index:
        yield (
            "# PyTorch first and alone: it is most of the bytes, and changes least.",
            *_pip(ENVIRONMENT, ["torch"], options, index="TORCH_INDEX"),
        )
    yield [*apart, *_pip(ENVIRONMENT, ["--requirement /build/requirements.txt"], options)]
    if target.small:
        yield (
            "# Headers, tests and static libraries of packages: no one compiles on such a machine.",
            _APART,
            f"RUN find {ENVIRONMENT}/lib -depth \\( -type d \\( -name tests -o -name include \\) -path '*/site-packages/*' \\",
            "      -not -path '*/torch/_*' -o -type f \\( -name '*.a' -o -name '*.pyx' -o -name '*.pxd' \\) \\) -exec rm -rf {} +",
        )
    code = f"{SOURCE}/src" if target.role == "test" else CODE
    yield (
        f"# The way to the code, the bill of materials, and what a run imports, compiled (see {PLACE}/sbom.cdx.json).",
        "ENV PYTHONDONTWRITEBYTECODE=",
        "COPY prepare.py /build/",
        f"RUN {ENVIRONMENT}/bin/python /build/prepare.py {code} {PLACE} /tmp/system.txt",
    )


def _pip(environment: str, what: Sequence[str], options: Options, index: str | None = None) -> list[str]:
    lines = []
    if options.mounts:
        # The cache stays with the builder; a package index with a password comes as a secret, never as an argument.
        lines = [
            "RUN --mount=type=cache,target=/root/.cache/pip \\",
            "    --mount=type=secret,id=pip,target=/etc/pip.conf \\",
            "    --mount=type=bind,source=wheels,target=/wheels \\",
        ]
    pip = f"{environment}/bin/python -m pip install{'' if options.mounts else ' --no-cache-dir'} --no-compile"
    lines.append(f"    {pip} --progress-bar off \\" if lines else f"RUN {pip} --progress-bar off \\")
    lines.append('      ${INDEX:+--index-url "$INDEX"} ${OFFLINE:+--no-index} --find-links /wheels \\')
    if index:
        lines.append(f'      ${{{index}:+--extra-index-url "${index}"}} --no-deps \\')
    lines.append(f"      --constraint /build/locked.txt {' '.join(what)}")
    return lines


def _engine(target: Target, options: Options) -> Iterator[Block]:
    lines = _pip(ENGINE, [f"'{name}'" for name in target.engine], options)
    lines[-1] = lines[-1].replace("--constraint /build/locked.txt ", "")
    yield (
        "# --- The inference engine, in an environment of its own: it pins another PyTorch than tunedock.",
        "FROM system AS engine",
        _PIP_SETTINGS,
        *_INDEX,
        *(() if options.mounts else ("COPY wheels/ /wheels/",)),
        f"RUN python3 -m venv {ENGINE}",
        *lines,
    )


def _last(target: Target, options: Options) -> Iterator[Block]:
    yield (
        "# --- The image.",
        "FROM system",
        f'LABEL org.opencontainers.image.title="tunedock {target.role}, {target.name}" \\',
        '      org.opencontainers.image.licenses="Apache-2.0" \\',
        f'      io.tunedock.target="{target.name}" \\',
        f'      io.tunedock.role="{target.role}"',
    )
    yield (
        "# A home that whoever the container runs as may write, and a name for those whose number is in no list.",
        f"RUN mkdir -p {HOME} && chmod 1777 {HOME} && echo 'tunedock:x:{USER}:{USER}::{HOME}:/bin/sh' >> /etc/passwd",
        f"ENV HOME={HOME} USER=tunedock LOGNAME=tunedock PYTHONUNBUFFERED=1 \\",
        f"    PATH={ENVIRONMENT}/bin:$PATH{f':{ENGINE}/bin' if target.engine else ''}",
        f"WORKDIR {SOURCE if target.role == 'test' else HOME}",
    )
    copies = [f"COPY --from=builder {ENVIRONMENT} {ENVIRONMENT}", f"COPY --from=builder {PLACE}/ {PLACE}/"]
    if target.engine:
        copies.append(f"COPY --from=engine {ENGINE} {ENGINE}")
    yield copies
    if options.model:
        yield ("# What is served. Above the packages, below the code: a new model is a new layer, a new line is not one.",
               f"COPY model/ {MODEL}/")  # fmt: skip
    if options.adapter:
        yield ("# The adapter: small, and what changes most often beside the code.", f"COPY adapter/ {ADAPTER}/")
    code = SOURCE if target.role == "test" else CODE
    yield (
        "# The code: all that is made anew when a line of it changes.",
        f"COPY {'source' if target.role == 'test' else 'code'}/ {code}/",
        f"RUN {ENVIRONMENT}/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash {code}",
    )
    yield _start(target, options)


def _start(target: Target, options: Options) -> list[str]:
    lines = [f"USER {USER}:{USER}"]
    if target.port:
        lines.append(f"EXPOSE {target.port}")
    check, times = _health(target)
    lines += [f"HEALTHCHECK {times} \\", f"    CMD {json.dumps(check)}"]
    if target.source:
        lines += ["# The vendor's script sets what its libraries are found by; it is a shell's."]
    lines += [f"ENTRYPOINT {json.dumps(_entry(target))}", f"CMD {json.dumps(_command(target, options))}"]
    return lines


def _health(target: Target) -> tuple[list[str], str]:
    """A command, and how often. A service answers; elsewhere the installation can be read and started."""
    if target.port:
        asks = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{target.port}/health', timeout=4)"
        return ["python", "-c", asks], "--interval=10s --timeout=5s --start-period=120s --retries=3"
    return ["tunedock", "--version"], "--interval=60s --timeout=30s --start-period=5s --retries=3"


def _entry(target: Target) -> list[str]:
    """tini hands signals on and buries what is left of ended processes; it is process 1."""
    if target.source is None:
        return ["tini", "--"]
    return ["tini", "--", "/bin/bash", "-c", f'source {target.source} && exec "$0" "$@"']


def _command(target: Target, options: Options) -> list[str]:
    if target.role == "test":
        return ["python", "-m", "pytest", "-p", "no:cacheprovider", "-m", "not long"]
    if target.role == "train":
        return ["tunedock", "--help"]
    served = [MODEL] if options.model else []
    served += ["--adapter", f"adapter={ADAPTER}"] if options.adapter else []
    return ["tunedock", "serve", *served, "--host", "0.0.0.0", "--port", str(target.port)]  # noqa: S104 - in its own network


def all_dockerfiles() -> dict[str, str]:
    """`train.cpu` -> its text, for all targets, roles and engines, as `image lint` and the golden files have them."""
    rows = [target(name, role) for role in ROLES for name in names()]
    rows += [target(name, "serve", engine) for engine in engines() for name in engine_targets(engine)]
    made = {}
    for row in rows:
        full = Options(ca=True, model=row.role == "serve", adapter=row.role == "serve")
        made[row.full_name] = dockerfile(row, full if row.role == "serve" else Options())
    return made
