"""What a model is, and what was asked -> the argument list that starts an engine on it. Pure: no file is read, nothing is started.

vLLM's and SGLang's flags are those of vLLM 0.33 and SGLang 0.5.23, whose own parsers have read what is written here; a real
llama-server has been started by its own; Ollama's are those of its documentation. An engine listens where the gateway alone is to
ask it: on loopback (in a container: on the container's own network, published on loopback), behind a key of chance. The key is in
the environment or in a file that nobody else may read, never in an argument list, which every user of a machine can see.

In an argument `{port}` is the port to listen on, `{folder}` a folder of the engine's own, with the files that are written here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError
from tunedock.recipe.serving import EngineContainer, Program

BASE = "the-base"
"""What an engine calls the model without adapters, where there are some."""

SECRET = "TUNEDOCK_ENGINE_SECRET"  # noqa: S105 - the variable's name
AUDIENCE, ISSUER = "tunedock-engine", "tunedock-gateway"
"""Of the tokens that a gateway shows to another one it has started."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of its adapters."""

QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_COLOR": "0"}
"""No word to anybody of what is served here."""

FACTS = Path(__file__).with_name("formats.json")


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What an engine is to serve."""

    path: str
    """A folder, a GGUF file, or a hub id; of `tunedock` whatever `tunedock serve` takes."""
    name: str
    """As the engine is to call it."""
    revision: str | None = None
    """Of a hub id."""
    tokenizer: str | None = None
    """A folder with the run's own; None: the model's."""
    template: str | None = None
    """The chat template's text."""
    template_file: str | None = None
    """Where it lies, where the engine is to be told."""
    thinking: bool = False
    """Whether the model was trained to answer with reasoning."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Name -> folder of a LoRA."""
    rank: int = 0
    """The largest of them."""
    dtype: str = "auto"
    quantization: str | None = None
    """`bitsandbytes` or `fp8`: weights that are put into few bits as they are loaded."""
    trust_remote_code: bool = False
    offline: bool = False
    """Whether no hub may be asked."""
    modelfile: str | None = None
    """The file that Ollama makes a model of; None: of the weights alone."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller asked of an engine."""

    longest: int | None = None
    running: int | None = None
    tensor_parallel_size: int | None = None
    arguments: tuple[str, ...] = ()
    """`--flag=value`, passed on as given."""
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Command:
    """How an engine is started."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> content, in the engine's folder, for its user alone."""
    then: tuple[tuple[str, ...], ...] = ()
    """To be run once it answers, before it counts as ready."""
    tidies: bool = False
    """Whether it has something to take away when the gateway is killed, and is asked to end then and not killed too."""

    @property
    def program(self) -> str:
        return self.arguments[0]


def command(kind: Program, model: EngineModel, wishes: Wishes, key: str) -> Command:
    """Raises RecipeError for what the engine is not to be told."""
    for argument in wishes.arguments:
        refuse(kind, argument)
    return _WRITE[kind](model, wishes, key)


def contained(made: Command, model: EngineModel, container: EngineContainer) -> Command:
    """The same program in a container. `made` is to listen on all of the container's addresses, which are published on loopback."""
    if made.then:
        raise RecipeError(
            "Ollama is not started in a container here",
            where="--engine-image",
            hint="start its container, and name the address",
        )
    reads = [model.path, model.tokenizer, model.template_file, *model.adapters.values()]
    told = [*container.launcher, "--image", container.image, "--name", model.name, "--port", "{port}"]
    for flag, values in (
        ("--read", dict.fromkeys(path for path in reads if path and path.startswith("/"))),
        ("--write", ["{folder}"]),
        ("--env", [*made.environment, *([] if model.path.startswith("/") else ["HF_TOKEN"])]),
        ("--gpu", container.gpus),
    ):
        told += [word for value in values for word in (flag, value)]
    told += [] if model.path.startswith("/") else ["--outward"]
    program = ["python" if part == sys.executable else part for part in made.arguments]
    return replace(made, arguments=(*told, "--", *program), tidies=True)


def parsers(template: str | None, kind: Program) -> tuple[str | None, str | None]:
    """(of calls, of reasoning): the engine's parsers for what a template writes; None where none is known."""
    found = [_parser(_facts()[what], template or "", kind) for what in ("calls", "reasoning")]
    return found[0], found[1]


@cache
def _facts() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))
    return value


def _parser(rows: Sequence[Mapping[str, Any]], template: str, kind: Program) -> str | None:
    return next((row.get(kind) for row in rows if all(text in template for text in row["texts"])), None)


