"""What a gateway is told: the request of the stage `serve`, made in one plane and read in the other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tunedock.recipe.section import Section

Kind = Literal["run", "folder", "gguf", "version", "vllm", "sglang", "ollama", "llama-server", "openai", "tunedock"]
Numbers = Literal["auto", "float32", "bfloat16", "float16"]
REMOTE: tuple[Kind, ...] = ("vllm", "sglang", "ollama", "llama-server", "openai", "tunedock")

Program = Literal["vllm", "sglang", "ollama", "llama-server", "tunedock"]
"""Engines that can be started here."""


class EngineContainer(Section):
    """A container for the program of an engine."""

    image: str
    gpus: list[str] = []
    """Their ids; `all` for whatever there is."""
    launcher: list[str] = Field(min_length=1)
    """The beginning of the command line that runs a program in a container, in the foreground (`launch.engine_container`)."""


class Start(Section):
    """An engine of another program, started here to compute a run, a folder or a file, and kept alive."""

    program: Program
    arguments: list[str] = []
    """`--flag=value`, or `--flag`: passed on as they are."""
    tensor_parallel_size: PositiveInt | None = None
    """GPUs that one model is spread over."""
    container: EngineContainer | None = None
    """None: the program is this machine's own."""
    start_s: PositiveFloat = 900.0
    """It may take so long until it answers."""
    logs: str | None = None
    """Folder for what it prints; None: a temporary file, kept where it does not come up."""


class Backend(Section):
    """A model under a name."""

    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
    kind: Kind
    place: str
    """A run's directory, a folder, a file, the server's address, which ends in `/v1`, or a version's: `models:/NAME@ALIAS`."""
    model: str | None = None
    """As a server knows it; None: by the same name."""
    key_env: str | None = None
    """The variable that holds the key a server wants."""
    adapters: dict[str, str] = {}
    """Of a model computed here: name -> folder of a LoRA, each a model of its own to clients."""
    start: Start | None = None
    """Of a run, a folder or a file: the program that computes it; None: this process."""


class Jwt(Section):
    audience: str
    issuer: str
    secret_file: str | None = None
    secret_env: str | None = None
    jwks: str | None = None


class ServeOrder(Section):
    backends: list[Backend] = Field(min_length=1)
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any that is free, which is told."""
    open: bool = False
    """Whether anybody may call; on loopback only."""
    store: str | None = None
    """Of keys, policies and counts: a SQLite file or a PostgreSQL URL."""
    jwt: Jwt | None = None
    registry: str | None = None
    """Of versions: a SQLite file, a PostgreSQL URL, or MLflow's server."""
    keep_warm: NonNegativeInt = 1
    """Versions of a model that stay in memory after they gave way, for a rollback."""
    audit: str | None = None
    """What starts, ends and changes of versions are noted in; None: the files beside a store and a registry in files."""
    access_log: str | None = None
    log_bodies: bool = False
    """Whether that log has what was said."""
    cors_origins: list[Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:\[\]-]{1,255}$")]] = []
    """Of web pages that may call from a browser."""
    tls_cert: str | None = None
    tls_key: str | None = None
    body_bytes: PositiveInt = 4 << 20
    request_s: PositiveFloat = 600.0
    grace_s: PositiveFloat = 30.0
    """For what is at work when the gateway is asked to end."""
    max_running: PositiveInt | None = None
    max_waiting: PositiveInt | None = None
    longest: PositiveInt | None = None
    """Tokens of a prompt and its answer together, of models computed here; None: what the model and the memory allow."""
    dtype: Numbers = "auto"
    """What PyTorch computes such models in; auto: what is native, and on a CPU the quicker of the two."""
