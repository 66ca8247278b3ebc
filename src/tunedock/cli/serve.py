"""`tunedock serve`: models behind a gateway."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tunedock.cli.options import RUNS_DIR, RunsDir
from tunedock.registry import DEFAULT_REGISTRY


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Place(StrEnum):
    local = "local"
    docker = "docker"
    compose = "compose"


class Profile(StrEnum):
    postgresql = "postgresql"
    monitoring = "monitoring"


class EngineKind(StrEnum):
    vllm = "vllm"
    sglang = "sglang"
    ollama = "ollama"
    llama_server = "llama-server"
    openai = "openai"
    tunedock = "tunedock"


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN|DIR|FILE.gguf|URL|models:/MODEL@ALIAS",
            help="A run, an exported folder, a GGUF file, the address of an OpenAI-compatible server (http://host:port/v1, "
            "vllm+http://...), or a version of `tunedock models`.",
            show_default=False,
        ),
    ],
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: any that is free.")] = 8000,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="A LoRA on the first model, served beside it. Repeatable."),
    ] = None,
    engine: Annotated[
        EngineKind | None,
        typer.Option(
            "--engine",
            metavar="vllm|sglang|ollama|llama-server|tunedock|openai",
            help="The program to start for the models; of addresses, what is there. Without it this process computes.",
            show_default=False,
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel-size", metavar="GPUS", min=1, help="Of vLLM and SGLang: GPUs a model is spread over."
        ),
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--engine-arg", metavar="FLAG[=VALUE]", help="Passed on to the program that is started. Repeatable."
        ),
    ] = None,
    engine_image: Annotated[
        str | None,
        typer.Option(
            "--engine-image", metavar="IMAGE", help="Run the program in a container of it, on this machine's engine."
        ),
    ] = None,
    engine_wait: Annotated[
        float | None,
        typer.Option(
            "--engine-wait", metavar="SECONDS", min=1, help="Until a program that is started answers. [default: 900]"
        ),
    ] = None,
    engine_logs: Annotated[
        str | None,
        typer.Option(
            "--engine-logs", metavar="DIR", help="For what programs print; else files that go when they end well."
        ),
    ] = None,
    engine_model: Annotated[
        str | None,
        typer.Option("--engine-model", metavar="NAME", help="The model's name at its server, where it is another."),
    ] = None,
    engine_key_env: Annotated[
        str | None,
        typer.Option("--engine-key-env", metavar="VARIABLE", help="The variable with the key that servers want."),
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Let anybody call, without keys; on this machine's loopback only.")
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            "--store", metavar="FILE|URL", help="Where keys and limits are kept: a SQLite file, or postgresql://."
        ),
    ] = None,
    jwt_audience: Annotated[
        str | None, typer.Option("--jwt-audience", metavar="TEXT", help="Take JSON Web Tokens made for it.")
    ] = None,
    jwt_issuer: Annotated[
        str | None, typer.Option("--jwt-issuer", metavar="TEXT", help="Who must have made them.")
    ] = None,
    jwt_secret_file: Annotated[
        str | None, typer.Option("--jwt-secret-file", metavar="FILE", help="Secret of HS256.")
    ] = None,
    jwt_secret_env: Annotated[
        str | None, typer.Option("--jwt-secret-env", metavar="VARIABLE", help="The variable with the secret of HS256.")
    ] = None,
    jwks: Annotated[
        str | None, typer.Option("--jwks", metavar="FILE|URL", help="Public keys of RS256 and ES256.")
    ] = None,
    registry: Annotated[
        str,
        typer.Option(
            "--registry", metavar="FILE|URL", help="Of models:/...: a SQLite file, postgresql://, or MLflow's."
        ),
    ] = DEFAULT_REGISTRY,
    keep_warm: Annotated[
        int,
        typer.Option(
            "--keep-warm", metavar="N", min=0, max=16, help="Versions before that stay in memory, to go back to."
        ),
    ] = 1,
    audit: Annotated[
        str | None,
        typer.Option(
            "--audit",
            metavar="FILE",
            help="Where starts, ends and changes of versions are noted; beside the store and the registry by default.",
            show_default=False,
        ),
    ] = None,
    access_log: Annotated[
        str | None,
        typer.Option("--access-log", metavar="FILE", help="JSON lines, one a request; by default on standard error."),
    ] = None,
    log_bodies: Annotated[
        bool, typer.Option("--log-bodies", help="Note what is said too: requests and answers, 64 KiB of each.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", metavar="ORIGIN", help="Let web pages of https://name call. Repeatable."),
    ] = None,
    tls_cert: Annotated[str | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[str | None, typer.Option("--tls-key", metavar="FILE", help="Its key, PEM.")] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            "--dtype",
            metavar="auto|float32|bfloat16|float16",
            help="What runs and folders are computed in here; auto: what is native, and on a CPU the quicker.",
        ),
    ] = Dtype.auto,
    max_length: Annotated[
        int | None, typer.Option("--max-length", metavar="TOKENS", min=1, help="Of a prompt and its answer together.")
    ] = None,
    max_requests: Annotated[
        int | None,
        typer.Option("--max-requests", metavar="N", min=1, help="Answered at once by a model computed here."),
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option("--max-waiting", metavar="N", min=1, help="For a model computed here, beyond those.")
    ] = None,
    max_body: Annotated[
        int | None, typer.Option("--max-body", metavar="BYTES", min=1024, help="Of a request.", show_default="4 MiB")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="For an answer.")] = 600.0,
    grace: Annotated[
        float, typer.Option("--grace", metavar="SECONDS", min=0.1, help="For answers at work when it is to end.")
    ] = 30.0,
    on: Annotated[
        Place,
        typer.Option(
            "--on",
            metavar="local|docker|compose",
            help="Where the gateway is: here, or in a container of this machine.",
        ),
    ] = Place.local,
    image: Annotated[
        str | None,
        typer.Option(
            "--image",
            metavar="IMAGE",
            help="Of a container; by default what `tunedock image build --role serve` makes.",
        ),
    ] = None,
    profile: Annotated[
        list[Profile] | None,
        typer.Option(
            "--profile", metavar="postgresql|monitoring", help="What compose has beside the gateway. Repeatable."
        ),
    ] = None,
    service_image: Annotated[
        list[str] | None,
        typer.Option(
            "--service-image",
            metavar="SERVICE=IMAGE",
            help="In the place of a public one, a mirror's for example. Repeatable.",
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="For compose's file and the secrets it names.")
    ] = Path("gateway"),
    write: Annotated[bool, typer.Option("--write", help="Write compose's file, and start nothing.")] = False,
    runs_dir: RunsDir = RUNS_DIR,
) -> None:
    """Serve models behind a gateway that speaks OpenAI's interface, until Ctrl-C or SIGTERM. SIGHUP reads adapters again.

    Callers show a key (`tunedock token issue`) or a JSON Web Token; --open does without, on this machine alone.
    """
    from tunedock.cli.show import display
    from tunedock.errors import RecipeError
    from tunedock.pipeline.serving import order_of, serve_models

    fields = {
        "host": host,
        "port": port,
        "open": open_,
        "store": _file(store) if store and on is not Place.local and "://" not in store else store,
        "registry": registry if "://" in registry else _file(registry),
        "keep_warm": keep_warm,
        "jwt": _jwt(jwt_audience, jwt_issuer, jwt_secret_file, jwt_secret_env, jwks),
        "audit": _file(audit),
        "access_log": _file(access_log),
        "tls_cert": _file(tls_cert),
        "tls_key": _file(tls_key),
        "dtype": dtype.value,
        "longest": max_length,
        "max_running": max_requests,
        "log_bodies": log_bodies,
        "cors_origins": cors_origin,
        "max_waiting": max_waiting,
        "body_bytes": max_body,
        "request_s": timeout,
        "grace_s": grace,
    }
    start = {
        "tensor_parallel_size": tensor_parallel_size,
        "arguments": [_flag(text) for text in engine_arg or []],
        "image": engine_image,
        "start_s": engine_wait,
        "logs": _file(engine_logs),
    }
    order = order_of(
        models,
        adapters=_pairs(adapter or []),
        engine=engine.value if engine else None,
        start={key: value for key, value in start.items() if value},
        engine_model=engine_model,
        key_env=engine_key_env,
        runs_dir=Path(runs_dir),
        fields=fields,
    )
    if on is not Place.compose and (profile or write or service_image):
        raise RecipeError("this is for compose", where="--profile, --service-image, --write", hint="add --on compose")
    if on is Place.local:
        with display() as tell:
            serve_models(order, on_event=tell)
        return
    from tunedock.cli.text import printable
    from tunedock.pipeline import serving_elsewhere as elsewhere

    if on is Place.docker:
        code = elsewhere.serve_in_container(order, image, lambda text: print(printable(text), file=sys.stderr))
        raise typer.Exit(code)
    profiles = [each.value for each in profile or []]
    file = elsewhere.write_compose(order, image, folder, profiles, _images(service_image or []))
    print(printable(file))
    if not write:
        elsewhere.up(file, profiles)


def _file(path: str | None) -> str | None:
    return str(Path(path).expanduser().absolute()) if path else None


def _flag(text: str) -> str:
    return text if text.startswith("-") else f"--{text}"


def _images(given: Sequence[str]) -> dict[str, str]:
    from tunedock.errors import RecipeError

    known = ("postgres", "prometheus", "grafana")
    pairs = [text.partition("=") for text in given]
    for text, (name, _, image) in zip(given, pairs, strict=True):
        if name not in known or not image:
            raise RecipeError(
                f"`{text}` names no service and its image",
                where="--service-image",
                hint=f"write grafana=registry.example/grafana:12.2.0; services are {', '.join(known)}",
            )
    return {name: image for name, _, image in pairs}


def _pairs(given: Sequence[str]) -> dict[str, str]:
    from tunedock.errors import RecipeError

    pairs = [text.partition("=") for text in given]
    for text, (name, equals, path) in zip(given, pairs, strict=True):
        if not (name and equals and path):
            raise RecipeError(
                f"`{text}` is not of the form NAME=DIR", where="--adapter", hint="write support=exports/adapter"
            )
    return {name: str(Path(path).expanduser().absolute()) for name, _, path in pairs}


def _jwt(
    audience: str | None, issuer: str | None, secret_file: str | None, secret_env: str | None, jwks: str | None
) -> dict[str, str] | None:
    from tunedock.errors import RecipeError

    keys = {
        "secret_file": _file(secret_file),
        "secret_env": secret_env,
        "jwks": jwks if jwks and "://" in jwks else _file(jwks),
    }
    given = {name: value for name, value in keys.items() if value}
    if not given and audience is None and issuer is None:
        return None
    if not given or audience is None or issuer is None:
        raise RecipeError(
            "JSON Web Tokens are checked by who made them, whom for, and a key",
            where="--jwt-audience, --jwt-issuer",
            hint="give both, and --jwks, --jwt-secret-file or --jwt-secret-env",
        )
    return {"audience": audience, "issuer": issuer, **given}