# -- what callers may not say ------------------------------------------------------------------------------------------

_OURS: Mapping[Program, tuple[str, ...]] = {
    "vllm": (
        *("--host", "--port", "--uds", "--api-key", "--api-key-file", "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs"),
        *("--root-path", "--config", "--model", "--served-model-name", "--lora-modules", "--headless", "--grpc"),
        *("--allowed-origins", "--enable-ssl-refresh", "--ssl-cert-reqs"),
    ),
    "sglang": (
        *("--host", "--port", "--api-key", "--admin-api-key", "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs"),
        *("--config", "--model-path", "--model", "--served-model-name", "--lora-paths", "--nccl-port", "--grpc-mode"),
    ),
    "llama-server": (
        *("--host", "--port", "--api-key", "--api-key-file", "--ssl-key-file", "--ssl-cert-file", "--model", "-m"),
        *("--path", "--api-prefix", "--alias", "-a", "--reuse-port", "--models-dir", "--models-preset"),
    ),
    "ollama": (),
    "tunedock": (
        *("--host", "--port", "--open", "--store", "--jwks", "--jwt-audience", "--jwt-issuer", "--jwt-secret-env"),
        *("--jwt-secret-file", "--on"),
    ),
}  # fmt: skip
"""Where an engine listens, who may ask it and what it is called are the gateway's to say."""

_ABBREVIATED: frozenset[Program] = frozenset({"vllm", "sglang"})
"""Their parsers take the beginning of a flag for the flag, and `_` for `-`."""

_FLAG = re.compile(r"--?[A-Za-z][\w-]*(?:\.[\w.-]+)?\+?")
"""With a dot: vLLM's way to say a key of a flag that is JSON."""


def refuse(kind: Program, argument: str) -> None:
    """Raises RecipeError for an argument that is not of the form `--flag=value`, or is the gateway's to say."""
    where = f"--engine-arg {argument}"
    if kind == "ollama":
        raise RecipeError(
            "`ollama serve` takes no arguments", where=where, hint="set OLLAMA_... variables where the gateway starts"
        )
    name = argument.partition("=")[0]
    if not _FLAG.fullmatch(name):
        raise RecipeError(
            "an argument of the engine is a flag and its value",
            where=where,
            hint="write --engine-arg max-num-seqs=64, or --engine-arg enforce-eager, once for each",
        )
    flag = (name.replace("_", "-") if kind in _ABBREVIATED else name).split(".")[0].rstrip("+")
    meant = next((one for one in _OURS[kind] if one == flag or (kind in _ABBREVIATED and one.startswith(flag))), None)
    if meant is not None:
        raise RecipeError(
            f"`{meant}` of the engine is the gateway's to say",
            where=where,
            hint="what clients reach is the gateway: --host and --port are its own",
        )


# -- the engines -------------------------------------------------------------------------------------------------------


def _vllm(model: EngineModel, wishes: Wishes, key: str) -> Command:
    arguments = ["vllm", "serve", model.path, "--host", wishes.host, "--port", "{port}"]
    arguments += ["--served-model-name", _name_of(model), "--dtype", model.dtype]
    arguments += _given("--revision", model.revision)
    arguments += _given("--tokenizer", model.tokenizer)
    arguments += ["--max-model-len", str(wishes.longest or "auto")]  # `auto`: what the model and the memory allow
    arguments += _given("--max-num-seqs", wishes.running)
    arguments += _given("--tensor-parallel-size", wishes.tensor_parallel_size)
    arguments += _given("--quantization", model.quantization)
    arguments += _given("--chat-template", model.template_file)
    arguments += ["--trust-remote-code"] if model.trust_remote_code else []
    calls, reasoning = parsers(model.template, "vllm")
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", calls] if calls else []
    arguments += _given("--reasoning-parser", reasoning)
    if model.adapters:
        rank = next((rank for rank in RANKS if rank >= model.rank), RANKS[-1])
        arguments += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(model.adapters))]
        arguments += ["--lora-modules", *(f"{name}={path}" for name, path in model.adapters.items())]
    arguments += ["--disable-uvicorn-access-log", *wishes.arguments]
    return Command(tuple(arguments), {"VLLM_API_KEY": key, **QUIET, **_offline(model)})


def _sglang(model: EngineModel, wishes: Wishes, key: str) -> Command:
    arguments = ["sglang", "serve", "--model-path", model.path, "--host", wishes.host, "--port", "{port}"]
    arguments += ["--config", "{folder}/sglang.yaml", "--served-model-name", _name_of(model)]
    arguments += ["--dtype", model.dtype]
    arguments += _given("--revision", model.revision)
    arguments += _given("--tokenizer-path", model.tokenizer)
    arguments += _given("--context-length", wishes.longest)
    arguments += _given("--max-running-requests", wishes.running)
    arguments += _given("--tp-size", wishes.tensor_parallel_size)
    arguments += _given("--quantization", model.quantization)
    arguments += _given("--chat-template", model.template_file)
    arguments += ["--trust-remote-code"] if model.trust_remote_code else []
    calls, reasoning = parsers(model.template, "sglang")
    arguments += _given("--tool-call-parser", calls)
    arguments += _given("--reasoning-parser", reasoning)
    if model.adapters:
        arguments += ["--enable-lora", "--max-lora-rank", str(model.rank)]
        arguments += ["--max-loras-per-batch", str(len(model.adapters) + 1)]
        arguments += ["--lora-paths", *(f"{name}={path}" for name, path in model.adapters.items())]
    arguments += wishes.arguments
    return Command(tuple(arguments), {**QUIET, **_offline(model)}, {"sglang.yaml": f"api-key: {json.dumps(key)}\n"})


def _llama_server(model: EngineModel, wishes: Wishes, key: str) -> Command:
    """Its parser knows no `--flag=value`."""
    arguments = [
        "llama-server",
        "--model",
        model.path,
        "--alias",
        model.name,
        "--host",
        wishes.host,
        "--port",
        "{port}",
    ]
    arguments += ["--api-key-file", "{folder}/api-key", "--no-webui", "--jinja"]
    arguments += _given("--ctx-size", None if wishes.longest is None else wishes.longest * (wishes.running or 1))
    arguments += _given("--parallel", wishes.running)
    if "enable_thinking" in (model.template or ""):
        arguments += ["--chat-template-kwargs", json.dumps({"enable_thinking": model.thinking})]
    for argument in wishes.arguments:
        flag, gives, value = argument.partition("=")
        arguments += [flag, value] if gives else [flag]
    return Command(tuple(arguments), {}, {"api-key": f"{key}\n"})


def _ollama(model: EngineModel, wishes: Wishes, key: str) -> Command:
    """Ollama has no key: on this machine's loopback anybody may ask it."""
    environment = {"OLLAMA_HOST": f"{wishes.host}:{{port}}", "OLLAMA_MODELS": "{folder}/models", "OLLAMA_NOPRUNE": "1"}
    environment |= {"OLLAMA_CONTEXT_LENGTH": str(wishes.longest)} if wishes.longest is not None else {}
    environment |= {"OLLAMA_NUM_PARALLEL": str(wishes.running)} if wishes.running is not None else {}
    own = model.modelfile is None
    create = ("ollama", "create", model.name, "--file", "{folder}/Modelfile" if own else str(model.modelfile))
    files = {"Modelfile": f"FROM {model.path}\n"} if own else {}
    return Command(("ollama", "serve"), environment, files, (create,))


def _tunedock(model: EngineModel, wishes: Wishes, key: str) -> Command:
    """A gateway of its own: a model in a process of its own, whose end is not the end of the others."""
    arguments = [sys.executable, "-P", "-m", "tunedock", "serve", f"{model.name}={model.path}"]
    arguments += ["--host", wishes.host, "--port", "{port}", "--store", "{folder}/access.db"]
    arguments += ["--jwt-audience", AUDIENCE, "--jwt-issuer", ISSUER, "--jwt-secret-env", SECRET]
    for name, path in model.adapters.items():
        arguments += ["--adapter", f"{name}={path}"]
    arguments += _given("--dtype", None if model.dtype == "auto" else model.dtype)
    arguments += _given("--max-length", wishes.longest)
    arguments += _given("--max-requests", wishes.running)
    return Command((*arguments, *wishes.arguments), {SECRET: key})


_WRITE: Mapping[Program, Callable[[EngineModel, Wishes, str], Command]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama-server": _llama_server,
    "ollama": _ollama,
    "tunedock": _tunedock,
}


def _given(flag: str, value: object) -> list[str]:
    return [] if value is None else [flag, str(value)]


def _name_of(model: EngineModel) -> str:
    return BASE if model.adapters else model.name


def _offline(model: EngineModel) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1"} if model.offline or model.path.startswith("/") else {}
